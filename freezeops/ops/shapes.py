"""Checks of a gradient's shape against its variable's, while tracing where it is known and else at run time."""

import tensorflow as tf


def of_shape(gradient: tf.Tensor | tf.IndexedSlices, shape: tf.TensorShape) -> tf.Tensor | tf.IndexedSlices:
    """Returns a gradient that has the shape of a tensor, and names only rows of it.

    Raises:
        ValueError: If it has another shape, or rows of another shape.
        tf.errors.InvalidArgumentError: At run time, if its shape was not known before, or a row does not exist.
    """
    if isinstance(gradient, tf.IndexedSlices):
        gradient = slices_of_shape(gradient, shape)
        return tf.IndexedSlices(gradient.values, rows_in_range(gradient.indices, shape[0]), gradient.dense_shape)
    return tf.ensure_shape(gradient, shape)


def slices_of_shape(gradient: tf.IndexedSlices, shape: tf.TensorShape) -> tf.IndexedSlices:
    """Returns slices whose rows have the shape of a tensor's rows.

    Looking for rows that do not exist, as `of_shape` does, would make the host wait for a GPU.

    Raises:
        ValueError: If the rows have another shape.
    """
    values = gradient.values
    static = values.shape
    if static.rank is None or not static[1:].is_fully_defined():
        # As `tf.ensure_shape`, whose result has rows of a dynamic shape for XLA: no rows at all are appended.
        values = tf.concat([values, tf.zeros([0, *shape[1:]], values.dtype)], axis=0)
    elif static[1:] != shape[1:]:
        raise ValueError(
            f"A gradient's slices must be rows of its variable, of shape {tuple(shape)}. Received: slices of shape "
            f"{static}"
        )
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def rows_in_range(indices: tf.Tensor, rows: int) -> tf.Tensor:
    """Returns indices of rows as `int64`.

    Raises:
        tf.errors.InvalidArgumentError: At run time, if an index is not a row. Not under XLA, which has no such errors.
    """
    row = tf.cast(indices, tf.int64)
    in_range = tf.debugging.Assert(
        tf.reduce_all((row >= 0) & (row < rows)),
        [f"`indices` must be rows from 0 to {rows - 1}. Received: indices=", row],
    )
    with tf.control_dependencies([] if in_range is None else [in_range]):
        return tf.identity(row)
