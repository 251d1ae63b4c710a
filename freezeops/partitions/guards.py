"""Guards: what puts the frozen entries of one variable back after something else may have written them.

A guard takes its snapshot when it is made, with the mask bits of that moment: another thread may change the mask
meanwhile. It belongs to one step, since the replicas of a distributed step share their partitions.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.variables import Variable
from freezeops.masks.layout import Layout
from freezeops.ops.gradients import merge_slices

Copies = Sequence[tuple[tf.Variable, tf.Tensor]]
"""The copies of a variable that a context holds, each with its packed mask bits."""


class Guard:
    """Puts nothing back: for variables of which no frozen entry can be written."""

    def put_back(self) -> None:
        """Makes the frozen entries what they were when the guard was made."""

    def discard(self) -> None:
        """Called instead of `put_back` where a step failed."""
        self.put_back()


class WholeGuard(Guard):
    """Puts back all frozen entries of a variable.

    Args:
        copies: The variable's copies with their mask bits.
        layout: Layout of the bits.
    """

    def __init__(self, copies: Copies, layout: Layout):
        self._layout = layout
        self._kept = [(variable, bits, ops.remember_frozen(variable, bits, layout)) for variable, bits in copies]

    def put_back(self) -> None:  # noqa: D102
        for variable, bits, old in self._kept:
            ops.restore_frozen(variable, bits, old, self._layout)


class RowsGuard(Guard):
    """Puts back the frozen entries of some rows, where no other row can be written.

    Args:
        copies: The variable's copies with their mask bits.
        layout: Layout of the bits.
        rows: Integer vector of the indices of the rows.
    """

    def __init__(self, copies: Copies, layout: Layout, rows: tf.Tensor):
        self._layout = layout
        self._rows = rows
        self._kept = [(variable, bits, variable.sparse_read(rows)) for variable, bits in copies]

    def put_back(self) -> None:  # noqa: D102
        for variable, bits, old in self._kept:
            new = variable.sparse_read(self._rows)
            merged = merge_slices(new, old, self._rows, bits, self._layout, variable.shape[0])
            variable.scatter_update(tf.IndexedSlices(merged, self._rows))


class VariableGuard(Guard):
    """Puts back a variable of which every entry is frozen.

    Args:
        copies: The variable's copies.
    """

    def __init__(self, copies: Sequence[tf.Variable]):
        self._kept = [(variable, variable.read_value()) for variable in copies]

    def put_back(self) -> None:  # noqa: D102
        for variable, old in self._kept:
            variable.assign(old)


@contextmanager
def keeping_frozen(guards: Sequence[Guard], averages: Iterable[tuple[Any, Variable]] = ()) -> Iterator[None]:
    """Puts frozen entries back when the block ends.

    Args:
        guards: Of all variables that the block may write.
        averages: Slots of moving averages, each with the partition of its variable.
    """
    try:
        yield
    except BaseException:
        if tf.executing_eagerly():  # otherwise tracing failed: there is no step to protect
            for guard in guards:
                guard.discard()
        raise
    for guard in guards:
        guard.put_back()
    for partition, average in averages:
        partition.fill_frozen(average)
