"""Capacity: how many trainable entries a variable has room for in compact state."""

import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

from freezeops.masks.layout import Layout
from freezeops.messages import short

Capacity: TypeAlias = int | float
"""Trainable entries that there is room for: a number of entries (`int`) or a share of them (`float`)."""


def check_capacity(capacity: Any) -> None:
    """Raises unless this is what `MaskedOptimizer` takes for `capacity`."""
    values = capacity.values() if isinstance(capacity, Mapping) else [] if capacity is None else [capacity]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                "`capacity` must be a number of entries (int) or a share of them (float), or map path patterns to "
                f"those. Received: capacity={short(capacity)}"
            )
        if not float(value) >= 0 or (not isinstance(value, numbers.Integral) and float(value) > 1):
            raise ValueError(
                "`capacity` must be an int that is not negative, or a float from 0.0 to 1.0. Received: "
                f"capacity={short(capacity)}"
            )


def capacity_in_bits(capacity: Capacity, layout: Layout) -> int:
    """Returns the number of mask bits that may be 1.

    Args:
        capacity: As the user gave it.
        layout: The mask's, `(1, kept, inner)`.
    """
    entries = int(capacity) if isinstance(capacity, numbers.Integral) else math.ceil(capacity * layout.size)
    return min(-(-entries // max(layout.inner, 1)), layout.kept)


def beyond_capacity_message(path: str, count: int, room: int) -> str:
    """The message for a mask with more trainable entries than there is room for."""
    return (
        f"A mask must not have more trainable entries than its variable has room for in compact state. Received: "
        f"{count} trainable entries for {path!r}, which has room for {room}. Call "
        f"`optimizer.repack(masks={{{path!r}: mask}})` instead, which makes room, keeps slots and asks for a new "
        f"trace, or pass capacity={{{path!r}: {count}}} to MaskedOptimizer from the start."
    )
