"""Gradients that do not fit their variable, and NaN: fused or not, native or reference, in every state and mode."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import SETUPS, in_mode

import freezeops as fz

# --- A gradient of another shape, rows that do not exist ---


def some_step(state, fused, jit, signature, inner=None, shape=(2, 3), rows=(0,)):
    """A variable of which these rows are trainable, and a step from a gradient without static shape."""
    v = tf.Variable(tf.zeros(shape), name="w")
    mask = np.isin(np.arange(shape[0]), rows)[:, None]
    inner = keras.optimizers.Adam(0.1) if inner is None else inner
    optimizer = fz.MaskedOptimizer(inner, masks={"w": mask}, state=state, fused=fused)
    optimizer.build([v])

    @tf.function(input_signature=signature, jit_compile=jit)
    def step(*gradient):
        if len(gradient) > 1:
            gradient = [tf.IndexedSlices(*gradient, tf.constant(shape, tf.int64))]
        optimizer.apply(gradient, [v])

    return v, optimizer, step


STATES = pytest.mark.parametrize("state", ["full", "compact"])
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
JIT = pytest.mark.parametrize("jit", [False, True], ids=["function", "jit"])


@STATES
@FUSED
@BACKENDS
@JIT
@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3)], ids=str)
def test_a_gradient_of_another_shape_is_refused_at_run_time(state, fused, backend, jit, shape, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
    v, _, step = some_step(state, fused, jit, [tf.TensorSpec(None)])
    with pytest.raises((tf.errors.OpError, ValueError)):
        step(tf.ones(shape))
    assert not v.numpy().any()
    step(tf.ones((2, 3)))
    assert v.numpy()[0].all() and not v.numpy()[1].any()


@STATES
@FUSED
@BACKENDS
@JIT
def test_slices_with_rows_of_another_shape_are_refused_at_run_time(state, fused, backend, jit, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
    signature = [tf.TensorSpec([None, None]), tf.TensorSpec([None], tf.int64)]
    v, _, step = some_step(state, fused, jit, signature, shape=(4, 6))
    with pytest.raises((tf.errors.OpError, ValueError)):
        step(tf.ones((1, 12)), tf.constant([0], tf.int64))
    assert not v.numpy().any()
    step(tf.ones((1, 6)), tf.constant([0], tf.int64))
    assert v.numpy()[0].all() and not v.numpy()[1:].any()


@FUSED
@BACKENDS
@pytest.mark.parametrize(
    "inner, width", [("SGD", 1), ("SGD momentum", 2), ("Adagrad", 1), ("Adam", 2), ("Ftrl", 1), ("SGD", 0)]
)
def test_under_xla_rows_that_do_not_exist_are_dropped_with_compact_state(fused, backend, inner, width, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
    signature = [tf.TensorSpec([None, width]), tf.TensorSpec([None], tf.int64)]
    trainable = [0, 1, 4, 5]
    v, _, step = some_step("compact", fused, True, signature, SETUPS[inner](), (6, width), trainable)
    for row in (-1, -7, 6, 2**61, 2**62, 2**63 - 1, -(2**63)):
        step(tf.ones((1, width)), tf.constant([row], tf.int64))
        assert not v.numpy().any(), row
    step(tf.ones((3, width)), tf.constant([6, 1, -1], tf.int64))
    assert np.flatnonzero(v.numpy().any(axis=1)).tolist() == ([1] if width else [])


@FUSED
@STATES
@BACKENDS
def test_outside_of_xla_rows_that_do_not_exist_are_an_error(fused, state, backend, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
    signature = [tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int64)]
    v, _, step = some_step(state, fused, False, signature, shape=(6, 2), rows=[0, 1, 5])
    for row in (6, -1, 2**62):
        with pytest.raises(tf.errors.InvalidArgumentError):
            step(tf.ones((1, 2)), tf.constant([row], tf.int64))
        assert not v.numpy().any()


# --- NaN ---


@STATES
@pytest.mark.parametrize("way", ["fused", "twin", "unfused"])
@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_amsgrad_keeps_nan_as_keras_does(dtype, mode, way, state, monkeypatch):
    """inf - inf in the second moment, after an overflow: the largest second moment is NaN from then on."""
    monkeypatch.setenv("FREEZEOPS_BACKEND", "reference" if way == "twin" else "auto")
    fused = way != "unfused"
    large = {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38, "float64": 1e308}[dtype]
    v = tf.Variable(tf.ones([9, 9], dtype), name="w")
    mask = np.arange(81).reshape(9, 9) % 5 > 0
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.Adam(0.1, amsgrad=True), masks={"w": mask}, state=state, fused=fused
    )
    optimizer.build([v])
    step = in_mode(lambda gradient: optimizer.apply([gradient], [v]), mode)
    for value in (large, 1.0, 1.0):
        step(tf.fill([9, 9], tf.constant(value, dtype)))
    values = v.numpy().astype(float)
    if fused or mode != "jit":  # XLA's own maximum on the CPU drops it, and so does a bare Adam there
        assert np.isnan(values[mask]).all()
    assert (values[~mask] == 1).all()
