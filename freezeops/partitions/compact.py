"""Compact state: the inner optimizer owns a variable of the trainable entries alone.

Frozen entries are never written, so they keep their bits whatever it does.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.variables import FunctionConstraint, Variable, components, replica_number, variable_path
from freezeops.masks import packing
from freezeops.masks.layout import Layout, elementwise
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.ops import reference
from freezeops.ops.gradients import Gradient, mask_with_bits
from freezeops.partitions import partition
from freezeops.partitions.partition import MaskedPartition, Plan, fit

Capacity: TypeAlias = int | float
"""Trainable entries that there is room for: a number of entries (`int`) or a share of them (`float`)."""


def check_capacity(capacity: Any) -> None:
    """Raises unless this is what `MaskedOptimizer` takes for `capacity`."""
    values = capacity.values() if isinstance(capacity, Mapping) else [] if capacity is None else [capacity]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                "`capacity` must be a number of entries (int) or a share of them (float), or map path patterns to "
                f"those. Received: capacity={short(capacity)}"
            )
        if not float(value) >= 0 or (not isinstance(value, numbers.Integral) and float(value) > 1):
            raise ValueError(
                "`capacity` must be an int that is not negative, or a float from 0.0 to 1.0. Received: "
                f"capacity={short(capacity)}"
            )


def capacity_in_bits(capacity: Capacity, layout: Layout) -> int:
    """How many of a mask's bits may be 1.

    Args:
        capacity: As the user gave it.
        layout: The mask's, `(1, kept, inner)`.
    """
    entries = int(capacity) if isinstance(capacity, numbers.Integral) else math.ceil(capacity * layout.size)
    return min(-(-entries // max(layout.inner, 1)), layout.kept)


def beyond_capacity_message(path: str, count: int, room: int) -> str:
    """What to tell someone whose mask has more trainable entries than there is room for."""
    return (
        f"A mask must not have more trainable entries than its variable has room for in compact state. Received: "
        f"{count} trainable entries for {path!r}, which has room for {room}. Call "
        f"`optimizer.repack(masks={{{path!r}: mask}})` instead, which makes room, keeps slots and asks for a new "
        f"trace, or pass capacity={{{path!r}: {count}}} to MaskedOptimizer from the start."
    )


def choose(
    variable: Variable,
    mask: Mask | None,
    permanent: bool = False,
    maskable: str | None = None,
    saved: Mapping[str, Any] | None = None,
    capacity: Capacity | None = None,
    named: bool = False,
    at_least: bool = False,
) -> Plan:
    """`partition.choose` where compact state was asked for.

    Args:
        variable: The model's variable.
        mask: What the rules make of it; `None` where no rule names it.
        permanent: Whether a rule freezes it for good.
        maskable: What the user asked to set aside.
        saved: Way, layout and capacity from a saved config.
        capacity: What the user asked to make room for; `None`: for the entries that are
            trainable now.
        named: Whether the user asked that for this variable in particular.
        at_least: Whether there may be more room than that, if the mask needs it.

    Returns:
        A `Plan`; compact state is not for variables without a frozen entry, nor for those
        that a norm is taken of whole.

    Raises:
        ValueError: If the mask needs more than is set aside.
    """
    plan = partition.choose(variable, mask, permanent, maskable, saved)
    if plan.way != "full" or (saved is not None and saved["way"] == "full"):
        return plan
    saved_layout: Layout | None = None
    saved_capacity = 0
    if saved is not None and saved["way"] == "compact":
        saved_layout, saved_capacity = Layout(*saved["layout"]), saved["capacity"]
    assert plan.mask is not None and plan.layout is not None
    wanted = named or saved_layout is not None
    reason = ""
    if getattr(variable, "constraint", None) is not None:
        reason = f"a constraint, {type(variable.constraint).__name__}, looks at the whole variable"
    elif getattr(variable, "overwrite_with_gradient", False):
        reason = "its gradient overwrites it"
    elif plan.mask.count() == plan.mask.size and not wanted:
        reason = "nothing was frozen when built"
    if reason:
        return replace(plan, reason=reason)
    shape = tuple(variable.shape)
    layout = plan.layout if plan.layout.outer == 1 and plan.layout.kept > 1 else elementwise(shape)
    if saved_layout is not None and mask is None:
        empty = Mask.frozen(shape).with_layout(saved_layout)
        return Plan("compact", saved_layout, empty, capacity=saved_capacity, pending=saved_capacity > 0)
    mask = fit(plan.mask, layout, variable)
    count = mask.count() // max(layout.inner, 1)
    room = count if capacity is None else capacity_in_bits(capacity, layout)
    if count > room and at_least:
        room = count
    if count > room:
        raise ValueError(beyond_capacity_message(variable_path(variable), mask.count(), room * layout.inner))
    if saved_layout is not None:
        room = max(room, capacity_in_bits(saved_capacity * saved_layout.inner, layout))
    return Plan("compact", layout, mask, capacity=room)


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
    """What to tell someone who trains before the masks are there."""
    return (
        "An optimizer with compact state that was made from a config must be given its masks, from a file or by "
        f"`register_mask`, before it trains. Received: no mask yet for {path!r}"
    )


class IndexTensors(NamedTuple):
    """What the ops of compact state take; see `reference.gather_trainable`."""

    mask: tf.Tensor
    offsets: tf.Tensor
    indices: tf.Tensor


class TrainableIndex:
    """Which entries of a variable are trainable, in all forms that the ops want it in.

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
        """How many bits may be 1."""
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


