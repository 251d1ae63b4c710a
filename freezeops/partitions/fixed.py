"""Variables whose mask cannot change: frozen for good, or without a mask."""

import tensorflow as tf

from freezeops.keras_compat.variables import Variable, components, dtype_name
from freezeops.masks.mask import Mask
from freezeops.ops.gradients import Gradient
from freezeops.partitions.guards import Guard, VariableGuard
from freezeops.partitions.partition import Description, Partition, Taken
from freezeops.partitions.plan import cannot_hold_message


class PermanentPartition(Partition):
    """Frozen for good: the inner optimizer never sees the variable, which costs nothing."""

    mode = "permanent"

    @property
    def inner_variable(self) -> None:  # noqa: D102
        return None

    def masked(self, gradient: Gradient) -> Gradient:  # noqa: D102
        gradient = self.checked(gradient)
        if isinstance(gradient, tf.IndexedSlices):
            values = tf.zeros_like(gradient.values)
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return tf.zeros_like(gradient)

    def take(self, gradient: Gradient, named_rows_only: bool = False) -> Taken:  # noqa: D102
        return Taken(self.checked(gradient), None, Guard())

    def variable_guard(self) -> Guard:  # noqa: D102
        return VariableGuard(components(self.variable))

    @property
    def mask(self) -> Mask:  # noqa: D102
        return Mask.frozen(tuple(self.variable.shape))

    def fit(self, mask: Mask) -> Mask:  # noqa: D102
        if mask.count():
            raise ValueError(
                "A variable that was frozen with `permanent=True` must stay frozen: the inner "
                f"optimizer has no slots for it. Received: {self.path!r} with {mask.count()} "
                "trainable entries"
            )
        return mask


class UnmaskedPartition(Partition):
    """The variable trains as without freezeops: no bits were set aside for it.

    Args:
        variable: The model's variable.
        reason: Why, for `summary()`.
    """

    mode = "unmasked"

    def __init__(self, variable: Variable, reason: str):
        super().__init__(variable)
        self._reason = reason

    def masked(self, gradient: Gradient) -> Gradient:  # noqa: D102
        return self.checked(gradient)

    def take(self, gradient: Gradient, named_rows_only: bool = False) -> Taken:  # noqa: D102
        return Taken(self.checked(gradient), self.variable, Guard())

    @property
    def mask(self) -> Mask:  # noqa: D102
        return Mask.trainable(tuple(self.variable.shape))

    def fit(self, mask: Mask) -> Mask:  # noqa: D102
        if mask.count() != mask.size:
            if not tf.as_dtype(self.variable.dtype).is_floating:
                raise ValueError(
                    "A mask must be for a variable of a floating dtype. "
                    f"Received: variable {self.path!r} of dtype={dtype_name(self.variable)}"
                )
            raise ValueError(cannot_hold_message(self.variable, None))
        return mask

    def describe(self) -> Description:  # noqa: D102
        return Description(self._reason, capacity=self.size, config={"way": self.mode})
