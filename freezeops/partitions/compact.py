"""Compact state: the inner optimizer owns a variable of the trainable entries alone.

Frozen entries are never written, so they keep their bits whatever it does.
"""

import math
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar, cast

import keras
import numpy as np
import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.variables import FunctionConstraint, Variable, components, replica_number
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.ops.gradients import Gradient, mask_with_bits
from freezeops.ops.shapes import of_shape, slices_of_shape
from freezeops.partitions.capacity import beyond_capacity_message
from freezeops.partitions.gradient_index import GradientIndex, MakeVariable
from freezeops.partitions.guards import Guard
from freezeops.partitions.partition import Description, MaskedPartition, MaskOperand, Taken

_Index = TypeVar("_Index", bound=GradientIndex)


def inner_shape(variable: Variable, layout: Layout, capacity: int) -> tuple[int, ...]:
    """Shape of a compact variable: `[capacity]`, or `[capacity, d...]` where each bit stands for a row `[d...]`."""
    shape = tuple(variable.shape)
    if layout.inner == 1:
        return (capacity,)
    row = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) == layout.inner)
    return (capacity, *shape[row:])


def pending_index(dtype: np.dtype) -> np.generic:
    """An index that stands for a mask which is still to come: the largest of all."""
    return dtype.type(np.iinfo(dtype).max)


def pending_message(path: str) -> str:
    """The message for a step before the masks are there."""
    return (
        "An optimizer with compact state that was made from a config must be given its masks, from a file or by "
        f"`register_mask`, before it trains. Received: no mask yet for {path!r}"
    )


class IndexTensors(NamedTuple):
    """The index of the trainable entries as ops take it; see `reference.gather_trainable`."""

    mask: tf.Tensor
    offsets: tf.Tensor
    indices: tf.Tensor


