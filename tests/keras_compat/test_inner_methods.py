"""What an inner optimizer says for itself is done: its own `apply_gradients`, methods put on the instance."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MODES, assert_same_bits, in_mode

import freezeops as fz

MASK = np.arange(12).reshape(4, 3) % 3 > 0
GRADIENT = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)


def make_variable() -> keras.Variable:
    return keras.Variable(np.linspace(1.0, 2.0, 12, dtype=np.float32).reshape(4, 3), name="w")


@fz.declare_elementwise
class Doubling(keras.optimizers.SGD):
    """Changes gradients on their way, as gradient centralization and clipping by agreement do."""

    seen = ()

    def apply_gradients(self, grads_and_vars):
        pairs = list(grads_and_vars)
        Doubling.seen = pairs
        super().apply_gradients([(2.0 * gradient, variable) for gradient, variable in pairs])
        return "own"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("fused", [True, False])
def test_own_apply_gradients(state, mode, fused):
    bare, variable = make_variable(), make_variable()
    masked = np.where(MASK, GRADIENT, 0).astype(np.float32)
    Doubling(0.1, momentum=0.9).apply_gradients([(masked, bare)])
    inner = Doubling(0.1, momentum=0.9)
    optimizer = fz.MaskedOptimizer(inner, masks={"w": MASK}, state=state, fused=fused)
    optimizer.build([variable])
    poisoned = np.where(MASK, GRADIENT, np.nan).astype(np.float32)
    returned = []
    in_mode(lambda: returned.append(optimizer.apply_gradients([(tf.constant(poisoned), variable)])), mode)()
    assert returned == ["own"]
    ((gradient, of),) = Doubling.seen
    assert of is inner._trainable_variables[0] and tuple(gradient.shape) == tuple(of.shape)
    if mode == "eager":
        assert np.isfinite(gradient.numpy()).all()
    assert_same_bits(variable.numpy()[~MASK], make_variable().numpy()[~MASK])
    np.testing.assert_allclose(variable.numpy()[MASK], bare.numpy()[MASK], rtol=0 if mode == "eager" else 1e-6)
    assert int(optimizer.iterations) == 1


def test_apply_is_apply():
    """As with the bare optimizer, whose `apply` does not call `apply_gradients`."""
    variable, bare = make_variable(), make_variable()
    Doubling(0.1).apply([GRADIENT], [bare])
    fz.MaskedOptimizer(Doubling(0.1), masks={"w": True}).apply([GRADIENT], [variable])
    assert_same_bits(variable.numpy(), bare.numpy())


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_own_apply_gradients_in_fit(state, jit_compile):
    x, y = np.random.rand(32, 4).astype("float32"), np.random.rand(32, 3).astype("float32")
    weights = []
    for wrap in (False, True):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")])
        optimizer = Doubling(0.1)
        if wrap:
            optimizer = fz.MaskedOptimizer(optimizer, state=state)
            optimizer.freeze("a/kernel", MASK)
        start = model.layers[0].kernel.numpy()
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        model.fit(x, y, batch_size=32, verbose=0)
        weights.append(model.layers[0].kernel.numpy())
    assert_same_bits(weights[1][MASK], start[MASK])
    np.testing.assert_allclose(weights[1][~MASK], weights[0][~MASK], rtol=1e-5)


class DoublingApply(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply([2.0 * gradient for gradient in grads], trainable_variables)


class DoublingScaler(keras.optimizers.LossScaleOptimizer):
    def apply_gradients(self, grads_and_vars):
        return super().apply_gradients([(2.0 * gradient, variable) for gradient, variable in grads_and_vars])


def replaced(name):
    def make():
        inner = keras.optimizers.SGD(0.1)
        real = getattr(inner, name)
        if name == "apply":
            inner.apply = lambda grads, variables=None: real([2.0 * gradient for gradient in grads], variables)
        else:
            inner.apply_gradients = lambda pairs: real([(2.0 * gradient, variable) for gradient, variable in pairs])
        return inner

    return make


@pytest.mark.parametrize(
    "make",
    {
        "apply of the class": lambda: DoublingApply(0.1),
        "apply on the instance": replaced("apply"),
        "apply_gradients on the instance": replaced("apply_gradients"),
        "a scaler's own": lambda: DoublingScaler(keras.optimizers.SGD(0.1), initial_scale=1.0),
        "inside of a scaler, as in Keras not called": lambda: keras.optimizers.LossScaleOptimizer(Doubling(0.1)),
    }.items(),
    ids=lambda case: case[0],
)
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_equals_the_bare_optimizer(make, mode):
    bare, variable = make_variable(), make_variable()
    masked = np.where(MASK, GRADIENT, 0).astype(np.float32)
    one, optimizer = make[1](), fz.MaskedOptimizer(make[1](), masks={"w": MASK})
    for step in range(2):
        in_mode(lambda: one.apply_gradients([(tf.constant(masked), bare)]), mode)()
        in_mode(lambda: optimizer.apply_gradients([(tf.constant(GRADIENT), variable)]), mode)()
        assert_same_bits(variable.numpy()[~MASK], make_variable().numpy()[~MASK], str(step))
        assert_same_bits(variable.numpy()[MASK], bare.numpy()[MASK], str(step))


def test_a_loss_scaler_outside():
    """It calls `apply`, as around the bare optimizer."""
    kernels = []
    for wrap in (False, True):
        variable = make_variable()
        optimizer = fz.MaskedOptimizer(Doubling(0.1), masks={"w": MASK}) if wrap else Doubling(0.1)
        scaler = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
        scaler.build([variable])
        scaler.apply_gradients([(4.0 * GRADIENT, variable)])
        kernels.append(variable.numpy())
    assert_same_bits(kernels[1][~MASK], make_variable().numpy()[~MASK])
    assert_same_bits(kernels[1][MASK], kernels[0][MASK])


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="new in Keras 3.15")
def test_several_optimizers_inside():
    one, other = make_variable(), keras.Variable(np.ones(3, np.float32), name="b")
    parts = keras.optimizers.OptimizerMap(default_optimizer=DoublingApply(0.1))
    parts[".*w"] = DoublingApply(0.2)
    optimizer = fz.MaskedOptimizer(keras.optimizers.MultiOptimizer(parts), masks={"w": MASK})
    assert optimizer.apply_gradients([(GRADIENT, one), (np.ones(3, np.float32), other)]) is not None
    np.testing.assert_allclose(other.numpy(), 0.8, rtol=1e-6)
    expected = np.where(MASK, make_variable().numpy() - 0.4 * GRADIENT, make_variable().numpy())
    np.testing.assert_allclose(one.numpy(), expected, rtol=1e-6)


def test_a_subclass_that_extends_apply():
    class Counting(fz.MaskedOptimizer):
        calls = 0

        def apply(self, grads, trainable_variables=None):
            Counting.calls += 1
            super().apply(grads, trainable_variables)

    optimizer = Counting(Doubling(0.1), masks={"w": MASK})
    assert optimizer.apply_gradients([(GRADIENT, make_variable())]) == "own"
    assert Counting.calls == 1


@pytest.mark.parametrize("wrap", [lambda inner: inner, keras.optimizers.LossScaleOptimizer])
def test_what_keras_returns_is_the_live_counter(wrap):
    inner = keras.optimizers.SGD(0.1)
    optimizer = fz.MaskedOptimizer(wrap(inner), masks={"w": MASK})
    assert optimizer.apply_gradients([(GRADIENT, make_variable())]) is inner._iterations
    assert int(inner._iterations) == 1


def hundredfold(gradient, variable, learning_rate):
    variable.assign_sub(gradient * 100.0)


@pytest.mark.parametrize("when", ["before", "after the build", "after a step"])
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("policy", ["seed", "keep"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["eager", "function"])
def test_update_step_on_the_instance(when, state, policy, fused, mode):
    variable = make_variable()
    inner = keras.optimizers.Adam(0.1)
    optimizer = fz.MaskedOptimizer(inner, masks={"w": MASK}, state=state, unfreeze_policy=policy, fused=fused)
    if when == "before":
        inner.update_step = hundredfold
    optimizer.build([variable])
    if when == "after the build":
        inner.update_step = hundredfold
    if when == "after a step":
        optimizer.apply([GRADIENT], [variable])
        inner.update_step = hundredfold
    for _ in range(2):
        before = variable.numpy()
        in_mode(lambda: optimizer.apply([tf.constant(GRADIENT)], [variable]), mode)()
        assert_same_bits(variable.numpy()[~MASK], before[~MASK])
        assert_same_bits(variable.numpy()[MASK], (before - GRADIENT * np.float32(100.0))[MASK])
    del inner.update_step  # and Keras's own again
    before = variable.numpy()
    in_mode(lambda: optimizer.apply([tf.constant(GRADIENT)], [variable]), mode)()
    assert_same_bits(variable.numpy()[~MASK], before[~MASK])
    assert 0 < np.abs(variable.numpy() - before).max() < 1.0


@pytest.mark.parametrize("name", ["_apply_weight_decay", "_distributed_tf_update_step", "_clip_gradients"])
@pytest.mark.parametrize("when", ["before", "after a step"])
@pytest.mark.parametrize("fused", [True, False])
def test_other_methods_on_the_instance(name, when, fused):
    variable, calls = make_variable(), []
    inner = keras.optimizers.AdamW(0.1)
    optimizer = fz.MaskedOptimizer(inner, masks={"w": MASK}, fused=fused)
    if when != "before":
        optimizer.apply([GRADIENT], [variable])
    real = getattr(inner, name)
    setattr(inner, name, lambda *args: calls.append(name) or real(*args))
    for step in range(2):
        before = variable.numpy()
        optimizer.apply([GRADIENT], [variable])
        assert calls == [name] * (step + 1)
        assert_same_bits(variable.numpy()[~MASK], before[~MASK])
        assert np.all(variable.numpy()[MASK] != before[MASK])


def test_seeding_goes_on_beside_an_update_step_of_ones_own():
    """Moments of entries that are unfrozen late are seeded whoever replaced the method, and when."""
    results = []
    for when in ("never", "before", "after"):
        variable, inner = make_variable(), keras.optimizers.Adam(0.1)
        optimizer = fz.MaskedOptimizer(inner, masks={"w": MASK})
        real = inner.update_step
        if when == "before":
            inner.update_step = lambda *args, real=real: real(*args)
        for _ in range(3):
            optimizer.apply([GRADIENT], [variable])
        if when == "after":
            real = inner.update_step
            inner.update_step = lambda *args, real=real: real(*args)
        optimizer.unfreeze("w")
        optimizer.apply([GRADIENT], [variable])
        results.append(variable.numpy())
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
