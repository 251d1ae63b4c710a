"""Loss scaling inside and outside, mixed and low precision."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits

import freezeops as fz

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 3)).astype("float32")
MASK = np.random.default_rng(2).random((6, 12)) < 0.5


@keras.saving.register_keras_serializable(package="tests")
class Poison(keras.layers.Layer):
    """The identity, whose gradient is NaN where `where` is True, while `on` is 1."""

    def __init__(self, where, **kwargs):
        super().__init__(**kwargs)
        self.where = np.asarray(where)
        self.on = self.add_weight(shape=(), initializer="zeros", trainable=False, name="on")

    def call(self, x):
        @tf.custom_gradient
        def poisoned(x):
            def backward(upstream):
                on = tf.cast(self.on.value, tf.bool)
                nan = tf.cast(float("nan"), upstream.dtype)
                return tf.where(tf.logical_and(self.where, on), nan, upstream)

            return tf.identity(x), backward

        return poisoned(x)


class PoisonedDense(keras.layers.Layer):
    """A dense layer some of whose kernel's gradients can be made NaN."""

    def __init__(self, where, **kwargs):
        super().__init__(**kwargs)
        self.poison = Poison(where)

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=MASK.shape, name="kernel")

    def call(self, x):
        return x @ self.poison(tf.convert_to_tensor(self.kernel))


def compiled(make_optimizer, poisoned, policy="mixed_float16", jit_compile=False):
    keras.config.set_dtype_policy(policy)
    layer = PoisonedDense(poisoned, name="body")
    model = keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(3, dtype="float32")])
    optimizer = make_optimizer()
    masked = optimizer if isinstance(optimizer, fz.MaskedOptimizer) else optimizer.inner_optimizer
    masked.register_mask("body/kernel", MASK)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    return model, layer, masked


@pytest.fixture(autouse=True)
def float32_again():
    yield
    keras.config.set_dtype_policy("float32")


def inside():
    scaler = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.01), initial_scale=256.0, dynamic_growth_steps=1000
    )
    return fz.MaskedOptimizer(scaler)


def outside():
    return fz.MaskedOptimizer(keras.optimizers.AdamW(0.01))


def scaler_of(model):
    optimizer = model.optimizer
    return optimizer.inner_optimizer if isinstance(optimizer, fz.MaskedOptimizer) else optimizer


def fit(model):
    model.fit(X, Y, batch_size=16, epochs=1, shuffle=False, verbose=0)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("make_optimizer", [inside, outside])
def test_nan_in_frozen_entries_neither_skips_nor_lowers_the_scale(make_optimizer, jit_compile):
    model, layer, masked = compiled(make_optimizer, ~MASK, jit_compile=jit_compile)
    fit(model)
    scale, steps = float(scaler_of(model).dynamic_scale), int(masked.iterations)
    before = layer.kernel.numpy()
    layer.poison.on.assign(1)
    fit(model)
    assert float(scaler_of(model).dynamic_scale) == scale
    assert int(masked.iterations) == steps + 4
    assert_same_bits(layer.kernel.numpy()[~MASK], before[~MASK])
    assert (layer.kernel.numpy()[MASK] != before[MASK]).all()


@pytest.mark.parametrize("make_optimizer", [inside, outside])
def test_nan_in_a_trainable_entry_does_both(make_optimizer):
    poisoned = np.zeros_like(MASK)
    poisoned.reshape(-1)[np.flatnonzero(MASK)[0]] = True
    model, layer, masked = compiled(make_optimizer, poisoned)
    fit(model)
    scale, steps = float(scaler_of(model).dynamic_scale), int(masked.iterations)
    before = layer.kernel.numpy()
    layer.poison.on.assign(1)
    fit(model)
    assert float(scaler_of(model).dynamic_scale) == scale / 16
    assert int(masked.iterations) == steps
    assert_same_bits(layer.kernel.numpy(), before)


def test_compile_does_not_wrap_a_loss_scaler_that_is_inside():
    model, _, masked = compiled(inside, ~MASK)
    assert model.optimizer is masked
    assert isinstance(masked, keras.optimizers.LossScaleOptimizer)
    assert isinstance(masked, fz.MaskedOptimizer)


def test_compile_wraps_outside_and_the_wrapper_masks():
    model, _, masked = compiled(outside, ~MASK)
    assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
    assert model.optimizer.inner_optimizer is masked


@pytest.mark.parametrize("make_optimizer", [inside, outside])
def test_save_and_load(make_optimizer, tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(12, name="body"), keras.layers.Dense(3)])
    optimizer = make_optimizer()
    optimizer.register_mask("body/kernel", MASK)
    model.compile(optimizer, "mse", jit_compile=False)
    fit(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    before = model.get_layer("body").kernel.numpy()
    fit(model)
    fit(loaded)
    for a, b in zip(loaded.variables, model.variables, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.path)
    for a, b in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.path)
    assert_same_bits(loaded.get_layer("body").kernel.numpy()[~MASK], before[~MASK])


def test_custom_loop_with_the_scaler_outside():
    (kernel,) = [keras.Variable(np.ones((6, 12), "float32"), name="kernel")]
    masked = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"kernel": MASK})
    scaler = keras.optimizers.LossScaleOptimizer(masked, initial_scale=4.0)
    bad = tf.constant(np.where(MASK, np.float32(1), np.float32(np.inf)))
    for step in range(3):
        scaler.apply([bad], [kernel])
        assert int(masked.iterations) == step + 1
    assert float(scaler.dynamic_scale) == 4.0
    assert_same_bits(kernel.numpy()[~MASK], np.ones((~MASK).sum(), np.float32))
    assert (kernel.numpy()[MASK] != 1).all()


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16", "float64"])
def test_other_policies(policy, jit_compile):
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(12, name="body"), keras.layers.Dense(3)])
    inner = keras.optimizers.SGD(0.125, momentum=0.5, loss_scale_factor=16.0)
    optimizer = fz.MaskedOptimizer(inner, masks={"body/kernel": MASK})
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    kernel = model.get_layer("body").kernel
    before = kernel.numpy()
    fit(model)
    assert_same_bits(kernel.numpy()[~MASK], before[~MASK])
    assert (kernel.numpy()[MASK] != before[MASK]).mean() > 0.9
    assert np.isfinite(kernel.numpy().astype("float32")).all()


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_scaler_around_an_optimizer_around_ours_is_refused():
    """It would look at unmasked gradients, and could skip every step in silence."""
    masked = fz.MaskedOptimizer(keras.optimizers.SGD(0.5))
    multi = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(masked))
    scaler = keras.optimizers.LossScaleOptimizer(multi)
    with pytest.raises(ValueError, match="must wrap a MaskedOptimizer directly.*MultiOptimizer between the two"):
        scaler.build([keras.Variable(np.ones(3, "float32"), name="v")])
