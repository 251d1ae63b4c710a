"""The plan by which the CPU kernel of `ops.sampled_matmul` goes through the trainable entries of a mask.

The kernel multiplies rows of two transposed matrices that lie in the cache. A *visit* is one row of `x^T` against those
columns of `dy` in one *panel* of columns that are trainable in that row; it has `count` entries. Visits of one *chunk*
of rows and one panel make a *block*. In a block visits are sorted by their counts, so that no branch depends on the
mask, and all that is read of the plan is read in order. `csrc/kernels/cpu/visits.h` reads it.

The vector, of `int32`:

- the head, `HEAD` numbers: tokens (how many rows of `x` and `dy` are transposed at a time), panel and chunk (columns
  and rows of a block), rows, columns, and how many entries (ones of the mask), visits and groups there are;
- for each block, and once more for the end: its first group, its first visit and its first entry. Blocks are numbered
  `row // chunk * panels + column // panel`;
- for each group, which are the visits of a block with the same count: the count and how many visits. Counts ascend
  within a block;
- for each visit: its row. Rows ascend within a group;
- for each visit: the rank (number among the ones of the mask) of its first entry; the others follow that one;
- for each entry, in the order of visits: its column within the panel, as `uint16`, two in the place of a number;
- zeros up to the length, which depends on the capacity and not on the mask.
"""

import math

import numpy as np

from freezeops.masks import packing

HEAD = 8
"""Numbers in the head of the vector; `kVisitsHead` in `csrc/kernels/cpu/visits.h`."""

_TOKENS = 128

_CHUNK = 512
_PANELS = ((0.03, 768), (0.075, 128), (1.0, 64))
"""Up to which share of trainable entries a panel is the fastest.

A panel of many entries lies in the first-level cache, of few with its chunk in the second: `_TOKENS` floats for each
column and each row. The wider a panel, the more entries has a visit, for which a row of `x^T` is loaded.
"""


def block_shape(rows: int, columns: int, capacity: int) -> tuple[int, int, int]:
    """Returns tokens, panel and chunk, see above, for a matrix of a shape with room for so many trainable entries."""
    share = min(capacity / max(rows * columns, 1), 1.0)
    return _TOKENS, next(panel for most, panel in _PANELS if share <= most), _CHUNK


def visits_size(rows: int, columns: int, capacity: int) -> int:
    """Returns the length of the vector of `visits`, whatever the mask.

    Args:
        rows: Number of rows of the masked matrix.
        columns: Number of its columns.
        capacity: The most entries that may be trainable.

    Returns:
        The number of `int32`.

    Raises:
        ValueError: If one is negative, or needs more than 31 bits.
    """
    for name, number in (("rows", rows), ("columns", columns), ("capacity", capacity)):
        if not 0 <= number < 2**31:
            raise ValueError(f"`{name}` must be from 0 to 2**31 - 1. Received: {name}={number}")
    _, panel, chunk = block_shape(rows, columns, capacity)
    panels = -(-columns // panel)
    blocks = -(-rows // chunk) * panels
    most_visits = min(capacity, rows * panels)
    # A block with k counts has 1 + 2 + ... + k entries at least; all have the most groups where each has as many.
    by_entries = (math.isqrt(8 * capacity * blocks + blocks**2) - blocks) // 2
    most_groups = min(most_visits, blocks * min(panel, chunk), by_entries)
    return HEAD + 3 * (blocks + 1) + 2 * most_groups + 2 * most_visits + -(-capacity // 2)


def visits(packed: np.ndarray, rows: int, columns: int, capacity: int) -> np.ndarray:
    """Returns the plan of the kernel for a mask of single entries, as described at the top of this module.

    Args:
        packed: Packed bits of the mask, `rows * columns` of them in row-major order; see `packing.pack_bits`.
        rows: Number of rows of the masked matrix.
        columns: Number of its columns.
        capacity: The most entries that may be trainable.

    Returns:
        An `int32` vector of length `visits_size(rows, columns, capacity)`.

    Raises:
        ValueError: If more entries are trainable than `capacity`, or `packed` has not a bit for each entry.

    Example:
        >>> from freezeops.masks.visits import HEAD, visits
        >>> mask = np.packbits([[1, 0, 1], [0, 0, 0]], bitorder="little")
        >>> plan = visits(mask, rows=2, columns=3, capacity=2)
        >>> plan[:HEAD]  # two entries in one visit, which is a group
        array([128,  64, 512,   2,   3,   2,   1,   1], dtype=int32)
    """
    size = visits_size(rows, columns, capacity)
    if packed.size != (rows * columns + 7) // 8:
        raise ValueError(
            f"`packed` must have a bit for each of the {rows} x {columns} entries. Received: {packed.size} bytes"
        )
    ones = packing.count_bits(packed, rows * columns)
    if ones > capacity:
        raise ValueError(f"`capacity` must be at least the {ones} trainable entries. Received: capacity={capacity}")
    shape = block_shape(rows, columns, capacity)
    if host := packing.host_module():
        return host.visits(packed, rows, columns, *shape, size)
    return _visits(packed, rows, columns, *shape, size)


def _visits(packed: np.ndarray, rows: int, columns: int, tokens: int, panel: int, chunk: int, size: int) -> np.ndarray:
    panels, chunks = -(-columns // panel), -(-rows // chunk)
    entries = packing.bit_indices(packed, rows * columns)
    entry_row, entry_column = np.divmod(entries, max(columns, 1))
    entry_visit = entry_row * panels + entry_column // panel
    ranks = np.flatnonzero(np.diff(entry_visit, prepend=-1))  # of the first entry of each visit, in row-major order
    counts = np.diff(ranks, append=entries.size)
    row, visit_panel = np.divmod(entry_visit[ranks], max(panels, 1))
    block = row // chunk * panels + visit_panel

    order = np.argsort(block * (panel + 1) + counts, kind="stable")  # which keeps the order of rows
    ranks, counts, row, block = ranks[order], counts[order], row[order], block[order]
    first_entries = np.cumsum(counts) - counts
    column = entry_column[np.repeat(ranks - first_entries, counts) + np.arange(entries.size)] % panel
    group_visits = np.flatnonzero(np.diff(block * (panel + 1) + counts, prepend=-1))  # the first visit of each group
    groups = np.stack([counts[group_visits], np.diff(group_visits, append=row.size)], axis=1)

    each = np.arange(chunks * panels + 1)
    block_visits = np.searchsorted(block, each)
    starts = np.stack(
        [
            np.searchsorted(block[group_visits], each),
            block_visits,
            np.append(first_entries, entries.size)[block_visits],
        ],
        axis=1,
    )
    halves = np.zeros(-(-entries.size // 2) * 2, np.uint16)
    halves[: entries.size] = column
    head = [tokens, panel, chunk, rows, columns, entries.size, row.size, len(groups)]
    plan = np.zeros(size, np.int32)
    parts = (np.asarray(head), starts.reshape(-1), groups.reshape(-1), row, ranks, halves.view(np.int32))
    used = np.concatenate([part.astype(np.int32) for part in parts])
    plan[: used.size] = used
    return plan
