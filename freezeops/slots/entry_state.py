"""The state that an optimizer keeps for each entry of a variable: slots, averages and accumulated gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from freezeops.keras_compat.variables import Variable, components, numpy_of
from freezeops.keras_compat.wrapped import SlotRecord, accumulators, average_slots
from freezeops.slots.catalogue import Slot


class EntryState(NamedTuple):
    """A variable in which an optimizer keeps a value for each entry of one that it trains.

    Attributes:
        slot: The optimizer's variable, of the shape of what it trains.
        initializer: Function of a shape and a dtype, returning its values in a new optimizer. `None`: they
            are those of the variable itself.
        accumulates: `True` for an accumulated gradient, which an entry that is frozen loses.
    """

    slot: keras.Variable
    initializer: Callable[..., Any] | None
    accumulates: bool = False

    def initial_values(self, variable: Variable, shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """Returns the values that a new optimizer would start with.

        Args:
            variable: The model's variable.
            shape: Shape to see it in.
            positions: Indices along the first axis of that.
        """
        if self.initializer is None:
            return numpy_of(variable).reshape(shape)[positions]
        return np.asarray(self.initializer((positions.size, *shape[1:]), dtype=self.slot.dtype))

    def numpy(self) -> np.ndarray:
        """Returns the values now."""
        return numpy_of(self.slot)

    def assign(self, values: np.ndarray) -> None:
        """Sets the values in all copies."""
        for component in components(self.slot):
            component.assign(values)


def entry_states(
    optimizer: keras.optimizers.Optimizer,
    records: Sequence[SlotRecord],
    slots: Sequence[tuple[Slot, keras.Variable]],
) -> list[EntryState]:
    """Returns all that an optimizer keeps for the entries of one variable.

    Args:
        optimizer: The optimizer that trains the variable.
        records: The slots that it made for it.
        slots: Those of known role.
    """
    start_as_variable = {id(average) for _, average in average_slots(optimizer)}
    start_as_variable |= {id(state) for slot, state in slots if slot.initial is None}
    accumulated = {id(accumulator) for _, accumulator in accumulators(optimizer)}
    return [
        EntryState(
            slot,
            initializer=None if id(slot) in start_as_variable else keras.initializers.get(initializer),
            accumulates=id(slot) in accumulated,
        )
        for _, slot, initializer in records
    ]
