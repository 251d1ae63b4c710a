"""Names of variables in saved state, and the search for the variables that they mean now."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple


def unique(paths: Sequence[str]) -> list[str]:
    """Returns the paths, with `#1`, `#2` behind those that occurred before."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        count = seen.get(path, 0)
        seen[path] = count + 1
        names.append(f"{path}#{count}" if count else path)
    return names


def match(saved: Sequence[str], current: Sequence[str]) -> list[int] | None:
    """Maps each current variable name to the position of its saved name.

    Names are matched in order, as Keras itself matches weights and slots, if they agree but for
    the numbers that Keras counts up (`dense_3` for `dense`) and the name of the model in
    front; else by the whole name; else by the name without the model's, which `Sequential`
    loses when it is loaded from a file.

    Args:
        saved: Unique names in the order in which they were saved.
        current: Unique names of the variables now.

    Returns:
        Positions in `saved`, one per current name and each once; `None` if the
        names do not fit.
    """
    if len(saved) != len(current):
        return None
    if [_uncounted(name) for name in saved] == [_uncounted(name) for name in current]:
        return list(range(len(current)))
    for matches in (_equal, _same_tail):
        found = [[i for i, name in enumerate(saved) if matches(name, now)] for now in current]
        if all(len(positions) == 1 for positions in found):
            positions = [positions[0] for positions in found]
            if len(set(positions)) == len(positions):
                return positions
    return None


def _equal(a: str, b: str) -> bool:
    return a == b


def _same_tail(a: str, b: str) -> bool:
    return a == b or a.endswith(f"/{b}") or b.endswith(f"/{a}")


def _uncounted(name: str) -> list[str]:
    """Returns the last two parts of a name without Keras's counts."""
    return [re.sub(r"_\d+$", "", part) for part in name.split("/")[-2:]]


def path_of(name: str) -> str:
    """Returns the path of a name that `unique` made."""
    return name.partition("#")[0]


Named = tuple[str, tuple[int, ...] | None]
"""A variable's unique name and its shape; `None` where the shape is not known."""


class Pairs(NamedTuple):
    """Saved names and the current variables that they mean.

    Attributes:
        found: Positions of current variables, by the position of their saved name.
        candidates: For each saved name without a variable: the positions of those that it may mean. An empty list:
            there is none. Two or more: the name is ambiguous.
    """

    found: dict[int, int]
    candidates: dict[int, list[int]]


def pair(saved: Sequence[Named], current: Sequence[Named]) -> Pairs:
    """Finds the variables that saved names mean.

    A saved name means the variable with exactly its path, but for the name of the model, which Keras counts up and
    `Sequential` loses in a file. Only if there is none, it means the one that Keras's counting leads to:
    `dense_3/kernel` for `dense/kernel`, in the order of the counts if there are several.
    If that leaves two, the name is ambiguous; so are `dense` and `dense_1` if there are `dense_1` and `dense_2`.

    Args:
        saved: The saved names, and shapes as far as they are known.
        current: The current variables.

    Returns:
        `Pairs`.
    """
    positions = {name: i for i, (name, _) in enumerate(current)}
    exact = {i: positions[name] for i, (name, _) in enumerate(saved) if name in positions}
    exact |= _but_for_the_model(saved, current, exact)
    found = dict(exact)
    candidates: dict[int, list[int]] = {}
    for same in (_same_counted, _same_tail_counted):
        taken = set(found.values())
        for fitting, members in _groups(saved, current, same, found.keys() | candidates.keys()).items():
            not_taken = [j for j in fitting if j not in taken]
            if not not_taken:
                continue  # each has its saved name already
            rivals = {i for i, j in exact.items() if j in fitting and same(saved[i][0], current[j][0])}
            names = sorted({*members, *rivals})
            order = _in_order(names, fitting, saved, current)
            if order is None:
                candidates |= dict.fromkeys(members, not_taken)
            elif any(order[i] != exact[i] for i in rivals):
                # `dense`, `dense_1` for `dense_1`, `dense_2`: by its path or by its count?
                candidates |= {i: sorted({order[i], found.pop(i, order[i])}) for i in names}
            else:
                found |= {i: order[i] for i in members}
    for i in range(len(saved)):
        if i not in found:
            candidates.setdefault(i, [])
    # A variable that two names would mean belongs to neither.
    counts = Counter(found.values())
    for i in [i for i, j in found.items() if counts[j] > 1 and i not in exact]:
        candidates[i] = [found.pop(i)]
    return Pairs(found, candidates)


def _groups(
    saved: Sequence[Named], current: Sequence[Named], same: Callable[[str, str], bool], done: Collection[int]
) -> dict[tuple[int, ...], list[int]]:
    """Returns the saved names that are not done, by the positions of all variables that they may mean."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (name, shape) in enumerate(saved):
        if i not in done:
            fitting = (j for j, other in enumerate(current) if same(name, other[0]) and _same_shape(shape, other[1]))
            if positions := tuple(fitting):
                groups.setdefault(positions, []).append(i)
    return groups


def _but_for_the_model(saved: Sequence[Named], current: Sequence[Named], exact: dict[int, int]) -> dict[int, int]:
    """Returns pairs of names that are the same behind the name of the model."""
    taken = set(exact.values())
    fitting = {
        i: [j for j, (now, _) in enumerate(current) if j not in taken and _same_but_for_the_model(name, now)]
        for i, (name, _) in enumerate(saved)
        if i not in exact
    }
    counts = Counter(j for positions in fitting.values() for j in positions)
    return {i: positions[0] for i, positions in fitting.items() if len(positions) == 1 and counts[positions[0]] == 1}


def _same_but_for_the_model(a: str, b: str) -> bool:
    parts, others = a.split("/"), b.split("/")
    if len(parts) == len(others) > 2:
        return parts[1:] == others[1:] and _without_counts(parts[0]) == _without_counts(others[0])
    return min(len(parts), len(others)) > 1 and _same_tail(a, b)


def _in_order(
    members: Sequence[int], fitting: Sequence[int], saved: Sequence[Named], current: Sequence[Named]
) -> dict[int, int] | None:
    """Returns pairs of as many names as variables, in the order of their counts; `None` if these tell no order."""
    if len(members) != len(fitting):
        return None
    parts = min(len(name.split("/")) for name, _ in [*(saved[i] for i in members), *(current[j] for j in fitting)])
    counts = [{i: _counts(names[i][0], parts) for i in of} for names, of in ((saved, members), (current, fitting))]
    if len(members) > 1 and any(len(set(each.values())) < len(each) for each in counts):
        return None
    ordered = [sorted(each, key=each.__getitem__) for each in counts]
    return dict(zip(*ordered, strict=True))


def _counts(name: str, parts: int) -> tuple[int, ...]:
    """Returns the numbers that Keras counted up in the last parts of a name: `(3, 0)` for `dense_3/kernel`."""
    found = (re.search(r"_(\d+)$", part) for part in name.split("/")[-parts:])
    return tuple(int(match[1]) if match else 0 for match in found)


def _without_counts(name: str) -> list[str]:
    return [re.sub(r"_\d+$", "", part) for part in name.split("/")]


def _same_counted(a: str, b: str) -> bool:
    return _without_counts(a) == _without_counts(b)


def _same_tail_counted(a: str, b: str) -> bool:
    shorter, longer = sorted((_without_counts(a), _without_counts(b)), key=len)
    # A name of one part, without the layer, says too little.
    return len(shorter) > 1 and longer[-len(shorter) :] == shorter


def _same_shape(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    return a is None or b is None or a == b