class CompactPartition(MaskedPartition):
    """The inner optimizer owns a variable of the trainable entries; frozen ones are never written.

    In a step that variable is first filled from the model's, so that whatever was written
    there from outside counts, and in the end its entries are written back.

    Args:
        variable: The model's variable.
        index: Which of its entries are trainable.
        inner: What the inner optimizer owns, of the shape that `inner_shape` gives.
        pending: Whether the mask is still to come: its indices are `pending_index` until then.
    """

    way = "compact"

    def __init__(self, variable: Variable, index: TrainableIndex, inner: keras.Variable, pending: bool = False):
        super().__init__(variable)
        self.layout = index.layout
        self.bits = index.bits
        self.index = index
        self._inner = inner
        self._pending = pending
        self._constrained_with: dict[int | None, list[IndexTensors]] = {}

    @property
    def capacity(self) -> int:
        """How many of the mask's bits may be 1."""
        return self.index.capacity

    @property
    def inner_variable(self) -> keras.Variable:
        return self._inner

    def take(self, gradient: Gradient) -> Gradient:
        return self.take_and_remember(gradient)[0]

    def take_and_remember(self, gradient: Gradient) -> tuple[Gradient, list[IndexTensors]]:
        gradient = self.checked(gradient)
        self.check_not_pending()
        # All of a step is done with the index of this moment: another thread may change the mask in between.
        indices = self.index.component_tensors()
        self._follow_variable(indices)
        copies = self._copies()
        if isinstance(gradient, tf.IndexedSlices):
            self._fill(indices)
            return self._take_slices(gradient, indices[0]), indices
        if len(copies) > 1 or gradient.dtype != copies[0][0].dtype:
            gradient = reference.of_shape(gradient, tf.TensorShape(self.variable.shape))
            self._fill(indices)
            compact = ops.gather_trainable(gradient, *indices[0], self.layout)
        else:
            ((variable, inner),) = copies
            compact, values = ops.take_trainable(variable, gradient, *indices[0], self.layout)
            inner.assign(tf.reshape(values, inner.shape))
        return tf.reshape(compact, self._inner.shape), indices

    def _follow_variable(self, indices: list[IndexTensors]) -> None:
        """Tells the compact variable what the model's was told since it was made, for a step that begins."""
        constrained = getattr(self.variable, "constraint", None) is not None
        if constrained:
            # By replica: the constraint is called in the one that this is called in, if not in the same thread.
            self._constrained_with[replica_number()] = indices
        else:
            self._constrained_with.clear()
        self._inner.constraint = FunctionConstraint(self._constrained) if constrained else None
        self._inner.overwrite_with_gradient = bool(getattr(self.variable, "overwrite_with_gradient", False))

    def _constrained(self, inner: keras.Variable) -> tf.Tensor:
        """The compact variable under the constraint of the model's, which looks at the whole of it."""
        del inner  # its copies
        indices = self._constrained_with[replica_number()]
        # Only trainable entries are written, which `put_back` is to write anyway.
        self.put_back(indices)
        whole = tf.cast(tf.convert_to_tensor(self.variable.constraint(self.variable)), self.variable.dtype)
        whole = tf.ensure_shape(whole, self.variable.shape)
        return tf.reshape(ops.gather_trainable(whole, *indices[0], self.layout), self._inner.shape)

    def _take_slices(self, gradient: tf.IndexedSlices, index: IndexTensors) -> Gradient:
        """Slices of the compact variable: repeated rows stay repeated, as Keras squares each by itself."""
        row_shape = tuple(self._inner.shape[1:])
        if not self.capacity:
            return tf.zeros(self._inner.shape, gradient.dtype)
        rows = self.variable.shape[0]
        gradient = reference.slices_of_shape(gradient, tf.TensorShape(self.variable.shape))
        masked = mask_with_bits(gradient, index.mask, self.layout, self.rows)
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

    def remember(self, rows: tf.Tensor | None = None) -> list[IndexTensors]:
        del rows
        indices = self.index.component_tensors()
        self._fill(indices)
        return indices

    def _fill(self, indices: list[IndexTensors]) -> None:
        """Sets the compact variable to what the model's holds."""
        for (variable, inner), index in zip(self._copies(), indices, strict=True):
            inner.assign(tf.reshape(ops.read_trainable(variable, *index, self.layout), inner.shape))

    def put_back(self, snapshot: list[IndexTensors]) -> None:
        for (variable, inner), index in zip(self._copies(), snapshot, strict=True):
            ops.scatter_trainable(variable, inner.read_value(), *index, self.layout)

    def abandon(self, snapshot: list[IndexTensors]) -> None:
        """Nothing was written."""

    def remember_frozen(self) -> Any:
        self.check_not_pending()
        return super().remember_frozen()

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
        self.index.assign(mask.packed)
        self._pending = False

    @property
    def pending(self) -> bool:
        return self._pending

    def check_not_pending(self) -> None:
        """Raises where the mask is still to come.

        Raises:
            ValueError: If this was made from a config, and nobody has set a mask since.
        """
        if self._pending:
            raise ValueError(pending_message(self.path))

    @property
    def bytes_beside_slots(self) -> dict[str, int]:
        sizes = {"compact values": self._inner}
        sizes |= dict(zip(("mask bits", "rank offsets", "indices"), self.index.variables, strict=True))
        return {name: math.prod(v.shape) * tf.as_dtype(v.dtype).size for name, v in sizes.items()}

    @property
    def note(self) -> str:
        used, capacity = self.mask.count(), self.capacity * self.layout.inner
        return "" if used == capacity else f"room for {capacity:,}"

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"capacity": self.capacity}
