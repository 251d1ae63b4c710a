"""Full state: the inner optimizer's slots have the variable's shape."""

import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.variables import Variable, components
from freezeops.masks.mask import Mask
from freezeops.ops.gradients import Gradient
from freezeops.partitions.guards import Guard, RowsGuard
from freezeops.partitions.partition import MaskedPartition, MaskOperand, Taken


class FullPartition(MaskedPartition):
    """The inner optimizer trains the variable itself; what it does to frozen entries is undone."""

    mode = "full"

    def take(self, gradient: Gradient, named_rows_only: bool = False) -> Taken:  # noqa: D102
        masked = self.masked(gradient)
        if named_rows_only and isinstance(masked, tf.IndexedSlices) and self._rows_can_be_kept:
            guard: Guard = RowsGuard(self._copies_with_bits(self.variable), self.layout, masked.indices)
        else:
            guard = self.guard()
        return Taken(masked, self.variable, guard)

    @property
    def _rows_can_be_kept(self) -> bool:
        """True if writing some rows, and putting them back, changes no other row."""
        # XLA scatters 16-bit floats by way of float32: NaNs change in rows it does not even name.
        return getattr(self.variable, "constraint", None) is None and tf.as_dtype(self.variable.dtype).size >= 4

    def mask_operand(self) -> MaskOperand:  # noqa: D102
        return MaskOperand(self.layout, self._bits)

    def guard(self) -> Guard:  # noqa: D102
        return self.variable_guard()

    def fill_frozen(self, average: Variable) -> None:  # noqa: D102
        variables = components(self.variable)
        for (slot, bits), variable in zip(self._copies_with_bits(average), variables, strict=True):
            own = tf.reshape(variable.read_value(), [self.size])
            ops.restore_frozen(slot, bits, own, self.layout)

    def clear_frozen(self, accumulator: Variable) -> None:  # noqa: D102
        for slot, bits in self._copies_with_bits(accumulator):
            slot.assign(ops.mask_gradient(slot.read_value(), bits, self.layout))

    def assign(self, mask: Mask) -> None:  # noqa: D102
        self._bits.assign(mask.packed)
