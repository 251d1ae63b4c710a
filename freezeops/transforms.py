"""Masking of gradients for training loops of your own."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from freezeops import ops
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.ops.gradients import Gradient, dense_shape, mask_with_bits


@tf.autograph.experimental.do_not_convert
def mask_gradient(gradient: Gradient, mask: Any) -> Gradient:
    """Returns a gradient with +0.0 in the frozen entries.

    Entries are selected, never multiplied: a NaN or infinity in a frozen entry
    is gone, and the other entries keep their bits.

    Args:
        gradient: Float tensor, or `tf.IndexedSlices` (never made dense).
        mask: `fz.Mask`, or array-like of booleans that broadcasts along axes of
            length 1. True = trainable: the gradient passes.

    Returns:
        A gradient of the same kind, shape and dtype.

    Raises:
        TypeError: If `gradient` is not floating or `mask` not boolean.
        ValueError: If the mask does not fit the gradient.

    Example:

    >>> import tensorflow as tf
    >>> import freezeops as fz
    >>> fz.mask_gradient(tf.constant([1.0, float("nan")]), [True, False])
    <tf.Tensor: shape=(2,), dtype=float32, numpy=array([1., 0.], dtype=float32)>
    """
    if not isinstance(gradient, tf.IndexedSlices):
        gradient = tf.convert_to_tensor(gradient)
    _check_float(gradient.dtype, "gradient")
    mask = _as_mask(mask, dense_shape(gradient))
    return mask_with_bits(gradient, tf.constant(mask.packed), mask.layout)


@tf.autograph.experimental.do_not_convert
def mask_gradients(gradients: Sequence[Gradient | None], masks: Sequence[Any]) -> list[Gradient | None]:
    """Masks a list of gradients; see `mask_gradient`.

    Args:
        gradients: Gradients; `None` stays `None`.
        masks: One mask per gradient, True = trainable; `None` lets the gradient pass.

    Returns:
        A list of gradients.

    Raises:
        ValueError: If the lists differ in length.

    Example:

    >>> import tensorflow as tf
    >>> import freezeops as fz
    >>> w, b = tf.Variable([2.0, 3.0]), tf.Variable(1.0)
    >>> with tf.GradientTape() as tape:
    ...     loss = tf.reduce_sum(w * w) + b
    >>> gradients = tape.gradient(loss, [w, b])
    >>> [gradient.numpy().tolist() for gradient in fz.mask_gradients(gradients, [[True, False], None])]
    [[4.0, 0.0], 1.0]
    """
    gradients, masks = list(gradients), list(masks)
    if len(gradients) != len(masks):
        raise ValueError(
            "`masks` must have one mask, or None, per gradient. "
            f"Received: {len(gradients)} gradients and {len(masks)} masks"
        )
    return [
        gradient if gradient is None or mask is None else mask_gradient(gradient, mask)
        for gradient, mask in zip(gradients, masks, strict=True)
    ]


@tf.autograph.experimental.do_not_convert
def partial_stop_gradient(x: tf.Tensor, mask: Any) -> tf.Tensor:
    """Returns `x` as it is; backward, the gradient passes only where the mask is True.

    Like `tf.stop_gradient`, for single entries. Differentiable any number of times.

    Args:
        x: Float tensor or variable.
        mask: `fz.Mask`, or array-like of booleans that broadcasts along axes of
            length 1. True = trainable: the gradient passes.

    Returns:
        A tensor equal to `x`, bit for bit.

    Raises:
        TypeError: If `x` is not floating or `mask` not boolean.
        ValueError: If the mask does not fit `x`.

    Example:

    >>> import tensorflow as tf
    >>> import freezeops as fz
    >>> x = tf.constant([2.0, 3.0])
    >>> with tf.GradientTape() as tape:
    ...     tape.watch(x)
    ...     y = tf.reduce_sum(fz.partial_stop_gradient(x, [True, False]) ** 2)
    >>> tape.gradient(y, x).numpy().tolist()
    [4.0, 0.0]
    """
    x = tf.convert_to_tensor(x)
    _check_float(x.dtype, "x")
    mask = _as_mask(mask, x.shape)
    layout = mask.layout
    bits = tf.constant(mask.packed)

    @tf.custom_gradient
    def identity(x: tf.Tensor) -> tuple[tf.Tensor, Any]:
        return tf.identity(x), lambda upstream: mask_with_bits(upstream, bits, layout)

    return identity(x)


def _check_float(dtype: tf.DType, name: str) -> None:
    if dtype.name not in ops.FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must be of a dtype in {', '.join(ops.FLOAT_DTYPES)}. Received: {name} of dtype={dtype.name}"
        )


def _as_mask(mask: Any, shape: tf.TensorShape) -> Mask:
    """Returns a `Mask` for a shape. Where that is not fully known when tracing, `mask` must be one already."""
    if tf.is_tensor(mask) and tf.get_static_value(mask) is None:
        raise ValueError(
            f"`mask` must be known when the function is traced: an `fz.Mask` or an array. Received: mask={mask}"
        )
    if isinstance(mask, Mask):
        if not shape.is_compatible_with(mask.shape):
            raise ValueError(
                f"`mask` must have the shape of what it masks. Received: mask.shape={mask.shape}, shape={shape}"
            )
        return mask
    if not shape.is_fully_defined():
        raise ValueError(
            "`mask` must be an `fz.Mask` where the shape it masks is not fully known. "
            f"Received: shape={shape}, mask={short(mask)}"
        )
    return Mask.from_array(mask, shape.as_list())
