"""The slots of a compact variable, moved to where their entries are as its mask changes."""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np

from freezeops.keras_compat.variables import Variable
from freezeops.keras_compat.wrapped import step_count
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.slots.catalogue import Slot
from freezeops.slots.entry_state import EntryState
from freezeops.slots.unfreezing import Policy, VariableSlots


class _RecentlyFrozen(NamedTuple):
    """Slots of entries frozen since the last step, kept in case they are unfrozen before the next.

    Attributes:
        steps: The number of steps there were.
        mask: The mask after the last change.
        positions: Positions of the entries' bits.
        values: For each state, its values for these.
    """

    steps: int
    mask: Mask
    positions: np.ndarray
    values: list[np.ndarray]


class CompactSlots(VariableSlots):
    """The slots of one compact variable.

    Args:
        variable: The variable that the inner optimizer owns.
        model_variable: The model's variable.
        optimizer: The optimizer that owns the slots, built.
        slots: The variable's slots of known role.
        policy: One of `unfreezing.POLICIES`. There are no slots of frozen entries that `"keep"`
            could keep: they start as in a new optimizer.
        states: All that the optimizer keeps for its entries.
    """

    materialized = True

    def __init__(
        self,
        variable: keras.Variable,
        model_variable: Variable,
        optimizer: keras.optimizers.Optimizer,
        slots: Sequence[tuple[Slot, Variable]],
        policy: Policy,
        states: Sequence[EntryState],
    ):
        super().__init__(variable, optimizer, slots, policy)
        self._model_variable = model_variable
        self._states = list(states)
        self._recently_frozen: _RecentlyFrozen | None = None

    def change(self, old: Mask, new: Mask, mask_layout: Layout) -> None:
        """Moves the slots to where their entries are under another mask.

        Entries that become trainable follow the policy. Several changes between two steps
        count as one.

        Args:
            old: The mask until now.
            new: The mask from now on.
            mask_layout: The layout of the mask on the device.
        """
        bits = [mask.with_layout(mask_layout).packed for mask in (old, new)]
        before, after = (packing.bit_indices(each, mask_layout.kept) for each in bits)
        recent = self._recent_under(old)
        known = before if recent is None else np.concatenate([before, recent.positions])
        _, source, target = np.intersect1d(known, after, assume_unique=True, return_indices=True)
        frozen = np.ones(known.size, bool)
        frozen[source] = False

        shape = (mask_layout.kept, *self.variable.shape[1:])
        states: list[EntryState | _Waiting] = list(self._states)
        if self.unseeded is not None:
            states.append(_Waiting(self))
        moved, values_of_frozen = [], []
        for number, state in enumerate(states):
            current = state.numpy()
            values = current[: before.size]
            if recent is not None:
                values = np.concatenate([values, recent.values[number]])
            result = np.zeros_like(current)
            result[: after.size] = state.initial_values(self._model_variable, shape, after)
            result[target] = values[source]
            moved.append(result)
            values_of_frozen.append(np.zeros_like(values[frozen]) if state.accumulates else values[frozen])
        self._recently_frozen = _RecentlyFrozen(step_count(self._optimizer), new, known[frozen], values_of_frozen)
        for state, result in zip(states, moved, strict=True):
            state.assign(result)

    def forget(self) -> None:  # noqa: D102
        super().forget()
        self._recently_frozen = None

    def recently_frozen(self, mask: Mask) -> tuple[np.ndarray, list[np.ndarray]] | None:
        """Returns the slots that `change` would bring back; `None` for none.

        Args:
            mask: The mask as it is.

        Returns:
            Positions among the mask's bits, and for each state its values; at the end, where entries can wait to be
            seeded, the flags of `waiting`.
        """
        recent = self._recent_under(mask)
        return None if recent is None else (recent.positions, recent.values)

    def _recent_under(self, mask: Mask) -> _RecentlyFrozen | None:
        """Returns the slots of entries frozen since the last step, if the mask is the one after that change."""
        recent = self._recently_frozen
        if recent is None or recent.mask != mask or recent.steps != step_count(self._optimizer):
            return None
        return recent


class _Waiting:
    """The flags of entries that wait to be seeded, moved as the slots are.

    Args:
        slots: The slots, some of which can be seeded.
    """

    accumulates = False

    def __init__(self, slots: CompactSlots):
        self._slots = slots

    def initial_values(self, variable: Variable, shape: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """Returns flags of entries that become trainable: they wait, but before the first step."""
        del variable
        return np.full((positions.size, *shape[1:]), self._slots.steps > 0)

    def numpy(self) -> np.ndarray:
        """Returns the flags now."""
        return self._slots.waiting()

    def assign(self, flags: np.ndarray) -> None:
        """Sets the flags."""
        self._slots.set_waiting(flags)
