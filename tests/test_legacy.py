"""The promise and its surroundings for `tf_keras` (Keras 2) optimizers.

Cases under `tf.distribute` need a process whose devices were set up before use:
`python test_legacy.py CASE` is that process.
"""

import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MODES, OPTIONS, assert_same_bits, in_mode, setups_of

pytest.importorskip("tf_keras", reason="tf_keras is not installed: nothing to wrap")
import tf_keras
from processes import run_script
from training import Training, body_and_head

import freezeops as fz
from freezeops.legacy import MaskedOptimizer
from freezeops.registry import rules_config

_O = tf_keras.optimizers

SETUPS = setups_of(_O)
del SETUPS["RMSprop"]  # with momentum and centered it does all that it does without

OPTIONS = {name: OPTIONS[name] for name in ("plain", "weight_decay", "ema_overwrite", "clipnorm", "global_clipnorm")}

STEPS = 3

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 3)).astype("float32")
MASK = np.random.default_rng(2).random((6, 12)) < 0.5


@pytest.fixture(autouse=True)
def clean_keras():
    """Instead of that for Keras 3, which here would take longer than the tests."""
    tf_keras.utils.set_random_seed(1)
    yield
    tf_keras.mixed_precision.set_global_policy("float32")


def make_model(**head):
    return body_and_head(tf_keras, **head)


def kernel_of(model):
    return model.get_layer("body").kernel


def fit(model, epochs=1, **kwargs):
    return model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def assert_trained(variable, before, mask=MASK):
    after = variable.numpy()
    assert_same_bits(after[~mask], before[~mask], "frozen entries")
    assert (after[mask] != before[mask]).all()


# The promise.

SHAPES = {"late": (6, 12), "odd": (8, 10), "bias": (19,)}
"""Masked after some steps, when the slots are full; with odd values and NaN gradients in frozen entries; a vector."""


def training_of(setup):
    # Adafactor takes a norm of the variable: NaN in a frozen entry reaches the others through it.
    return Training(SHAPES, odd=["odd"], finite=setup == "Adafactor", nan=["odd"], make=tf.Variable)


def check_promise(setup, options, mode, inner_jit=False):
    """Trains three variables and compares bits; returns their masks, and their values before they are finalized."""
    training = training_of(setup)
    inner = SETUPS[setup](**options)
    inner.jit_compile = inner_jit  # the default where a GPU is visible
    optimizer = MaskedOptimizer(inner)
    *_, last, _ = training.check_promise(optimizer, mode, STEPS)
    for part, average in optimizer._averages():
        frozen = ~training.masks[part.path]
        assert_same_bits(average.numpy()[frozen], last[part.path][frozen], "average of frozen entries")
    assert int(optimizer.iterations) == 2 * STEPS
    return training.masks, last


PROMISE = [
    (setup, option, mode)
    for setup in SETUPS
    for option in OPTIONS
    for mode in MODES
    # All of them in eager mode; of those that are traced, which takes longer, what is hardest for each optimizer.
    if mode == "eager" or option == "ema_overwrite" or setup == "Adam" or (mode, option) == ("function", "weight_decay")
]


