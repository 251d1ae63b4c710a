"""Indices for making the trainable part of a gradient: beside those of compact state, and changed with them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from freezeops.keras_compat.variables import components
from freezeops.masks import packing
from freezeops.masks.grid import Grid, grid_of
from freezeops.masks.layout import Layout
from freezeops.masks.visits import visits

MakeVariable = Callable[[np.ndarray, str], keras.Variable]
"""Makes a variable of integers on the device of the model's, given its values and a word for its name."""


class GridShape(NamedTuple):
    """A variable as a tensor of three axes; a matrix has one tap."""

    taps: int
    rows: int
    columns: int


def elementwise_bits(packed: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns one packed bit for each entry, for a packed mask of some layout with `outer` 1."""
    if layout.inner == 1:
        return packed
    return packing.pack_bits(np.repeat(packing.unpack_bits(packed, layout.kept), layout.inner))


class GradientIndex(ABC):
    """An index for one way of making the trainable part of a gradient.

    It belongs to a compact variable, and has the room that this has.
    """

    @abstractmethod
    def assign(self, packed: np.ndarray, layout: Layout) -> None:
        """Sets a packed mask, which fits into the room of the compact variable."""

    @property
    @abstractmethod
    def variables(self) -> list[keras.Variable]:
        """The variables that hold it."""


class VisitIndex(GradientIndex):
    """The plan of `ops.sampled_matmul`.

    Args:
        rows: Number of rows of the matrix.
        columns: Number of its columns.
        capacity: How many entries may be trainable.
        packed: The mask that it begins with.
        layout: The layout of that.
        make: Makes its variable.
    """

    def __init__(self, rows: int, columns: int, capacity: int, packed: np.ndarray, layout: Layout, make: MakeVariable):
        self._matrix = rows, columns, capacity
        self._visits = make(self._plan(packed, layout), f"visits_{rows}x{columns}")

    def _plan(self, packed: np.ndarray, layout: Layout) -> np.ndarray:
        return visits(elementwise_bits(packed, layout), *self._matrix)

    def assign(self, packed: np.ndarray, layout: Layout) -> None:
        self._visits.assign(self._plan(packed, layout))

    @property
    def variables(self) -> list[keras.Variable]:
        return [self._visits]

    def tensor(self) -> tf.Tensor:
        """Returns the plan, of the copy that this context holds."""
        return tf.convert_to_tensor(components(self._visits)[0])


class GridTensors(NamedTuple):
    """A grid as tensors.

    Attributes:
        rows: `int64` indices of the rows.
        columns: `int64` indices of the columns.
        fits: Whether the mask is this grid.
    """

    rows: tf.Tensor
    columns: tf.Tensor
    fits: tf.Tensor


class GridIndex(GradientIndex):
    """The rows and columns of a grid that fills the room of its variable.

    Args:
        shape: The variable as a tensor of three axes.
        grid: The grid that it begins with.
        make: Makes its variables.
    """

    def __init__(self, shape: GridShape, grid: Grid, make: MakeVariable):
        self.shape = shape
        name = "x".join(map(str, shape))
        self._rows = make(grid.rows, f"rows_of_{name}")
        self._columns = make(grid.columns, f"columns_of_{name}")
        self._fits = make(np.ones(1, np.int64), f"fits_{name}")

    def assign(self, packed: np.ndarray, layout: Layout) -> None:
        grid = grid_of(elementwise_bits(packed, layout), *self.shape)
        if grid is not None and (len(grid.rows), len(grid.columns)) == (self.row_count, self.column_count):
            self._rows.assign(grid.rows)
            self._columns.assign(grid.columns)
            self._fits.assign(np.ones(1, np.int64))
        else:
            self._fits.assign(np.zeros(1, np.int64))

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return int(self._rows.shape[0])

    @property
    def column_count(self) -> int:
        """Number of columns."""
        return int(self._columns.shape[0])

    @property
    def variables(self) -> list[keras.Variable]:
        return [self._rows, self._columns, self._fits]

    def tensors(self) -> GridTensors:
        """Returns rows, columns and whether they are the mask, of the copies that this context holds."""
        rows, columns, fits = (tf.convert_to_tensor(components(each)[0]) for each in self.variables)
        return GridTensors(rows, columns, tf.not_equal(fits[0], 0))
