"""Mask rules: one per call of the user's.

A rule names targets and entries, and is applied when the variables are known: rules given before the optimizer is
built wait until then, later ones are carried out at once.
"""

import contextlib
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from freezeops.keras_compat.variables import Variable, is_variable, variable_key, variable_path
from freezeops.masks.checks import as_array
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.masks.where import Booleans, named_entries
from freezeops.messages import short
from freezeops.storage.matching import find_variables
from freezeops.storage.saved_names import Named, unique
from freezeops.storage.stored import Stored

Action = Literal["register_mask", "freeze", "unfreeze", "train_only"]


_NO_PATTERN = (re.error, RecursionError, OverflowError)
"""What `re.compile` raises."""


@dataclass(frozen=True)
class ExactPath:
    """A target: the one variable of this whole path."""

    path: str


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
            _compile(target)
    if isinstance(rule.entries, Mask) and rule.action != "register_mask":
        named_entries(rule.entries, rule.entries.shape)


def check_maskable_dtype(variable: Variable) -> None:
    """Raises unless the variable is of a floating dtype."""
    dtype = tf.as_dtype(variable.dtype)
    if not dtype.is_floating:
        raise ValueError(
            "A mask must be for a variable of a floating dtype. "
            f"Received: variable {variable_path(variable)!r} of dtype={dtype.name}"
        )


def flatten_target(target: Any) -> list[Any]:
    """Variables, layers and patterns out of a target or nested lists of them.

    Raises:
        TypeError: If something else is among them.
    """
    if isinstance(target, str | ExactPath) or is_variable(target) or hasattr(target, "trainable_variables"):
        return [target]
    if isinstance(target, list | tuple | set | frozenset) or (
        isinstance(target, Iterable) and not isinstance(target, dict | np.ndarray | tf.Tensor)
    ):
        return [part for item in target for part in flatten_target(item)]
    raise TypeError(
        "`target` must be a variable, a layer, a model, a path pattern (str) or a list of those. "
        f"Received: target={short(target)} of type {type(target).__name__}"
    )


