"""The pure-TensorFlow twins of the native ops: the specification, and the fallback.

Nothing here depends on a compiled library. Entries are selected as integers of
the entry's width: a float select may change the payload of a NaN (XLA turns the
bfloat16 NaN 0x7f81 into 0x7fc0), and arithmetic would flush subnormals.

All functions take a packed mask (`uint8` vector, little bit order, 1 = trainable)
and its layout `(outer, kept, inner)`.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from freezeops.masks.layout import Layout
from freezeops.ops.shapes import of_shape, rows_in_range


def integers_like(dtype: tf.DType) -> tf.DType:
    """Returns the signed integer dtype that is as wide as a floating one."""
    return {2: tf.int16, 4: tf.int32, 8: tf.int64}[dtype.size]


def unpack_mask(mask: tf.Tensor, kept: int) -> tf.Tensor:
    """Returns packed bits as a boolean tensor of shape `[kept]`."""
    shifts = tf.range(8, dtype=tf.int32)
    bits = tf.bitwise.right_shift(tf.cast(mask, tf.int32)[:, None], shifts[None, :])
    return tf.cast(tf.reshape(bits & 1, [-1])[:kept], tf.bool)


def expand_mask(mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Returns packed bits as a boolean tensor of shape `[outer * kept * inner]`."""
    outer, kept, inner = layout
    bits = tf.reshape(unpack_mask(mask, kept), [1, kept, 1])
    return tf.reshape(tf.broadcast_to(bits, [outer, kept, inner]), [outer * kept * inner])


