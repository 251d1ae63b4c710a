"""Finds the variable of each stored mask, by path and shape."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from freezeops.masks.layout import Layout, Shape
from freezeops.storage import saved_names
from freezeops.storage.saved_names import Named
from freezeops.storage.stored import Stored
from freezeops.storage.stored_mask import RawMask, StoredMask


class Problem(ValueError):
    """Stored masks that do not fit the variables of an optimizer."""


class Matches(NamedTuple):
    """Stored masks and their variables.

    Attributes:
        masks: The masks by the position of their variable.
        problems: Messages on masks that fit no variable.
        passed: Names of masks of variables that the optimizer does not have. They are passed over.
    """

    masks: dict[int, StoredMask]
    problems: list[str]
    passed: list[str]


def find_variables(
    stored: Stored,
    variables: Sequence[Named],
    known_layouts: Mapping[str, Layout] | None = None,
    strict: bool = False,
    others: Collection[str] = (),
) -> Matches:
    """Finds the variable of each stored mask. One that freezes nothing is left out where it fits no variable.

    Args:
        stored: The masks.
        variables: The optimizer's variables: unique paths and shapes.
        known_layouts: Layouts of masks that were stored without, by the stored name.
        strict: True if every mask must fit, also one that freezes nothing.
        others: Paths of the model's variables that the optimizer does not have.

    Returns:
        `Matches`.
    """
    names = _StoredNames(stored, variables, others)
    found: dict[int, StoredMask] = {}
    problems, passed = [], []
    for mask in stored.masks:
        needed = mask.freezes or strict
        position = names.position(mask.name)
        if position is None:
            if needed:
                problems.append(f"a mask of {mask.name!r}, {names.candidates(mask.name)}")
        elif position >= len(variables):
            if mask.freezes:
                passed.append(mask.name)
        else:
            try:
                found[position] = _for_variable(mask, variables[position], (known_layouts or {}).get(mask.name))
            except ValueError as error:
                if needed or isinstance(mask, RawMask):
                    problems.append(str(error))
    masks, indistinct = _without_indistinct(found, variables)
    return Matches(masks, problems + indistinct, passed)


class _StoredNames:
    """The names of stored masks, paired with the variables that they mean.

    Args:
        stored: The masks.
        variables: The optimizer's variables.
        others: Paths of the model's other variables, whose positions come behind those.
    """

    def __init__(self, stored: Stored, variables: Sequence[Named], others: Collection[str]):
        named: Sequence[Named] = list(stored.variables) or [
            (mask.name, mask.shape if isinstance(mask, StoredMask) else None) for mask in stored.masks
        ]
        self._numbers = {name: i for i, (name, _) in enumerate(named)}
        self._variables: Sequence[Named] = [*variables, *((path, None) for path in others)]
        if any(isinstance(mask, RawMask) and not mask.slashes for mask in stored.masks):
            named, self._variables = _without_slashes(named), _without_slashes(self._variables)
        self._named = named
        self._pairs = saved_names.pair(named, self._variables)

    @cached_property
    def _pairs_of_any_shape(self) -> saved_names.Pairs:
        return saved_names.pair([(name, None) for name, _ in self._named], self._variables)

    def position(self, name: str) -> int | None:
        """Returns the position of the variable that a name means, or None if there is none, or more than one."""
        number = self._numbers.get(name)
        if number is None:
            return None
        if number not in self._pairs.found and not self._pairs.candidates.get(number):
            return self._pairs_of_any_shape.found.get(number)  # so that the error can name both shapes
        return self._pairs.found.get(number)

    def candidates(self, name: str) -> str:
        """Returns the part of a message on a name that has no position."""
        positions = self._pairs.candidates.get(self._numbers.get(name, -1), [])
        paths = [self._variables[position][0] for position in positions]
        return f"which may be for any of {paths}" if paths else "which matches nothing"


def _for_variable(mask: StoredMask | RawMask, variable: Named, layout: Layout | None) -> StoredMask:
    """Returns a mask for a variable.

    Raises:
        ValueError: If it has another shape, or its layout is not known.
    """
    name, shape = variable
    assert shape is not None
    if isinstance(mask, RawMask):
        return mask.resolve(shape, layout)
    if mask.shape != shape:
        raise ValueError(
            f"`mask` must have the shape of its variable, mask.shape={mask.shape}, shape={shape} for {name!r}"
        )
    return mask


def _without_indistinct(
    found: dict[int, StoredMask], variables: Sequence[Named]
) -> tuple[dict[int, StoredMask], list[str]]:
    """Leaves out masks of variables that share a path and a shape, if they differ: only their order tells them apart.

    Returns:
        The other masks, and a message for each path.
    """
    groups: dict[tuple[str, Shape | None], list[int]] = {}
    for position, (name, shape) in enumerate(variables):
        groups.setdefault((saved_names.path_of(name), shape), []).append(position)
    masks, problems = dict(found), []
    for (path, _), positions in groups.items():
        stored = [found[position] for position in positions if position in found]
        differ = len(stored) < len(positions) or any(each.mask != stored[0].mask for each in stored)
        if len(positions) > 1 and any(each.freezes for each in stored) and differ:
            problems.append(f"masks of {len(positions)} variables with the path {path!r}, which only order tells apart")
            for position in positions:
                masks.pop(position, None)
    return masks, problems


def _without_slashes(named: Sequence[Named]) -> list[Named]:
    """Returns paths with a slash for every underscore, which may have been one, but for those before Keras's counts."""
    return [(re.sub(r"_(?!\d+(?:_|/|$))", "/", name), shape) for name, shape in named]


def refusal(problems: Iterable[str], variables: Sequence[Named]) -> Problem:
    """Returns the error for stored masks that do not fit.

    Args:
        problems: Messages of `find_variables`.
        variables: The optimizer's variables.
    """
    problems = list(problems)
    return Problem(
        "Stored masks must be those of the optimizer's variables, found by path. Received: "
        f"{'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}. The optimizer has "
        f"{[name for name, _ in variables[:20]]}{'...' if len(variables) > 20 else ''}. Load with "
        "`fz.load_masks(optimizer, path, rename={...})` to say which variable is meant, or with `skip_mismatch=True` "
        "(`load_weights`) to do without what does not fit"
    )