class VariableIndex:
    """The variables that an optimizer knows, to be found by identity or by path.

    Args:
        variables: Keras or TensorFlow variables, in order.
    """

    def __init__(self, variables: Sequence[Variable]):
        self.variables = list(variables)
        self.paths = [variable_path(variable) for variable in self.variables]
        self._positions = {variable_key(v): i for i, v in enumerate(self.variables)}

    @property
    def named(self) -> list[Named]:
        """Unique paths and shapes, as stores name variables."""
        shapes = (tuple(variable.shape) for variable in self.variables)
        return list(zip(unique(self.paths), shapes, strict=True))

    def find_position(self, variable: Variable) -> int | None:
        """Position of a variable, `None` where the optimizer does not know it."""
        return self._positions.get(variable_key(variable))

    def position(self, variable: Variable) -> int:
        """Position of a variable.

        Raises:
            TypeError: If it is no variable.
            ValueError: If the optimizer does not know it.
        """
        _check_is_variable(variable)
        position = self.find_position(variable)
        if position is None:
            path = variable_path(variable)
            raise ValueError(
                "A variable must be one of those that the optimizer was built with. Received: "
                f"variable {path!r} of shape {tuple(variable.shape)}{self._why_unknown(variable, path)}"
            )
        return position

    def find(self, target: Any) -> list[int]:
        """Positions of the variables that a target stands for, in the order of their naming.

        Raises:
            TypeError: If the target is of no known kind.
            ValueError: If a variable is unknown, a layer not built, a pattern matches
                nothing, or a plain name fits two variables.
        """
        found: dict[int, None] = {}
        for part in flatten_target(target):
            if isinstance(part, ExactPath):
                positions = [i for i, path in enumerate(self.paths) if path == part.path]
                if len(positions) != 1:
                    raise ValueError(
                        "A path must be that of one variable. Received: "
                        f"{part.path!r}, which matches {len(positions) or 'nothing'}.{self._nearest(part.path)}"
                    )
            elif isinstance(part, str):
                positions = self._match(part)
            elif is_variable(part):
                positions = [self.position(part)]
            else:
                positions = [self.position(v) for v in layer_variables(part)]
            found.update(dict.fromkeys(positions))
        return list(found)

    def _match(self, pattern: str) -> list[int]:
        positions = [i for i, path in enumerate(self.paths) if path_matches(pattern, path)]
        if not positions:
            raise ValueError(
                "A path pattern must match a variable's whole path, or its tail after a '/'. "
                f"Received: {short(pattern)}, which matches nothing.{self._meant(pattern)}{self._nearest(pattern)}"
            )
        if len(positions) > 1 and all(f"/{self.paths[i]}".endswith(f"/{pattern}") for i in positions):
            # No part of it was needed as a pattern: it is a name, and names mean one variable.
            exact = [i for i in positions if self.paths[i] == pattern]
            if len(exact) == 1:
                return exact
            raise ValueError(
                "A plain name must fit one variable. Received: "
                f"{pattern!r}, which fits {short([self.paths[i] for i in positions])}. Write more of the "
                f"path, or a pattern such as '.*{pattern}' to mean all of them."
            )
        return positions

    def _why_unknown(self, variable: Variable, path: str) -> str:
        """Returns the likely reason why the optimizer does not know a variable, and the remedy."""
        if not self.variables:
            return ", and the optimizer was built with none. Compile the model with a new optimizer."
        carry = "`fz.save_masks` and `fz.load_masks` carry its masks over."
        if path in self.paths:
            return (
                ", which is not the variable of that path that the optimizer knows: it was built with another model, "
                f"or before this one was made anew. Compile with a new optimizer, one for each model; {carry}"
            )
        if not getattr(variable, "trainable", True):
            return (
                ", which is not trainable: an optimizer is built with the trainable variables, so nothing trains this "
                "one. To train some of its entries, set `layer.trainable = True` and compile with a new optimizer; "
                f"{carry}"
            )
        return (
            ", which is another model's, or was added to this one (or made trainable) after the optimizer was built. "
            f"Compile with a new optimizer, one for each model; {carry}{self._nearest(path)}"
        )

    def _meant(self, pattern: str) -> str:
        """The regular expression that a name or glob was perhaps meant as, if it matches something."""
        for meant in (_without_globs(pattern), f"{pattern.rstrip('/')}/.*"):
            with contextlib.suppress(*_NO_PATTERN):
                compiled = re.compile(meant)
                if any(_matches(compiled, path) for path in self.paths):
                    return f" Patterns are regular expressions: write {meant!r}."
        return ""

    def _nearest(self, text: str) -> str:
        paths = list(dict.fromkeys(self.paths))
        near = difflib.get_close_matches(text, paths, n=5, cutoff=0.4) or paths[:5]
        return f" The nearest paths: {near}" if near else " The optimizer has no variables."


def _check_is_variable(variable: Any) -> None:
    if not is_variable(variable):
        raise TypeError(
            "A variable must be a keras.Variable or a tf.Variable. "
            f"Received: {short(variable)} of type {type(variable).__name__}"
        )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except _NO_PATTERN as error:
        hint = f" Write {meant!r}." if (meant := _without_globs(pattern)) != pattern else ""
        raise ValueError(
            f"A path pattern must be a regular expression. Received: {short(pattern)}: {error}.{hint}"
        ) from None


def _without_globs(pattern: str) -> str:
    """A pattern with `.*` for every `*` that repeats nothing or a name's character, as a shell reads `a/*`."""
    return re.sub(r"(?<![.)\]}\\*])\*+", ".*", pattern)


def path_matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a whole path, or its tail after some `/`."""
    return _matches(_compile(pattern), path)


def _matches(compiled: re.Pattern[str], path: str) -> bool:
    parts = path.split("/")
    return any(compiled.fullmatch("/".join(parts[i:])) for i in range(len(parts)))


def layer_variables(layer: Any) -> list[Variable]:
    """The trainable variables of a layer, model or module.

    Raises:
        ValueError: If a Keras layer has not been built and so has none yet.
    """
    variables = list(layer.trainable_variables)
    if not variables and not getattr(layer, "built", True):
        raise ValueError(
            "A layer must have been built before its variables can be found. "
            f"Received: layer {layer.name!r} without variables. Build the model first, "
            "or name the variables by a pattern before the optimizer is built."
        )
    return variables


def mask_before_build(variable: Variable, rules: Sequence[MaskRule | Loaded]) -> Mask:
    """Returns the mask that rules give one variable, their patterns matched against it alone."""
    _check_is_variable(variable)
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
