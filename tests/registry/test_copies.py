"""Copies keep what was said: configs, clones, scikit-learn, tuners."""

import copy
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits

import freezeops as fz
from freezeops.registry import rules_config

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 2)).astype("float32")
MASK = np.random.default_rng(2).random((8, 6)) < 0.5
STATES = ("full", "compact")


def make(rules=lambda optimizer: None, units=6, **options):
    layers = [keras.Input((8,)), keras.layers.Dense(units, name="a"), keras.layers.Dense(2, name="b")]
    model = keras.Sequential(layers)
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01), **options)
    rules(optimizer)
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def train(model):
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)


def assert_frozen(model, trainable=MASK):
    """Trains; exactly the entries of the first kernel that are to be trainable move."""
    kernel = model.layers[0].kernel
    before = kernel.numpy()
    train(model)
    assert_same_bits(kernel.numpy()[~trainable], before[~trainable])
    assert (kernel.numpy()[trainable] != before[trainable]).all()
    np.testing.assert_array_equal(model.optimizer.mask_for(kernel).to_numpy(), trainable)


RULES = {
    "mask": lambda o: o.register_mask("a/kernel", MASK),
    "fz.Mask": lambda o: o.register_mask("a/kernel", fz.Mask.rows((8, 6), [1, 2])),
    "broadcast": lambda o: o.register_mask("a/kernel", np.arange(8)[:, None] > 2),
    "slice": lambda o: o.freeze("a/kernel", np.s_[:, :3]),
    "index": lambda o: o.freeze("a/kernel", np.s_[..., 2, None][:2]),
    "coordinates": lambda o: o.freeze("a/kernel", np.nonzero(~MASK)),
    "integers": lambda o: o.train_only("a/kernel", [1, -1]),
    "scalar": lambda o: o.freeze("a/kernel", 3),
    "booleans": lambda o: o.freeze("a/kernel", ~MASK),
    "pattern": lambda o: o.freeze(r".*/kernel"),
    "several": lambda o: (o.freeze("a/.*"), o.unfreeze("a/kernel", [0]), o.freeze(["b/bias", "a/bias"])),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_come_back_from_a_config(name):
    model = make(RULES[name])
    config = model.optimizer.get_config()
    again = fz.MaskedOptimizer.from_config(config)
    assert again.get_config() == config
    model.optimizer.build(model.trainable_variables)
    assert model.optimizer.density < 1
    twin = make()
    twin.compile(again, "mse", jit_compile=False)
    again.build(twin.trainable_variables)
    for own, other in zip(model.trainable_variables, twin.trainable_variables, strict=True):
        assert again.mask_for(other) == model.optimizer.mask_for(own)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("after_fit", [False, True])
def test_clone_model(after_fit, state):
    model = make(lambda o: o.freeze("a/kernel", ~MASK), state=state)
    if after_fit:
        train(model)
        model.optimizer.freeze("b/kernel", [0])
    clone = keras.models.clone_model(model)
    assert_frozen(clone)
    assert clone.optimizer.describe()[0].mode == state
    if after_fit:
        assert clone.optimizer.mask_for(clone.layers[1].kernel) == ~fz.Mask.rows((6, 2), [0])
    twice = keras.models.clone_model(clone)
    assert_frozen(twice)


def test_clone_with_names_that_keras_counted_up():
    def build():
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)])
        return model

    model = build()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01))
    optimizer.freeze("dense/kernel", ~MASK)
    model.compile(optimizer, "mse", jit_compile=False)
    train(model)
    other = build()
    assert other.layers[0].path != model.layers[0].path
    other.compile(fz.MaskedOptimizer.from_config(optimizer.get_config()), "mse", jit_compile=False)
    assert_frozen(other)


@pytest.mark.parametrize("state", STATES)
def test_serialize_and_deepcopy(state):
    model = make(lambda o: o.freeze("a/kernel", ~MASK), state=state)
    for copied in (
        keras.optimizers.deserialize(keras.optimizers.serialize(model.optimizer)),
        copy.deepcopy(model.optimizer),
    ):
        other = make()
        other.compile(copied, "mse", jit_compile=False)
        assert_frozen(other)
    assert_frozen(copy.deepcopy(model))


def test_scikit_learn():
    from keras.wrappers import SKLearnRegressor
    from sklearn.base import clone

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(1, name="b")])
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01))
    optimizer.freeze("a/kernel", ~MASK)
    model.compile(optimizer, "mse", jit_compile=False)
    regressor = clone(SKLearnRegressor(model, fit_kwargs={"verbose": 0, "epochs": 2})).fit(X, Y[:, 0])
    kernel = regressor.model_.layers[0].kernel
    assert regressor.model_.optimizer.mask_for(kernel) == fz.Mask.from_array(MASK)


