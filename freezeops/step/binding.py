"""The inner optimizer's state, bound to the records of the variables: slots, seeding, fused updates, averages."""

from collections.abc import Iterator, Sequence

import keras
import numpy as np

from freezeops.keras_compat.variables import Variable, variable_key
from freezeops.keras_compat.wrapped import SlotRecord, accumulators, average_slots, base_optimizers, trained_variables
from freezeops.partitions.building import PartitionBuilder
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.full import FullPartition
from freezeops.partitions.partition import Partition
from freezeops.slots.catalogue import UpdateFormula
from freezeops.slots.entry_state import EntryState, entry_states
from freezeops.slots.lookup import slots_of
from freezeops.slots.moving import CompactSlots
from freezeops.slots.unfreezing import Policy, Seeding, VariableSlots
from freezeops.step import fused
from freezeops.step.formulas import formula_of
from freezeops.step.fused import FusedUpdates, NotFused
from freezeops.step.managed import ManagedVariable


class SlotBinding:
    """Finds the slots of a built inner optimizer and keeps them in the records of their variables.

    Args:
        inner_optimizer: The inner optimizer.
        policy: What slots hold for entries that become trainable; one of `unfreezing.POLICIES`.
        builder: Makes the variables of bits that wait to be seeded.

    Attributes:
        seedings: What seeds slots in a step, one for each optimizer that updates variables.
    """

    def __init__(self, inner_optimizer: keras.optimizers.Optimizer, policy: Policy, builder: PartitionBuilder):
        self._inner_optimizer = inner_optimizer
        self._policy = policy
        self._builder = builder
        self._managed: dict[str, ManagedVariable] = {}
        self._positions: dict[str, int] = {}
        self._seedings: dict[int, Seeding] = {}

    @property
    def seedings(self) -> list[Seeding]:
        """Each seeds the slots of one optimizer in a step."""
        return list(self._seedings.values())

    def bind(self, managed: Sequence[ManagedVariable], slot_records: Sequence[SlotRecord] | None) -> None:
        """Finds out all that is to be known of the inner optimizer.

        Args:
            managed: The records, in order.
            slot_records: The slots that it made while it was built; `None`: it was built before.

        Raises:
            ValueError: If a compact variable has slots of which nothing is known.
        """
        keys = [variable_key(each.partition.variable) for each in managed]
        self._managed = dict(zip(keys, managed, strict=True))
        self._positions = {key: position for position, key in enumerate(keys)}
        if slot_records is not None:
            self._keep_records(slot_records)
        self.find_slots()
        self.find_fused()

    def clear(self) -> None:
        """Forgets all records."""
        self._managed, self._positions, self._seedings = {}, {}, {}

    def _find(self, variable: Variable) -> ManagedVariable | None:
        # The inner optimizer may have been built with more variables. (A compact one has its variable's key.)
        return self._managed.get(variable_key(variable))

    def _keep_records(self, slot_records: Sequence[SlotRecord]) -> None:
        for record in slot_records:
            self._managed[variable_key(record.variable)].slot_records.append(record)
        recorded = {id(record.slot) for record in slot_records}
        partitions = [managed.partition for managed in self._managed.values()]
        shapes = {tuple(each.inner_variable.shape) for each in partitions if isinstance(each, CompactPartition)}
        for base in base_optimizers(self._inner_optimizer):
            for variable in base.variables:
                if id(variable) not in recorded and tuple(variable.shape) in shapes:
                    raise ValueError(
                        "Slots must be made by `add_optimizer_variables` or `add_variable_from_reference` for "
                        f"state='compact'. Received: {variable.path!r} of {type(base).__name__}, made otherwise"
                    )

    def find_slots(self, only: ManagedVariable | None = None) -> None:
        """Prepares for entries that are unfrozen later.

        Args:
            only: The record of the one variable to look at; by default all.
        """
        for base in base_optimizers(self._inner_optimizer):
            seeding = self._seedings.setdefault(id(base), Seeding(base))
            for variable, slots in slots_of(base):
                managed = self._find(variable)
                if managed is None or (only is not None and managed is not only):
                    continue
                partition = managed.partition
                if isinstance(partition, CompactPartition):
                    states = entry_states(base, managed.slot_records, slots)
                    own: VariableSlots = CompactSlots(variable, partition.variable, base, slots, self._policy, states)
                elif isinstance(partition, FullPartition):
                    own = VariableSlots(variable, base, slots, self._policy)
                else:
                    continue
                managed.slots = own
                if own.seeded:
                    zeros = np.zeros(own.unseeded_bytes, np.uint8)
                    position = self._positions[variable_key(variable)]
                    own.unseeded = self._builder.state(variable, zeros, "unseeded", f"unseeded {position}")
                    seeding.add(variable, own)

    def find_fused(self) -> None:
        """Finds out which variables can be updated in one pass."""
        for managed in self._managed.values():
            managed.fused = NotFused(fused.reason_against(managed.partition))
        for base in base_optimizers(self._inner_optimizer):
            formula = formula_of(base, self._inner_optimizer)
            updates: FusedUpdates | None = None
            if isinstance(formula, UpdateFormula):
                updates = FusedUpdates(self._inner_optimizer, base, formula, self._seedings[id(base)])
            for number, variable in enumerate(trained_variables(base)):
                found = self._find(variable)
                if found is None:
                    continue
                reason = formula if isinstance(formula, str) else fused.reason_against(found.partition)
                if updates is None or reason:
                    found.fused = NotFused(reason)
                else:
                    found.fused = updates
                    updates.add(found.partition, number, found.slots)

    def states_of(self, managed: ManagedVariable) -> tuple[keras.optimizers.Optimizer | None, list[EntryState]]:
        """Returns the optimizer that trains a variable, and all that it keeps for its entries."""
        for base in base_optimizers(self._inner_optimizer):
            for variable, slots in slots_of(base):
                if self._find(variable) is managed:
                    return base, entry_states(base, managed.slot_records, slots)
        return None, []

    def averages(self) -> Iterator[tuple[Partition, Variable]]:
        """Yields the slots of moving averages, each with the partition of its variable."""
        for variable, average in average_slots(self._inner_optimizer):
            if (managed := self._find(variable)) is not None:
                yield managed.partition, average

    def clear_frozen(self, changed: Sequence[ManagedVariable]) -> None:
        """Clears what accumulators and averages hold of entries that are frozen now.

        Accumulated gradients of them must neither be applied nor count in a norm.

        Args:
            changed: The records whose masks have changed.
        """
        partitions = {id(managed.partition) for managed in changed}
        for variable, accumulator in accumulators(self._inner_optimizer):
            found = self._find(variable)
            if found is not None and id(found.partition) in partitions:
                found.partition.clear_frozen(accumulator)
        for partition, average in self.averages():
            if id(partition) in partitions:
                partition.fill_frozen(average)
