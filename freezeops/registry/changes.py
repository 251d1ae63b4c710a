"""Changes: what calls and loads make of the masks of a built optimizer, computed before anything is set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import tensorflow as tf

from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.notices import warn
from freezeops.registry.rules import Loaded, MaskRule
from freezeops.step.managed import Source
from freezeops.storage.matching import refusal

if TYPE_CHECKING:
    from freezeops.registry.registry import MaskRegistry


@dataclass
class Changes:
    """New masks, by the position of their variable, and what is to be said of them.

    Attributes:
        masks: The new masks, each in its variable's layout.
        waiting: Of masks that were loaded: the entries that wait to be seeded.
        stated: Who stated a mask.
        replaced: By path: how many entries a load changed that a call had stated.
        known: Positions of variables whose whole mask was stated.
        awaiting: Positions of masks that were left out where they come from.
        passed: Paths of masks of variables of the model that the optimizer does not train.
        problems: Messages of what does not fit.
        without_layouts: Whether something was stored before layouts were.
    """

    masks: dict[int, Mask] = field(default_factory=dict)
    waiting: dict[int, Mask | None] = field(default_factory=dict)
    stated: dict[int, Source] = field(default_factory=dict)
    replaced: dict[str, int] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    awaiting: set[int] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    without_layouts: bool = False

    def warn(self) -> None:
        """Warns once of what may be unexpected; before anything is changed, should a warning be an error."""
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


def changes_of(registry: MaskRegistry, new_rules: Iterable[MaskRule | Loaded], all_rules: bool = False) -> Changes:
    """Returns what calls and loads change, with nothing changed yet.

    Args:
        registry: The masks of a built optimizer.
        new_rules: The calls and loads, in order.
        all_rules: Whether these are all calls that somebody made, so that masks that a config left out begin anew.

    Raises:
        ValueError: If one does not fit.
        RuntimeError: If a mask is changed while a function is traced.
    """
    changes = Changes()
    for rule in new_rules:
        if isinstance(rule, Loaded):
            _add_load(registry, rule, changes)
        else:
            _add_call(registry, rule, changes, all_rules)
    return changes


def _add_call(registry: MaskRegistry, rule: MaskRule, changes: Changes, all_rules: bool) -> None:
    if not tf.executing_eagerly():
        raise RuntimeError(
            "Masks must be changed outside of `tf.function`, for example from a callback. "
            f"Received: {rule.action}() while a function is traced"
        )
    for position in registry.index.find(rule.target):
        managed = registry.managed[position]
        partition = managed.partition
        if rule.permanent and partition.mode != "permanent":
            raise ValueError(
                "`permanent` must be used before the optimizer is built. Received: "
                f"permanent=True for {partition.path!r}, for which the inner optimizer has slots"
            )
        begins = all_rules and managed.awaiting and position not in changes.known
        if begins or rule.states_all:
            mask = Mask.trainable(tuple(partition.variable.shape))  # without reading the one on the device
        elif position in changes.masks:
            mask = changes.masks[position]
        else:
            mask = partition.mask
        changes.masks[position] = partition.fit(rule.apply_to(mask))
        changes.stated[position] = "call"
        if rule.states_all or begins:
            changes.known.add(position)
            changes.awaiting.discard(position)


def _add_load(registry: MaskRegistry, loaded: Loaded, changes: Changes) -> None:
    found, problems, passed = registry.find_stored(loaded, registry.index)
    changes.passed += passed
    if problems and not loaded.skip:
        raise refusal(problems, registry.index.named)
    for position, stored in found.items():
        managed = registry.managed[position]
        partition = managed.partition
        if stored.mask is None and stored.stated:
            changes.awaiting.add(position)
        if stored.mask is None or not (stored.stated or partition.pending):
            continue
        before = changes.masks.get(position)
        if before is None and not partition.pending:
            before = partition.mask
        try:
            mask = partition.fit(stored.mask)
        except ValueError as error:
            if not loaded.skip:
                raise
            problems.append(str(error))
            continue
        by_call = changes.stated.get(position, managed.stated) == "call"
        by_call = by_call and not managed.awaiting and position not in changes.awaiting
        if by_call and before is not None and not loaded.by_call and mask != before:
            changes.replaced[partition.path] = (mask ^ before).count()
        changes.masks[position] = mask
        changes.waiting[position] = stored.waiting
        changes.awaiting.discard(position)
        changes.known.add(position)
        if stored.stated:
            changes.stated[position] = "call" if loaded.by_call else "load"
    changes.problems += problems
    changes.without_layouts |= loaded.stored.without_layouts
