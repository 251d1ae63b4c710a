"""Grids: masks in which the trainable entries are those of some rows and some columns of a matrix."""

from typing import NamedTuple

import numpy as np

from freezeops.masks import packing


class Grid(NamedTuple):
    """A grid.

    Attributes:
        rows: Indices of its rows, ascending: `int64`.
        columns: Indices of its columns, ascending: `int64`.
    """

    rows: np.ndarray
    columns: np.ndarray


def grid_of(packed: np.ndarray, taps: int, rows: int, columns: int) -> Grid | None:
    """Returns the grid that a mask is, the same at each tap; `None` if it is none.

    Args:
        packed: `uint8` vector, one bit for each entry of a tensor `[taps, rows, columns]`.
        taps: Length of its first axis; a matrix has 1.
        rows: Length of its second axis.
        columns: Length of its last axis.

    Example:

    >>> import numpy as np
    >>> from freezeops.masks.grid import grid_of
    >>> from freezeops.masks.packing import pack_bits
    >>> grid_of(pack_bits(np.array([[False, True], [False, True]])), 1, 2, 2)
    Grid(rows=array([0, 1]), columns=array([1]))
    >>> grid_of(pack_bits(np.array([[False, True], [True, True]])), 1, 2, 2) is None
    True
    """
    mask = packing.unpack_bits(packed, taps * rows * columns).reshape(taps, rows, columns)
    first = mask[0]
    in_rows, in_columns = first.any(axis=1), first.any(axis=0)
    if int(np.count_nonzero(mask)) != taps * int(in_rows.sum()) * int(in_columns.sum()):
        return None
    if any(not np.array_equal(each, first) for each in mask[1:]):
        return None
    return Grid(np.flatnonzero(in_rows), np.flatnonzero(in_columns))
