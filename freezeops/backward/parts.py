"""The trainable part of a gradient, made from its terms: operations that take the place of the whole gradient's."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from freezeops import ops
from freezeops.backward.terms import BatchSum, Elementwise, FilterGradient, Leaf, Number, Product, Slices, Term
from freezeops.backward.ways import Chosen, reason_against_entries
from freezeops.keras_compat.operations import again
from freezeops.partitions.compact import CompactPartition, IndexTensors
from freezeops.partitions.gradient_index import (
    GridIndex,
    GridShape,
    GridTensors,
    MakeVariable,
    VisitIndex,
)

Choices: TypeAlias = dict[int, Chosen]
"""The way of each term, by the term's `id`."""


class PartMaker:
    """Makes the trainable part of one gradient in a function that is being traced.

    Every tensor here is a vector of the variable's compact entries, `capacity * inner` of them; `make` gives it the
    shape of the compact variable.

    Args:
        partition: The variable's partition.
        index: The index of its trainable entries, for the step.
        choices: The way of each term.
    """

    def __init__(self, partition: CompactPartition, index: IndexTensors, choices: Choices):
        self._partition = partition
        self._index = index
        self._choices = choices
        self._room = partition.capacity * partition.layout.inner

    def make(self, term: Term, dtype: tf.DType) -> tf.Tensor:
        """Returns the trainable part of a gradient; +0.0 where room is left.

        Args:
            term: What the gradient is made of.
            dtype: The dtype that the gradient has.
        """
        part = tf.cast(self._part(term), dtype)
        if not self._leaves_room_at_zero(term):
            used = tf.cast(self._index.indices, tf.int64) < self._partition.layout.kept
            part = tf.reshape(part, [self._partition.capacity, self._partition.layout.inner])
            part = tf.where(used[:, None], part, tf.zeros([], dtype))
        return tf.reshape(part, self._partition.inner_variable.shape)

    def _leaves_room_at_zero(self, term: Term) -> bool:
        chosen = self._choices.get(id(term))
        return isinstance(term, Leaf | Slices) or (chosen is not None and chosen.way in ("entries", "grid"))

    def _part(self, term: Term) -> tf.Tensor:
        if isinstance(term, Number):
            return tf.reshape(term.tensor, [])
        if isinstance(term, Leaf):
            return self._gathered(term.tensor)
        if isinstance(term, Elementwise):
            return self._elementwise(term)
        if isinstance(term, BatchSum):
            return self._batch_sum(term)
        if isinstance(term, Slices):
            return self._slices(term)
        chosen = self._choices[id(term)]
        if isinstance(term, FilterGradient):
            return self._filter(term, chosen)
        return self._product(term.x.matrix(), term.dy.matrix(), chosen)

    # Elementwise.

    def _elementwise(self, term: Elementwise) -> tf.Tensor:
        if term.op.type == "AddN":
            return tf.add_n(self._summands(term.terms))
        return again(term.op, [self._part(each) for each in term.terms])

    def _summands(self, terms: Sequence[Term]) -> list[tf.Tensor]:
        """Returns the parts of summands. Several products of one kind become one, over the tokens of all of them."""
        alike: dict[Any, list[Product]] = {}
        parts = []
        for term in terms:
            if isinstance(term, Product):
                alike.setdefault((term.x.width, term.dy.width, term.dtype), []).append(term)
            else:
                parts.append(self._part(term))
        for products in alike.values():
            x = [product.x.matrix() for product in products]
            dy = [product.dy.matrix() for product in products]
            chosen = self._choices[id(products[0])]
            if len(products) > 1:
                x, dy = [tf.concat(x, 0)], [tf.concat(dy, 0)]
            parts.append(self._product(x[0], dy[0], chosen))
        # `AddN` takes no number for all entries, of which the whole gradient was filled.
        return [part if part.shape.rank else tf.fill([self._room], part) for part in parts]

    # Products.

    def _product(self, x: tf.Tensor, dy: tf.Tensor, chosen: Chosen) -> tf.Tensor:
        if chosen.way == "rows":
            return self._rows(x, dy)
        if chosen.way == "grid":
            return self._grid(x, dy, chosen)
        return self._entries(x, dy)

    def _rows(self, x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        columns = self._positions(self._partition.layout.inner // dy.shape[1])
        return tf.reshape(tf.matmul(tf.gather(x, columns, axis=1), dy, transpose_a=True), [-1])

    def _entries(self, x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        partition, shape = self._partition, (x.shape[1], dy.shape[1])

        def make(make_variable: MakeVariable) -> VisitIndex:
            mask = partition.mask
            return VisitIndex(*shape, self._room, mask.packed, mask.layout, make_variable)

        index = partition.gradient_index(("visits", *shape), make)
        indices = self._index
        if partition.layout.inner > 1:
            # The twin's own index is of single entries.
            indices = self._index._replace(indices=self._positions(partition.layout.inner))
        return ops.sampled_matmul(x, dy, index.tensor(), *indices)

    def _grid(self, x: tf.Tensor, dy: tf.Tensor, chosen: Chosen) -> tf.Tensor:
        index, grid = self._grid_index(GridShape(1, x.shape[1], dy.shape[1]), chosen)

        def of_grid() -> tf.Tensor:
            some = x if index.row_count == x.shape[1] else tf.gather(x, grid.rows, axis=1)
            others = dy if index.column_count == dy.shape[1] else tf.gather(dy, grid.columns, axis=1)
            return tf.reshape(tf.matmul(some, others, transpose_a=True), [-1])

        def otherwise() -> tf.Tensor:
            if not reason_against_entries(x.dtype):
                return self._entries(x, dy)
            return self._gathered(tf.matmul(x, dy, transpose_a=True))

        return self._where_it_fits(grid, of_grid, otherwise)

    def _filter(self, term: FilterGradient, chosen: Chosen) -> tf.Tensor:
        index, grid = self._grid_index(GridShape(term.taps, *term.channels), chosen)
        images, sizes, upstream = term.op.inputs

        def of_grid() -> tf.Tensor:
            of_rows = images if index.row_count == term.channels[0] else tf.gather(images, grid.rows, axis=-1)
            columns = grid.columns
            if term.depthwise:
                columns = tf.reshape(grid.rows[:, None] * term.channels[1] + columns[None, :], [-1])
            of_columns = tf.gather(upstream, columns, axis=-1)
            shape = [*term.op.outputs[0].shape[:-2], index.row_count, index.column_count]
            return tf.reshape(again(term.op, [of_rows, tf.constant(shape, tf.int32), of_columns]), [-1])

        def otherwise() -> tf.Tensor:
            return self._gathered(again(term.op, [images, sizes, upstream]))

        return self._where_it_fits(grid, of_grid, otherwise)

    def _grid_index(self, shape: GridShape, chosen: Chosen) -> tuple[GridIndex, GridTensors]:
        assert chosen.grid is not None
        grid = chosen.grid
        index = self._partition.gradient_index(
            ("grid", shape, len(grid.rows), len(grid.columns)),
            lambda make_variable: GridIndex(shape, grid, make_variable),
        )
        return index, index.tensors()

    def _where_it_fits(
        self, grid: GridTensors, of_grid: Callable[[], tf.Tensor], otherwise: Callable[[], tf.Tensor]
    ) -> tf.Tensor:
        """Another mask may be none of rows and columns, without a new trace."""
        part = tf.cond(grid.fits, of_grid, otherwise)
        return tf.ensure_shape(part, [self._room])

    # Sums and slices.

    def _batch_sum(self, term: BatchSum) -> tf.Tensor:
        entries = self._positions(self._partition.layout.inner)
        parts = [tf.gather(tf.reshape(each, [-1, term.size]), entries, axis=1) for each in term.factors]
        product = math.prod(parts[1:], start=parts[0])
        wide = tf.float32 if product.dtype in (tf.float16, tf.bfloat16) else product.dtype
        return tf.cast(tf.reduce_sum(tf.cast(product, wide), axis=0), product.dtype)

    def _slices(self, term: Slices) -> tf.Tensor:
        shape = tuple(self._partition.variable.shape)
        values = tf.reshape(term.values, [-1, *shape[1:]])
        gradient = tf.IndexedSlices(values, term.indices, tf.constant(shape, tf.int64))
        compact = self._partition.compact_slices(gradient, self._index)
        return tf.reshape(tf.math.unsorted_segment_sum(compact.values, compact.indices, self._partition.capacity), [-1])

    # The index.

    def _positions(self, each: int) -> tf.Tensor:
        """Returns the positions that the mask's ones stand for, `each` of them in a row; 0 where room is left."""
        bits = tf.cast(self._index.indices, tf.int64)
        bits = tf.where(bits < self._partition.layout.kept, bits, tf.zeros([], tf.int64))
        if each == 1:
            return bits
        return tf.reshape(bits[:, None] * each + tf.range(each, dtype=tf.int64)[None, :], [-1])

    def _gathered(self, whole: tf.Tensor) -> tf.Tensor:
        """Returns the trainable entries of a tensor of which all are computed."""
        whole = tf.reshape(whole, self._partition.variable.shape)
        return tf.reshape(ops.gather_trainable(whole, *self._index, self._partition.layout), [-1])
