"""Random masks of a given density, and the fewest bytes that a step of an optimizer must move under one."""

import math

import numpy as np

ROW = 1024
LINE = 64
"""Bytes of memory that a processor reads or writes together."""
WIDTH = 4
"""Of a float32."""


def shape_of(size: int) -> tuple[int, ...]:
    """Rows of `ROW` entries, where that comes out even."""
    return (size // ROW, ROW) if size % ROW == 0 else (size, 1)


def make_mask(shape: tuple[int, ...], density: float, rows: bool) -> np.ndarray:
    """A random mask of about that density, of the tensor's shape or of one value per row; at 1 all is trainable."""
    rng = np.random.default_rng(0)
    count = shape[0] if rows else math.prod(shape)
    flags = np.zeros(count, bool)
    if density >= 1:
        flags[:] = True
    elif rows:
        flags[rng.choice(count, max(round(density * count), 1), replace=False)] = True
    else:
        step = 2**24  # so that no float is made for every entry at once
        for start in range(0, count, step):
            part = flags[start : start + step]
            part[:] = rng.random(part.size, dtype=np.float32) < density
        flags[0], flags[-1] = True, False  # never none, nor all
    return flags[:, None] if rows else flags.reshape(shape)


def touched_share(density: float, rows: bool) -> float:
    """Expected share of a float32 tensor's cache lines that hold a trainable entry.

    At random a line holds none with probability `(1 - density) ** 16`. Rows are whole lines
    (tensors and rows of `ROW` entries begin at one).
    """
    return density if rows else 1 - (1 - density) ** (LINE // WIDTH)


def fewest_bytes(size: int, slots: int, density: float, rows: bool, state: str) -> float:
    """Bytes that a step of an optimizer must move between memory and processor, at least.

    The gradient is read, the variable and each slot are read and written, each line that
    holds a trainable entry once, and nothing else:

    - full state: `touched * size * 4 * (1 + 2 + 2 * slots)`, where `touched` is `touched_share`;
    - compact state: `touched * size * 4 * (1 + 2)`, and of the slots, which lie together,
      `density * size * 4 * 2 * slots`;
    - the mask: a bit per entry or row; or, in compact state, an index of four bytes per
      trainable one where that is less.

    Args:
        size: Entries of the variable.
        slots: How many slots the optimizer has.
        density: Share of trainable entries.
        rows: Whether whole rows are trainable.
        state: "full" or "compact".
    """
    touched = touched_share(density, rows) * size * WIDTH
    kept = size // ROW if rows else size
    mask = kept / 8
    if state == "compact":
        return 3 * touched + 2 * slots * density * size * WIDTH + min(mask, 4 * density * kept)
    return (3 + 2 * slots) * touched + mask
