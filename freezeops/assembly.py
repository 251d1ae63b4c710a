"""The parts of a `MaskedOptimizer` of Keras 3, put together around its inner optimizer."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import keras
import tensorflow as tf

from freezeops.files.checkpoints import MaskStore, restore
from freezeops.files.inner_load import InnerLoads
from freezeops.files.keras_state import KerasState
from freezeops.keras_compat import contract
from freezeops.keras_compat.variables import Variable, check_strategy
from freezeops.keras_compat.wrapped import (
    base_optimizers,
    build_without_slots,
    hide_trained_variables,
    recording_slots,
    strategy_of,
)
from freezeops.partitions.building import PartitionBuilder
from freezeops.partitions.capacity import Capacity
from freezeops.registry.planning import Planned
from freezeops.registry.registry import MaskRegistry, awaiting_message
from freezeops.registry.repack import Repacker
from freezeops.registry.targets import VariableIndex
from freezeops.slots.unfreezing import Policy
from freezeops.step.binding import SlotBinding
from freezeops.step.managed import ManagedVariable
from freezeops.storage.stored import Stored


class Assembly:
    """Builds and repacks; everything else is done by the parts.

    Args:
        owner: The `MaskedOptimizer`.
        inner_optimizer: The optimizer that it wraps.
        compact: Whether compact state was asked for.
        maskable: What is set aside for masks, by path pattern.
        capacity: How many entries can be trainable in compact state.
        policy: What slots hold for entries that become trainable.

    Attributes:
        registry: The masks.
        masks: What TensorFlow tracks of them.
        binding: The slots of the inner optimizer.
        keras_state: The masks in Keras's files.
    """

    def __init__(
        self,
        owner: keras.optimizers.Optimizer,
        inner_optimizer: keras.optimizers.Optimizer,
        compact: bool,
        maskable: Mapping[str, str] | None,
        capacity: Capacity | Mapping[str, Capacity] | None,
        policy: Policy,
    ):
        self._owner = owner
        self._inner_optimizer = inner_optimizer
        self.registry = MaskRegistry(owner, maskable, self._masks_changed, compact, capacity)
        self.masks = MaskStore(self._checkpointed, self._restored)
        self._builder = PartitionBuilder(owner.name, self.masks.add, strategy_of(owner))
        self.binding = SlotBinding(inner_optimizer, policy, self._builder)
        self._loads = InnerLoads(self.registry, self.binding, inner_optimizer)
        self.keras_state = KerasState(self.registry, self._loads)
        self._loads.take_masks_by(self.keras_state.take_entries)

    def _masks_changed(self, changed: Sequence[ManagedVariable]) -> None:
        self.binding.clear_frozen(changed)

    def _checkpointed(self) -> bytes:
        return self.keras_state.stored().to_bytes()

    def _restored(self, stored: Stored) -> None:
        restore(self.registry, stored)

    def build(self, variables: list[Variable]) -> None:
        """Creates the masks and builds the inner optimizer.

        Args:
            variables: The trainable variables of the model.

        Raises:
            ValueError: If a rule matches nothing or does not fit; nothing was created then.
        """
        check_strategy(tf.distribute.get_strategy())
        for base in base_optimizers(self._inner_optimizer):
            contract.check_options(base, self.registry.compact)
        planned = self.registry.plan(VariableIndex(variables), self._inner_optimizer.built)
        planned.changes.warn()
        self._check_can_build(planned)
        is_waiting = self._loads.is_waiting(planned)
        try:
            self.registry.index = planned.index
            # Compact variables are filled at once, and so is what was loaded, also where a function is traced.
            with tf.init_scope() if self.registry.compact or is_waiting else nullcontext():
                self._make_partitions(planned)
        except BaseException:
            # The next attempt begins anew.
            self.registry.managed = []
            self.binding.clear()
            self.masks.clear()
            raise
        build_without_slots(self._owner, variables)
        self.registry.keep_planned(planned)
        if is_waiting:
            with tf.init_scope():
                self._loads.assign_waiting(planned)
        self.registry.warn_of_problems()

    def _check_can_build(self, planned: Planned) -> None:
        if self._inner_optimizer.built and any(plan.mode == "compact" for plan in planned.plans):
            raise ValueError(
                "`inner_optimizer` must not be built before it is wrapped for state='compact': its slots have the "
                f"shapes of whole variables. Received: inner_optimizer={self._inner_optimizer!r}, which is built"
            )
        if not tf.executing_eagerly() and (awaiting := planned.paths_without_mask()):
            # Now, and not when gradients are taken: a `tf.function` whose first trace fails after variables were
            # created does nothing when it is called again (seen in TensorFlow 2.21).
            raise ValueError(awaiting_message(awaiting))

    def _make_partitions(self, planned: Planned) -> None:
        partitions = [
            self._builder.partition(variable, plan, position)
            for position, (variable, plan) in enumerate(zip(planned.index.variables, planned.plans, strict=True))
        ]
        self.registry.managed = [ManagedVariable(partition) for partition in partitions]
        records = None
        if not self._inner_optimizer.built:
            inner_variables = [partition.inner_variable for partition in partitions]
            with recording_slots(self._inner_optimizer) as records:
                # Not under Keras's `no_automatic_dependency_tracking`, as its own wrapper builds: Nadam's and
                # Adafactor's state would not be tracked and not be saved.
                self._inner_optimizer.build([variable for variable in inner_variables if variable is not None])
            if self.registry.compact:
                hide_trained_variables(self._inner_optimizer)
        self.binding.bind(self.registry.managed, records)

    def repack(self, pairs: Sequence[tuple[Any, Any]], capacity: Capacity | Mapping[str, Capacity] | None) -> None:
        """Makes compact state anew; see `MaskedOptimizer.repack`.

        Args:
            pairs: Targets and their new masks; other masks stay.
            capacity: Room to make from now on.
        """
        repacker = Repacker(self.registry, self._builder, self.binding, self._inner_optimizer)
        plans = repacker.plans(pairs, capacity)
        if capacity is not None:
            self.registry.capacity = dict(capacity) if isinstance(capacity, Mapping) else capacity
        with strategy_of(self._owner).scope():
            for position, plan in plans.items():
                repacker.rebuild(position, plan)
            self._masks_changed([self.registry.managed[position] for position in plans])
