"""Planning: what a build is going to make of each variable, computed before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.partitions.plan import Plan, Request, plan
from freezeops.registry import rules, targets
from freezeops.registry.changes import Changes
from freezeops.registry.rules import Loaded, MaskRule
from freezeops.registry.targets import VariableIndex
from freezeops.storage import saved_names
from freezeops.storage.matching import refusal

if TYPE_CHECKING:
    from freezeops.registry.registry import MaskRegistry


@dataclass
class Planned:
    """The outcome of planning; what is by position is by the variable's.

    Attributes:
        index: The variables.
        plans: The plan of each variable.
        masks: By position: the masks that calls and loads stated.
        loaded: By position: the masks that were loaded, before later calls.
        awaiting: Positions of masks that a config left out.
        changes: What else calls and loads said.
    """

    index: VariableIndex
    plans: list[Plan] = field(default_factory=list)
    masks: dict[int, Mask] = field(default_factory=dict)
    loaded: dict[int, Mask] = field(default_factory=dict)
    awaiting: set[int] = field(default_factory=set)
    changes: Changes = field(default_factory=Changes)

    def paths_without_mask(self) -> list[str]:
        """Returns the paths of variables whose masks are still to come."""
        pending = [getattr(each, "pending", False) for each in self.plans]
        return [path for i, path in enumerate(self.index.paths) if pending[i] or i in self.awaiting]


class Planner:
    """Plans one build.

    Args:
        registry: The masks of the optimizer.
        index: The variables.
    """

    def __init__(self, registry: MaskRegistry, index: VariableIndex):
        self._registry = registry
        self._index = index
        self._planned = Planned(index)
        self._permanent: set[int] = set()
        self._saved = self._saved_partitions()

    def plan(self, inner_built: bool) -> Planned:
        """Returns what is to be made of each variable.

        Args:
            inner_built: Whether the inner optimizer is built.

        Raises:
            ValueError: If calls or loads do not fit the variables.
        """
        for rule in list(self._registry.rules):
            if isinstance(rule, Loaded):
                self._add_load(rule)
            else:
                self._add_call(rule)
        if self._permanent and inner_built:
            raise ValueError(
                "`permanent` must be used before the inner optimizer is built. Received: "
                f"permanent=True for {short([self._index.paths[i] for i in sorted(self._permanent)])}"
            )
        masks, awaiting = self._planned.masks, self._planned.awaiting
        if self._registry.config_holds_masks:
            # What the config has no mask for, nobody stated.
            for i, saved in enumerate(self._saved):
                if saved is not None and saved["way"] == "compact" and i not in awaiting:
                    masks.setdefault(i, Mask.trainable(tuple(self._index.variables[i].shape)))
        for position in awaiting:
            masks.pop(position, None)
        self._planned.plans = self._plans()
        return self._planned

    def _plans(self) -> list[Plan]:
        registry, index = self._registry, self._index
        maskable = registry.by_position(registry.maskable, index)
        rooms = registry.rooms(index) if registry.compact else [None] * len(index.variables)
        return [
            plan(Request(variable, self._planned.masks.get(i), i in self._permanent, maskable.get(i), saved, room))
            for i, (variable, saved, room) in enumerate(zip(index.variables, self._saved, rooms, strict=True))
        ]

    def _add_call(self, rule: MaskRule) -> None:
        planned, index = self._planned, self._index
        for position in index.find(rule.target):
            variable = index.variables[position]
            targets.check_maskable_dtype(variable)
            planned.changes.stated[position] = "call"
            if rule.entries is rules.LEFT_OUT:
                planned.awaiting.add(position)
                continue
            if rule.states_all:
                planned.awaiting.discard(position)
            start = planned.masks.get(position, Mask.trainable(tuple(variable.shape)))
            planned.masks[position] = rule.apply_to(start)
            if rule.permanent:
                self._permanent.add(position)
            if position in self._permanent and planned.masks[position].count():
                raise ValueError(
                    "A variable that was frozen with `permanent=True` must stay frozen. "
                    f"Received: {rule.action}() of {index.paths[position]!r}"
                )

    def _add_load(self, loaded: Loaded) -> None:
        planned, index = self._planned, self._index
        found, problems, passed = self._registry.find_stored(loaded, index)
        planned.changes.passed += passed
        if problems and not loaded.skip:
            if not loaded.by_call:
                self._registry.rules.remove(loaded)  # so that the next attempt goes on without it
            raise refusal(problems, index.named)
        for position, stored in found.items():
            if not tf.as_dtype(index.variables[position].dtype).is_floating:
                continue
            if stored.mask is None:
                planned.awaiting.add(position)
                planned.changes.stated[position] = "call"
                continue
            if stored.mode == "compact" and self._saved[position] is None:
                # Room as in the optimizer that stored it: its slots have that shape.
                layout = list(stored.mask.layout)
                self._saved[position] = {"way": "compact", "layout": layout, "capacity": stored.capacity}
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

    def _saved_partitions(self) -> list[Mapping[str, Any] | None]:
        """Mode and layout of each variable from the config that the optimizer was made from, if any."""
        found: list[Mapping[str, Any] | None] = [None] * len(self._index.paths)
        saved = list(self._registry.saved.items())
        for i, position in saved_names.pair([(name, None) for name, _ in saved], self._index.named).found.items():
            found[position] = saved[i][1]
        return found
