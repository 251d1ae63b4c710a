"""Options of the inner optimizer, read from the wrapper and set on it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from common import assert_same_bits

import freezeops as fz
from freezeops import legacy

MASK = np.arange(12).reshape(4, 3) % 3 > 0
GRADIENT = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)

OPTIONS = {
    "weight_decay": 0.1,
    "clipnorm": 0.5,
    "global_clipnorm": 0.25,
    "clipvalue": 0.125,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 3,
    "gradient_accumulation_steps": 2,
}

WRAPPED = {
    "alone": lambda inner: fz.MaskedOptimizer(inner, masks={"w": MASK}),
    "compact": lambda inner: fz.MaskedOptimizer(inner, masks={"w": MASK}, state="compact"),
    "scaler inside": lambda inner: fz.MaskedOptimizer(
        keras.optimizers.LossScaleOptimizer(inner, initial_scale=1.0), masks={"w": MASK}
    ),
}


def make_variable():
    return keras.Variable(np.linspace(1.0, 2.0, 12, dtype=np.float32).reshape(4, 3), name="w")


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("name", OPTIONS)
def test_read_and_set(wrap, name):
    inner = keras.optimizers.SGD(0.1)
    optimizer = WRAPPED[wrap](inner)
    assert getattr(optimizer, name) == getattr(inner, name)
    setattr(optimizer, name, OPTIONS[name])
    assert getattr(inner, name) == getattr(optimizer, name) == OPTIONS[name]
    setattr(inner, name, None)
    assert getattr(optimizer, name) is None
    given = keras.optimizers.SGD(0.1, **({name: OPTIONS[name]} | ({"use_ema": True} if "ema" in name else {})))
    assert getattr(WRAPPED[wrap](given), name) == OPTIONS[name]


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_set_on_the_wrapper_is_done_once(wrap, name, fused):
    """As the bare optimizer that was made with it."""
    options = {name: OPTIONS[name]} | ({"use_ema": True} if "ema" in name else {})
    bare, variable = make_variable(), make_variable()
    one = keras.optimizers.Adam(0.1, **options)
    optimizer = WRAPPED[wrap](keras.optimizers.Adam(0.1))
    optimizer.fused = fused
    for option, value in options.items():
        setattr(optimizer, option, value)
    masked = np.where(MASK, GRADIENT, 0).astype(np.float32)
    start = make_variable().numpy()
    for _ in range(4):
        one.apply([masked], [bare])
        bare.assign(np.where(MASK, bare.numpy(), start))
        optimizer.apply([GRADIENT], [variable])
        assert_same_bits(variable.numpy()[~MASK], start[~MASK])
        # Norms are sums, in another order with compact state.
        np.testing.assert_allclose(variable.numpy()[MASK], bare.numpy()[MASK], rtol=1e-6)
    one.finalize_variable_values([bare])
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(variable.numpy()[MASK], bare.numpy()[MASK], rtol=1e-6)
    assert_same_bits(variable.numpy()[~MASK], start[~MASK])
    # No slots of the wrapper's own.
    assert len(optimizer._variables) == len(keras.optimizers.SGD(0.1)._variables)


def test_set_between_steps():
    variable = make_variable()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"w": MASK})
    optimizer.apply([GRADIENT], [variable])
    before = variable.numpy()
    optimizer.clipvalue = 1e-4
    optimizer.apply([GRADIENT], [variable])
    assert 0 < np.abs(variable.numpy() - before).max() < 2e-5
    optimizer.clipvalue = None
    before = variable.numpy()
    optimizer.apply([GRADIENT], [variable])
    assert np.abs(variable.numpy() - before).max() > 1e-2


@pytest.mark.parametrize("name, value", [("use_ema", True), ("gradient_accumulation_steps", 2)])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_needs_slots_is_set_before_the_build(name, value, wrap):
    variable = make_variable()
    optimizer = WRAPPED[wrap](keras.optimizers.SGD(0.1))
    optimizer.build([variable])
    with pytest.raises(ValueError, match=f"`{name}` must be set before the optimizer is built"):
        setattr(optimizer, name, value)
    assert not getattr(optimizer, name)
    optimizer.apply([GRADIENT], [variable])
    with_slots = WRAPPED[wrap](keras.optimizers.SGD(0.1, **{name: value}))
    with_slots.build([variable])
    for each in (None, value):  # off, and on again
        setattr(with_slots, name, each)
        assert getattr(with_slots, name) == each


def test_options_that_only_the_inner_optimizer_has():
    inner = keras.optimizers.Adam(0.1)
    optimizer = fz.MaskedOptimizer(keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0), masks={"w": MASK})
    assert (optimizer.beta_1, optimizer.epsilon, optimizer.initial_scale) == (0.9, 1e-7, 8.0)
    optimizer.beta_1, optimizer.dynamic_growth_steps = 0.5, 7
    assert inner.beta_1 == 0.5 and "beta_1" not in vars(optimizer)
    assert optimizer.inner_optimizer.dynamic_growth_steps == 7
    with pytest.raises(AttributeError, match="no attribute 'beta_3'"):
        _ = optimizer.beta_3
    optimizer.remark = "mine"  # nobody's option: as on any object
    assert optimizer.remark == "mine" and not hasattr(inner, "remark")
    assert not hasattr(optimizer, "_momentums") and not hasattr(optimizer, "optimizers")


def test_own_attributes_come_first():
    class Named(keras.optimizers.SGD):
        state = "theirs"

        def reset(self):
            pass

    optimizer = fz.MaskedOptimizer(Named(0.1))
    assert optimizer.state == "full" and optimizer.inner_optimizer.state == "theirs"
    with pytest.raises(AttributeError, match=r"Call it on `optimizer\.inner_optimizer`"):
        optimizer.reset()


def test_update_step_set_on_the_wrapper():
    variable = make_variable()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"w": MASK})
    optimizer.update_step = lambda gradient, variable, learning_rate: variable.assign_sub(gradient * 100.0)
    optimizer.apply([GRADIENT], [variable])
    start = make_variable().numpy()
    assert_same_bits(variable.numpy(), np.where(MASK, start - GRADIENT * np.float32(100.0), start))


@pytest.mark.parametrize("name", [*OPTIONS, "momentum"])
def test_several_inner_optimizers_are_refused(name):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("new in Keras 3.15")
    parts = keras.optimizers.OptimizerMap(default_optimizer=keras.optimizers.SGD(0.1))
    parts[".*w"] = keras.optimizers.SGD(0.2)
    optimizer = fz.MaskedOptimizer(keras.optimizers.MultiOptimizer(parts), masks={"w": MASK})
    with pytest.raises(AttributeError, match="parts of a MultiOptimizer"):
        setattr(optimizer, name, 1)
    with pytest.raises(AttributeError, match="parts of a MultiOptimizer"):
        getattr(optimizer, name)
    with pytest.raises(AttributeError, match="individual sub-optimizers"):
        _ = optimizer.learning_rate
    optimizer.apply([GRADIENT], [make_variable()])


def test_a_model_is_compiled_fitted_and_saved_with_them(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")])
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.freeze("a/kernel", MASK)
    optimizer.use_ema, optimizer.momentum = True, 0.9
    model.compile(optimizer, "mse")
    kernel = model.layers[0].kernel.numpy()
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0)
    assert_same_bits(model.layers[0].kernel.numpy()[MASK], kernel[MASK])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert loaded.use_ema is True and loaded.momentum == 0.9
    assert len(loaded.variables) == len(optimizer.variables)


@pytest.mark.parametrize("wrap", [lambda inner: inner, tf_keras.mixed_precision.LossScaleOptimizer])
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "gradient_accumulation_steps"])
def test_legacy(wrap, name):
    inner = tf_keras.optimizers.SGD(0.1)
    optimizer = legacy.MaskedOptimizer(wrap(inner), masks={"w": MASK})
    setattr(optimizer, name, OPTIONS[name])
    assert getattr(inner, name) == getattr(optimizer, name) == OPTIONS[name]
    optimizer.nesterov = True
    assert inner.nesterov is True and optimizer.nesterov is True
    options = {name: OPTIONS[name]} | ({"use_ema": True} if "ema" in name else {})
    optimizer = legacy.MaskedOptimizer(wrap(tf_keras.optimizers.Adam(0.1)), masks={"w": MASK})
    for option, value in options.items():
        setattr(optimizer, option, value)
    one = tf_keras.optimizers.Adam(0.1, **options)
    start = make_variable().numpy()
    bare, variable = tf.Variable(start, name="w"), tf.Variable(start, name="w")
    masked = np.where(MASK, GRADIENT, 0).astype(np.float32)
    for _ in range(4):
        one.apply_gradients([(tf.constant(masked), bare)])
        bare.assign(np.where(MASK, bare.numpy(), start))
        optimizer.apply_gradients([(tf.constant(GRADIENT), variable)])
        assert_same_bits(variable.numpy()[~MASK], start[~MASK])
        np.testing.assert_allclose(variable.numpy()[MASK], bare.numpy()[MASK], rtol=1e-6)


def test_legacy_slots_and_compilation():
    inner = tf_keras.optimizers.SGD(0.1)
    optimizer = legacy.MaskedOptimizer(inner, masks={"w": MASK})
    optimizer.jit_compile = True
    assert inner.jit_compile is True
    optimizer.build([tf.Variable(make_variable().numpy(), name="w")])
    with pytest.raises(ValueError, match="`use_ema` must be set before the optimizer is built"):
        optimizer.use_ema = True


def test_legacy_scaler_outside():
    inner = tf_keras.optimizers.SGD(0.1)
    scaler = tf_keras.mixed_precision.LossScaleOptimizer(legacy.MaskedOptimizer(inner, masks={"w": MASK}))
    scaler.use_ema = True
    assert inner.use_ema is True and scaler.use_ema is True
