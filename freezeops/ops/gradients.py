"""Gradients, dense or `tf.IndexedSlices`, under the packed bits of a mask."""

from typing import TypeAlias

import tensorflow as tf

from freezeops import ops
from freezeops.masks.layout import Layout
from freezeops.ops.reference import integers_like

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


def dense_shape(gradient: Gradient) -> tf.TensorShape:
    """Returns the static shape of a gradient; for `tf.IndexedSlices` that of the dense tensor.

    Raises:
        ValueError: If the values of `tf.IndexedSlices` are not rows of their `dense_shape`.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient.shape
    given = gradient.dense_shape  # a tensor, or the sizes that the user wrote
    shape = tf.TensorShape(tf.get_static_value(given) if tf.is_tensor(given) else given)
    values = tf.TensorShape(gradient.values.shape)
    rows = tf.TensorShape(None) if values.rank is None else tf.TensorShape([None, *values[1:]])
    if not shape.is_compatible_with(rows):
        raise ValueError(
            "`gradient` must have values that are rows of its `dense_shape`. "
            f"Received: values of shape {values}, dense_shape={shape}"
        )
    return shape.merge_with(rows)


def mask_with_bits(gradient: Gradient, bits: tf.Tensor, layout: Layout, rows: int | None = None) -> Gradient:
    """Returns a dense or sparse gradient with zeros under the frozen entries.

    Args:
        gradient: Tensor with `layout.size` entries, or `tf.IndexedSlices` of one.
        bits: `uint8` vector of `layout.packed_bytes` bytes.
        layout: How the bits spread over the dense tensor.
        rows: Number of rows of the dense tensor; by default that of `gradient.dense_shape`.

    Returns:
        A gradient of the same kind with +0.0 in the frozen entries; `tf.IndexedSlices`
        keep their indices.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return ops.mask_gradient(tf.convert_to_tensor(gradient), bits, layout)
    if rows is None:
        rows = _rows_of(gradient, layout)
    masked = ops.mask_slices(tf.convert_to_tensor(gradient.values), gradient.indices, bits, layout, rows)
    return tf.IndexedSlices(masked, gradient.indices, gradient.dense_shape)


def _rows_of(gradient: tf.IndexedSlices, layout: Layout) -> int:
    shape = dense_shape(gradient)
    if shape.rank and shape[0] is not None:
        return shape[0]
    if not (row_size := shape[1:].num_elements()):
        raise ValueError(
            "`gradient` must have a static `dense_shape`, or values of a static row shape. "
            f"Received: gradient={gradient}"
        )
    return layout.size // row_size


def merge_slices(
    new: tf.Tensor,
    old: tf.Tensor,
    indices: tf.Tensor,
    mask: tf.Tensor,
    layout: Layout,
    rows: int,
) -> tf.Tensor:
    """Returns rows of a tensor with the trainable entries of `new` and the frozen entries of `old`.

    Args:
        new: Float tensor of shape `[k, ...]`.
        old: Tensor of the same shape and dtype.
        indices: Integer vector of length `k`: the number of each row in the dense tensor.
        mask: Packed bits of the dense tensor.
        layout: Layout of the mask.
        rows: Number of rows of the dense tensor.

    Returns:
        A tensor of the shape of `new`, bits preserved.
    """
    integer = integers_like(new.dtype)

    def passing(values: tf.Tensor) -> tf.Tensor:
        return tf.bitcast(ops.mask_slices(values, indices, mask, layout, rows), integer)

    # Masked entries are zero bits, so `^` leaves the frozen ones and `|` joins the two.
    frozen = tf.bitwise.bitwise_xor(tf.bitcast(old, integer), passing(old))
    return tf.bitcast(tf.bitwise.bitwise_or(passing(new), frozen), new.dtype)
