"""Repacking: another mode, layout or room for variables of a built optimizer; trainable entries keep their slots."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from freezeops.backward.skipping import NOT_TRACED
from freezeops.keras_compat.variables import Variable, reshape_variable
from freezeops.keras_compat.wrapped import replace_variable, step_count
from freezeops.masks.mask import Mask
from freezeops.partitions.building import PartitionBuilder
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.compact_values import gather_values, scatter_values
from freezeops.partitions.full import FullPartition
from freezeops.partitions.partition import MaskedPartition
from freezeops.partitions.plan import CompactPlan, FullPlan, Request, plan
from freezeops.registry import targets
from freezeops.registry.registry import MaskRegistry
from freezeops.registry.rules import MaskRule
from freezeops.slots.entry_state import EntryState
from freezeops.slots.moving import CompactSlots
from freezeops.step.binding import SlotBinding
from freezeops.step.managed import ManagedVariable


class Repacker:
    """Makes compact state anew.

    Args:
        registry: The masks of a built optimizer.
        builder: Makes the new variables of masks.
        binding: The slots of the inner optimizer.
        inner_optimizer: The inner optimizer.
    """

    def __init__(
        self,
        registry: MaskRegistry,
        builder: PartitionBuilder,
        binding: SlotBinding,
        inner_optimizer: keras.optimizers.Optimizer,
    ):
        self._registry = registry
        self._builder = builder
        self._binding = binding
        self._inner_optimizer = inner_optimizer

    def plans(self, pairs: Sequence[tuple[Any, Any]], capacity: Any) -> dict[int, FullPlan | CompactPlan]:
        """Returns the new plans of masked variables by position, with nothing changed yet.

        Args:
            pairs: Targets and their new masks; other masks stay.
            capacity: Room to make from now on; `None`: what was asked for before, and as much as the masks need.

        Raises:
            ValueError: If something does not fit.
        """
        registry = self._registry
        index = registry.index
        masks = {i: partition.mask for i, partition in enumerate(registry.partitions)}
        given: set[int] = set()
        for target, mask in pairs:
            rule = MaskRule("register_mask", target, mask)
            for position in index.find(rule.target):
                given.add(position)
                targets.check_maskable_dtype(index.variables[position])
                masks[position] = rule.apply_to(masks[position])
        maskable = registry.by_position(registry.maskable, index)
        rooms = registry.rooms(index, capacity)
        plans: dict[int, FullPlan | CompactPlan] = {}
        for i, partition in enumerate(registry.partitions):
            if not isinstance(partition, MaskedPartition):
                partition.fit(masks[i])
                continue
            if isinstance(partition, CompactPartition) and i not in given:
                partition.check_not_pending()
            made = plan(Request(partition.variable, masks[i], maskable=maskable.get(i), room=rooms[i]))
            assert isinstance(made, FullPlan | CompactPlan)
            plans[i] = made
        return plans

    def rebuild(self, position: int, new: FullPlan | CompactPlan) -> None:
        """Gives one variable the mode, layout, room and mask of a plan, and moves its slots.

        Args:
            position: The variable's position.
            new: The plan.
        """
        managed = self._registry.managed[position]
        old = managed.partition
        assert isinstance(old, MaskedPartition)
        room = new.capacity if isinstance(new, CompactPlan) else None
        if (old.mode, old.layout, getattr(old, "capacity", None)) == (new.mode, new.layout, room):
            managed.prepare(new.mask)
            old.assign(new.mask)
            return
        optimizer, states = self._binding.states_of(managed)
        if isinstance(old, CompactPartition):
            steps = 0 if optimizer is None else step_count(optimizer)
            values, waiting = _whole_values(managed, old, states, new.mask, steps)
        else:
            managed.prepare(new.mask)
            slots = managed.slots
            waiting = np.zeros(old.size, bool)
            if slots is not None and slots.unseeded is not None:
                waiting = slots.waiting().reshape(-1)
            values = [state.numpy().reshape(-1) for state in states]
        self._replace(managed, position, new, values, states, waiting)
        # Functions that were traced before have the old mask: they must not go on with it.
        old.retire()

    def _replace(
        self,
        managed: ManagedVariable,
        position: int,
        new: FullPlan | CompactPlan,
        values: Sequence[np.ndarray],
        states: Sequence[EntryState],
        waiting: np.ndarray,
    ) -> None:
        """Makes the new partition and gives it the slots.

        Args:
            managed: The variable's record.
            position: The variable's position.
            new: The plan.
            values: The values of each slot, for all entries.
            states: The slots.
            waiting: The entries that wait to be seeded: booleans for all entries.
        """
        old = managed.partition
        made = self._builder.partition(old.variable, new, position)
        assert isinstance(made, FullPartition | CompactPartition)
        managed.partition = made
        managed.gradient = NOT_TRACED
        replace_variable(self._inner_optimizer, old.inner_variable, made.inner_variable)
        entries = new.mask.indices() if made.gathers else None
        inner: Variable = made.inner_variable
        shape = tuple(inner.shape)
        for state, of_slot in zip(states, values, strict=True):
            reshape_variable(state.slot, gather_values(of_slot, entries, shape), old.variable)
        self._binding.find_slots(managed)
        self._binding.find_fused()
        if managed.slots is not None and managed.slots.unseeded is not None:
            managed.slots.set_waiting(gather_values(waiting, entries, shape))


def _whole_values(
    managed: ManagedVariable, old: CompactPartition, states: Sequence[EntryState], mask: Mask, steps: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns what compact slots hold, for all entries of the variable, and which entries wait to be seeded.

    Args:
        managed: The variable's record.
        old: Its partition.
        states: Its slots.
        mask: The new mask.
        steps: How many steps the optimizer has made.
    """
    before, slots = old.mask, managed.slots
    waiting = np.zeros(old.size, bool)
    if steps:
        waiting[(mask & ~before).indices()] = True
    entries, everything = before.indices(), np.arange(old.size)
    if slots is not None and slots.unseeded is not None:
        waiting = scatter_values(slots.waiting(), entries, waiting)
    values = [
        scatter_values(state.numpy(), entries, state.initial_values(old.variable, (old.size,), everything))
        for state in states
    ]
    if isinstance(slots, CompactSlots) and (recent := slots.recently_frozen(before)):
        inner = np.arange(old.layout.inner)
        positions = (recent[0][:, None] * old.layout.inner + inner).reshape(-1)
        for of_slot, kept in zip([*values, waiting], recent[1], strict=False):
            of_slot[positions] = kept.reshape(-1)
    return values, waiting
