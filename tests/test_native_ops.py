"""What the compiled ops refuse, while tracing (shape functions) and while running."""

import resource

import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits

from freezeops import _native

library = _native.op_library()
pytestmark = pytest.mark.skipif(library is None, reason="no native library for this TensorFlow")

LAYOUT = [1, 12, 1]


def mask(count=2):
    return tf.zeros(count, tf.uint8)


def variable(shape=(3, 4), dtype=tf.float32):
    return tf.Variable(tf.ones(shape, dtype))


CASES = {
    "mask of rank 2": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), tf.zeros((1, 2), tf.uint8), layout=LAYOUT),
        r"rank 1|mask must have shape \[2\].*\[1,2\]",
    ),
    "mask too short": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), mask(1), layout=LAYOUT),
        r"mask must have (2 bytes|shape \[2\]).*12 kept.*Received: mask of shape \[1\]",
    ),
    "gradient of another size": (
        lambda: library.freezeops_mask_gradient(tf.ones((3, 5)), mask(), layout=LAYOUT),
        r"gradient must have the 12 entries.*\[3,5\]",
    ),
    "layout of two": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), mask(), layout=[1, 12]),
        r"layout",
    ),
    "negative layout": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), mask(), layout=[-1, -12, 1]),
        r"layout",
    ),
    "slices and indices": (
        lambda: library.freezeops_mask_slices(tf.ones((2, 4)), tf.constant([0]), mask(), layout=LAYOUT, rows=3),
        r"one row for each index|[Dd]imensions must be equal",
    ),
    "slices of another width": (
        lambda: library.freezeops_mask_slices(tf.ones((1, 5)), tf.constant([0]), mask(), layout=LAYOUT, rows=3),
        r"rows times the size of a row must be the 12 entries",
    ),
    "slices without an axis": (
        lambda: library.freezeops_mask_slices(tf.ones(()), tf.constant([0]), mask(), layout=LAYOUT, rows=3),
        r"rank|one row for each index.*\[\]",
    ),
    "indices of rank 2": (
        lambda: library.freezeops_mask_slices(tf.ones((1, 4)), tf.constant([[0]]), mask(), layout=LAYOUT, rows=3),
        r"rank 1|one row for each index.*\[1,1\]",
    ),
    "variable of another size": (
        lambda: library.freezeops_remember_frozen(
            variable((5,)).handle, mask(), T=tf.float32, layout=LAYOUT
        ),
        r"variable must have the 12 entries.*\[5\]",
    ),
    "variable of another dtype": (
        lambda: library.freezeops_remember_frozen(
            variable(dtype=tf.float64).handle, mask(), T=tf.float32, layout=LAYOUT
        ),
        r"variable must be of dtype float.*double",
    ),
    "snapshot too long": (
        lambda: library.freezeops_restore_frozen(variable().handle, mask(), tf.ones(13), layout=LAYOUT),
        r"snapshot must .*12",
    ),
    "snapshot of rank 2": (
        lambda: library.freezeops_restore_frozen(variable().handle, mask(), tf.ones((3, 4)), layout=LAYOUT),
        r"rank 1|must be a vector.*\[3,4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("case", CASES)
def test_refused(case, mode):
    call, message = CASES[case]
    if mode == "function":
        # Kept alive outside, as a function does not own what it captures.
        call = tf.function(call, autograph=False)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        call()


def test_snapshot_of_neither_length_changes_nothing():
    target = variable()
    half = tf.constant(np.packbits(np.arange(12) < 5, bitorder="little"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"the 7 frozen entries or of all 12 entries.*\[6\]"):
        library.freezeops_restore_frozen(target.handle, half, tf.zeros(6), layout=LAYOUT)
    assert_same_bits(target.numpy(), np.ones((3, 4), np.float32))


def test_shapes_that_functions_infer():
    @tf.function
    def shapes(gradient):
        values = library.freezeops_mask_slices(tf.ones((2, 4)), tf.constant([0, 1]), mask(), layout=LAYOUT, rows=3)
        masked = library.freezeops_mask_gradient(gradient, mask(), layout=LAYOUT)
        assert masked.shape == (3, 4) and values.shape == (2, 4)
        return masked

    shapes(tf.ones((3, 4)))


def test_variable_that_does_not_exist():
    handle = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[12], shared_name="never")
    with pytest.raises(tf.errors.NotFoundError, match="does not exist"):
        library.freezeops_remember_frozen(handle, mask(), T=tf.float32, layout=LAYOUT)


def test_gradient_is_masked_in_its_own_buffer():
    """Where it has one consumer: masking touches no fresh page of memory."""
    size = 1 << 24  # 64 MB: allocated afresh at every step, as malloc keeps nothing that large

    @tf.function
    def step(x, bits):
        return library.freezeops_mask_gradient(x * 2, bits, layout=[1, size, 1])

    x, bits = tf.ones(size), tf.zeros(size // 8, tf.uint8)
    step(x, bits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step(x, bits)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4
    assert faults < 1.5 * size * 4 / resource.getpagesize()
