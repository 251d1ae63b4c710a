"""The interface of partitions: how one variable is split between frozen and trainable entries.

`take` gives what a step hands to the inner optimizer, and a guard that puts frozen entries back after it. Each mode has
a class: `full.py`, `compact.py`, `fixed.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from freezeops.keras_compat.variables import Variable, components, empty_variable, shape_now, tf_variable, variable_path
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.ops.gradients import Gradient, dense_shape, mask_with_bits
from freezeops.partitions.guards import Guard, WholeGuard
from freezeops.partitions.plan import Mode, fit


class Taken(NamedTuple):
    """A gradient as a step hands it on, with the variable and a guard.

    Attributes:
        gradient: What the inner optimizer is given.
        variable: The variable that it is given with; `None`: it is given neither.
        guard: What puts frozen entries back after the step.
    """

    gradient: Gradient
    variable: Variable | None
    guard: Guard


class MaskOperand(NamedTuple):
    """A mask as a fused update takes it.

    Attributes:
        layout: Layout of the mask bits.
        bits: `uint8` variable of the packed mask; `None`: every entry is trainable.
        ranks: With compact state the variables of rank offsets and of trainable indices; else `None`.
    """

    layout: Layout
    bits: Variable | None = None
    ranks: tuple[Variable, Variable] | None = None


@dataclass(frozen=True)
class Description:
    """The properties of a partition that reports and configs show.

    Attributes:
        reason: Why the variable has this mode; empty where that needs no reason.
        layout: Layout of the mask; `None` without one.
        mask_bytes: Bytes of the mask on the device.
        overhead_bytes: With compact state the memory that it needs but for slots, in bytes, by purpose.
        capacity: How many entries can be trainable without `repack`.
        config: Mode and layout as a config holds them, without mask bits.
    """

    reason: str = ""
    layout: Layout | None = None
    mask_bytes: int = 0
    overhead_bytes: dict[str, int] = field(default_factory=dict)
    capacity: int = 0
    config: dict[str, Any] = field(default_factory=dict)


class Partition(ABC):
    """One variable, as the model and as the inner optimizer see it.

    Args:
        variable: The model's variable.

    Attributes:
        mode: Which kind of partition this is.
        path: The variable's path.
        size: The variable's number of entries.
        gathers: Whether `take` gathers the trainable entries into a variable of their own.
        pending: Whether the mask is still to come, from a file.
    """

    mode: Mode
    gathers = False
    pending = False

    def __init__(self, variable: Variable):
        self.variable = variable
        self.path = variable_path(variable)
        self.size = int(tf.TensorShape(variable.shape).num_elements())

    @property
    def inner_variable(self) -> Variable | None:
        """The variable that the inner optimizer is built with; `None`: it never sees this one."""
        return self.variable

    @abstractmethod
    def masked(self, gradient: Gradient) -> Gradient:
        """Returns a gradient of the variable with +0.0 in the frozen entries.

        Raises:
            ValueError: If it has not the variable's shape.
        """

    @abstractmethod
    def take(self, gradient: Any, named_rows_only: bool = False) -> Taken:
        """Returns what the inner optimizer is given for a gradient of the variable.

        Args:
            gradient: As the model gives it; with compact state also a `compact.TrainablePart` of it.
            named_rows_only: Whether the inner optimizer writes no rows but those that a sparse gradient names.

        Raises:
            ValueError: If the gradient has not the variable's shape.
        """

    def take_whole(self, gradient: Any, masked: bool) -> Taken:
        """Returns what an update is given that looks at the mask itself, and so needs no guard.

        Args:
            gradient: As the model gives it; with compact state also a `compact.TrainablePart` of it.
            masked: Whether something looks at the gradient before the update.
        """
        return Taken(self.masked(gradient) if masked else self.checked(gradient), self.variable, Guard())

    def mask_operand(self) -> MaskOperand:
        """Returns the mask as a fused update of the model's variable takes it."""
        return MaskOperand(Layout(1, 1, self.size))

    def guard(self) -> Guard:
        """Returns a guard for a step in which there is no gradient of the variable."""
        return Guard()

    def variable_guard(self) -> Guard:
        """Returns a guard around writes of the model's variable by something else than the inner optimizer."""
        return Guard()

    def fill_frozen(self, average: Variable) -> None:
        """Sets the frozen entries of a moving average to the variable's own values."""

    def clear_frozen(self, accumulator: Variable) -> None:
        """Sets the frozen entries of an accumulated gradient to zero."""

    @property
    @abstractmethod
    def mask(self) -> Mask:
        """The mask as it is now."""

    @abstractmethod
    def fit(self, mask: Mask) -> Mask:
        """Returns the mask as `assign` takes it.

        Raises:
            ValueError: If this variable can't take it.
        """

    def assign(self, mask: Mask) -> None:
        """Sets a mask that `fit` returned; no retracing."""

    def describe(self) -> Description:
        """Returns what reports and configs say of this."""
        return Description(config={"way": self.mode})

    @property
    def frozen_count(self) -> int:
        """Number of entries that are frozen now."""
        return self.size - self.mask.count()

    def checked(self, gradient: Any) -> Gradient:
        """Returns a gradient as it is, if it has the variable's shape.

        Dimensions that are not static are checked when the step runs; where all are static, that costs nothing.

        Raises:
            ValueError: If it has another shape.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            gradient = tf.convert_to_tensor(gradient)
        shape, own = dense_shape(gradient), tf.TensorShape(self.variable.shape)
        if not shape.is_compatible_with(own):
            raise ValueError(
                "A gradient must have the shape of its variable. Received: gradient of shape "
                f"{shape} for {self.path!r} of shape {tuple(self.variable.shape)}"
            )
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient if shape.is_fully_defined() else tf.ensure_shape(gradient, own)
        values = tf.convert_to_tensor(gradient.values)
        if values.shape[1:].is_fully_defined():
            return gradient
        return tf.IndexedSlices(tf.ensure_shape(values, [None, *own[1:]]), gradient.indices, gradient.dense_shape)


class MaskedPartition(Partition):
    """A partition with a mask that can change: packed bits on the device.

    Args:
        variable: The model's variable.
        layout: Layout of the bits.
        bits: `uint8` variable of the packed mask.
        reason: Why the variable has this mode, where that needs a reason.
    """

    def __init__(self, variable: Variable, layout: Layout, bits: keras.Variable, reason: str = ""):
        super().__init__(variable)
        self.layout = layout
        self._bits = bits
        self._reason = reason

    def masked(self, gradient: Gradient) -> Gradient:
        bits = tf.convert_to_tensor(tf_variable(self._bits))
        return mask_with_bits(self.checked(gradient), bits, self.layout, self._row_count)

    @property
    def _row_count(self) -> int | None:
        """Length of the first axis; `None` for a scalar."""
        return self.variable.shape[0] if len(self.variable.shape) else None

    @property
    def mask(self) -> Mask:
        return Mask(tuple(self.variable.shape), self.layout, self._bits.numpy())

    def fit(self, mask: Mask) -> Mask:
        return fit(mask, self.layout, self.variable)

    def variable_guard(self) -> Guard:
        return WholeGuard(self._copies_with_bits(self.variable), self.layout)

    def _copies_with_bits(self, variable: Variable) -> list[tuple[tf.Variable, tf.Tensor]]:
        """The copies of a variable that this context holds, each with the mask bits on its device."""
        bits = [tf.convert_to_tensor(copy) for copy in components(self._bits)]
        return list(zip(components(variable), bits, strict=True))

    def bits_shape(self) -> tf.Tensor:
        """Returns the shape of the mask bits when a function runs: `[0]` after `retire`."""
        return shape_now(self._bits)

    def retire(self) -> None:
        """Empties the mask bits, so that every function that was traced with them fails."""
        empty_variable(self._bits)

    def describe(self) -> Description:
        config = {"way": self.mode, "layout": list(self.layout)}
        return Description(self._reason, self.layout, self.layout.packed_bytes, capacity=self.size, config=config)
