"""Names of variables in saved state, and how they find the variables again."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


def unique(paths: Sequence[str]) -> list[str]:
    """The paths, with `#1`, `#2` behind those that occurred before."""
    seen: dict[str, int] = {}
    names = []
    for path in paths:
        count = seen.get(path, 0)
        seen[path] = count + 1
        names.append(f"{path}#{count}" if count else path)
    return names


def match(saved: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """For each own name, the position of the saved name that is meant.

    In order, as Keras itself matches weights and slots, where the names agree but for
    the numbers that Keras counts up (`dense_3` for `dense`) and the model's own name in
    front; else by name, and by name without what is in front of it, which `Sequential`
    loses when it is loaded from a file.

    Args:
        saved: Unique names in the order in which they were saved.
        own: Unique names now.

    Returns:
        Positions in `saved`, one per own name and each once; `None` where the
        names do not fit.
    """
    if len(saved) != len(own):
        return None
    if [_uncounted(name) for name in saved] == [_uncounted(name) for name in own]:
        return list(range(len(own)))
    for matches in (_equal, _same_tail):
        found = [[i for i, name in enumerate(saved) if matches(name, mine)] for mine in own]
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
    """The last two parts of a name without Keras's counts."""
    return [re.sub(r"_\d+$", "", part) for part in name.split("/")[-2:]]


def path_of(name: str) -> str:
    """The path that `unique` made a name of."""
    return name.partition("#")[0]


Named = tuple[str, tuple[int, ...] | None]
"""A variable's unique name and its shape; `None` where the shape is not known."""


class Pairs(NamedTuple):
    """Which saved variable stands for which own one.

    Attributes:
        found: Position among the own ones, by position among the saved ones.
        candidates: For each saved one that was not found: positions of the own ones that its name may mean. None:
            there is no such variable. Two or more: the name does not say which.
    """

    found: dict[int, int]
    candidates: dict[int, list[int]]


def pair(saved: Sequence[Named], own: Sequence[Named]) -> Pairs:
    """Finds saved variables again among others, by name.

    A saved variable is the one with exactly its path, but for the model's own name, which Keras counts up and
    `Sequential` loses in a file. Only where there is none, it is the one that Keras's counting
    means: `dense_3/kernel` for `dense/kernel`, in the order of the counts where there are several.
    Where that leaves two, the name is ambiguous; so
    are `dense` and `dense_1` where there are `dense_1` and `dense_2`.

    Args:
        saved: The saved variables.
        own: The variables now.

    Returns:
        `Pairs`.
    """
    positions = {name: i for i, (name, _) in enumerate(own)}
    exact = {i: positions[name] for i, (name, _) in enumerate(saved) if name in positions}
    exact |= _but_for_the_model(saved, own, exact)
    found = dict(exact)
    candidates: dict[int, list[int]] = {}
    for means in (_same_counted, _same_tail_counted):
        taken = set(found.values())
        left = [i for i in range(len(saved)) if i not in found and i not in candidates]
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in left:
            fitting = [
                j for j, (name, shape) in enumerate(own) if means(saved[i][0], name) and _same_shape(saved[i][1], shape)
            ]
            if fitting:
                groups.setdefault(tuple(fitting), []).append(i)
        for group, members in groups.items():
            fitting = list(group)
            rivals = {i for i, j in exact.items() if j in fitting and means(saved[i][0], own[j][0])}
            open_ones = [j for j in fitting if j not in taken]
            if not open_ones:
                continue  # all of them have their own
            everyone = sorted({*members, *rivals})
            order = _in_order(everyone, fitting, saved, own)
            if order is None:
                candidates |= dict.fromkeys(members, open_ones)
            elif any(order[i] != exact[i] for i in rivals):
                # `dense`, `dense_1` for `dense_1`, `dense_2`: by its path or by its count?
                candidates |= {i: sorted({order[i], found.pop(i, order[i])}) for i in everyone}
            else:
                found |= {i: order[i] for i in members}
    for i in range(len(saved)):
        if i not in found:
            candidates.setdefault(i, [])
    # One that two names would mean is nobody's.
    counts = Counter(found.values())
    for i in [i for i, j in found.items() if counts[j] > 1 and i not in exact]:
        candidates[i] = [found.pop(i)]
    return Pairs(found, candidates)


def _but_for_the_model(saved: Sequence[Named], own: Sequence[Named], exact: dict[int, int]) -> dict[int, int]:
    """Pairs of names that are the same behind the model's own."""
    taken = set(exact.values())
    fitting = {
        i: [j for j, (mine, _) in enumerate(own) if j not in taken and _same_but_for_the_model(name, mine)]
        for i, (name, _) in enumerate(saved)
        if i not in exact
    }
    counts = Counter(j for positions in fitting.values() for j in positions)
    return {i: js[0] for i, js in fitting.items() if len(js) == 1 and counts[js[0]] == 1}


def _same_but_for_the_model(a: str, b: str) -> bool:
    parts, others = a.split("/"), b.split("/")
    if len(parts) == len(others) > 2:
        return parts[1:] == others[1:] and _without_counts(parts[0]) == _without_counts(others[0])
    return min(len(parts), len(others)) > 1 and _same_tail(a, b)


def _in_order(
    members: Sequence[int], fitting: Sequence[int], saved: Sequence[Named], own: Sequence[Named]
) -> dict[int, int] | None:
    """Pairs as many names as there are variables, in the order of their counts; `None` where that is no order."""
    if len(members) != len(fitting):
        return None
    parts = min(len(name.split("/")) for name, _ in [*(saved[i] for i in members), *(own[j] for j in fitting)])
    counts = [{i: _counts(names[i][0], parts) for i in of} for names, of in ((saved, members), (own, fitting))]
    if len(members) > 1 and any(len(set(each.values())) < len(each) for each in counts):
        return None
    ordered = [sorted(each, key=each.__getitem__) for each in counts]
    return dict(zip(*ordered, strict=True))


def _counts(name: str, parts: int) -> tuple[int, ...]:
    """The numbers that Keras counted up in the last parts of a name: `(3, 0)` for `dense_3/kernel`."""
    found = (re.search(r"_(\d+)$", part) for part in name.split("/")[-parts:])
    return tuple(int(match[1]) if match else 0 for match in found)


def _without_counts(name: str) -> list[str]:
    return [re.sub(r"_\d+$", "", part) for part in name.split("/")]


def _same_counted(a: str, b: str) -> bool:
    return _without_counts(a) == _without_counts(b)


def _same_tail_counted(a: str, b: str) -> bool:
    shorter, longer = sorted((_without_counts(a), _without_counts(b)), key=len)
    # A name without a layer's says too little.
    return len(shorter) > 1 and longer[-len(shorter) :] == shorter


def _same_shape(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
    return a is None or b is None or a == b