@pytest.mark.parametrize("after_fit", [False, True])
def test_multi_optimizer_outside(tmp_path, after_fit):
    def make_multi():
        layers = [keras.Input((8,)), keras.layers.Dense(6, name="a"), keras.layers.Dense(2, name="b")]
        inputs = keras.Input((8,))
        model = keras.Model(inputs, layers[2](layers[1](inputs)))
        sgd, adam = fz.MaskedOptimizer(keras.optimizers.SGD(0.1)), fz.MaskedOptimizer(keras.optimizers.Adam(0.01))
        sgd.freeze("a/kernel", ~MASK)
        adam.freeze("b/kernel", [0])
        maps = keras.optimizers.OptimizerMap(sgd, {"b/.*": adam})
        model.compile(keras.optimizers.MultiOptimizer(maps), "mse", jit_compile=False)
        return model

    model = make_multi()
    if after_fit:
        train(model)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / "c"))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    weights = make_multi()
    weights.load_weights(tmp_path / "m.weights.h5")
    restored = make_multi()
    tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(path)
    for each in (loaded, weights, restored, keras.models.clone_model(model)):
        kernels = [each.get_layer("a").kernel, each.get_layer("b").kernel]
        before = [kernel.numpy() for kernel in kernels]
        train(each)
        assert_same_bits(kernels[0].numpy()[~MASK], before[0][~MASK])
        assert_same_bits(kernels[1].numpy()[0], before[1][0])
        assert (kernels[1].numpy()[1:] != before[1][1:]).all()


# What cannot be copied.


@pytest.mark.parametrize("target", ["variable", "layer"])
def test_objects_cannot_be_copied(tmp_path, target):
    model = make()
    layer = model.layers[0]
    model.optimizer.freeze(layer.kernel if target == "variable" else layer)
    for copy_it in (
        model.optimizer.get_config,
        lambda: keras.models.clone_model(model),
        lambda: model.save(tmp_path / "m.keras"),
    ):
        with pytest.raises(ValueError, match=r"must name its variables by path.*freeze\('"):
            copy_it()
    model.optimizer.build(model.trainable_variables)
    clone = keras.models.clone_model(model)  # by path, now
    assert clone.optimizer.mask_for(clone.layers[0].kernel).count() == 0


def test_another_width_is_an_error_at_build():
    """A tuner's other width."""
    model = make(lambda o: o.freeze("a/kernel", ~MASK))
    train(model)
    for config in (model.optimizer.get_config(), make(lambda o: o.freeze("a/kernel", ~MASK)).optimizer.get_config()):
        wide = make(units=7)
        wide.compile(fz.MaskedOptimizer.from_config(config), "mse", jit_compile=False)
        before = wide.layers[0].kernel.numpy()
        with pytest.raises(ValueError, match=r"\(8, 6\).*\(8, 7\)"):
            train(wide)
        assert_same_bits(wide.layers[0].kernel.numpy(), before)


# Large masks.


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("built", [False, True])
def test_masks_above_the_limit_are_left_out(tmp_path, monkeypatch, built, state):
    """Saving always works; a clone refuses to train until somebody states what was left out."""
    monkeypatch.setattr(rules_config, "LIMIT", 10)
    model = make(lambda o: (o.freeze("a/kernel", ~MASK), o.freeze("b/bias")), state=state)
    if built:
        train(model)
    config = model.optimizer.get_config()
    assert "left_out" in str(config["rules"])
    clone = keras.models.clone_model(model)
    before = clone.layers[0].kernel.numpy()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must be given the masks.*no mask yet for '.*a/kernel'"):
            train(clone)
    assert_same_bits(clone.layers[0].kernel.numpy(), before)
    clone.optimizer.register_mask("a/kernel", MASK)
    assert_frozen(clone)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    if not built and state == "full":
        assert_frozen(loaded)
    if built:
        assert_frozen(loaded)
    again = keras.models.clone_model(model)
    fz.save_masks(loaded.optimizer, tmp_path / "masks")
    fz.load_masks(again.optimizer, tmp_path / "masks")
    assert_frozen(again)


def test_small_masks_stay_where_a_large_one_is_left_out(monkeypatch):
    monkeypatch.setattr(rules_config, "LIMIT", 60)
    variables = [tf.Variable(tf.ones([n]), name=name) for n, name in ((100_000, "large"), (8, "small"))]
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build(variables)
    optimizer.register_mask("large", np.random.default_rng(0).random(100_000) < 0.5)
    optimizer.register_mask("small", np.arange(8) > 3)
    (load,) = optimizer.get_config()["rules"]
    assert load["masks"]["large"].get("left_out") and "bits" in load["masks"]["small"]
    again = fz.MaskedOptimizer.from_config(optimizer.get_config())
    again.build(variables)
    with pytest.raises(ValueError, match="no mask yet for 'large'"):
        again.apply([tf.ones(v.shape) for v in variables], variables)
    again.freeze("large", [0])  # of a mask that is not known
    with pytest.raises(ValueError, match="no mask yet for 'large'"):
        again.apply([tf.ones(v.shape) for v in variables], variables)
    with pytest.raises(ValueError, match="no mask yet for 'large'"):
        again.masks_by_path()
    again.register_mask("large", np.arange(100_000) > 5)
    again.apply([tf.ones(v.shape) for v in variables], variables)


def test_a_config_takes_at_most_1_mb():
    size = 20_000_000
    variable = tf.Variable(tf.zeros([size]), name="v")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([variable])
    optimizer.freeze("v", np.s_[: size // 2])  # compresses well
    assert "left_out" not in str(optimizer.get_config()["rules"])
    optimizer.register_mask("v", np.random.default_rng(0).random(size) < 0.5)
    text = str(optimizer.get_config())
    assert "left_out" in text and len(text) < 10_000


def test_the_store_wins_over_the_config_without_a_warning(tmp_path):
    model = make(lambda o: o.freeze("a/kernel", ~MASK))
    train(model)
    model.save(tmp_path / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_frozen(loaded)
