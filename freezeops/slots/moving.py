"""The slots of a compact variable, as entries become trainable or frozen: kept ones keep theirs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from freezeops.keras_compat.variables import Variable, components, numpy_of
from freezeops.keras_compat.wrapped import SlotRecord, accumulators, average_slots, step_count
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.partitions.compact import CompactPartition, inner_shape
from freezeops.partitions.partition import MaskedPartition
from freezeops.slots.catalogue import Slot
from freezeops.slots.unfreezing import Policy, VariableSlots
from freezeops.storage.stored import StoredMask


class EntryState(NamedTuple):
    """Something that an optimizer keeps for each entry of a variable.

    Attributes:
        slot: The optimizer's variable, of the shape of what it trains.
        initializer: Its values in a new optimizer, from a shape and a dtype; `None`: those
            of the variable itself.
        accumulates: Whether it is an accumulated gradient, which an entry that is frozen loses.
    """

    slot: keras.Variable
    initializer: Callable[..., Any] | None
    accumulates: bool = False

    def initial(self, variable: Variable, by_position: tuple[int, ...], positions: np.ndarray) -> np.ndarray:
        """What a new optimizer would start with.

        Args:
            variable: The model's variable.
            by_position: A shape to bring it into.
            positions: Along the first axis of that, of the entries in question.
        """
        if self.initializer is None:
            return numpy_of(variable).reshape(by_position)[positions]
        return np.asarray(self.initializer((positions.size, *by_position[1:]), dtype=self.slot.dtype))

    def numpy(self) -> np.ndarray:
        """The values now."""
        return numpy_of(self.slot)

    def assign(self, values: np.ndarray) -> None:
        """Sets the values in all copies."""
        for component in components(self.slot):
            component.assign(values)


def entry_states(
    optimizer: keras.optimizers.Optimizer,
    records: Sequence[SlotRecord],
    declared: Sequence[tuple[Slot, keras.Variable]],
) -> list[EntryState]:
    """All that an optimizer keeps for the entries of one variable.

    Args:
        optimizer: The one that trains it.
        records: The slots that it made for it.
        declared: Those of known role.
    """
    own_values = {id(average) for _, average in average_slots(optimizer)}
    own_values |= {id(state) for slot, state in declared if slot.initial is None}
    accumulated = {id(accumulator) for _, accumulator in accumulators(optimizer)}
    return [
        EntryState(
            slot, None if id(slot) in own_values else keras.initializers.get(initializer), id(slot) in accumulated
        )
        for _, slot, initializer in records
    ]


def positions_of(mask: Mask, layout: Layout) -> np.ndarray:
    """The positions of the ones among the bits of a mask, ascending."""
    return packing.bit_indices(mask.with_layout(layout).packed, layout.kept)


def unpacked(values: np.ndarray, entries: np.ndarray, initial: np.ndarray) -> np.ndarray:
    """Values of some entries, put among those that all entries start with.

    Args:
        values: Of the entries, in order; what is behind them is ignored.
        entries: Positions in the flattened variable.
        initial: A vector with all entries.

    Returns:
        A vector with all entries.
    """
    result = np.array(initial)
    result[entries] = values.reshape(-1)[: entries.size]
    return result


def packed_into(values: np.ndarray, entries: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """The reverse: some entries of a vector, in a shape that has room for them.

    Args:
        values: A vector with all entries.
        entries: Positions of those to take; `None`: all.
        shape: Of the result.
    """
    if entries is None:
        return values.reshape(shape)
    result = np.zeros(int(np.prod(shape, dtype=np.int64)), values.dtype)
    result[: entries.size] = values[entries]
    return result.reshape(shape)


def fitted_slot(
    array: np.ndarray, slot: keras.Variable, part: MaskedPartition, stored: StoredMask | None
) -> np.ndarray | None:
    """What a file holds of a slot, as the slot holds it now.

    Full state becomes compact state by taking the trainable entries, compact state of one layout or room that of
    another, or full state.

    Args:
        array: From the file.
        slot: The slot.
        part: The partition of its variable, with its mask as it is now.
        stored: The mask in the file; `None`: there is none, and `array` is of full state.

    Returns:
        An array of the slot's shape; `None` where it does not fit. Entries that the file has not stay as they are.
    """
    shape, whole = tuple(slot.shape), tuple(part.variable.shape)
    compact_now = isinstance(part, CompactPartition) and shape == tuple(part.inner_variable.shape)
    compact_then = stored is not None and stored.mask is not None and stored.way == "compact"
    if stored is not None and not stored.way:  # a file of an older version does not say
        compact_then = array.shape != whole or (compact_now and array.shape == shape)
    if not compact_then and not compact_now:
        return array if array.shape == shape else None
    same_masks = stored is not None and stored.mask is not None and stored.mask == part.mask
    if compact_then and compact_now and array.shape == shape and same_masks:
        return array
    mine = part.mask.indices() if compact_now else np.arange(part.size)
    if compact_then:
        assert stored is not None and stored.mask is not None
        theirs = stored.mask.indices()
        if array.shape != inner_shape(part.variable, stored.mask.layout, array.shape[0] if array.ndim else 0):
            return None
        if array.size < theirs.size:
            return None
        values = unpacked(numpy_of(slot), mine, np.zeros(part.size, array.dtype))
        values = unpacked(array, theirs, values)
    else:
        if array.shape != whole:
            return None
        values = array.reshape(-1)
    return packed_into(values, mine if compact_now else None, shape)


class _Left(NamedTuple):
    """State of entries that were frozen since a step, should they come back before the next.

    Attributes:
        steps: How many steps there were.
        mask: The mask after the last change.
        positions: Of the entries.
        values: Of each state, for these.
    """

    steps: int
    mask: Mask
    positions: np.ndarray
    values: list[np.ndarray]


class CompactSlots(VariableSlots):
    """The slots of one compact variable, and what becomes of them when its mask changes.

    Args:
        variable: What the inner optimizer owns.
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
        self._left: _Left | None = None

    def change(self, old: Mask, new: Mask, mask_layout: Layout) -> None:
        """Moves the slots to where their entries are under another mask.

        Entries that become trainable follow the policy. Several changes between two steps
        count as one.

        Args:
            old: The mask until now.
            new: The mask from now on.
            mask_layout: The layout of the mask on the device.
        """
        steps = step_count(self._optimizer)
        before, after = positions_of(old, mask_layout), positions_of(new, mask_layout)
        row_shape = tuple(self.variable.shape[1:])
        by_position = (mask_layout.kept, *row_shape)
        left = self._left
        if left is not None and (left.steps != steps or left.mask != old):
            left = None
        known = before if left is None else np.concatenate([before, left.positions])
        order = np.argsort(known, kind="stable")
        ordered = known[order]
        at = np.searchsorted(ordered, after)
        found = np.zeros(after.size, bool)
        inside = at < ordered.size
        found[inside] = ordered[at[inside]] == after[inside]
        source = order[at[found]]
        gone = np.flatnonzero(~np.isin(known, after, assume_unique=True))

        current = [state.numpy() for state in self._states]
        initial = [state.initial(self._model_variable, by_position, after) for state in self._states]
        if self.unseeded is not None:
            current.append(self.waiting())
            initial.append(np.full((after.size, *row_shape), steps > 0))
        left_values, moved = [], []
        for number, (values, target) in enumerate(zip(current, initial, strict=True)):
            of_known = values[: before.size]
            if left is not None:
                of_known = np.concatenate([of_known, left.values[number]])
            result = np.zeros_like(values)
            result[: after.size] = target
            result[np.flatnonzero(found)] = of_known[source]
            moved.append(result)
            dropped = number < len(self._states) and self._states[number].accumulates
            left_values.append(np.zeros_like(of_known[gone]) if dropped else of_known[gone])
        self._left = _Left(steps, new, known[gone], left_values)
        for state, values in zip(self._states, moved, strict=False):
            state.assign(values)
        if self.unseeded is not None:
            self.unseeded.assign(packing.pack_bits(moved[-1]))

    def forget(self) -> None:  # noqa: D102
        super().forget()
        self._left = None

    def left(self, mask: Mask) -> tuple[np.ndarray, list[np.ndarray]] | None:
        """What `change` would bring back: positions among the mask's bits, and values of each state.

        Last come the flags of `waiting`, where there are any.

        Args:
            mask: The mask as it is.
        """
        left = self._left
        if left is None or left.mask != mask or left.steps != step_count(self._optimizer):
            return None
        return left.positions, left.values
