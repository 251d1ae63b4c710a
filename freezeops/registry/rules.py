"""Mask rules: one per call of the user's.

A rule names targets and entries, and is applied when the variables are known: rules given before the optimizer is
built wait until then, later ones are carried out at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from freezeops.keras_compat.variables import Variable, is_variable, variable_key, variable_path
from freezeops.masks.checks import as_array
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.masks.where import Booleans, named_entries
from freezeops.registry.targets import (
    ExactPath,
    check_is_variable,
    check_maskable_dtype,
    compile_pattern,
    flatten_target,
    path_matches,
)
from freezeops.storage.matching import find_variables
from freezeops.storage.stored import Stored

Action = Literal["register_mask", "freeze", "unfreeze", "train_only"]


class _LeftOut:
    """Stands for entries that a config left out."""

    def __repr__(self) -> str:
        return "LEFT_OUT"


LEFT_OUT = _LeftOut()
"""Entries of a rule from a config that had no room for them: somebody has to state them before training."""


@dataclass(frozen=True)
class MaskRule:
    """One call of `register_mask`, `freeze`, `unfreeze` or `train_only`.

    Attributes:
        action: The call's name.
        target: Variables, layers, a pattern, or a list of those.
        entries: The mask for `register_mask`; otherwise the entries that the verb acts on.
            A `Mask`, `Booleans`, an integer array, an index expression, or `None` for every entry.
        permanent: Whether `freeze` leaves the variable out of the inner optimizer.
    """

    action: Action
    target: Any
    entries: Any = None
    permanent: bool = False

    def __post_init__(self) -> None:
        # Copies: later changes of the user's own lists and arrays do not reach a rule that waits.
        object.__setattr__(self, "target", tuple(flatten_target(self.target)))
        name = "mask" if self.action == "register_mask" else "where"
        object.__setattr__(self, "entries", _copied(self.entries, name))

    @property
    def states_all(self) -> bool:
        """True if the mask after this rule is known, whatever it was before."""
        return self.action in ("register_mask", "train_only") or self.entries is None

    @property
    def freezes(self) -> bool:
        """True if an entry can be frozen after this rule that was not before."""
        if self.action == "register_mask":
            mask = self.entries.packed if isinstance(self.entries, Booleans) else self.entries
            return mask.count() != mask.size
        return self.action != "unfreeze"

    def apply_to(self, mask: Mask) -> Mask:
        """The mask after this rule."""
        if self.action == "register_mask":
            if isinstance(self.entries, Booleans):
                return self.entries.as_mask(mask.shape, "mask")
            return Mask.from_array(self.entries, mask.shape)
        entries = named_entries(self.entries, mask.shape)
        if self.action == "freeze":
            return mask & ~entries
        if self.action == "unfreeze":
            return mask | entries
        return entries


@dataclass(frozen=True, eq=False)
class Loaded:
    """A load before the optimizer is built, which counts as a call: the masks that it brought, by path.

    Attributes:
        stored: What was loaded.
        skip: Whether to do without what does not fit, with a warning.
        by_call: Whether somebody stated these masks, by a config or `load_masks`; otherwise a file did.
        layouts: Of masks that were stored without, by path, where they are known.
        strict: Whether every mask must find its variable, also one that freezes nothing.
    """

    stored: Stored
    skip: bool = False
    by_call: bool = False
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    strict: bool = False


def _copied(entries: Any, name: str) -> Any:
    """Returns what a rule keeps of what the user gave: booleans packed, once; everything else as a copy."""
    if isinstance(entries, Mask | Booleans | _LeftOut):
        return entries
    if name == "mask":
        return Booleans(Mask.from_array(entries))
    if entries is None or entries is Ellipsis or isinstance(entries, slice):
        return entries
    if isinstance(entries, tuple):
        return tuple(_copied_part(part) for part in entries)
    array = as_array(entries, name)
    return Booleans(Mask.from_array(array)) if array.dtype == np.bool_ else np.array(array)


def _copied_part(part: Any) -> Any:
    """Returns a copy of one part of an index expression."""
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    return np.array(as_array(part, "where"))


def check_before_build(rule: MaskRule) -> None:
    """Raises what can be known to be wrong before the variables are known."""
    for target in rule.target:
        if is_variable(target):
            check_maskable_dtype(target)
            rule.apply_to(Mask.trainable(target.shape))
        elif isinstance(target, str):
            compile_pattern(target)
    if isinstance(rule.entries, Mask) and rule.action != "register_mask":
        named_entries(rule.entries, rule.entries.shape)


def mask_before_build(variable: Variable, rules: Sequence[MaskRule | Loaded]) -> Mask:
    """Returns the mask that rules give one variable, their patterns matched against it alone."""
    check_is_variable(variable)
    mask = Mask.trainable(variable.shape)
    key, path = variable_key(variable), variable_path(variable)
    for rule in rules:
        if isinstance(rule, Loaded):
            found = find_variables(rule.stored, [(path, tuple(variable.shape))]).masks
            if 0 in found and found[0].stated and found[0].mask is not None:
                mask = found[0].mask
        elif rule.entries is LEFT_OUT:
            continue
        elif any(_names(part, key, path) for part in rule.target):
            mask = rule.apply_to(mask)
    return mask


def _names(target: Any, key: str, path: str) -> bool:
    if isinstance(target, ExactPath):
        return target.path == path
    if isinstance(target, str):
        return path_matches(target, path)
    if is_variable(target):
        return variable_key(target) == key
    return any(variable_key(v) == key for v in target.trainable_variables)
