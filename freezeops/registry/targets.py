"""Targets: the variables, layers and path patterns of a call, and the variables that they stand for."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from freezeops.keras_compat.variables import Variable, is_variable, variable_key, variable_path
from freezeops.messages import short
from freezeops.storage.saved_names import Named, unique

_NO_PATTERN = (re.error, RecursionError, OverflowError)
"""What `re.compile` raises."""


@dataclass(frozen=True)
class ExactPath:
    """A target: the one variable of this whole path."""

    path: str


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
        check_is_variable(variable)
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


def check_is_variable(variable: Any) -> None:
    """Raises a `TypeError` unless this is a Keras or TensorFlow variable."""
    if not is_variable(variable):
        raise TypeError(
            "A variable must be a keras.Variable or a tf.Variable. "
            f"Received: {short(variable)} of type {type(variable).__name__}"
        )


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Returns a path pattern, compiled.

    Raises:
        ValueError: If it is no regular expression.
    """
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
    return _matches(compile_pattern(pattern), path)


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
