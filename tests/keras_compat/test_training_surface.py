"""The rest of Keras's training surface: sparse updates, accumulation, averages that are swapped, set-ups of models."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits, in_mode
from training import body_and_head, odd_values

import freezeops as fz

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 3)).astype("float32")
MASK = np.random.default_rng(2).random((6, 12)) < 0.5


def with_odd_values(shape, frozen, dtype="float32", finite=False):
    """Normal values, and -0.0, subnormals (NaN payloads, infinities) where frozen."""
    odd = odd_values(dtype, finite)
    values = np.random.default_rng(3).normal(size=shape).astype(odd.dtype)
    places = np.flatnonzero(frozen)
    values.reshape(-1)[places] = np.resize(odd, places.size)
    return values


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("masked", ["rows", "elements"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"global_clipnorm": 1.0}, {"clipnorm": 1.0}], ids=str)
def test_sparse_update_of_plain_sgd(masked, mode, dtype, backend, options):
    """Only the rows that the gradient names are remembered; repeated ones included."""
    rng = np.random.default_rng(1)
    mask = rng.random((60, 1)) < 0.5 if masked == "rows" else rng.random((60, 5)) < 0.5
    full = np.broadcast_to(mask, (60, 5))
    table = keras.Variable(with_odd_values((60, 5), ~full, dtype), dtype=dtype, name="table")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.5, **options), masks={"table": mask})
    optimizer.build([table])
    before = table.numpy()

    def step(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([60, 5], tf.int64))
        optimizer.apply([slices], [table])

    step = in_mode(step, mode)
    touched = np.zeros(60, bool)
    for _ in range(3):
        indices = rng.integers(0, 40, 12)
        indices[1] = indices[0]
        touched[indices] = True
        step(tf.constant(rng.normal(size=(12, 5)), dtype), tf.constant(indices))
    after = table.numpy()
    assert_same_bits(after[~full], before[~full])
    assert_same_bits(after[~touched], before[~touched])
    moved = full & touched[:, None]
    assert (after[moved] != before[moved]).mean() > 0.9


def test_sparse_remembers_no_more_than_the_rows(monkeypatch):
    from freezeops import ops

    def refuse(*args):
        raise AssertionError("the whole table was remembered")

    monkeypatch.setattr(ops, "remember_frozen", refuse)
    table = keras.Variable(np.ones((50, 4), "float32"), name="table")
    slices = tf.IndexedSlices(tf.ones((2, 4)), tf.constant([3, 9]), tf.constant([50, 4], tf.int64))
    fz.MaskedOptimizer(keras.optimizers.SGD(0.5, clipnorm=1.0), masks={"table": False}).apply([slices], [table])
    for inner in (
        keras.optimizers.SGD(0.5, momentum=0.9),
        keras.optimizers.SGD(0.5, weight_decay=0.1),
        keras.optimizers.SGD(0.5, use_ema=True),
        keras.optimizers.SGD(0.5, global_clipnorm=1.0),
        keras.optimizers.Adam(),
        type("Own", (keras.optimizers.SGD,), {})(0.5),
    ):
        with pytest.raises(AssertionError, match="whole table"):
            fz.MaskedOptimizer(inner, masks={"table": False}, fused=False).apply([slices], [table])


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_sparse_norms_count_trainable_entries(clip):
    table = keras.Variable(np.zeros((5, 1), "float32"), name="table")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0, **{clip: 1.0}))
    optimizer.freeze(table, [0])
    values = tf.constant([[np.inf], [3.0], [4.0]])
    optimizer.apply([tf.IndexedSlices(values, tf.constant([0, 1, 2]), tf.constant([5, 1], tf.int64))], [table])
    assert np.allclose(table.numpy()[:, 0], [0, -0.6, -0.8, 0, 0], atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
def test_mask_that_changes_between_accumulation_steps(mode):
    """What was accumulated before the freeze is neither applied nor counted in a norm."""
    variable = keras.Variable(np.zeros(3, "float32"), name="v")
    inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2, global_clipnorm=1.0)
    optimizer = fz.MaskedOptimizer(inner)
    optimizer.build([variable])
    step = in_mode(lambda g: optimizer.apply([g]), mode)
    step(tf.constant([1e6, 3.0, 4.0]))
    optimizer.freeze(variable, [0])
    step(tf.constant([1e6, 3.0, 4.0]))
    assert np.allclose(variable.numpy(), [0, -0.6, -0.8], atol=1e-6)
    step(tf.constant([1e6, 0.0, 0.0]))
    optimizer.unfreeze(variable, [0])
    step(tf.constant([0.5, 0.0, 0.0]))
    assert np.allclose(variable.numpy(), [-0.25, -0.6, -0.8], atol=1e-6)


@pytest.mark.parametrize("swap_on_epoch", [True, False])
def test_swap_ema_weights(swap_on_epoch):
    model = body_and_head()
    kernel = model.get_layer("body").kernel
    odd = with_odd_values(MASK.shape, ~MASK, finite=True)
    kernel.assign(odd)
    frozen = odd[~MASK]
    odd_head = np.array([np.nan, -np.inf, 3e38], "float32")
    bias = keras.Variable(odd_head, name="extra")
    model.extra = bias
    inner = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.8)
    optimizer = fz.MaskedOptimizer(inner, masks={"body/kernel": MASK})
    model.compile(optimizer, "mse", jit_compile=False)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            seen.append(kernel.numpy())

        def on_epoch_end(self, epoch, logs=None):
            seen.append(kernel.numpy())

    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch), Look()]
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0, callbacks=callbacks, validation_data=(X, Y))
    assert len(seen) > 3
    for values in seen:
        assert_same_bits(values[~MASK], frozen)
    assert_same_bits(kernel.numpy()[~MASK], frozen)
    assert (kernel.numpy()[MASK] != odd[MASK]).all()


def test_swap_of_values_that_adding_cannot_swap():
    values = np.array([np.nan, -np.inf, 3.4e38, -0.0, 1e-45, 1.0], "float32")
    layer = keras.layers.Dense(6, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), layer])
    variable = layer.kernel
    values = values[None]
    variable.assign(values)
    inner = keras.optimizers.SGD(0.5, use_ema=True)
    optimizer = fz.MaskedOptimizer(inner)
    optimizer.freeze(variable, np.s_[:, :5])
    optimizer.apply([tf.ones((1, 6))], [variable])
    callback = keras.callbacks.SwapEMAWeights()
    model.optimizer = optimizer
    callback.set_model(model)
    for _ in range(2):
        callback._swap_variables()
        assert_same_bits(variable.numpy()[:, :5], values[:, :5])
        assert_same_bits(inner._model_variables_moving_average[0].numpy()[:, :5], values[:, :5])


AROUND = {
    "alone": lambda inner, wrap: wrap(inner),
    "scaler inside": lambda inner, wrap: wrap(keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)),
    "scaler outside": lambda inner, wrap: keras.optimizers.LossScaleOptimizer(wrap(inner), initial_scale=4.0),
    "several inside": lambda inner, wrap: wrap(_several(inner)),
    "several outside": lambda inner, wrap: _several(wrap(inner)),
}


def _several(optimizer):
    parts = keras.optimizers.OptimizerMap(default_optimizer=keras.optimizers.SGD(0.1))
    parts[".*kernel"] = optimizer
    return keras.optimizers.MultiOptimizer(parts)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    "state, mask", [("full", True), ("full", MASK), ("compact", MASK)], ids=["trainable", "full", "compact"]
)
def test_swap_ema_weights_under_wrappers(around, state, mask):
    """Evaluates with the averages, as with the bare optimizer."""
    if around.startswith("several") and not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("new in Keras 3.15")
    results, kernels = [], []
    for wrap in (
        lambda inner: inner,
        lambda inner: fz.MaskedOptimizer(inner, masks={"body/kernel": mask}, state=state),
    ):
        keras.utils.set_random_seed(1)
        model = body_and_head()
        kernel = model.get_layer("body").kernel
        odd = kernel.numpy()
        odd[0, 0], odd[1, 1] = -0.0, 1e-42
        kernel.assign(odd)
        inner = keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.8)
        model.compile(AROUND[around](inner, wrap), "mse", jit_compile=False)
        seen = []
        look = keras.callbacks.Callback()
        look.on_test_batch_begin = lambda batch, logs=None: seen.append(kernel.numpy())  # noqa: B023
        callbacks = [keras.callbacks.SwapEMAWeights(), look]
        history = model.fit(X, Y, epochs=2, verbose=0, shuffle=False, callbacks=callbacks, validation_data=(X, Y))
        results.append(history.history["val_loss"])
        kernels.append((odd, [*seen, kernel.numpy()]))
    if mask is True:
        assert results[1] == results[0]
        return
    odd, seen = kernels[1]
    for values in seen:
        assert_same_bits(values[~MASK], odd[~MASK])
        assert (values[MASK] != odd[MASK]).all()


def test_swap_without_averages_is_refused():
    model = body_and_head()
    model.compile(fz.MaskedOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())), "mse")
    with pytest.raises(ValueError, match="`use_ema=True`"):
        model.fit(X, Y, verbose=0, validation_data=(X, Y), callbacks=[keras.callbacks.SwapEMAWeights()])


def test_swap_without_freezeops_is_as_before():
    model = body_and_head()
    model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse", jit_compile=False)
    model.fit(X, Y, verbose=0, callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_steps_per_execution(jit_compile):
    model = body_and_head()
    kernel = model.get_layer("body").kernel
    before = kernel.numpy()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01), masks={"body/kernel": MASK})
    model.compile(optimizer, "mse", jit_compile=jit_compile, steps_per_execution=3)
    model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    assert_same_bits(kernel.numpy()[~MASK], before[~MASK])
    assert (kernel.numpy()[MASK] != before[MASK]).all()
    assert int(optimizer.iterations) == 8


def functional_model():
    inputs = keras.Input((6,))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(keras.layers.Dense(12, name="body")(inputs)))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.body, self.head = keras.layers.Dense(12, name="body"), keras.layers.Dense(3, name="head")

    def call(self, x):
        return self.head(self.body(x))


class OwnTrainStep(Subclassed):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - y) ** 2)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


MODELS = [pytest.param(body_and_head, id="dense_model"), functional_model, Subclassed, OwnTrainStep]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("head_trainable", [True, False])
def test_kinds_of_models(make, head_trainable):
    model = make()
    model.build((None, 6))
    model(X[:1])
    kernel = model.get_layer("body").kernel
    model.get_layer("head").trainable = head_trainable
    before = [kernel.numpy(), model.get_layer("head").kernel.numpy()]
    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(0.01), masks={"body/kernel": MASK})
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(X, Y, batch_size=16, verbose=0)
    assert_same_bits(kernel.numpy()[~MASK], before[0][~MASK])
    assert (kernel.numpy()[MASK] != before[0][MASK]).all()
    assert (model.get_layer("head").kernel.numpy() != before[1]).any() == head_trainable


def test_variables_that_gradients_overwrite():
    """Float8 training puts new scales where gradients go."""
    scale = keras.Variable(np.array([1.0, 2.0], "float32"), name="scale")
    scale.overwrite_with_gradient = True
    weight = keras.Variable(np.ones(2, "float32"), name="weight")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    optimizer.freeze(scale, [0])
    for _ in range(2):
        optimizer.apply([tf.constant([7.0, 8.0]), tf.ones(2)], [scale, weight])
    assert scale.numpy().tolist() == [1.0, 8.0]