class TrainableIndex:
    """The index of a variable's trainable entries, in all forms that ops take.

    Args:
        layout: Layout of the bits, `(1, kept, inner)`.
        bits: `uint8` variable of the packed mask.
        offsets: `int64` variable of rank offsets; see `packing.rank_offsets`.
        indices: `uint32` or `int64` variable of the positions of the ones, as long as the capacity. Not
            `int32`, of which TensorFlow keeps variables on the host only: they would be sent to a GPU
            in every step.
    """

    def __init__(self, layout: Layout, bits: keras.Variable, offsets: keras.Variable, indices: keras.Variable):
        self.layout = layout
        self.bits = bits
        self.offsets = offsets
        self.indices = indices

    @staticmethod
    def arrays(packed: np.ndarray, layout: Layout, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Rank offsets and indices of a packed mask with at most `capacity` ones."""
        wide = layout.kept + capacity > np.iinfo(np.int32).max
        indices = layout.kept + np.arange(capacity, dtype=np.int64 if wide else np.uint32)
        ones = packing.bit_indices(packed, layout.kept)
        indices[: ones.size] = ones
        return packing.rank_offsets(packed, layout.kept), indices

    @property
    def variables(self) -> tuple[keras.Variable, keras.Variable, keras.Variable]:
        """Bits, offsets and indices."""
        return self.bits, self.offsets, self.indices

    @property
    def capacity(self) -> int:
        """Number of bits that may be 1."""
        return int(self.indices.shape[0])

    def assign(self, packed: np.ndarray) -> None:
        """Sets a packed mask of at most `capacity` ones."""
        offsets, indices = self.arrays(packed, self.layout, self.capacity)
        self.bits.assign(packed)
        self.offsets.assign(offsets)
        self.indices.assign(indices)

    def component_tensors(self) -> list[IndexTensors]:
        """Bits, offsets and indices, for each copy that `components` gives."""
        copies = zip(*(components(variable) for variable in self.variables), strict=True)
        return [IndexTensors(*(tf.convert_to_tensor(copy) for copy in of_one)) for of_one in copies]


class TrainablePart(NamedTuple):
    """The trainable part of a gradient, in place of the gradient.

    Attributes:
        values: Of the compact variable's shape, with +0.0 where room is left.
        indices: The index that it was made with, for each copy that this context holds.
    """

    values: tf.Tensor
    indices: list[IndexTensors]


class ScatterGuard(Guard):
    """Writes the trainable entries of a compact variable to the model's variable; frozen ones are never written.

    Args:
        copies: The copies of the model's variable that this context holds, each with that of the compact variable.
        indices: The index of the trainable entries, for each copy.
        layout: Layout of the mask.
    """

    def __init__(self, copies: list[tuple[tf.Variable, tf.Variable]], indices: list["IndexTensors"], layout: Layout):
        self._copies = list(zip(copies, indices, strict=True))
        self._layout = layout

    def put_back(self) -> None:
        for (variable, inner), index in self._copies:
            ops.scatter_trainable(variable, inner.read_value(), *index, self._layout)

    def discard(self) -> None:
        """Does nothing: nothing was written."""


class CompactPartition(MaskedPartition):
    """The inner optimizer owns a variable of the trainable entries; frozen ones are never written.

    In a step that variable is first filled from the model's, so that whatever was written
    there from outside counts, and in the end its entries are written back.

    Args:
        variable: The model's variable.
        index: Which of its entries are trainable.
        inner: What the inner optimizer owns, of the shape that `inner_shape` gives.
        make_variable: Makes variables for further indices.
        pending: Whether the mask is still to come: its indices are `pending_index` until then.
    """

    mode = "compact"
    gathers = True

    def __init__(
        self,
        variable: Variable,
        index: TrainableIndex,
        inner: keras.Variable,
        make_variable: MakeVariable,
        pending: bool = False,
    ):
        super().__init__(variable, index.layout, index.bits)
        self._index = index
        self._inner = inner
        self._make_variable = make_variable
        self.pending = pending
        self._gradient_indices: dict[Hashable, GradientIndex] = {}
        self._constrained_with: dict[int | None, list[IndexTensors]] = {}

    @property
    def capacity(self) -> int:
        """Number of mask bits that may be 1."""
        return self._index.capacity

    @property
    def inner_variable(self) -> keras.Variable:
        return self._inner

    def take(self, gradient: Gradient | TrainablePart, named_rows_only: bool = False) -> Taken:
        self.check_not_pending()
        if isinstance(gradient, TrainablePart):
            self._follow_variable(gradient.indices)
            self._fill(gradient.indices)
            guard = ScatterGuard(self._copies(), gradient.indices, self.layout)
            return Taken(gradient.values, self._inner, guard)
        gradient = self.checked(gradient)
        # All of a step is done with the index of this moment: another thread may change the mask in between.
        indices = self.component_tensors()
        self._follow_variable(indices)
        copies = self._copies()
        guard = ScatterGuard(copies, indices, self.layout)
        if isinstance(gradient, tf.IndexedSlices):
            self._fill(indices)
            return Taken(self.compact_slices(gradient, indices[0]), self._inner, guard)
        if not self.capacity:
            # Nothing consumes the gradient then, and it is not computed.
            return Taken(tf.zeros(self._inner.shape, gradient.dtype), self._inner, guard)
        if len(copies) > 1 or gradient.dtype != copies[0][0].dtype:
            gradient = of_shape(gradient, tf.TensorShape(self.variable.shape))
            self._fill(indices)
            compact = ops.gather_trainable(gradient, *indices[0], self.layout)
        else:
            ((variable, inner),) = copies
            compact, values = ops.take_trainable(variable, gradient, *indices[0], self.layout)
            inner.assign(tf.reshape(values, inner.shape))
        return Taken(tf.reshape(compact, self._inner.shape), self._inner, guard)

    def take_whole(self, gradient: Gradient | TrainablePart, masked: bool) -> Taken:
        self.check_not_pending()
        if isinstance(gradient, TrainablePart):
            # The update goes by the mask of its own moment, as for every other gradient: it writes no entry that
            # another thread has frozen meanwhile, and slots are where that mask has them. The part's indices are those
            # of its own trace or step; only such a change in between could tell them from the variables.
            return Taken(gradient.values, self.variable, Guard())
        return super().take_whole(gradient, masked)

    def mask_operand(self) -> MaskOperand:
        return MaskOperand(self.layout, self._bits, (self._index.offsets, self._index.indices))

    def _follow_variable(self, indices: list[IndexTensors]) -> None:
        """Gives the compact variable the settings that the model's has when a step begins."""
        constrained = getattr(self.variable, "constraint", None) is not None
        if constrained:
            # By replica: the constraint is called in the one that this is called in, if not in the same thread.
            self._constrained_with[replica_number()] = indices
        else:
            self._constrained_with.clear()
        self._inner.constraint = FunctionConstraint(self._constrained) if constrained else None
        self._inner.overwrite_with_gradient = bool(getattr(self.variable, "overwrite_with_gradient", False))

    def _constrained(self, inner: keras.Variable) -> tf.Tensor:
        """Returns the compact variable under the constraint of the model's, which looks at all entries."""
        del inner  # its copies
        indices = self._constrained_with[replica_number()]
        # Only trainable entries are written, which the guard is to write anyway.
        ScatterGuard(self._copies(), indices, self.layout).put_back()
        whole = tf.cast(tf.convert_to_tensor(self.variable.constraint(self.variable)), self.variable.dtype)
        whole = tf.ensure_shape(whole, self.variable.shape)
        return tf.reshape(ops.gather_trainable(whole, *indices[0], self.layout), self._inner.shape)

    def compact_slices(self, gradient: tf.IndexedSlices, index: IndexTensors) -> Gradient:
        """Returns slices of the compact variable; repeated rows stay repeated, as Keras squares each by itself."""
        row_shape = tuple(self._inner.shape[1:])
        if not self.capacity:
            return tf.zeros(self._inner.shape, gradient.dtype)
        rows = self.variable.shape[0]
        gradient = slices_of_shape(gradient, tf.TensorShape(self.variable.shape))
        masked = mask_with_bits(gradient, index.mask, self.layout, self._row_count)
        bits_per_row = self.layout.kept // rows
        # A row that does not exist is an error outside of XLA; there its bits stand for none, and it is dropped.
        named = tf.cast(masked.indices, tf.int64)
        first = tf.where((named >= 0) & (named < rows), named, rows)[:, None] * bits_per_row
        bits = tf.reshape(first + np.arange(bits_per_row, dtype=np.int64)[None, :], [-1])
        # Frozen entries become slices of zeros at some entry's rank.
        ranks = ops.rank_trainable(bits, *index, self.layout.kept)
        values = tf.reshape(masked.values, [-1, *row_shape])
        # TensorFlow has shapes of int32 in host memory, where they are wanted.
        shape = tf.constant(list(self._inner.shape), tf.int32 if self.capacity < 2**31 else tf.int64)
        return tf.IndexedSlices(values, ranks, shape)

    def component_tensors(self) -> list[IndexTensors]:
        """Returns the index of the trainable entries as it is now, for each copy that this context holds."""
        return self._index.component_tensors()

    def gradient_index(self, key: Hashable, make: Callable[[MakeVariable], _Index]) -> _Index:
        """Returns a further index, which follows the mask from then on.

        Args:
            key: What it is for.
            make: Makes it, where there is none yet, outside of functions that are being traced.
        """
        if key not in self._gradient_indices:
            with tf.init_scope():
                self._gradient_indices[key] = make(self._make_variable)
        return cast(_Index, self._gradient_indices[key])

    def guard(self) -> Guard:
        """Returns a guard, with the compact variable filled from the model's."""
        indices = self.component_tensors()
        self._fill(indices)
        return ScatterGuard(self._copies(), indices, self.layout)

    def fill(self) -> None:
        """Sets the compact variable to the trainable entries of the model's."""
        self._fill(self.component_tensors())

    def _fill(self, indices: list[IndexTensors]) -> None:
        for (variable, inner), index in zip(self._copies(), indices, strict=True):
            inner.assign(tf.reshape(ops.read_trainable(variable, *index, self.layout), inner.shape))

    def variable_guard(self) -> Guard:
        self.check_not_pending()
        return super().variable_guard()

    def _copies(self) -> list[tuple[tf.Variable, tf.Variable]]:
        """The copies of variable and compact variable that this context holds."""
        return list(zip(components(self.variable), components(self._inner), strict=True))

    def fit(self, mask: Mask) -> Mask:
        mask = super().fit(mask)
        if mask.count() > self.capacity * self.layout.inner:
            room = self.capacity * self.layout.inner
            raise ValueError(beyond_capacity_message(self.path, mask.count(), room))
        return mask

    def assign(self, mask: Mask) -> None:
        self._index.assign(mask.packed)
        for index in self._gradient_indices.values():
            index.assign(mask.packed, self.layout)
        self.pending = False

    def check_not_pending(self) -> None:
        """Raises where the mask is still to come.

        Raises:
            ValueError: If this was made from a config, and nobody has set a mask since.
        """
        if self.pending:
            raise ValueError(pending_message(self.path))

    def describe(self) -> Description:
        room = self.capacity * self.layout.inner
        held = {"compact values": self._inner}
        held |= dict(zip(("mask bits", "rank offsets", "indices"), self._index.variables, strict=True))
        overhead = {purpose: _bytes_of(variable) for purpose, variable in held.items()}
        if self._gradient_indices:
            variables = [each for index in self._gradient_indices.values() for each in index.variables]
            overhead["indices of gradients"] = sum(map(_bytes_of, variables))
        return Description(
            "",
            self.layout,
            self.layout.packed_bytes,
            overhead,
            room,
            {"way": self.mode, "layout": list(self.layout), "capacity": self.capacity},
        )


def _bytes_of(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * tf.as_dtype(variable.dtype).size
