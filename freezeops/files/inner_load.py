"""The state of the optimizers inside a `MaskedOptimizer`: named by path, and fitted to the masks of a file."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from freezeops.keras_compat import stored_state
from freezeops.keras_compat.loading import paths_of_model
from freezeops.keras_compat.stored_state import Load, SlotName
from freezeops.keras_compat.wrapped import step_count, wrapped_optimizers
from freezeops.masks.mask import Mask
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.full import FullPartition
from freezeops.partitions.partition import MaskedPartition
from freezeops.registry import rules_config
from freezeops.registry.changes import changes_of
from freezeops.registry.planning import Planned
from freezeops.registry.registry import MaskRegistry
from freezeops.registry.rules import Loaded
from freezeops.slots.loading import fitted_slot
from freezeops.step.binding import SlotBinding
from freezeops.step.managed import ManagedVariable
from freezeops.storage import saved_names
from freezeops.storage.stored import Stored


class InnerLoads:
    """The `InnerState` of an optimizer of Keras 3.

    Args:
        registry: The masks.
        binding: The slots of the inner optimizer.
        inner_optimizer: The inner optimizer.
    """

    def __init__(self, registry: MaskRegistry, binding: SlotBinding, inner_optimizer: keras.optimizers.Optimizer):
        self._registry = registry
        self._binding = binding
        self._inner_optimizer = inner_optimizer
        self._take_masks: Callable[[Mapping[str, np.ndarray]], None] | None = None

    def take_masks_by(self, take: Callable[[Mapping[str, np.ndarray]], None]) -> None:
        """Sets what loads the masks of a file that was saved with a scaler outside, which is inside now."""
        self._take_masks = take

    def slot_names(self) -> list[tuple[str, list[tuple[str | None, str]]]]:  # noqa: D102
        names = [name for name, _ in self._registry.index.named]
        return [
            (type(optimizer).__name__, [(None if i is None else names[i], name) for i, name in own])
            for optimizer, own in self._own_names()
        ]

    def _own_names(self) -> Iterator[tuple[keras.optimizers.Optimizer, list[SlotName]]]:
        """Yields each optimizer inside with the names of its own variables."""
        positions = {
            id(record.slot): position
            for position, managed in enumerate(self._registry.managed)
            for record in managed.slot_records
        }
        for optimizer in wrapped_optimizers(self._inner_optimizer):
            yield optimizer, stored_state.names_of(optimizer, self._registry.index.paths, positions)

    def begin(self, stored: Stored, skip: bool, masks: Mapping[int, Mask] | None = None) -> None:  # noqa: D102
        load = Load(skip)
        if self._registry.built:
            load = self._new_load(stored, skip)
            load.undo = self._undo_of(stored, skip) if masks is None else [functools.partial(self._unload, masks)]
        load.take_masks = self._take_masks
        stored_state.begin(load, self._inner_optimizer)

    def refuse(self) -> None:  # noqa: D102
        stored_state.begin(Load(False, refused=True), self._inner_optimizer)

    def load_bare(self, arrays: list[np.ndarray], skip: bool) -> None:  # noqa: D102
        stored_state.load_bare(self._inner_optimizer, arrays)

    def waits(self, stored: Stored) -> bool:  # noqa: D102
        # With compact state all variables would have full state while nothing says what is frozen.
        stated = any(mask.freezes for mask in stored.masks)
        return self._registry.compact and not stated and not stored.rules and not self._registry.rules

    # What came before the build.

    def is_waiting(self, planned: Planned) -> bool:
        """Returns whether something was loaded before the build."""
        return bool(planned.loaded) or any(map(stored_state.is_waiting, wrapped_optimizers(self._inner_optimizer)))

    def assign_waiting(self, planned: Planned) -> None:
        """Sets what was loaded before the build: the optimizers' state, then what waits to be seeded.

        The optimizer is built by then and can go on: what does not fit is forgotten.

        Raises:
            ValueError: If something does not fit.
        """
        loads = [rule.stored for rule in self._registry.rules if isinstance(rule, Loaded) and rule.stored.slots]
        load = self._new_load(loads[-1] if loads else Stored(), False)
        for optimizer in wrapped_optimizers(self._inner_optimizer):
            stored_state.assign_waiting(optimizer, load)
        for position, waiting in planned.changes.waiting.items():
            self._registry.managed[position].waiting = waiting
        for position, loaded in planned.loaded.items():
            self._change_since_load(self._registry.managed[position], loaded)

    def _change_since_load(self, managed: ManagedVariable, loaded: Mask) -> None:
        """Carries the policy out for entries that calls unfroze after a load, before the build."""
        slots, partition = managed.slots, managed.partition
        newly = partition.mask & ~loaded
        if slots is None or not newly.count():
            return
        if isinstance(partition, CompactPartition):
            optimizer, _ = self._binding.states_of(managed)
            if optimizer is not None and step_count(optimizer):
                waiting = managed.waiting
                managed.waiting = newly if waiting is None else waiting | newly
        elif isinstance(partition, FullPartition):
            slots.change(loaded & partition.mask, partition.mask, partition.layout)

    # A load, and what takes it back.

    def _new_load(self, stored: Stored, skip: bool) -> Load:
        """Returns how the state of the optimizers inside is found in a file; built."""
        registry = self._registry
        found = registry.find_stored(Loaded(stored), registry.index).masks
        # Shapes do not count: a slot that does not fit is told from one of no variable.
        own_paths = registry.index.named
        others = sorted(paths_of_model(registry.owner) - set(registry.index.paths))
        pairs = saved_names.pair(
            [(name, None) for name, _ in stored.variables], [*own_paths, *((path, None) for path in others)]
        )
        found_at = {name: pairs.found.get(i, -1) for i, (name, _) in enumerate(stored.variables)}
        positions = {name: i if i < len(own_paths) else -1 for name, i in found_at.items()}
        own, saved = {}, {}
        for number, (optimizer, names) in enumerate(self._own_names()):
            own[id(optimizer)] = names
            if number < len(stored.slots) and stored.slots[number][0] == type(optimizer).__name__:
                saved[id(optimizer)] = [
                    (None if name is None else positions.get(name, -1), slot) for name, slot in stored.slots[number][1]
                ]

        def fit(array: np.ndarray, slot: keras.Variable, position: int | None) -> np.ndarray | None:
            partition = None if position is None else registry.managed[position].partition
            if position is None or not isinstance(partition, MaskedPartition):
                return array if array.shape == tuple(slot.shape) else None
            return fitted_slot(array, slot, partition, found.get(position))

        return Load(skip, own, saved, fit)

    def _unload(self, masks: Mapping[int, Mask]) -> None:
        """Gives variables the masks that they would have if the optimizer had been built without a load.

        Args:
            masks: By position; entries of other variables are trainable.
        """
        fitting: dict[int, Mask] = {}
        for position, partition in enumerate(self._registry.partitions):
            if not isinstance(partition, MaskedPartition):
                continue
            mask = masks.get(position, Mask.trainable(tuple(partition.variable.shape)))
            try:
                fitting[position] = partition.fit(mask)
            except ValueError:
                # No room in compact state, which was made for the file's masks.
                raise ValueError(
                    "The masks of a refused file could not be taken back: compile with a new optimizer. "
                    f"{partition.path!r} has no room in compact state for what was trainable before"
                ) from None
        for position, managed in enumerate(self._registry.managed):
            managed.stated = "call" if position in masks else None
        self._registry.set_masks(fitting)

    def _undo_of(self, stored: Stored, skip: bool) -> list[Callable[[], None]]:
        """Returns calls that set everything that a load may change to what it is now; the last one comes first."""
        registry = self._registry
        undo: list[Callable[[], None]] = []
        changes = changes_of(
            registry, [Loaded(stored, skip), *rules_config.from_config(stored.rules)], bool(stored.rules)
        )
        notes = [(managed, managed.stated, managed.awaiting) for managed in registry.managed]

        def set_back(partition: MaskedPartition, mask: Mask, values: list[tuple[Any, np.ndarray]]) -> None:
            partition.assign(mask)
            for variable, value in values:
                variable.assign(value)

        def note_back() -> None:
            for managed, stated, awaiting in notes:
                managed.stated, managed.awaiting = stated, awaiting
            registry.forget_changes()

        for position in changes.masks:
            managed = registry.managed[position]
            partition = managed.partition
            if isinstance(partition, MaskedPartition) and not partition.pending:
                undo.append(functools.partial(set_back, partition, partition.mask, managed.state_values()))
        return [note_back, *undo]
