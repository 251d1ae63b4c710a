"""`mask_gradient`, `mask_gradients` and `partial_stop_gradient`."""

import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits, in_mode

import freezeops as fz

MASK = np.array([[True, False, True], [False, False, True]])
MODES = ["eager", "function", "jit"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_mask_gradient_selects(dtype, mode, backend):
    gradient = tf.constant([[1.0, np.nan, -0.0], [np.inf, -np.inf, 2.5]], dtype)
    masked = in_mode(lambda g: fz.mask_gradient(g, MASK), mode)(gradient)
    expected = np.where(MASK, gradient.numpy(), np.zeros((), gradient.numpy().dtype))
    assert_same_bits(masked.numpy(), expected)


def test_mask_gradient_of_unknown_shape():
    mask = fz.Mask.from_array(MASK)

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)])
    def masked(gradient):
        return fz.mask_gradient(gradient, mask)

    assert masked(tf.ones((2, 3))).numpy().tolist() == MASK.astype(float).tolist()
    with pytest.raises(tf.errors.InvalidArgumentError):
        masked(tf.ones((2, 4)))


@pytest.mark.parametrize("mode", MODES)
def test_mask_gradient_of_slices(mode, backend):
    def masked(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([2, 3], tf.int64))
        result = fz.mask_gradient(slices, MASK)
        assert isinstance(result, tf.IndexedSlices)
        return result.values

    values = tf.constant(np.arange(1, 10, dtype="float32").reshape(3, 3))
    result = in_mode(masked, mode)(values, tf.constant([1, 0, 1]))
    assert_same_bits(result.numpy(), np.where(MASK[[1, 0, 1]], values, np.float32(0)))


def test_slices_with_an_index_out_of_range(backend):
    slices = tf.IndexedSlices(tf.ones((1, 3)), tf.constant([2]), tf.constant([2, 3], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="2"):
        fz.mask_gradient(slices, MASK)


def test_mask_gradients_keeps_none():
    gradients = [tf.ones((2, 3)), None, tf.ones(4)]
    masked = fz.mask_gradients(gradients, [MASK, MASK, None])
    assert_same_bits(masked[0].numpy(), MASK.astype("float32"))
    assert masked[1] is None and masked[2] is gradients[2]
    with pytest.raises(ValueError, match="3 gradients and 1 masks"):
        fz.mask_gradients(gradients, [MASK])


@pytest.mark.parametrize("mode", MODES)
def test_partial_stop_gradient(mode, backend):
    x = tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    def derivatives(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(fz.partial_stop_gradient(x, MASK) ** 3)
            first = inner.gradient(y, x)
        return y, first, outer.gradient(first, x)

    y, first, second = in_mode(derivatives, mode)(x)
    assert float(y) == 441.0
    assert np.allclose(first, np.where(MASK, 3 * x**2, 0))
    assert np.allclose(second, np.where(MASK, 6 * x, 0))


def test_partial_stop_gradient_is_the_identity():
    x = tf.constant(np.array([np.nan, -0.0, 1e-40, np.inf], "float32"))
    assert_same_bits(fz.partial_stop_gradient(x, [True, False, False, True]).numpy(), x.numpy())


def test_partial_stop_gradient_of_a_variable():
    x = tf.Variable([1.0, 2.0])
    with tf.GradientTape() as tape:
        y = tf.reduce_sum(fz.partial_stop_gradient(x, [True, False]) * 3)
    assert tape.gradient(y, x).numpy().tolist() == [3.0, 0.0]


@pytest.mark.parametrize("jit", [False, True])
def test_masking_is_twice_differentiable(jit, backend):
    """Masking a gradient inside a loss, as in gradient penalties."""
    x = tf.constant([1.0, 2.0, 3.0])

    def penalty(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(x**3)
            norm = tf.reduce_sum(fz.mask_gradient(inner.gradient(y, x), [True, False, True]) ** 2)
        return outer.gradient(norm, x)

    result = tf.function(penalty, jit_compile=jit)(x)
    assert np.allclose(result, [36.0, 0.0, 972.0])


def test_slices_values_are_differentiable(backend):
    values = tf.Variable(tf.ones((2, 3)))
    with tf.GradientTape() as tape:
        slices = tf.IndexedSlices(values * 2.0, tf.constant([1, 0]), tf.constant([2, 3], tf.int64))
        y = tf.reduce_sum(fz.mask_gradient(slices, MASK).values)
    assert np.array_equal(tape.gradient(y, values), 2.0 * MASK[[1, 0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fz.mask_gradient(tf.ones((2, 3)), MASK[0]), ValueError, r"`mask\[None, :\]`"),
        (lambda: fz.mask_gradient(tf.ones((2, 3)), MASK * 1), TypeError, r"must be boolean"),
        (lambda: fz.mask_gradient(tf.ones((2, 3), tf.int32), MASK), TypeError, r"dtype=int32"),
        (
            lambda: fz.mask_gradient(tf.ones((3, 2)), fz.Mask.from_array(MASK)),
            ValueError,
            r"mask\.shape=\(2, 3\), shape=\(3, 2\)",
        ),
        (
            lambda: fz.mask_gradient(tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1])), fz.Mask.from_array(MASK)),
            ValueError,
            r"mask\.shape=\(2, 3\), shape=\(None, 2\)",
        ),
        (
            lambda: fz.mask_gradient(tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), (2, 3)), MASK),
            ValueError,
            r"rows of its `dense_shape`",
        ),
        (lambda: fz.partial_stop_gradient(tf.constant([1]), [True]), TypeError, r"`x` must be"),
        (
            lambda: tf.function(lambda m: fz.mask_gradient(tf.ones(3), m))(tf.ones(3, tf.bool)),
            ValueError,
            r"known when the function is traced",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
