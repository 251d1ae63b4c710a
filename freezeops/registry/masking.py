"""What every kind of `MaskedOptimizer` has: its masks, from the users' calls to the bits and into files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from freezeops.keras_compat.loading import paths_of_model, weights_being_loaded
from freezeops.keras_compat.variables import Variable, variable_path
from freezeops.keras_compat.wrapped import wrapped_optimizers
from freezeops.masks import layout
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.notices import warn
from freezeops.ops.gradients import Gradient
from freezeops.partitions import partition
from freezeops.partitions.partition import MaskedPartition, Partition
from freezeops.registry import report, rules, rules_config
from freezeops.registry.rules import Loaded, Rule
from freezeops.step.traced_writes import TracedWrites, guarded
from freezeops.storage import saved_names
from freezeops.storage.stored import Stored, StoredMask, find, refusal

INNER_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)
"""Arguments that every optimizer takes and that are meant for the inner one."""


class State:
    """What an optimizer knows of its masks; plain, so that nothing in it is tracked twice.

    Args:
        maskable: What the user set aside, by path pattern.
    """

    def __init__(self, maskable: Mapping[str, str] | None = None):
        self.maskable = dict(maskable or {})
        self.built = False
        self.rules: list[Rule | Loaded] = []
        self.index = rules.VariableIndex([])
        self.partitions: list[Partition] = []
        # By path: way and layout from the config that this was made from, and whether that holds masks, too.
        self.saved: dict[str, dict[str, Any]] = {}
        self.config_holds_masks = False
        # By position: whether a call or a load named the variable last. What neither did states nothing.
        self.stated: dict[int, str] = {}
        # Positions of masks that a config left out, and that nobody has stated since.
        self.awaiting: set[int] = set()
        self.traced_writes = TracedWrites()
        # What did not fit in a load with `skip_mismatch` before the build, in words.
        self.problems: list[str] = []


@dataclass
class Changes:
    """What calls and loads change.

    Attributes:
        masks: By position: the new mask, in the variable's layout.
        waiting: By position: the entries that wait to be seeded, of masks that were loaded.
        stated: By position: `"call"` or `"load"`.
        replaced: By path: how many entries a load changed that a call had stated.
        known: Positions of variables whose whole mask was stated.
        awaiting: Positions of masks that were left out where they come from.
        passed: Paths of masks of variables of the model that the optimizer does not train.
        problems: What does not fit, in words.
        without_layouts: Whether something was stored before layouts were.
    """

    masks: dict[int, Mask] = field(default_factory=dict)
    waiting: dict[int, Mask | None] = field(default_factory=dict)
    stated: dict[int, str] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    awaiting: set[int] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    without_layouts: bool = False

    def warn(self) -> None:
        """Says once what somebody may not expect; before anything is changed, should a warning be an error."""
        if self.without_layouts:
            warn(
                "Masks were loaded that an older version of freezeops stored without their layout; each had one "
                "reading. Save them again to store it."
            )
        if self.passed:
            warn(
                f"Masks of variables that are not trained here were passed over: {short(self.passed)}. Load the file "
                "again into an optimizer that trains them."
            )
        if self.replaced:
            entries = ", ".join(f"{path!r} ({count:,} entries)" for path, count in self.replaced.items())
            warn(
                f"A load replaces masks that calls had stated: {entries}. Make these calls after the load if they are "
                "to count."
            )


@dataclass
class Planned:
    """What a build is going to do.

    Attributes:
        plans: Of each variable.
        masks: By position: the masks that calls and loads stated.
        loaded: By position: the masks that were loaded, before later calls.
        awaiting: Positions of masks that a config left out.
        changes: What else calls and loads said.
    """

    plans: list[partition.Plan] = field(default_factory=list)
    masks: dict[int, Mask] = field(default_factory=dict)
    loaded: dict[int, Mask] = field(default_factory=dict)
    awaiting: set[int] = field(default_factory=set)
    changes: Changes = field(default_factory=Changes)


class _Store(Protocol):
    """A group of a Keras file."""

    def keys(self) -> Iterable[str]: ...
    def __getitem__(self, key: str) -> Any: ...
    def __setitem__(self, key: str, value: Any) -> None: ...


class Masking:
    """The part of a `MaskedOptimizer` that no version of Keras has a say in: a mix-in.

    The class that takes it in sets `name` and `_state`.
    """

    name: str
    _state: State
    _builds_for_load = False
    _refused: tuple[Any, BaseException] | None = None
    _shifted = False

    # What the class that takes this in says.

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the masks and builds the inner optimizer."""
        raise NotImplementedError

    def _build_once(self, variables: Sequence[Variable]) -> None:
        """Builds the optimizer if it is not."""
        if not self._state.built:
            self.build(variables)

    def _before_change(self, position: int, mask: Mask) -> None:
        """Called before a variable's mask is set, when nothing can go wrong any more."""

    def _after_change(self, positions: set[int]) -> None:
        """Called after masks were set."""

    def _after_load(self) -> None:
        """Called after masks were set from a file or from weights."""

    def _waiting(self, position: int) -> Mask | None:
        """The entries of a variable that wait to be seeded; `None`: none."""
        return None

    def _set_waiting(self, position: int, waiting: Mask | None) -> None:
        """Sets the entries of a variable that wait to be seeded."""

    def _slot_names(self) -> list[tuple[str, list[tuple[str | None, str]]]]:
        """What the variables of the optimizers inside are, as `Stored.slots` says."""
        return []

    def _update_notes(self) -> list[str] | None:
        """For each variable how it is updated; `None`: not to be shown."""
        return None

    def _slot_bytes(self) -> list[tuple[int, int]] | None:
        """For each variable the bytes of its slots, and what they would be in full state; `None`: not to be shown."""
        return None

    # Masks.

    def register_mask(self, target: Any, mask: Any) -> None:
        """Replaces the masks of variables.

        Args:
            target: A variable, a layer or model (its trainable variables), a path
                pattern (`re.fullmatch` on the variable's path or on its tail after
                a `/`), or a list of those.
            mask: `fz.Mask`, or array-like of booleans of the variable's rank, where
                axes of length 1 broadcast, or a scalar. True = trainable.

        Raises:
            TypeError: If `mask` is not boolean, or `target` of no known kind.
            ValueError: If the mask does not fit, or the target is unknown,
                ambiguous or not of a floating dtype. Nothing has changed then.
        """
        rule = Rule("register_mask", target, mask)
        self._add(rule)
        self._state.traced_writes.warn_of_layers(rule)

    def register_masks(self, masks: Mapping[Any, Any] | Sequence[tuple[Any, Any]]) -> None:
        """`register_mask` for several targets at once: all of them or, on an error, none.

        Args:
            masks: Mapping of targets to masks, or a list of pairs of those, since variables
                are no keys of a mapping.

        Raises:
            TypeError: If it is neither; otherwise as for `register_mask`.
        """
        self._add(*(Rule("register_mask", target, mask) for target, mask in mask_pairs(masks)))

    def freeze(self, target: Any, where: Any = None, permanent: bool = False) -> None:
        """Freezes entries.

        Args:
            target: As for `register_mask`. Freezing a layer with state that its
                forward pass changes (BatchNormalization) warns that this still moves.
            where: The entries to freeze: a boolean array (True = freeze), an index
                expression such as `np.s_[:10, 3]`, or a list of integer indices along
                the first axis. Every entry by default. As many zeros and ones as an
                axis is long could be booleans or indices, and are refused.
            permanent: Leave the variable out of the inner optimizer altogether: no
                slots and no cost, and no way to unfreeze. Only before the optimizer
                is built, and only for whole variables.

        Raises:
            TypeError: If `where` is a `Mask`, or of no known kind.
            ValueError: As for `register_mask`.
            IndexError: If an index is outside of the variable.
        """
        if permanent and where is not None:
            raise ValueError(
                "`where` must be None with `permanent=True`, which freezes whole variables. Received: "
                f"where={short(where)}"
            )
        rule = Rule("freeze", target, where, permanent)
        self._add(rule)
        self._state.traced_writes.warn_of_layers(rule)

    def unfreeze(self, target: Any, where: Any = None) -> None:
        """Makes entries trainable; arguments and errors as for `freeze`."""
        self._add(Rule("unfreeze", target, where))

    def train_only(self, target: Any, where: Any) -> None:
        """Makes entries trainable and freezes every other entry of those variables.

        Arguments and errors as for `freeze`.
        """
        rule = Rule("train_only", target, where)
        self._add(rule)
        self._state.traced_writes.warn_of_layers(rule)

    def mask_for(self, variable: Variable) -> Mask:
        """The mask of a variable as it is now.

        Args:
            variable: A variable that the optimizer knows; before it is built, any.

        Returns:
            An `fz.Mask`.

        Raises:
            ValueError: If the optimizer does not know the variable.
        """
        if not self._state.built:
            return rules.mask_before_build(variable, self._state.rules)
        return self._partition(variable).mask

    def masks_by_path(self) -> dict[str, Mask]:
        """The mask of every float variable as it is now, by the variable's path.

        Raises:
            ValueError: If the optimizer is not built, or two variables have one path.
        """
        self._check_built("masks_by_path")
        self._check_stated()
        paths = self._state.index.paths
        if len(set(paths)) < len(paths):
            twice = sorted({path for path in paths if paths.count(path) > 1})
            raise ValueError(f"Every variable must have a path of its own. Received: {short(twice)} more than once")
        return {part.path: part.mask for part in self._state.partitions if tf.as_dtype(part.variable.dtype).is_floating}

    @property
    def density(self) -> float:
        """Trainable entries / all entries, over the float variables of the built optimizer."""
        self._check_built("density")
        parts = [part for part in self._state.partitions if tf.as_dtype(part.variable.dtype).is_floating]
        size = sum(part.size for part in parts)
        return sum(part.mask.count() for part in parts) / size if size else 1.0

    def summary(self, console: Any = None) -> None:
        """Prints a table: variable, shape, frozen, density, mask bytes, way.

        With compact state also the bytes of the inner optimizer's slots, and those saved.

        Args:
            console: `rich.console.Console` to print to. Defaults to standard output.
        """
        if self._state.built:
            report.print_summary(self.name, self._state.partitions, console, self._slot_bytes(), self._update_notes())
        else:
            report.print_rules(self.name, self._state.rules, console)

    @tf.autograph.experimental.do_not_convert
    def mask_gradients(
        self, gradients: Sequence[Gradient | None], variables: Sequence[Variable]
    ) -> list[Gradient | None]:
        """Masks gradients with the live masks, for people who clip by themselves.

        The optimizer masks by itself; masking twice changes nothing.

        Args:
            gradients: Gradients; `None` stays `None`.
            variables: Their variables. They build the optimizer where it is not.

        Returns:
            A list of gradients with +0.0 in the frozen entries.

        Raises:
            ValueError: If the lists differ in length or a variable is unknown.
        """
        gradients, variables = list(gradients), list(variables)
        check_lengths(gradients, variables)
        self._build_once(variables)
        return [
            None if gradient is None else self._partition(variable).masked(gradient)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    @tf.autograph.experimental.do_not_convert
    def frozen_entries(self) -> AbstractContextManager[None]:
        """Keeps frozen entries around writes of your own: they come out of the block as they went in, bit for bit.

        For a train step that writes weights itself, as sharpness-aware minimization
        does; trainable entries keep what the block made of them. In eager mode, in
        `tf.function`, under XLA, and in a replica of a strategy, where its own copies are
        kept. Frozen is what is frozen as the block begins; variables that were frozen
        with `permanent=True` are kept whole. In eager mode frozen entries are restored
        after an exception, too. (A traced function that fails half-way stops before they
        are; put the block around its call, then.) Blocks may be nested, and steps of the
        optimizer may lie inside.

        Returns:
            A context manager.

        Raises:
            ValueError: If the optimizer is not built: `build(variables)` does that.

        Example:

        ```python
        with optimizer.frozen_entries():
            for variable in model.trainable_variables:
                variable.assign(tf.clip_by_value(variable, -0.01, 0.01))
        ```
        """
        if not self._state.built:
            raise ValueError(
                "The optimizer must be built before `frozen_entries()` can keep any: call "
                f"`optimizer.build(model.trainable_variables)`. Received: {self.name!r}, which is not built"
            )
        return FrozenBlock(self._state.partitions, self._averages)

    def _averages(self) -> Iterable[tuple[Partition, Variable]]:
        """The slots of moving averages, each with the partition of its variable."""
        raise NotImplementedError

    def _add(self, *new_rules: Rule | Loaded) -> None:
        """Keeps rules for later, or carries them out: wholly or, on an error, not at all."""
        if not self._state.built:
            for rule in new_rules:
                if isinstance(rule, Rule):
                    rules.check_before_build(rule)
            self._state.rules += new_rules
            return
        self._carry_out(self._changes(new_rules))

    def _changes(self, new_rules: Iterable[Rule | Loaded], all_rules: bool = False) -> "Changes":
        """What calls and loads make of the masks of the built optimizer, with nothing changed yet.

        Args:
            new_rules: The calls and loads.
            all_rules: Whether these are all calls that somebody made, so that masks that a config left out begin anew.
        """
        changes = Changes()
        index, parts = self._state.index, self._state.partitions
        for rule in new_rules:
            if isinstance(rule, Loaded):
                self._load_changes(rule, changes)
                continue
            if not tf.executing_eagerly():
                raise RuntimeError(
                    "Masks must be changed outside of `tf.function`, for example from a callback. "
                    f"Received: {rule.action}() while a function is traced"
                )
            for position in index.find(rule.target):
                part = parts[position]
                if rule.permanent and part.way != "permanent":
                    raise ValueError(
                        "`permanent` must be used before the optimizer is built. Received: "
                        f"permanent=True for {part.path!r}, for which the inner optimizer has slots"
                    )
                mask = changes.masks.get(position, part.mask)
                begins = all_rules and position in self._state.awaiting - changes.known
                if begins:
                    mask = Mask.trainable(tuple(part.variable.shape))
                changes.masks[position] = part.fit(rule.apply_to(mask))
                changes.stated[position] = "call"
                if rule.states_all or begins:
                    changes.known.add(position)
                    changes.awaiting.discard(position)
        return changes

    def _load_changes(self, loaded: Loaded, changes: "Changes") -> None:
        """Adds what a load changes in the built optimizer."""
        index, parts = self._state.index, self._state.partitions
        found, problems = self._find(loaded, index, changes)
        if problems and not loaded.skip:
            raise refusal(problems, index.named)
        for position, stored in found.items():
            part = parts[position]
            if stored.mask is None and stored.stated:
                changes.awaiting.add(position)
            if stored.mask is None or not (stored.stated or part.pending):
                continue
            before = changes.masks.get(position)
            if before is None and not part.pending:
                before = part.mask
            try:
                mask = part.fit(stored.mask)
            except ValueError as error:
                if not loaded.skip:
                    raise
                problems.append(str(error))
                continue
            by_call = changes.stated.get(position, self._state.stated.get(position)) == "call"
            by_call = by_call and position not in self._state.awaiting | changes.awaiting
            if by_call and before is not None and not loaded.by_call and mask != before:
                changes.replaced[part.path] = (mask ^ before).count()
            changes.masks[position] = mask
            changes.waiting[position] = stored.waiting
            changes.awaiting.discard(position)
            changes.known.add(position)
            if stored.stated:
                changes.stated[position] = "call" if loaded.by_call else "load"
        changes.problems += problems
        changes.without_layouts |= loaded.stored.without_layouts

    def _carry_out(self, changes: "Changes") -> None:
        """Sets masks that nothing can go wrong with any more."""
        changes.warn()
        self._set_masks(changes.masks)
        self._state.stated |= changes.stated
        self._state.awaiting -= changes.known
        self._state.awaiting |= changes.awaiting
        if changes.waiting:
            # After all changes of slots: what waits is what waited when it was stored.
            for position, waiting in changes.waiting.items():
                self._set_waiting(position, waiting)
            self._after_load()
        self._state.traced_writes.warn(self._state.partitions)

    def _set_masks(self, masks: Mapping[int, Mask]) -> None:
        """Sets masks that fit, given by position: all of them or, should it fail half-way, none."""
        parts = self._state.partitions
        before = {position: parts[position].mask for position in masks}
        begun: list[int] = []
        try:
            for position, mask in masks.items():
                self._before_change(position, mask)
                begun.append(position)
                parts[position].assign(mask)
            self._after_change(set(masks))
        except BaseException:  # no memory, or an interruption
            for position in begun:
                # The last one may lack its mask; what was to be done before is done.
                parts[position].assign(masks[position])
                self._before_change(position, before[position])
                parts[position].assign(before[position])
            self._after_change(set(begun))
            raise

    def _register_stored(self, stored: Stored, layouts: Mapping[str, layout.Layout], strict: bool) -> None:
        """Registers masks of a file, as by calls: wholly or, on an error, not at all.

        Args:
            stored: The masks.
            layouts: Of those that were stored without.
            strict: Whether every mask must find its variable, also one that freezes nothing.
        """
        masks = replace(stored, rules=[], slots=[])
        loaded = [Loaded(masks, by_call=True, layouts=dict(layouts), strict=strict)] if stored.masks else []
        self._add(*loaded, *rules_config.from_config(stored.rules))

    def _find(
        self, loaded: Loaded, index: rules.VariableIndex, changes: "Changes"
    ) -> tuple[dict[int, StoredMask], list[str]]:
        """Which variable each mask of a load is for, and what does not fit."""
        # A variable of the model that is not trained here: its mask must not go to another one.
        others = sorted(paths_of_model(self) - set(index.paths))
        layouts = self._known_layouts(loaded)
        return find(loaded.stored, index.named, layouts, loaded.strict, others, changes.passed)

    def _known_layouts(self, loaded: Loaded) -> dict[str, layout.Layout]:
        """Layouts of masks that were stored without, by the stored name, where a config says them."""
        saved = self._state.saved.items()
        return {name: layout.Layout(*each["layout"]) for name, each in saved if "layout" in each} | dict(loaded.layouts)

    # Building.

    def _plan(self, index: rules.VariableIndex, inner_built: bool) -> "Planned":
        """What becomes of each variable, with nothing changed yet."""
        maskable = self._by_position(self._state.maskable, index)
        saved = self._saved_partitions(index)
        planned = Planned()
        masks = planned.masks
        permanent: set[int] = set()
        for rule in self._state.rules:
            if isinstance(rule, Loaded):
                self._plan_load(rule, index, planned, saved)
                continue
            for position in index.find(rule.target):
                variable = index.variables[position]
                rules.check_maskable_dtype(variable)
                planned.changes.stated[position] = "call"
                if rule.entries is rules.LEFT_OUT:
                    planned.awaiting.add(position)
                    continue
                if rule.states_all:
                    planned.awaiting.discard(position)
                start = masks.get(position, Mask.trainable(tuple(variable.shape)))
                masks[position] = rule.apply_to(start)
                if rule.permanent:
                    permanent.add(position)
                if position in permanent and masks[position].count():
                    raise ValueError(
                        "A variable that was frozen with `permanent=True` must stay frozen. "
                        f"Received: {rule.action}() of {index.paths[position]!r}"
                    )
        if permanent and inner_built:
            raise ValueError(
                "`permanent` must be used before the inner optimizer is built. Received: "
                f"permanent=True for {short([index.paths[i] for i in sorted(permanent)])}"
            )
        if self._state.config_holds_masks:
            # What it has no mask for, nobody stated.
            for i, each in enumerate(saved):
                if each is not None and each["way"] == "compact" and i not in planned.awaiting:
                    masks.setdefault(i, Mask.trainable(tuple(index.variables[i].shape)))
        for position in planned.awaiting:
            masks.pop(position, None)
        planned.plans = self._choose(index, masks, permanent, maskable, saved)
        return planned

    def _plan_load(
        self,
        loaded: Loaded,
        index: rules.VariableIndex,
        planned: "Planned",
        saved: list[dict[str, Any] | None],
    ) -> None:
        """Adds a load that came before the build."""
        found, problems = self._find(loaded, index, planned.changes)
        if problems and not loaded.skip:
            if not loaded.by_call:
                self._state.rules.remove(loaded)  # so that the next attempt goes on without it
            raise refusal(problems, index.named)
        for position, stored in found.items():
            if not tf.as_dtype(index.variables[position].dtype).is_floating:
                continue
            if stored.mask is None:
                planned.awaiting.add(position)
                planned.changes.stated[position] = "call"
                continue
            if stored.way == "compact" and saved[position] is None:
                # Room as in the optimizer that stored it: its slots have that shape.
                saved[position] = {
                    "way": "compact",
                    "layout": list(stored.mask.layout),
                    "capacity": stored.capacity,
                }
                planned.masks.setdefault(position, Mask.trainable(stored.shape))
            if not stored.stated:
                continue
            before = planned.masks.get(position)
            by_call = planned.changes.stated.get(position) == "call" and position not in planned.awaiting
            if by_call and before is not None and not loaded.by_call and stored.mask != before:
                planned.changes.replaced[index.paths[position]] = (stored.mask ^ before).count()
            planned.masks[position] = stored.mask
            planned.awaiting.discard(position)
            planned.changes.stated[position] = "call" if loaded.by_call else "load"
            if not loaded.by_call:
                planned.loaded[position] = stored.mask
                planned.changes.waiting[position] = stored.waiting
        planned.changes.problems += problems
        planned.changes.without_layouts |= loaded.stored.without_layouts

    def _keep_planned(self, planned: "Planned") -> None:
        """Notes what was planned, once all is created; problems of loads stay for whoever builds."""
        self._state.stated = dict(planned.changes.stated)
        self._state.awaiting = set(planned.awaiting)
        self._state.problems = list(planned.changes.problems)

    def _warn_of_problems(self) -> None:
        """Warns of what did not fit when this was built after a load with `skip_mismatch=True`."""
        if self._builds_for_load:
            return  # which says it
        if problems := self._state.problems:
            self._state.problems = []
            warn(f"A load did without what does not fit: {'; '.join(problems)}")

    def _check_stated(self) -> None:
        """Raises where a config left masks out and nobody has stated them since."""
        if self._state.awaiting:
            raise ValueError(self._awaiting_message([self._state.index.paths[i] for i in self._state.awaiting]))

    @staticmethod
    def _awaiting_message(paths: Sequence[str]) -> str:
        return (
            "An optimizer that was made from a config must be given the masks that the config left out, by loading a "
            "file or by `register_mask`, before it trains. Received: no mask yet for "
            f"{', '.join(map(repr, sorted(paths)))}"
        )

    def _choose(
        self,
        index: rules.VariableIndex,
        masks: Mapping[int, Mask],
        permanent: set[int],
        maskable: Mapping[int, str],
        saved: Sequence[dict[str, Any] | None],
    ) -> list[partition.Plan]:
        """The plan of each variable, given by position what is asked for."""
        return [
            partition.choose(variable, masks.get(i), i in permanent, maskable.get(i), saved[i])
            for i, variable in enumerate(index.variables)
        ]

    def _by_position(self, by_pattern: Mapping[str, Any], index: rules.VariableIndex) -> dict[int, Any]:
        """Settings of variables, given by path pattern; the last that matches counts."""
        found: dict[int, Any] = {}
        for pattern, value in by_pattern.items():
            try:
                found.update(dict.fromkeys(index.find(pattern), value))
            except ValueError:
                # Loaded from a file: `Sequential` loses its name in paths, and the file says what to set aside.
                if not self._state.saved:
                    raise
        return found

    def _saved_partitions(self, index: rules.VariableIndex) -> list[dict[str, Any] | None]:
        """Way and layout of each variable from the config that this was made from, if any."""
        found: list[dict[str, Any] | None] = [None] * len(index.paths)
        saved = list(self._state.saved.items())
        for i, position in saved_names.pair([(name, None) for name, _ in saved], index.named).found.items():
            found[position] = saved[i][1]
        return found

    def _check_built(self, what: str) -> None:
        if not self._state.built:
            raise ValueError(
                f"The optimizer must be built before `{what}` is known: call `build(variables)` "
                f"or train a step first. Received: {self.name!r}, which is not built"
            )

    def _partition(self, variable: Variable) -> Partition:
        return self._state.partitions[self._state.index.position(variable)]

    # State.

    def _mask_config(self) -> dict[str, Any]:
        """What a config holds of the masks.

        Before the build the rules; after it each variable's way and layout, and the masks that somebody stated.
        """
        partitions = dict(self._state.saved)
        config_rules = self._state.rules
        if self._state.built:
            names = saved_names.unique(self._state.index.paths)
            partitions = {name: part.get_config() for name, part in zip(names, self._state.partitions, strict=True)}
            config_rules = [Loaded(self._stored(), by_call=True)] if self._state.stated else []
        return {
            "maskable": dict(self._state.maskable),
            "partitions": partitions,
            "rules": rules_config.to_config(config_rules, rules_config.LIMIT),
        }

    def _set_config(self, config: Mapping[str, Any]) -> None:
        """Takes what `_mask_config` returned."""
        self._state.saved = dict(config.get("partitions", {}))
        # Those of older versions hold ways and layouts alone.
        self._state.config_holds_masks = "rules" in config
        self._state.rules += rules_config.from_config(config.get("rules", ()))

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the values of `variables`, in their order; masks stay as they are.

        Raises:
            ValueError: If the optimizer is not built, or number or shapes differ.
        """
        if not self._state.built:
            raise ValueError(
                "You are calling `set_weights()` on an optimizer that must be built first: call "
                f"`optimizer.build(trainable_variables)`. Received: {self.name!r}, which is not built"
            )
        variables: list[Any] = self.variables  # type: ignore[attr-defined]
        if len(weights) != len(variables):
            raise ValueError(
                f"`weights` must have one array per variable of the inner optimizer, {len(variables)}; masks are not "
                "among them: store those with `fz.save_masks(optimizer, path)`. Received: "
                f"{len(weights)} arrays"
            )
        for variable, weight in zip(variables, weights, strict=True):
            if tuple(variable.shape) != tuple(np.shape(weight)):
                raise ValueError(
                    f"`weights` must have the shapes of `variables`. Received: shape "
                    f"{np.shape(weight)} for {variable_path(variable)!r} of shape {tuple(variable.shape)}"
                )
        for variable, weight in zip(variables, weights, strict=True):
            variable.assign(weight)
        self._after_load()

    def _stored(self) -> Stored:
        """What stores hold of this optimizer.

        Raises:
            ValueError: If rules wait for the optimizer to be built that name variables by the object.
        """
        if not self._state.built:
            waiting = list(self._state.rules)
            first = Stored()
            if waiting and isinstance(waiting[0], Loaded) and not waiting[0].by_call:
                first = waiting[0].stored
                del waiting[0]
                if first.without_layouts:
                    raise ValueError(
                        "An optimizer that loaded masks of an older version must be built before these can be saved: "
                        f"call `optimizer.build(model.trainable_variables)`. Received: {self.name!r}, which is not"
                    )
            return replace(first, rules=rules_config.to_config(waiting, None))
        masks = []
        for position, ((name, shape), part) in enumerate(
            zip(self._state.index.named, self._state.partitions, strict=True)
        ):
            stated = position in self._state.stated
            if position in self._state.awaiting or part.pending:
                if stated:
                    masks.append(StoredMask(name, tuple(shape or ()), None))
            elif part.way != "unmasked":
                capacity = part.get_config().get("capacity", 0)
                waiting_bits = self._waiting(position)
                masks.append(StoredMask(name, tuple(shape or ()), part.mask, stated, part.way, capacity, waiting_bits))
        return Stored(list(masks), self._state.index.named, self._slot_names())

    def save_own_variables(self, store: _Store) -> None:
        """Saves the masks, each with its variable's path, shape and layout; Keras saves the inner optimizer.

        Raises:
            ValueError: If rules wait for the optimizer to be built that name variables by the object.
        """
        for key, value in self._stored().to_entries():
            store[key] = value

    def load_own_variables(self, store: _Store) -> None:
        """Loads the masks; before the optimizer is built, keeps them until it is.

        Loading counts as a call: where a mask was stored that somebody had stated, it replaces the one that is here.
        A file without any mask changes nothing.

        Raises:
            ValueError: If the file's masks are not those of this optimizer's variables; no mask was changed then.
                (Keras has loaded the model's weights before it comes here.)
        """
        entries = {key: np.array(store[key]) for key in store.keys()}  # noqa: SIM118
        refused, shifted = self._refused, self._shifted
        self._shifted = False
        if shifted:
            # The masks came before, to a scaler around: this is what the optimizer wraps.
            if refused is None and entries:
                self._load_bare([entries[str(i)] for i in range(len(entries))], False)
        elif entries:
            self._load(entries)
        elif refused is not None and refused[0] == weights_being_loaded().token:
            # Keras comes a second time to a part of a `MultiOptimizer` that refused, with nothing.
            raise refused[1]

    def load_shifted(self, entries: Mapping[str, np.ndarray]) -> None:
        """Loads what a file without a scaler around has where this optimizer's scaler looks.

        Keras comes next with the state of the inner optimizer, where this optimizer's own is expected.
        """
        self._shifted = True
        self._load(entries)

    def build_to_load(self, model: Any) -> None:
        """Builds the optimizer, if a load of a file without masks does that; see `_builds_to_load`."""
        if not self._state.built and self._builds_to_load(Stored(), model):
            model.optimizer.build(model.trainable_variables)

    def _load(self, entries: Mapping[str, np.ndarray]) -> None:
        """Loads what a Keras file holds, of a `MaskedOptimizer` or of a bare optimizer."""
        file = weights_being_loaded()
        self._refused = None
        skip, bare = file.skip_mismatch, all(key.isdigit() for key in entries)
        try:
            stored = Stored() if bare else Stored.from_entries(entries)
            if not self._state.built and self._builds_to_load(stored, file.model):
                problems, masks = self._build_to_load(stored, skip, file.model)
                self._begin_load(stored, skip, masks)
            else:
                self._begin_load(stored, skip)
                problems = self._take_stored(stored, skip)
        except BaseException as error:
            self._refuse_load()
            self._refused = file.token, error
            raise
        if bare:
            self._load_bare([entries[str(i)] for i in range(len(entries))], skip)
        if problems:
            self._refused = file.token, refusal(problems, self._state.index.named)
            raise self._refused[1]

    def _begin_load(self, stored: Stored, skip: bool, masks: Mapping[int, Mask] | None = None) -> None:
        """Called before masks of a file are set; Keras loads the state of the optimizers inside next.

        Args:
            stored: What the file holds.
            skip: Whether to do without what does not fit.
            masks: Where the optimizer was built with masks of the file: those that it would have without, by position.
        """

    def _refuse_load(self) -> None:
        """Called where masks of a file do not fit."""

    def _load_bare(self, arrays: list[np.ndarray], skip: bool) -> None:
        """Loads the state of an optimizer that nobody wrapped."""
        raise NotImplementedError

    def _waits_to_load(self, stored: Stored) -> bool:
        """Whether a load waits until somebody builds the optimizer."""
        return False

    def _builds_to_load(self, stored: Stored, model: Any) -> bool:
        """Whether a load builds the optimizer first, so that what does not fit is known at once."""
        if model is None or not getattr(model, "built", False) or self._waits_to_load(stored):
            return False
        return any(part is self for part in wrapped_optimizers(model.optimizer))

    def _build_to_load(self, stored: Stored, skip: bool, model: Any) -> tuple[list[str], dict[int, Mask]]:
        """Builds the optimizer with masks that are loaded.

        Returns:
            What did not fit, in words; and the masks without that load, by position.
        """
        before = list(self._state.rules)
        self._take_stored(stored, skip)
        self._builds_for_load = True
        try:
            model.optimizer.build(model.trainable_variables)
        except BaseException:
            if not self._state.built:
                self._state.rules = before
            raise
        finally:
            self._builds_for_load = False
        problems, self._state.problems = self._state.problems, []
        loaded, self._state.rules = self._state.rules, before
        masks = self._plan(self._state.index, False).masks
        self._state.rules = loaded
        return problems, masks

    def _take_stored(self, stored: Stored, skip: bool = False) -> list[str]:
        """Takes what a store holds: at once or, before the build, as a rule; wholly or, on an error, not at all.

        Args:
            stored: What it holds.
            skip: Whether to do without what does not fit.

        Returns:
            What did not fit, in words.
        """
        items: list[Rule | Loaded] = [Loaded(stored, skip)] if stored.masks else []
        items += rules_config.from_config(stored.rules)
        if not self._state.built:
            self._state.rules += items
            return []
        changes = self._changes(items, all_rules=bool(stored.rules))
        problems, changes.problems = changes.problems, []
        self._carry_out(changes)
        return problems

    def _masked_partitions(self) -> list[MaskedPartition]:
        """The partitions of variables that have a mask of their own."""
        return [part for part in self._state.partitions if isinstance(part, MaskedPartition)]


class FrozenEntries:
    """Around what the inner optimizer does: frozen entries come out as they went in.

    Args:
        partitions: Of all variables that it may write.
        averages: Slots of moving averages, each with the partition of its variable.
        rows: By the partition's `id`, the only rows that can be written, where that is known.
        remembered: What `take_and_remember` returned just before, by the partition's `id`.
    """

    def __init__(
        self,
        partitions: Sequence[Partition],
        averages: Iterable[tuple[Partition, Variable]] = (),
        rows: Mapping[int, tf.Tensor] | None = None,
        remembered: Mapping[int, Any] | None = None,
    ):
        self._partitions = partitions
        self._averages = averages
        self._rows = rows or {}
        self._remembered = remembered or {}

    def __enter__(self) -> None:
        self._snapshots = [
            self._remembered[id(part)] if id(part) in self._remembered else part.remember(self._rows.get(id(part)))
            for part in self._partitions
        ]

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is not None and not tf.executing_eagerly():
            return  # Tracing failed: there is no step to protect.
        for part, snapshot in zip(self._partitions, self._snapshots, strict=True):
            if error is None:
                part.put_back(snapshot)
            else:
                part.abandon(snapshot)
        if error is None:
            for part, average in self._averages:
                part.put_into_average(average)


class FrozenBlock(AbstractContextManager):
    """Around anything else that writes the model's variables; see `Masking.frozen_entries`.

    Args:
        partitions: Of all variables that may be written.
        averages: Gives the slots of moving averages, each with the partition of its variable.
    """

    def __init__(self, partitions: Sequence[Partition], averages: Callable[[], Iterable[tuple[Partition, Variable]]]):
        self._partitions = list(partitions)
        self._averages = averages
        self._blocks: list[tuple[AbstractContextManager, list[Any]]] = []  # a block may lie in another

    def __enter__(self) -> None:
        snapshots = [part.remember_frozen() for part in self._partitions]
        writes = guarded()
        writes.__enter__()
        self._blocks.append((writes, snapshots))

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        writes, snapshots = self._blocks.pop()
        if error is None or tf.executing_eagerly():
            for part, snapshot in zip(self._partitions, snapshots, strict=True):
                part.restore_frozen(snapshot)
            for part, average in self._averages():
                part.put_into_average(average)
        writes.__exit__(None, None, None)


def check_lengths(gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raises unless there is one gradient per variable."""
    if len(gradients) != len(variables):
        raise ValueError(
            "Gradients and variables must match one to one. "
            f"Received: {len(gradients)} gradients and {len(variables)} variables"
        )


def mask_pairs(masks: Any) -> list[tuple[Any, Any]]:
    """Targets and their masks, one after the other.

    Args:
        masks: A mapping, or a list of pairs, since variables are no keys of a mapping; `None`: none.

    Raises:
        TypeError: If it is anything else.
    """
    pairs = list(masks.items()) if isinstance(masks, Mapping) else [] if masks is None else masks
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            "`masks` must map targets to masks, or be a list of pairs of those: [(variable, mask), ...]. "
            f"Received: masks={short(masks)} of type {type(masks).__name__}"
        )
    return list(pairs)


def masked_optimizer(optimizer: Any) -> Masking:
    """The `MaskedOptimizer`, where there may be others around it.

    Under `mixed_float16` Keras's `compile` puts a `LossScaleOptimizer` around.

    Raises:
        TypeError: If there is none.
    """
    found = optimizer
    while found is not None and not isinstance(found, Masking):
        found = getattr(found, "inner_optimizer", None)
    if found is None:
        hint = " Pass `model.optimizer`." if isinstance(getattr(optimizer, "optimizer", None), Masking) else ""
        raise TypeError(
            "`optimizer` must be a MaskedOptimizer, or one that was put around it, such as a LossScaleOptimizer."
            f"{hint} Received: optimizer={short(optimizer)} of type {type(optimizer).__name__}"
        )
    return found


def check_arguments(masks: Any, maskable: Any, inner_arguments: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Raises where arguments of a `MaskedOptimizer` are wrong.

    Args:
        masks: Must be a mapping, pairs or `None`.
        maskable: Likewise, with values of `layout.MASKABLE`.
        inner_arguments: Names of arguments that belong to the inner optimizer.
        arguments: Further keyword arguments that were given; there must be none.
    """
    for argument, value in arguments.items():
        if argument in inner_arguments:
            raise ValueError(
                f"MaskedOptimizer does not support `{argument}`: it must be set on the "
                f"`inner_optimizer`. Received: {argument}={short(value)}"
            )
    if arguments:
        raise ValueError(f"Arguments must be known ones. Received: {short(dict(arguments))}")
    mask_pairs(masks)
    if maskable is not None and not isinstance(maskable, Mapping):
        raise TypeError(
            f"`maskable` must map path patterns to one of {layout.MASKABLE}. Received: maskable={short(maskable)}"
        )
    for pattern, value in (maskable or {}).items():
        if value not in layout.MASKABLE:
            raise ValueError(
                f"`maskable` must map path patterns to one of {layout.MASKABLE}. "
                f"Received: maskable={short({pattern: value})}"
            )