@pytest.mark.parametrize("setup, option, mode", PROMISE)
def test_frozen_entries_keep_their_bits_and_the_others_train_as_by_hand(setup, option, mode):
    masks, last = check_promise(setup, OPTIONS[option], mode)
    if mode == "jit":
        return  # XLA reorders arithmetic, differently in two programs.
    *_, expected = training_of(setup).train_with_late_mask(SETUPS[setup](**OPTIONS[option]), mode, STEPS, late="late")
    for name, mask in masks.items():
        assert_same_bits(last[name][mask], expected[name][mask], name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setup", ["SGD momentum", "AdamW", "Ftrl"])
def test_on_the_reference_twins(setup, mode, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", "reference")
    check_promise(setup, OPTIONS["ema_overwrite"], mode)


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("setup", ["SGD momentum", "AdamW"])
def test_updates_compiled_by_the_inner_optimizer(setup, mode, backend):
    check_promise(setup, OPTIONS["ema_overwrite"], mode, inner_jit=True)


def test_no_optimizer_class_is_forgotten():
    classes = {name for name, value in vars(_O).items() if inspect.isclass(value)}
    assert classes == {name.split()[0] for name in SETUPS} | {"Optimizer"}


def test_masked_gradients_alone_would_fail_here():
    training = training_of("AdamW")
    before = training.values()["bias"]
    gradients = zip(SHAPES, training.gradients(), strict=True)
    gradients = [fz.mask_gradient(gradient, training.masks[name]) for name, gradient in gradients]
    SETUPS["AdamW"]().apply_gradients(list(zip(gradients, training.variables.values(), strict=True)))
    frozen = ~training.masks["bias"]
    with pytest.raises(AssertionError, match="entries differ"):
        assert_same_bits(training.values()["bias"][frozen], before[frozen])


class Plain(tf_keras.optimizers.Optimizer):
    """As someone may write it: subtracts, and moves everything a little."""

    def __init__(self, name="Plain", **kwargs):
        super().__init__(name, **kwargs)
        self._learning_rate = self._build_learning_rate(0.5)

    def build(self, var_list):
        super().build(var_list)
        self._built = True

    def update_step(self, gradient, variable):
        variable.assign_sub(self.learning_rate * gradient + 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_user_written_optimizer_constraint_and_missing_gradient(mode, backend):
    before = np.linspace(-3, 3, 12, dtype="float32").reshape(3, 4)
    mask = np.random.default_rng(0).random((3, 4)) < 0.5
    v = tf.Variable(before, name="v", constraint=lambda w: tf.clip_by_value(w, -1.0, 1.0))
    idle = tf.Variable(before, name="idle")
    optimizer = MaskedOptimizer(Plain(), masks={"v": mask, "idle": mask})
    optimizer.build([v, idle])
    in_mode(lambda: optimizer.apply_gradients([(tf.ones((3, 4)), v), (None, idle)]), mode)()
    assert_same_bits(v.numpy()[~mask], before[~mask])
    assert_same_bits(v.numpy()[mask], np.clip(before - 1.5, -1, 1)[mask])
    assert_same_bits(idle.numpy(), before)


@pytest.mark.parametrize(
    "setup, mode", [(setup, mode) for setup in SETUPS for mode in MODES if mode == "eager" or setup in ("SGD", "Adam")]
)
def test_sparse_gradients(setup, mode):
    before = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
    before[:10] = np.float32(-0.0)
    table, twin = tf.Variable(before, name="table"), tf.Variable(before)
    optimizer, plain = MaskedOptimizer(SETUPS[setup]()), SETUPS[setup]()
    optimizer.freeze(table, np.s_[:10])
    optimizer.build([table])
    plain.build([twin])
    assert optimizer.describe()[0].bytes == 3  # one bit per row
    values = np.ones((4, 3), "float32")
    values[0] = np.nan

    def slices(values):
        return tf.IndexedSlices(tf.constant(values), tf.constant([2, 12, 12, 19]), tf.constant([20, 3]))

    step = in_mode(lambda: optimizer.apply_gradients([(slices(values), table)]), mode)
    by_hand = in_mode(lambda: plain.apply_gradients([(slices(np.nan_to_num(values)), twin)]), mode)
    for _ in range(3):
        step()
        by_hand()
        twin.scatter_update(tf.IndexedSlices(before[:10], tf.range(10)))
    assert_same_bits(table.numpy()[:10], before[:10])
    assert (table.numpy()[[12, 19]] != before[[12, 19]]).all()
    if mode == "jit":
        np.testing.assert_allclose(table.numpy()[10:], twin.numpy()[10:], rtol=1e-5)
    else:
        assert_same_bits(table.numpy()[10:], twin.numpy()[10:])


def test_norms_count_trainable_entries_only():
    v = tf.Variable([0.0, 0.0], name="v")
    optimizer = MaskedOptimizer(_O.SGD(1.0, global_clipnorm=1.0), masks={"v": [True, False]})
    optimizer.apply_gradients([(tf.constant([0.5, 1e30]), v)])
    assert v.numpy().tolist() == [-0.5, 0.0]


# fit.


@pytest.mark.parametrize("how", [{}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_fit(how, backend):
    model = make_model()
    optimizer = MaskedOptimizer(_O.AdamW(0.01, weight_decay=0.1), masks={"body/kernel": MASK, "head/bias": False})
    before, bias = kernel_of(model).numpy(), model.get_layer("head").bias.numpy()
    model.compile(optimizer, "mse", **how)
    fit(model, epochs=2)
    assert_trained(kernel_of(model), before)
    assert_same_bits(model.get_layer("head").bias.numpy(), bias)
    assert int(optimizer.iterations) == 8
    assert optimizer.mask_for(kernel_of(model)) == fz.Mask.from_array(MASK)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_masks_change_inside_fit_without_retracing(jit_compile):
    model = make_model()
    optimizer = MaskedOptimizer(_O.AdamW(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3))
    seen, counts, traces = [], [], []

    class ChangeMasks(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(kernel_of(model).numpy())
            counts.append(len(traces))
            if batch == 1:
                optimizer.register_mask(kernel_of(model), MASK)
            elif batch == 2:
                optimizer.unfreeze(kernel_of(model), 0)
                optimizer.freeze("head/.*")

    train_step = model.train_step

    def counted(data):
        traces.append(1)
        return train_step(data)

    model.train_step = counted
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    model.fit(X, Y, batch_size=12, shuffle=False, verbose=0, callbacks=[ChangeMasks()])
    assert counts == [counts[0]] * 6
    moved = [b != a for a, b in zip(seen, seen[1:], strict=False)]
    later = MASK.copy()
    later[0] = True
    for change, mask in zip(moved, [np.ones_like(MASK), MASK, later, later, later], strict=True):
        assert np.array_equal(change, mask)


def test_learning_rate_callbacks_and_schedules():
    model = make_model()
    optimizer = MaskedOptimizer(_O.SGD(0.1), masks={"body/kernel": MASK})
    model.compile(optimizer, "mse")
    fit(model, epochs=2, callbacks=[tf_keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (epoch + 1))])
    assert float(optimizer.learning_rate) == float(optimizer.inner_optimizer.lr) == 0.25
    optimizer.lr = 0.125
    assert float(optimizer.inner_optimizer.learning_rate) == 0.125
    plateau = tf_keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    fit(model, epochs=2, callbacks=[plateau])
    assert float(optimizer.learning_rate) == 0.0625
    schedule = _O.schedules.ExponentialDecay(0.5, 1, 0.5)
    v = tf.Variable([1.0, 1.0], name="v")
    scheduled = MaskedOptimizer(_O.SGD(schedule), masks={"v": [True, False]})
    for _ in range(2):
        scheduled.apply_gradients([(tf.ones(2), v)])
    assert v.numpy().tolist() == [0.25, 1.0]
    logged: dict = {}
    board = tf_keras.callbacks.TensorBoard()
    board.model = tf_keras.Sequential()
    board.model.optimizer = scheduled
    board._collect_learning_rate(logged)
    assert logged == {"learning_rate": 0.125}


def test_permanent():
    model = make_model()
    optimizer = MaskedOptimizer(_O.Adam(0.01, weight_decay=0.1))
    optimizer.freeze("body/kernel", permanent=True)
    before = kernel_of(model).numpy()
    model.compile(optimizer, "mse")
    fit(model)
    assert_same_bits(kernel_of(model).numpy(), before)
    assert len(optimizer.inner_optimizer._momentums) == 3
    with pytest.raises(ValueError, match="must stay frozen"):
        optimizer.unfreeze("body/kernel")
    with pytest.raises(ValueError, match="before the optimizer is built"):
        optimizer.freeze("head/kernel", permanent=True)


def test_all_frozen_for_good_still_counts_steps():
    v = tf.Variable([1.0], name="v")
    optimizer = MaskedOptimizer(_O.Nadam(0.1))
    optimizer.freeze(v, permanent=True)
    tf.function(lambda: optimizer.apply_gradients([(tf.constant([np.nan]), v)]))()
    assert v.numpy().tolist() == [1.0] and int(optimizer.iterations) == 1


def test_verbs_density_and_summary(capsys):
    model = make_model()
    optimizer = MaskedOptimizer(_O.SGD(0.1))
    optimizer.train_only(model.get_layer("head"), 0)
    optimizer.summary()
    assert "train_only" in capsys.readouterr().out
    optimizer.build(model.trainable_variables)
    assert optimizer.mask_for(model.get_layer("head").kernel) == fz.Mask.rows((12, 3), [0])
    assert optimizer.density == pytest.approx((72 + 12 + 3 + 1) / (72 + 12 + 36 + 3))
    assert list(optimizer.masks_by_path()) == ["body/kernel", "body/bias", "head/kernel", "head/bias"]
    optimizer.summary()
    assert "head/kernel" in capsys.readouterr().out
    masked = optimizer.mask_gradients([tf.fill((12, 3), np.nan), None], model.get_layer("head").trainable_variables)
    assert np.isnan(masked[0].numpy()).sum() == 3 and (masked[0].numpy()[1:] == 0).all() and masked[1] is None
    before = [v.numpy() for v in model.variables]
    optimizer.finalize_variable_values(model.trainable_variables)
    for v, value in zip(model.variables, before, strict=True):
        assert_same_bits(v.numpy(), value)


def test_weight_decay_exclusions():
    v, w = tf.Variable([1.0, 1.0], name="v"), tf.Variable([1.0, 1.0], name="w")
    optimizer = MaskedOptimizer(_O.SGD(0.5, weight_decay=0.5), masks={"v": [True, False]})
    optimizer.exclude_from_weight_decay(var_names=["w"])
    optimizer.apply_gradients([(tf.zeros(2), v), (tf.zeros(2), w)])
    assert v.numpy().tolist() == [0.75, 1.0] and w.numpy().tolist() == [1.0, 1.0]


# Loss scaling.


class PoisonedDense(tf_keras.layers.Layer):
    """A dense layer whose kernel's gradients are NaN where `where` is True, while `on` is 1."""

    def __init__(self, where, **kwargs):
        super().__init__(**kwargs)
        self.where = where

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=MASK.shape, name="kernel")
        self.on = self.add_weight(shape=(), initializer="zeros", trainable=False, name="on")

    def call(self, x):
        @tf.custom_gradient
        def poisoned(w):
            def backward(upstream):
                on = tf.cast(self.on, tf.float32) > 0
                return tf.where(tf.logical_and(self.where, on), tf.cast(np.nan, upstream.dtype), upstream)

            return tf.identity(w), backward

        return x @ poisoned(tf.convert_to_tensor(self.kernel))


SCALERS = {
    "inside": lambda: MaskedOptimizer(
        tf_keras.mixed_precision.LossScaleOptimizer(_O.AdamW(0.01), initial_scale=256.0), masks={".*/kernel": True}
    ),
    "outside": lambda: MaskedOptimizer(_O.AdamW(0.01)),
}


@pytest.mark.parametrize("poisoned", ["frozen", "trainable"])
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("where", SCALERS)
def test_loss_scale(where, jit_compile, poisoned):
    tf_keras.mixed_precision.set_global_policy("mixed_float16")
    layer = PoisonedDense(~MASK if poisoned == "frozen" else MASK, name="body")
    model = tf_keras.Sequential([tf_keras.Input((6,)), layer, tf_keras.layers.Dense(3, dtype="float32")])
    masked = SCALERS[where]()
    masked.register_mask("body/kernel", MASK)
    model.compile(masked, "mse", jit_compile=jit_compile)
    scaler = model.optimizer if where == "outside" else masked.inner_optimizer
    assert (model.optimizer is masked) == (where == "inside")
    assert type(scaler).__name__ == "LossScaleOptimizerV3"
    fit(model)
    before, scale = layer.kernel.numpy(), float(scaler.loss_scale)
    layer.on.assign(1)
    fit(model)
    if poisoned == "frozen":
        assert float(scaler.loss_scale) == scale
        assert_trained(layer.kernel, before)
    else:
        assert float(scaler.loss_scale) == scale / 16
        assert_same_bits(layer.kernel.numpy(), before)
    assert int(masked.iterations) == 8  # tf_keras counts skipped steps


@pytest.mark.parametrize("where", SCALERS)
def test_loss_scale_in_a_loop(where):
    scaler_class = tf_keras.mixed_precision.LossScaleOptimizer
    inner = _O.SGD(0.5)
    optimizer = MaskedOptimizer(scaler_class(inner) if where == "inside" else inner)
    if where == "outside":
        optimizer = scaler_class(optimizer)
    masked = optimizer if where == "inside" else optimizer.inner_optimizer
    v = tf.Variable([1.0, 1.0], name="v")
    masked.register_mask(v, [True, False])
    assert isinstance(optimizer, scaler_class)
    assert optimizer.dynamic and optimizer.initial_scale == 2**15 and optimizer.dynamic_growth_steps == 2000
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = optimizer.get_scaled_loss(tf.reduce_sum(v * [1.0, np.inf]))
        gradients = optimizer.get_unscaled_gradients(tape.gradient(loss, [v]))
        optimizer.apply_gradients(list(zip(gradients, [v], strict=True)))
    assert v.numpy().tolist() == [0.0, 1.0]
    assert float(optimizer.loss_scale) == 2**15 and int(optimizer.dynamic_counter) == 2


# Saving.

SAVED = {
    "AdamW": lambda: _O.AdamW(0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3),
    "SGD": lambda: _O.SGD(_O.schedules.ExponentialDecay(0.1, 3, 0.5), momentum=0.9),
    "loss scale": lambda: tf_keras.mixed_precision.LossScaleOptimizer(_O.RMSprop(0.01), initial_scale=2.0),
}


def trained(setup, policy="float32"):
    tf_keras.mixed_precision.set_global_policy(policy)
    model = make_model(dtype="float32")
    optimizer = MaskedOptimizer(SAVED[setup](), maskable={"head/kernel": "rows"})
    optimizer.register_mask("body/kernel", MASK)
    optimizer.freeze("head/kernel", [1, 2])
    optimizer.freeze("body/bias", permanent=True)
    model.compile(optimizer, "mse")
    fit(model)
    return model


def assert_resumes(loaded, model):
    """Both train on alike, and what was frozen stays."""
    before = kernel_of(model).numpy()
    fit(model)
    fit(loaded)
    for a, b in zip(loaded.variables, model.variables, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.name)
    own, other = loaded.optimizer.variables, model.optimizer.variables
    for a, b in zip(own, other, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.name)
    assert_trained(kernel_of(loaded), before)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("setup", SAVED)
def test_keras_file(setup, policy, tmp_path):
    model = trained(setup, policy)
    model.save(tmp_path / "m.keras")
    loaded = tf_keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert_resumes(loaded, model)


@pytest.mark.parametrize("setup", ["AdamW", "loss scale"])
def test_h5_file(setup, tmp_path):
    model = trained(setup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tf_keras calls the format legacy
        model.save(tmp_path / "m.h5")
    assert_resumes(tf_keras.models.load_model(tmp_path / "m.h5"), model)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("setup", SAVED)
def test_checkpoint(setup, policy, built, tmp_path):
    model = trained(setup, policy)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    other = make_model(dtype="float32")
    optimizer = MaskedOptimizer(SAVED[setup](), maskable={"head/kernel": "rows"})
    optimizer.freeze("body/bias", permanent=True)
    other.compile(optimizer, "mse")
    if built:
        optimizer.build(other.trainable_variables)
    status = tf.train.Checkpoint(model=other, optimizer=other.optimizer).restore(path)
    if built:
        status.assert_consumed()
        assert optimizer.mask_for(kernel_of(other)) == fz.Mask.from_array(MASK)
    assert_resumes(other, model)


def test_checkpoint_of_masks_that_were_made_after_an_earlier_one(tmp_path):
    v = tf.Variable([1.0, 1.0], name="v")
    optimizer = MaskedOptimizer(_O.SGD(0.1), masks={"v": [True, False]})
    checkpoint = tf.train.Checkpoint(optimizer=optimizer)
    checkpoint.save(str(tmp_path / "empty"))
    optimizer.build([v])
    path = checkpoint.save(str(tmp_path / "c"))
    optimizer.unfreeze(v)
    with pytest.warns(UserWarning, match=r"replaces masks that calls had stated: 'v' \(1 entries\)"):
        checkpoint.restore(path)
    assert optimizer.mask_for(v).to_numpy().tolist() == [True, False]


def test_save_weights(tmp_path):
    model = trained("AdamW")
    model.save_weights(tmp_path / "weights")
    other = make_model()
    optimizer = MaskedOptimizer(SAVED["AdamW"](), maskable={"head/kernel": "rows"})
    optimizer.freeze("body/bias", permanent=True)
    other.compile(optimizer, "mse")
    other.load_weights(tmp_path / "weights")
    assert_resumes(other, model)


def test_config():
    model = trained("AdamW")
    config = model.optimizer.get_config()
    again = MaskedOptimizer.from_config(config)
    assert type(again.inner_optimizer) is _O.AdamW and again.inner_optimizer.use_ema
    again.build(model.trainable_variables)
    assert again.get_config() == config
    assert again.mask_for(kernel_of(model)) == fz.Mask.from_array(MASK)
    assert again.mask_for(model.get_layer("body").bias).density == 0.0  # permanent
    assert type(tf_keras.optimizers.deserialize(tf_keras.optimizers.serialize(again))) is MaskedOptimizer


def test_set_weights():
    model = trained("AdamW")
    optimizer = model.optimizer
    weights = [v.numpy() for v in optimizer.variables]
    again = MaskedOptimizer.from_config(optimizer.get_config())
    with pytest.raises(ValueError, match="must be built first"):
        again.set_weights(weights)
    again.build(model.trainable_variables)
    with pytest.raises(ValueError, match="one array per variable"):
        again.set_weights(weights[1:])
    with pytest.raises(ValueError, match="must have the shapes"):
        again.set_weights([*weights[:-1], weights[-1][1:]])
    with pytest.raises(ValueError, match="masks are not among them.*save_masks"):
        again.set_weights([np.zeros(9, np.uint8), *weights])
    again.unfreeze("body/kernel")
    again.set_weights(weights)
    assert again.mask_for(kernel_of(model)).density == 1.0  # masks are no weights
    for a, b in zip(again.variables, weights, strict=True):
        assert_same_bits(a.numpy(), b)
    assert [v.name for v in again.variables()] == [v.name for v in again.variables]


def test_a_saved_model_brings_masks_by_its_config(tmp_path):
    """tf_keras loads no optimizer state from it, but its config."""
    model = trained("AdamW")
    model.save(tmp_path / "m", save_format="tf")
    loaded = tf_keras.models.load_model(tmp_path / "m")
    assert type(loaded.optimizer) is MaskedOptimizer
    before = kernel_of(loaded).numpy()
    fit(loaded)
    assert loaded.optimizer.mask_for(kernel_of(loaded)) == fz.Mask.from_array(MASK)
    assert_trained(kernel_of(loaded), before)


def test_rules_that_wait_are_saved(tmp_path):
    model = make_model()
    model.compile(MaskedOptimizer(_O.SGD(0.1), masks={"body/kernel": MASK}), "mse")
    model.save(tmp_path / "m.keras")
    loaded = tf_keras.models.load_model(tmp_path / "m.keras")
    before = kernel_of(loaded).numpy()
    fit(loaded)
    assert_trained(kernel_of(loaded), before)
    model.optimizer.freeze(model.get_layer("head"))
    with pytest.raises(ValueError, match="must name its variables by path.*Received: freeze"):
        model.save(tmp_path / "n.keras")


# What loads do to masks: as in test_loading.py.


def stored_model(name="a", where=None, maskable=None):
    model = tf_keras.Sequential([tf_keras.layers.Dense(8, input_shape=(8,), name=name)])
    optimizer = MaskedOptimizer(_O.Adam(0.01), maskable=maskable)
    if where is not None:
        optimizer.freeze(f"{name}/kernel", where)
    model.compile(optimizer, "mse")
    return model


def train_stored(model):
    x = np.random.default_rng(0).random((16, 8), "float32")
    model.fit(x, x, batch_size=8, shuffle=False, verbose=0)


STORES = ["m.keras", "m.weights.h5", "m.h5", "checkpoint", "weights"]


def store(model, name, folder):
    if name == "checkpoint":
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "c"))
    if name in ("m.keras", "m.h5"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save(folder / name)
    else:
        model.save_weights(folder / name)
    return folder / name


def restore(model, name, path):
    if name == "checkpoint":
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(path)
    elif name in ("m.keras", "m.h5"):
        return tf_keras.models.load_model(path)
    else:
        model.load_weights(path)
    return model


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_rows_stay_rows(name, built, tmp_path):
    model = stored_model(where=[0, 1, 2])
    train_stored(model)
    path = store(model, name, tmp_path)
    other = stored_model()
    if built:
        other.optimizer.build(other.trainable_variables)
    loaded = restore(other, name, path)
    before = loaded.trainable_variables[0].numpy()
    train_stored(loaded)
    assert loaded.optimizer.mask_for(loaded.trainable_variables[0]) == fz.Mask.rows((8, 8), [3, 4, 5, 6, 7])
    assert_same_bits(loaded.trainable_variables[0].numpy()[:3], before[:3])
    assert int(loaded.optimizer.iterations) == 4


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", ["m.weights.h5", "checkpoint", "weights"])
def test_a_call_after_a_load_counts(name, built, tmp_path):
    model = stored_model(where=[0])
    train_stored(model)
    path = store(model, name, tmp_path)
    other = stored_model()
    if built:
        other.optimizer.build(other.trainable_variables)
    restore(other, name, path)
    other.optimizer.freeze("a/kernel", [5])
    train_stored(other)
    assert other.optimizer.mask_for(other.trainable_variables[0]) == fz.Mask.rows((8, 8), [1, 2, 3, 4, 6, 7])


@pytest.mark.parametrize("name", ["m.weights.h5", "checkpoint", "weights"])
def test_what_nobody_stated_states_nothing(name, tmp_path):
    model = stored_model()
    train_stored(model)
    path = store(model, name, tmp_path)
    other = stored_model(where=[5])
    restore(other, name, path)
    train_stored(other)
    assert other.optimizer.mask_for(other.trainable_variables[0]) == ~fz.Mask.rows((8, 8), [5])


@pytest.mark.parametrize("built", [False, True])
def test_weights_of_a_bare_optimizer(built, tmp_path):
    model = stored_model()
    model.compile(_O.Adam(0.01), "mse")
    train_stored(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = stored_model(where=[5])
    if built:
        other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "m.weights.h5")
    assert int(other.optimizer.iterations) == 2
    for a, b in zip(other.optimizer.variables, model.optimizer.variables, strict=True):
        assert_same_bits(a.numpy(), b.numpy())
    before = other.trainable_variables[0].numpy()
    train_stored(other)
    assert_same_bits(other.trainable_variables[0].numpy()[5], before[5])


def test_config_before_the_build():
    optimizer = MaskedOptimizer(_O.Adam(0.01))
    optimizer.freeze("a/kernel", np.s_[:, :3])
    again = MaskedOptimizer.from_config(optimizer.get_config())
    model = stored_model()
    again.build(model.trainable_variables)
    assert again.mask_for(model.trainable_variables[0]) == fz.Mask.columns((8, 8), [3, 4, 5, 6, 7])
    optimizer.freeze(model.trainable_variables[1])
    with pytest.raises(ValueError, match="must name its variables by path"):
        optimizer.get_config()


def test_masks_that_a_config_left_out(monkeypatch):
    monkeypatch.setattr(rules_config, "LIMIT", 4)
    model = stored_model(where=[0])
    train_stored(model)
    other = stored_model()
    other.compile(MaskedOptimizer.from_config(model.optimizer.get_config()), "mse")
    with pytest.raises(ValueError, match="no mask yet for 'a/kernel'"):
        train_stored(other)
    other.optimizer.register_mask("a/kernel", np.arange(8)[:, None] > 0)
    other.compile(other.optimizer, "mse")
    train_stored(other)


# Errors.


def test_wrong_inner_optimizers():
    with pytest.raises(TypeError, match=r"not one of tf_keras\.optimizers\.legacy\. Use .* in tf_keras\.optimizers"):
        MaskedOptimizer(_O.legacy.Adam())
    with pytest.raises(TypeError, match=r"For an optimizer of Keras 3 use freezeops\.MaskedOptimizer"):
        MaskedOptimizer(keras.optimizers.Adam())
    with pytest.raises(
        TypeError, match=r"must be a tf_keras\.optimizers\.Optimizer\. Received: inner_optimizer='adam'"
    ):
        MaskedOptimizer("adam")
    masked = MaskedOptimizer(_O.SGD(0.1))
    scaler = tf_keras.mixed_precision.LossScaleOptimizer
    for inner in (masked, scaler(masked)):
        with pytest.raises(ValueError, match="must not be a MaskedOptimizer itself"):
            MaskedOptimizer(inner)
    with pytest.raises(ValueError, match="already wrapped"):
        scaler(MaskedOptimizer(scaler(_O.SGD(0.1))))
    with pytest.raises(TypeError, match=r"must be a keras\.optimizers\.Optimizer"):
        fz.MaskedOptimizer(_O.SGD(0.1))


@pytest.mark.parametrize("argument", ["learning_rate", "lr", "weight_decay", "clipnorm", "use_ema", "jit_compile"])
def test_arguments_of_the_inner_optimizer(argument):
    with pytest.raises(ValueError, match=rf"`{argument}`: it must be set on the `inner_optimizer`. Received"):
        MaskedOptimizer(_O.SGD(0.1), **{argument: 1})


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"speed": 1}, ValueError, "must be known ones. Received: {'speed': 1}"),
        ({"masks": [1]}, TypeError, "`masks` must map"),
        ({"masks": {"v": [1, 0]}}, TypeError, "`mask` must be boolean"),
        ({"masks": {"(": [True]}}, ValueError, "must be a regular expression"),
        ({"maskable": 1}, TypeError, "`maskable` must map"),
        ({"maskable": {"v": "cells"}}, ValueError, "`maskable` must map"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        MaskedOptimizer(_O.SGD(0.1), **arguments)


def test_wrong_rules_change_nothing():
    v, w = tf.Variable(np.ones((2, 3), "f"), name="v"), tf.Variable(np.ones(3, "f"), name="a/w")
    waits = MaskedOptimizer(_O.Adam(0.1), masks={"u": True})
    with pytest.raises(ValueError, match="matches nothing"):
        waits.build([v, w])
    assert len(waits.variables) == 1  # the count of steps
    optimizer = MaskedOptimizer(_O.Adam(0.1), maskable={"v": "rows"})
    optimizer.build([v, w])
    with pytest.raises(ValueError, match="must have the shape"):
        optimizer.register_masks({"a/w": False, "v": np.ones((2, 2), bool)})
    with pytest.raises(ValueError, match="Pass maskable"):
        optimizer.freeze(["a/w", v], np.s_[..., 0])
    with pytest.raises(ValueError, match="must be one of those that the optimizer was built with"):
        optimizer.freeze(tf.Variable([1.0], name="x"))
    with pytest.raises(ValueError, match="must be one of those that the optimizer was built with"):
        optimizer.apply_gradients([(tf.ones(1), tf.Variable([1.0], name="x"))])
    with pytest.raises(ValueError, match="must have the shape of its variable"):
        optimizer.apply_gradients([(tf.ones((3, 2)), v)])
    with pytest.raises(RuntimeError, match=r"outside of `tf\.function`"):
        tf.function(lambda: optimizer.freeze(v))()
    assert optimizer.density == 1.0 and int(optimizer.iterations) == 0
    assert_same_bits(v.numpy(), np.ones((2, 3), "f"))
    with pytest.raises(ValueError, match="before `density` is known"):
        _ = MaskedOptimizer(_O.SGD(0.1)).density


def test_inner_optimizer_built_with_other_variables():
    v, w = tf.Variable([1.0], name="v"), tf.Variable([1.0], name="w")
    inner = _O.Adam(0.1)
    inner.build([v])
    with pytest.raises(ValueError, match=r"built without \['w'\]"):
        MaskedOptimizer(inner).build([v, w])
    optimizer = MaskedOptimizer(inner, masks={"v": False})
    optimizer.apply_gradients([(tf.ones(1), v)])
    assert v.numpy().tolist() == [1.0]


def test_layers():
    layer = tf_keras.layers.Dense(3)
    optimizer = MaskedOptimizer(_O.SGD(0.1))
    optimizer.freeze(layer)  # as a rule it may wait
    with pytest.raises(ValueError, match="A layer must have been built"):
        optimizer.build([tf.Variable([1.0], name="v")])
    norm = tf_keras.layers.BatchNormalization()
    model = tf_keras.Sequential([tf_keras.Input((6,)), norm, tf_keras.layers.Dense(3)])
    with pytest.warns(UserWarning, match="still moves .*moving_mean"):
        MaskedOptimizer(_O.SGD(0.1)).freeze(model)
    norm.trainable = False
    MaskedOptimizer(_O.SGD(0.1)).freeze(model)


def run_python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
    )


def test_only_freezeops_legacy_needs_tf_keras():
    script = (
        "import sys\n"
        "import freezeops\n"
        "assert 'tf_keras' not in sys.modules\n"
        "sys.modules['tf_keras'] = None\n"
        "try:\n"
        "    import freezeops.legacy\n"
        "except ImportError as error:\n"
        "    assert 'pip install tf_keras' in str(error)\n"
        "    print('refused')\n"
    )
    done = run_python("-c", script)
    assert done.stdout.strip().endswith("refused"), done.stderr[-2000:]


# Several replicas.


@pytest.mark.parametrize("case, backend", [("loop", "auto"), ("loop", "reference"), ("fit", "auto")])
def test_mirrored(case, backend, tmp_path):
    environment = os.environ | {"FREEZEOPS_BACKEND": backend}
    assert f"{case} passed" in run_script(Path(__file__), [case], environment, tmp_path / "log", seconds=900)


def copies(variable):
    return [copy.numpy() for copy in variable.values]


def check_copies(variable, before, mask):
    first, *others = copies(variable)
    for other in others:
        assert_same_bits(other, first, "replicas differ")
    assert_same_bits(first[~mask], before[~mask], "frozen entries moved")
    assert (first[mask] != before[mask]).all(), "trainable entries did not move"


def case_loop(strategy):
    """Gradients that differ by replica, NaN in frozen entries, masks that change on the way."""
    other = np.random.default_rng(5).random(MASK.shape) < 0.5
    ema = {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2}
    scaler = tf_keras.mixed_precision.LossScaleOptimizer
    inner = {
        "SGD momentum": lambda: SETUPS["SGD momentum"](weight_decay=0.1),
        "AdamW": lambda: SETUPS["AdamW"](**ema),
        "clipped": lambda: SETUPS["Adam"](global_clipnorm=0.5),
        "loss scale": lambda: scaler(SETUPS["SGD"](), initial_scale=2.0),
        "loss scale outside": SETUPS["SGD"],
        "summed before": SETUPS["SGD"],
    }
    for name, make in inner.items():
        before = np.random.default_rng(4).normal(size=MASK.shape).astype("float32")
        before[0] = -0.0
        with strategy.scope():
            v = tf.Variable(before, name="v", aggregation=tf.VariableAggregation.MEAN)
            masked = optimizer = MaskedOptimizer(make(), masks={"v": MASK})
            if name == "loss scale outside":
                optimizer = scaler(masked, initial_scale=2.0)
        known = name == "summed before"

        @tf.function
        def step(mask, v=v, optimizer=optimizer, known=known):
            def replica_step():
                index = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
                gradient = tf.where(mask, (1.0 + index) / 8, np.nan)
                if known:
                    gradient = tf.distribute.get_replica_context().all_reduce("SUM", gradient)
                optimizer.apply_gradients([(gradient, v)], skip_gradients_aggregation=known)

            strategy.run(replica_step)

        for _ in range(3):
            step(tf.constant(MASK))
        check_copies(v, before, MASK)
        traces = step.experimental_get_tracing_count()
        if name in ("loss scale", "loss scale outside", "summed before"):
            expected = before - 3 * np.float32(0.1) * np.float32(0.375)
            np.testing.assert_allclose(copies(v)[0][MASK], expected[MASK], atol=1e-6)
        middle = copies(v)[0]
        masked.register_mask(v, other)
        ones = strategy.run(lambda v=v, masked=masked: masked.mask_gradients([tf.ones(v.shape)], [v])[0])
        for one in strategy.experimental_local_results(ones):
            np.testing.assert_array_equal(one.numpy() != 0, other)
        for _ in range(3):
            step(tf.constant(other))
        check_copies(v, middle, other)
        masked.finalize_variable_values([v])
        check_copies(v, middle, other)
        assert int(masked.iterations.numpy()) == 6, name
        assert step.experimental_get_tracing_count() == traces
        if "loss scale" in name:
            scale = optimizer if "outside" in name else optimizer.inner_optimizer
            assert float(scale.loss_scale) == 2.0


def case_fit(strategy):
    # Not Nadam: with three variables tf_keras's own copies of one come apart, masked or not.
    for policy, setup in (("float32", "AdamW"), ("mixed_float16", "SGD momentum")):
        tf_keras.mixed_precision.set_global_policy(policy)
        with strategy.scope():
            model = make_model(dtype="float32")
            optimizer = MaskedOptimizer(SETUPS[setup](weight_decay=0.1), masks={"body/kernel": MASK})
            optimizer.freeze("head/bias", permanent=True)
            model.compile(optimizer, "mse")
        before = copies(kernel_of(model))[0]
        fit(model, epochs=2)
        check_copies(kernel_of(model), before, MASK)
        assert int(optimizer.iterations.numpy()) == 8


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    globals()[f"case_{sys.argv[1]}"](tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    print(f"{sys.argv[1]} passed")
