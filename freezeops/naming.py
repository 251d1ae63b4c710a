"""Names of variables in saved state, and how they find the variables again."""

import re
from collections.abc import Sequence


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