def select(condition: tf.Tensor, passing: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
    """Returns `tf.where(condition, passing, other)`, with the bits of floats as they are."""
    dtype = passing.dtype
    if not dtype.is_floating:
        return tf.where(condition, passing, other)
    integer = integers_like(dtype)
    chosen = tf.where(condition, tf.bitcast(passing, integer), tf.bitcast(other, integer))
    return tf.bitcast(chosen, dtype)


def _linear(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a masking function with itself as its gradient, any number of times: it is linear and symmetric."""

    @tf.custom_gradient
    def differentiable(x: tf.Tensor) -> tuple[tf.Tensor, Callable]:
        return function(x), differentiable

    return differentiable


def mask_gradient(gradient: tf.Tensor, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Returns the gradient where the mask's bit is 1, and zero where it is 0. Differentiable; of any dtype."""

    def masked(gradient: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(gradient, [layout.size])
        selected = select(expand_mask(mask, layout), flat, tf.zeros_like(flat))
        return tf.reshape(selected, tf.shape(gradient))

    return _linear(masked)(gradient)


def mask_slices(values: tf.Tensor, indices: tf.Tensor, mask: tf.Tensor, layout: Layout, rows: int) -> tf.Tensor:
    """Returns rows of a tensor, given as in `tf.IndexedSlices`, with zero where the mask's bit is 0.

    Args:
        values: Float tensor of shape `[k, ...]`.
        indices: Integer vector of length `k`: the number of each row in the dense tensor.
        mask: Packed bits of the dense tensor.
        layout: Layout of the mask.
        rows: Number of rows of the dense tensor.

    Returns:
        A tensor of the shape of `values`, +0.0 where the dense tensor is frozen.
        Differentiable with respect to `values`.

    Raises:
        tf.errors.InvalidArgumentError: If an index is not a row (outside of XLA,
            which has no errors at run time).
    """
    width = layout.size // rows if rows else 0
    row = rows_in_range(indices, rows)
    columns = tf.range(width, dtype=tf.int64)
    entry = row[:, None] * width + columns[None, :]
    bit = (entry // max(layout.inner, 1)) % max(layout.kept, 1)
    byte = tf.cast(tf.gather(mask, bit // 8), tf.int32)
    passing = tf.cast(
        tf.bitwise.right_shift(byte, tf.cast(bit % 8, tf.int32)) & 1,
        tf.bool,
    )

    def masked(values: tf.Tensor) -> tf.Tensor:
        flat = tf.reshape(values, [tf.size(row), width])
        return tf.reshape(select(passing, flat, tf.zeros_like(flat)), tf.shape(values))

    return _linear(masked)(values)


def remember_frozen(variable: tf.Variable, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Returns a snapshot of the frozen entries, for `restore_frozen`.

    Returns:
        A vector, to be passed on as it is. Here always the whole value; the native op
        may return the frozen entries alone, in order.
    """
    del mask
    return tf.reshape(variable.read_value(), [layout.size])


def restore_frozen(variable: tf.Variable, mask: tf.Tensor, snapshot: tf.Tensor, layout: Layout) -> None:
    """Writes the frozen entries of a variable back, from a snapshot of all entries or of the frozen ones alone."""
    passing = expand_mask(mask, layout)
    value = variable.read_value()
    flat = tf.reshape(value, [layout.size])
    if snapshot.shape.rank == 1 and snapshot.shape[0] == layout.size:
        old = snapshot
    else:
        old = tf.cond(
            tf.equal(tf.size(snapshot), layout.size),
            lambda: tf.reshape(snapshot, [layout.size]),
            lambda: _scatter_frozen(flat, passing, snapshot),
        )
    restored = tf.reshape(select(passing, flat, old), tf.shape(value))
    variable.assign(restored)


def _scatter_frozen(flat: tf.Tensor, passing: tf.Tensor, frozen: tf.Tensor) -> tf.Tensor:
    """Returns a vector of all entries with frozen ones replaced by those of `frozen`, in order."""
    integer = integers_like(flat.dtype)
    scattered = tf.tensor_scatter_nd_update(tf.bitcast(flat, integer), tf.where(~passing), tf.bitcast(frozen, integer))
    return tf.bitcast(scattered, flat.dtype)


def gather_trainable(
    source: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, layout: Layout
) -> tf.Tensor:
    """Returns the trainable entries of a tensor in order, and zeros up to the capacity.

    Args:
        source: Tensor of `layout.size` entries, of any dtype.
        mask: Packed bits.
        offsets: `int64` vector, see `packing.rank_offsets`. Not used here: the indices say the same.
        indices: `int32`, `uint32` (below 2**31) or `int64` vector as long as the capacity: the
            positions of the ones among the bits, ascending, and from their number on anything that
            is at least `layout.kept`.
        layout: `(1, kept, inner)`.

    Returns:
        A vector of `capacity * inner` entries.
    """
    del offsets
    kept, inner = layout.kept, layout.inner
    indices = signed_indices(indices)
    capacity = indices.shape[0]
    if not kept or not capacity:
        return tf.zeros([capacity * inner], source.dtype)
    floating = source.dtype.is_floating
    whole = tf.bitcast(source, integers_like(source.dtype)) if floating else source
    gathered = tf.gather(tf.reshape(whole, [kept, inner]), tf.clip_by_value(indices, 0, kept - 1))
    chosen = tf.where(valid_indices(indices, mask, layout)[:, None], gathered, tf.zeros_like(gathered))
    chosen = tf.reshape(chosen, [capacity * inner])
    return tf.bitcast(chosen, source.dtype) if floating else chosen


def sampled_matmul(
    x: tf.Tensor, dy: tf.Tensor, visits: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor
) -> tf.Tensor:
    """Returns the trainable entries of `x^T dy` in order, and zeros up to the capacity.

    Args:
        x: Tensor of shape `[tokens, rows]`; the last axis is static.
        dy: Tensor of shape `[tokens, columns]` and the dtype of `x`; likewise.
        visits: See `masks.visits`. Not used here.
        mask: Packed bits of a mask of `rows * columns` entries; with `offsets` and `indices` as for `gather_trainable`.
        offsets: Likewise.
        indices: Likewise.

    Returns:
        A vector as long as the capacity, of the dtype of `x`. Sums are of `float32`, rounded once.
    """
    del visits
    product = tf.matmul(tf.cast(x, tf.float32), tf.cast(dy, tf.float32), transpose_a=True)
    layout = Layout(1, x.shape[1] * dy.shape[1], 1)
    return tf.cast(gather_trainable(product, mask, offsets, indices, layout), x.dtype)


def read_trainable(
    variable: tf.Variable, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, layout: Layout
) -> tf.Tensor:
    """Returns `gather_trainable` of a variable's value."""
    return gather_trainable(variable.read_value(), mask, offsets, indices, layout)


def take_trainable(
    variable: tf.Variable,
    gradient: tf.Tensor,
    mask: tf.Tensor,
    offsets: tf.Tensor,
    indices: tf.Tensor,
    layout: Layout,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `gather_trainable` of a gradient of the variable's dtype, and `read_trainable`, in one op."""
    index = (mask, offsets, indices)
    gradient = of_shape(gradient, variable.shape)
    return gather_trainable(gradient, *index, layout), read_trainable(variable, *index, layout)


def scatter_trainable(
    variable: tf.Variable,
    compact: tf.Tensor,
    mask: tf.Tensor,
    offsets: tf.Tensor,
    indices: tf.Tensor,
    layout: Layout,
) -> None:
    """Writes the trainable entries of a variable; the reverse of `read_trainable`."""
    del offsets
    kept, inner = layout.kept, layout.inner
    indices = signed_indices(indices)
    capacity = indices.shape[0]
    if not layout.size or not capacity:
        return
    integer = integers_like(variable.dtype)
    value = variable.read_value()
    old = tf.reshape(tf.bitcast(value, integer), [kept, inner])
    new = tf.reshape(tf.bitcast(compact, integer), [capacity, inner])
    # Shapes must be static, so an index that stands for no entry writes the first entry again, or an old value.
    valid = valid_indices(indices, mask, layout)
    any_valid = valid[0]
    target = tf.where(valid, indices, tf.where(any_valid, indices[0], 0))
    rows = tf.where(valid[:, None], new, tf.where(any_valid, new[0], old[0])[None, :])
    written = tf.tensor_scatter_nd_update(old, target[:, None], rows)
    variable.assign(tf.bitcast(tf.reshape(written, tf.shape(value)), variable.dtype))


def rank_trainable(bits: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, kept: int) -> tf.Tensor:
    """Returns the number of ones before each of some bits: the positions of their entries in compact state.

    Args:
        bits: `int64` vector of positions of bits.
        mask: As for `gather_trainable`.
        offsets: Likewise.
        indices: Likewise.
        kept: Number of bits.

    Returns:
        An `int64` vector like `bits`, with at most the capacity less one. For a bit outside of the
        mask it holds the capacity, at which XLA, which has no errors at run time, scatters
        nothing (the native op raises outside of XLA).
    """
    del mask, offsets
    capacity = indices.shape[0]
    ranks = tf.searchsorted(tf.cast(indices, tf.int64), bits, out_type=tf.int64)
    return tf.where((bits >= 0) & (bits < kept), tf.clip_by_value(ranks, 0, max(capacity - 1, 0)), capacity)


def signed_indices(indices: tf.Tensor) -> tf.Tensor:
    """Returns indices of a dtype that TensorFlow's ops take."""
    indices = tf.convert_to_tensor(indices)
    return tf.bitcast(indices, tf.int32) if indices.dtype == tf.uint32 else indices


def valid_indices(indices: tf.Tensor, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Returns a boolean for each index: True if its bit in the mask is 1.

    A mask that `repack` emptied has none, so that a function which was traced before writes nothing.
    """
    position = tf.clip_by_value(indices, 0, layout.kept - 1)
    byte = tf.cast(tf.gather(mask, position // 8), tf.int32)
    one = tf.bitwise.right_shift(byte, tf.cast(position % 8, tf.int32)) & 1
    return tf.equal(position, indices) & tf.cast(one, tf.bool)


def seed_slots(
    unseeded: tf.Variable,
    gradient: tf.Tensor | tf.IndexedSlices,
    scales: Sequence[tf.Tensor],
    slots: Sequence[tf.Variable],
    powers: Sequence[int],
) -> None:
    """Seeds the slots of entries that were unfrozen late, from their first gradient that is not zero.

    Where an entry's bit is set and its entry of the first slot is zero, each slot becomes
    `scale * gradient**power`. The bit is cleared once the first slot is not zero any more,
    with `tf.IndexedSlices` perhaps only when its row is named. Bit and slot both count, so that
    an implementation that never clears bits (XLA's) gives the same slots.

    Of repeated rows the larger of the squared sum and the summed squares is taken for
    `gradient**2`: Keras sums squares, and gradients that cancel leave a second moment.

    Args:
        unseeded: `uint8` variable of one bit per entry, little bit order.
        gradient: Gradient of the slots' shape and dtype; `tf.IndexedSlices` may repeat rows.
        scales: A float64 scalar for each slot.
        slots: Variables of the model variable's shape and dtype.
        powers: 1 or 2 for each slot.
    """
    shape = slots[0].shape
    size = shape.num_elements()
    gradient = of_shape(gradient, shape)
    wide = tf.float64 if slots[0].dtype == tf.float64 else tf.float32

    def seed() -> None:
        bits = unpack_mask(unseeded.read_value(), size)
        values = tf.cast(gradient, wide)
        dense = tf.reshape(tf.convert_to_tensor(values), [size])
        square = dense * dense
        if isinstance(values, tf.IndexedSlices):
            squares = tf.IndexedSlices(values.values * values.values, values.indices, values.dense_shape)
            square = tf.maximum(square, tf.reshape(tf.convert_to_tensor(squares), [size]))
        seeded = seeded_slots(
            bits, dense, square, [tf.reshape(slot.read_value(), [size]) for slot in slots], powers, scales
        )
        for slot, value in zip(slots, seeded, strict=True):
            slot.assign(tf.reshape(value, shape))
        unseeded.assign(pack_mask(bits & (seeded[0] == 0)))

    def nothing() -> None:
        pass

    tf.cond(tf.reduce_any(unseeded.read_value() != 0), seed, nothing)


def seeded_slots(
    waiting: tf.Tensor,
    gradient: tf.Tensor,
    square: tf.Tensor,
    slots: Sequence[tf.Tensor],
    powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """Returns slots after `seed_slots`.

    Args:
        waiting: Booleans: the entries that wait to be seeded.
        gradient: The gradient.
        square: The squared gradient.
        slots: The slots before. All of these are vectors of one length.
        powers: 1 or 2 for each slot.
        scales: A scalar for each slot.
    """
    wide = tf.float64 if slots[0].dtype == tf.float64 else tf.float32
    gradient, square = tf.cast(gradient, wide), tf.cast(square, wide)
    due = waiting & (tf.cast(slots[0], wide) == 0)
    return [
        select(due, tf.cast(tf.cast(scale, wide) * (square if power == 2 else gradient), slot.dtype), slot)
        for slot, scale, power in zip(slots, scales, powers, strict=True)
    ]


def pack_mask(flags: tf.Tensor) -> tf.Tensor:
    """Returns booleans of shape `[n]` as packed bits."""
    size = flags.shape[0]
    padded = tf.pad(tf.cast(flags, tf.int32), [[0, -size % 8]])
    return tf.cast(tf.reduce_sum(tf.reshape(padded, [-1, 8]) * 2 ** tf.range(8), axis=1), tf.uint8)
