"""The registry: the masks of one optimizer, from the calls of users to the bits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from freezeops.keras_compat.loading import paths_of_model
from freezeops.keras_compat.variables import Variable
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.notices import warn
from freezeops.partitions.capacity import Capacity
from freezeops.partitions.partition import Partition
from freezeops.partitions.plan import Room
from freezeops.registry import rules, rules_config
from freezeops.registry.changes import Changes, changes_of
from freezeops.registry.planning import Planned, Planner
from freezeops.registry.rules import Loaded, MaskRule
from freezeops.registry.targets import VariableIndex
from freezeops.step.managed import ManagedVariable
from freezeops.step.traced_writes import TracedWrites
from freezeops.storage import saved_names
from freezeops.storage.matching import Matches, find_variables
from freezeops.storage.stored import Stored
from freezeops.storage.stored_mask import StoredMask


class MaskRegistry:
    """The masks of one optimizer. Plain, so that Keras and TensorFlow track nothing in it.

    Args:
        owner: The optimizer.
        maskable: What the user set aside, by path pattern.
        compact: Whether compact state was asked for.
        capacity: What the user made room for in compact state, for all variables or by path pattern.
        after_change: Called with the records whose masks were set.

    Attributes:
        built: Whether the variables are known.
        rules: Calls and loads that came before the build, in order.
        index: The variables.
        managed: The record of each variable.
        saved: By path: mode and layout from the config that the optimizer was made from.
        config_holds_masks: Whether that config holds masks, too.
        problems: Messages of what did not fit in a load with `skip_mismatch` before the build.
        warns_of_problems: Whether a build warns of them; not where a load builds, which does.
        traced_writes: What else writes variables in traced steps.
    """

    def __init__(
        self,
        owner: Any,
        maskable: Mapping[str, str] | None,
        after_change: Callable[[Sequence[ManagedVariable]], None],
        compact: bool = False,
        capacity: Capacity | Mapping[str, Capacity] | None = None,
    ):
        self.owner = owner
        self.maskable = dict(maskable or {})
        self.compact = compact
        self.capacity = dict(capacity) if isinstance(capacity, Mapping) else capacity
        self._after_change = after_change
        self.built = False
        self.rules: list[MaskRule | Loaded] = []
        self.index = VariableIndex([])
        self.managed: list[ManagedVariable] = []
        self.saved: dict[str, dict[str, Any]] = {}
        self.config_holds_masks = False
        self.problems: list[str] = []
        self.warns_of_problems = True
        self.traced_writes = TracedWrites()
        self._warned_of_skipping = False

    # The variables.

    @property
    def partitions(self) -> list[Partition]:
        """The partitions of all variables, in order."""
        return [managed.partition for managed in self.managed]

    def record_of(self, variable: Variable) -> ManagedVariable:
        """Returns the record of a variable.

        Raises:
            TypeError: If it is no variable.
            ValueError: If the optimizer does not know it.
        """
        return self.managed[self.index.position(variable)]

    def check_built(self, what: str) -> None:
        """Raises a `ValueError` unless the optimizer is built."""
        if not self.built:
            raise ValueError(
                f"The optimizer must be built before `{what}` is known: call `build(variables)` "
                f"or train a step first. Received: {self.owner.name!r}, which is not built"
            )

    def warn_of_nothing_skipped(self) -> None:
        """Warns once where gradients of frozen entries were to be skipped in a traced step, and none could be."""
        compact = [each for each in self.managed if each.partition.mode == "compact"]
        if tf.executing_eagerly() or self._warned_of_skipping or any(each.gradient.part for each in compact):
            return
        self._warned_of_skipping = True
        reasons = sorted({each.gradient.reason for each in compact}) or ["no variable has compact state"]
        warn(
            "With `skip_frozen_gradients=True` a gradient must be a product that the step's own function makes. "
            f"Received: none that is; whole gradients were made, as without it: {short(reasons)}"
        )

    def by_position(self, by_pattern: Mapping[str, Any], index: VariableIndex) -> dict[int, Any]:
        """Returns settings of variables by position, given by path pattern; the last that matches counts."""
        found: dict[int, Any] = {}
        for pattern, value in by_pattern.items():
            try:
                found.update(dict.fromkeys(index.find(pattern), value))
            except ValueError:
                # Loaded from a file: `Sequential` loses its name in paths, and the file says what to set aside.
                if not self.saved:
                    raise
        return found

    def rooms(self, index: VariableIndex, capacity: Any = None) -> list[Room]:
        """Returns the room that was asked for each variable in compact state.

        Args:
            index: The variables.
            capacity: For `repack`: what to ask for from now on; by default what was asked for before, and as much
                as the masks need.
        """
        asked = self.capacity if capacity is None else capacity
        named = self.by_position(asked, index) if isinstance(asked, Mapping) else {}
        everywhere = None if isinstance(asked, Mapping) else asked
        at_least = self.built and capacity is None
        return [Room(named.get(i, everywhere), i in named, at_least) for i in range(len(index.variables))]

    # Calls and loads.

    def call(self, rule: MaskRule) -> None:
        """Carries out one call, and warns of layers that move what it freezes."""
        self.add(rule)
        if rule.freezes:
            self.traced_writes.warn_of_layers(rule.target)

    def add(self, *new_rules: MaskRule | Loaded) -> None:
        """Keeps calls and loads for the build, or carries them out: wholly or, on an error, not at all."""
        if not self.built:
            for rule in new_rules:
                if isinstance(rule, MaskRule):
                    rules.check_before_build(rule)
            self.rules += new_rules
            return
        self.carry_out(changes_of(self, new_rules))

    def take_stored(self, stored: Stored, skip: bool = False) -> list[str]:
        """Takes what a store holds: at once or, before the build, as a rule; wholly or, on an error, not at all.

        Args:
            stored: What it holds.
            skip: Whether to do without what does not fit.

        Returns:
            Messages of what did not fit.
        """
        items: list[MaskRule | Loaded] = [Loaded(stored, skip)] if stored.masks else []
        items += rules_config.from_config(stored.rules)
        if not self.built:
            self.rules += items
            return []
        changes = changes_of(self, items, all_rules=bool(stored.rules))
        problems, changes.problems = changes.problems, []
        self.carry_out(changes)
        return problems

    def register_stored(self, stored: Stored, layouts: Mapping[str, Layout], strict: bool) -> None:
        """Registers masks of a file, as by calls: wholly or, on an error, not at all.

        Args:
            stored: The masks.
            layouts: Of those that were stored without.
            strict: Whether every mask must find its variable, also one that freezes nothing.
        """
        masks = replace(stored, rules=[], slots=[])
        loaded = [Loaded(masks, by_call=True, layouts=dict(layouts), strict=strict)] if stored.masks else []
        self.add(*loaded, *rules_config.from_config(stored.rules))

    def find_stored(self, loaded: Loaded, index: VariableIndex) -> Matches:
        """Returns the masks of a load by their variable's position, and what does not fit."""
        # A variable of the model that is not trained here: its mask must not go to another one.
        others = sorted(paths_of_model(self.owner) - set(index.paths))
        saved = self.saved.items()
        layouts = {name: Layout(*each["layout"]) for name, each in saved if "layout" in each} | dict(loaded.layouts)
        return find_variables(loaded.stored, index.named, layouts, loaded.strict, others)

    def carry_out(self, changes: Changes) -> None:
        """Sets masks that nothing can go wrong with any more."""
        changes.warn()
        self.set_masks(changes.masks)
        for position, managed in enumerate(self.managed):
            managed.stated = changes.stated.get(position, managed.stated)
            awaits = managed.awaiting and position not in changes.known
            managed.awaiting = awaits or position in changes.awaiting
        if changes.waiting:
            # After all changes of slots: what waits is what waited when it was stored.
            for position, waiting in changes.waiting.items():
                self.managed[position].waiting = waiting
            self.forget_changes()
        self.traced_writes.warn(self.partitions)

    def set_masks(self, masks: Mapping[int, Mask]) -> None:
        """Sets masks that fit, given by position: all of them or, should it fail half-way, none."""
        changed = {position: self.managed[position] for position in masks}
        before = {position: managed.partition.mask for position, managed in changed.items()}
        begun: list[int] = []
        try:
            for position, managed in changed.items():
                managed.prepare(masks[position])
                begun.append(position)
                managed.partition.assign(masks[position])
            self._after_change(list(changed.values()))
        except BaseException:  # no memory, or an interruption
            for position in begun:
                managed = changed[position]
                # The last one may lack its mask; what was to be done before is done.
                managed.partition.assign(masks[position])
                managed.prepare(before[position])
                managed.partition.assign(before[position])
            self._after_change([changed[position] for position in begun])
            raise

    def forget_changes(self) -> None:
        """Called when masks and slots come from elsewhere: earlier changes no longer count for slots."""
        for managed in self.managed:
            managed.forget_changes()

    # Building.

    def plan(self, index: VariableIndex, inner_built: bool) -> Planned:
        """Returns what a build makes of each variable; see `Planner.plan`."""
        return Planner(self, index).plan(inner_built)

    def keep_planned(self, planned: Planned) -> None:
        """Keeps what was planned, once all is made; problems of loads stay for whoever builds."""
        for position, managed in enumerate(self.managed):
            managed.stated = planned.changes.stated.get(position)
            managed.awaiting = position in planned.awaiting
        self.problems = list(planned.changes.problems)
        self.built = True

    def warn_of_problems(self) -> None:
        """Warns of what did not fit in a load with `skip_mismatch=True` before the build."""
        if self.problems and self.warns_of_problems:
            problems, self.problems = self.problems, []
            warn(f"A load did without what does not fit: {'; '.join(problems)}")

    def check_stated(self) -> None:
        """Raises a `ValueError` where a config left masks out and nobody has stated them since."""
        if awaiting := [managed.partition.path for managed in self.managed if managed.awaiting]:
            raise ValueError(awaiting_message(awaiting))

    # Queries.

    def mask_for(self, variable: Variable) -> Mask:
        """Returns the mask of a variable as it is now."""
        if not self.built:
            return rules.mask_before_build(variable, self.rules)
        return self.record_of(variable).partition.mask

    def masks_by_path(self) -> dict[str, Mask]:
        """Returns the mask of every float variable as it is now, by the variable's path."""
        self.check_built("masks_by_path")
        self.check_stated()
        paths = self.index.paths
        if len(set(paths)) < len(paths):
            twice = sorted({path for path in paths if paths.count(path) > 1})
            raise ValueError(f"Every variable must have a path of its own. Received: {short(twice)} more than once")
        return {partition.path: partition.mask for partition in self._float_partitions()}

    @property
    def density(self) -> float:
        """Trainable entries / all entries, over the float variables."""
        self.check_built("density")
        partitions = self._float_partitions()
        size = sum(partition.size for partition in partitions)
        return sum(partition.mask.count() for partition in partitions) / size if size else 1.0

    def _float_partitions(self) -> list[Partition]:
        return [each for each in self.partitions if tf.as_dtype(each.variable.dtype).is_floating]

    # Stores and configs.

    def stored(self, slots: Sequence[Any] = ()) -> Stored:
        """Returns what stores hold of the masks.

        Args:
            slots: The names of the inner optimizers' variables, as `Stored.slots` has them.

        Raises:
            ValueError: If rules wait for the build that name variables by the object.
        """
        if not self.built:
            return self._stored_rules()
        masks = []
        for (name, shape), managed in zip(self.index.named, self.managed, strict=True):
            partition, stated = managed.partition, managed.stated is not None
            if managed.awaiting or partition.pending:
                if stated:
                    masks.append(StoredMask(name, tuple(shape or ()), None))
            elif partition.mode != "unmasked":
                capacity = partition.describe().config.get("capacity", 0)
                masks.append(
                    StoredMask(
                        name, tuple(shape or ()), partition.mask, stated, partition.mode, capacity, managed.waiting
                    )
                )
        return Stored(list(masks), self.index.named, list(slots))

    def _stored_rules(self) -> Stored:
        waiting = list(self.rules)
        first = Stored()
        if waiting and isinstance(waiting[0], Loaded) and not waiting[0].by_call:
            first = waiting[0].stored
            del waiting[0]
            if first.without_layouts:
                raise ValueError(
                    "An optimizer that loaded masks of an older version must be built before these can be saved: "
                    f"call `optimizer.build(model.trainable_variables)`. Received: {self.owner.name!r}, which is not"
                )
        return replace(first, rules=rules_config.to_config(waiting, None))

    def get_config(self) -> dict[str, Any]:
        """Returns what a config holds of the masks.

        Before the build the rules; after it each variable's mode and layout, and the masks that somebody stated.
        """
        partitions = dict(self.saved)
        config_rules = self.rules
        if self.built:
            names = saved_names.unique(self.index.paths)
            configs = [partition.describe().config for partition in self.partitions]
            partitions = dict(zip(names, configs, strict=True))
            stated = any(managed.stated for managed in self.managed)
            config_rules = [Loaded(self.stored(), by_call=True)] if stated else []
        return {
            "maskable": dict(self.maskable),
            "partitions": partitions,
            "rules": rules_config.to_config(config_rules, rules_config.LIMIT),
        }

    def set_config(self, config: Mapping[str, Any]) -> None:
        """Takes what `get_config` returned."""
        self.saved = dict(config.get("partitions", {}))
        # Those of older versions hold modes and layouts alone.
        self.config_holds_masks = "rules" in config
        self.rules += rules_config.from_config(config.get("rules", ()))


def awaiting_message(paths: Sequence[str]) -> str:
    """The message for a step before masks are there that a config left out."""
    return (
        "An optimizer that was made from a config must be given the masks that the config left out, by loading a "
        "file or by `register_mask`, before it trains. Received: no mask yet for "
        f"{', '.join(map(repr, sorted(paths)))}"
    )
