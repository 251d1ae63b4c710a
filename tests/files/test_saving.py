"""Save, load and go on as if nothing had happened."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import SETUPS, assert_same_bits

import freezeops as fz

X = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 2)).astype("float32")
MASK = np.random.default_rng(2).random((5, 8)) < 0.5


def functional():
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(8, activation="tanh", name="body")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))


def sequential():
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.build((None, 5))
    return model


def kernel(model):
    return next(v for v in model.trainable_variables if tuple(v.shape) == (5, 8))


def half_trained(make, inner, jit_compile=False):
    model = make()
    optimizer = fz.MaskedOptimizer(inner)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    train(model)
    optimizer.register_mask(kernel(model), MASK)
    optimizer.freeze(".*[^l]$")  # the biases, by a pattern
    train(model)
    return model


def train(model):
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)


def assert_same_state(actual, expected):
    for a, b in zip(actual.trainable_variables, expected.trainable_variables, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.path)
    for a, b in zip(actual.optimizer.variables, expected.optimizer.variables, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.path)


def assert_goes_on(resumed, model):
    assert_same_state(resumed, model)
    assert resumed.optimizer.mask_for(kernel(resumed)) == fz.Mask.from_array(MASK)
    before = kernel(model).numpy()
    train(model)
    train(resumed)
    assert_same_state(resumed, model)
    assert_same_bits(kernel(resumed).numpy()[~MASK], before[~MASK])
    assert (kernel(resumed).numpy()[MASK] != before[MASK]).all()


@pytest.mark.parametrize("make", [functional, sequential])
@pytest.mark.parametrize("setup", ["SGD momentum", "Adam amsgrad", "AdamW", "Ftrl"])
def test_keras_file(tmp_path, setup, make):
    model = half_trained(make, SETUPS[setup](use_ema=setup == "AdamW"))
    model.save(tmp_path / "model.keras")
    assert_goes_on(keras.models.load_model(tmp_path / "model.keras"), model)


def test_keras_file_with_row_masks_and_a_permanent_one(tmp_path):
    model = functional()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    optimizer.freeze("body/kernel", [0, 2])
    optimizer.freeze("head/kernel", permanent=True)
    model.compile(optimizer, "mse")
    train(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_state(loaded, model)
    head = model.get_layer("head").kernel.numpy()
    train(loaded)
    assert_same_bits(loaded.get_layer("head").kernel.numpy(), head)
    assert loaded.optimizer.mask_for(kernel(loaded)).nbytes == 1


def test_inner_state_is_stored_once(tmp_path):
    import h5py

    model = half_trained(functional, keras.optimizers.Adam())
    model.save_weights(tmp_path / "w.weights.h5")
    with h5py.File(tmp_path / "w.weights.h5") as file:
        own = sorted(file["optimizer/vars"])
        inner = sorted(file["optimizer/inner_optimizer/vars"])
    names = ["body%2Fkernel", "body%2Fbias", "head%2Fkernel", "head%2Fbias"]
    assert own == ["index", *(f"record {i:06d} {name}" for i, name in enumerate(names))]
    assert len(inner) == len(model.optimizer.inner_optimizer.variables)


def test_weights_file(tmp_path):
    """Also into a model whose layers Keras counted up: `dense_2` for `dense`."""
    model = half_trained(sequential, keras.optimizers.Adam(0.1))
    model.save_weights(tmp_path / "w.weights.h5")
    other = sequential()
    assert other.trainable_variables[0].path != model.trainable_variables[0].path
    other.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "w.weights.h5")
    assert_goes_on(other, model)


def test_file_of_another_model_is_refused(tmp_path):
    model = half_trained(functional, keras.optimizers.Adam())
    model.save_weights(tmp_path / "w.weights.h5")
    other = functional()
    other.compile(fz.MaskedOptimizer(keras.optimizers.Adam(), maskable={"body/kernel": "rows"}), "mse")
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match=r"for 'body/kernel', which has layout \(1, 5, 8\). Pass\s+maskable="):
        other.load_weights(tmp_path / "w.weights.h5")
    assert other.optimizer.density == 1.0


@pytest.mark.parametrize("restore", ["before the optimizer is built", "after"])
def test_checkpoint(tmp_path, restore):
    model = half_trained(sequential, keras.optimizers.AdamW(0.1))
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    other = sequential()
    other.compile(fz.MaskedOptimizer(keras.optimizers.AdamW(0.1)), "mse", jit_compile=False)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    if restore == "after":
        other.optimizer.build(other.trainable_variables)
    status = checkpoint.restore(path)
    other.optimizer.build(other.trainable_variables)
    status.assert_existing_objects_matched()
    assert_goes_on(other, model)


def test_config_round_trip():
    model = half_trained(functional, keras.optimizers.AdamW(0.1, weight_decay=0.2))
    optimizer = model.optimizer
    config = optimizer.get_config()
    twin = fz.MaskedOptimizer.from_config(config)
    assert twin.get_config() == config
    assert twin.inner_optimizer.get_config() == optimizer.inner_optimizer.get_config()
    assert config["partitions"]["body/kernel"] == {"way": "full", "layout": [1, 40, 1]}
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(again, fz.MaskedOptimizer) and again.get_config() == config


def test_set_weights():
    """Takes the inner optimizer's variables, and leaves masks as they are."""
    model = half_trained(functional, keras.optimizers.Adam(0.1))
    weights = [v.numpy() for v in model.optimizer.variables]
    other = functional()
    other.set_weights(model.get_weights())
    other.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    other.optimizer.build(other.trainable_variables)
    other.optimizer.register_masks(
        {path: mask for path, mask in model.optimizer.masks_by_path().items() if mask.density < 1}
    )
    other.optimizer.set_weights(weights)
    assert_goes_on(other, model)
    before = [v.numpy() for v in other.optimizer.variables]
    with pytest.raises(ValueError, match=r"one array per variable of the inner optimizer, 10; masks are not"):
        other.optimizer.set_weights(weights[1:])
    with pytest.raises(ValueError, match=r"save_masks.*Received: 18 arrays"):  # as long as before masks were apart
        other.optimizer.set_weights([*[np.zeros(5, np.uint8)] * 8, *weights])
    with pytest.raises(ValueError, match=r"must have the shapes"):
        other.optimizer.set_weights([*weights[:-1], np.zeros((3, 3))])
    for variable, value in zip(other.optimizer.variables, before, strict=True):
        assert_same_bits(variable.numpy(), value)


def test_set_weights_before_build():
    with pytest.raises(ValueError, match="must be built first"):
        fz.MaskedOptimizer(keras.optimizers.Adam()).set_weights([])


@pytest.mark.parametrize("scaled", [False, True])
def test_weights_into_an_optimizer_that_is_not_built(tmp_path, scaled):
    """Masks and slots wait until it is."""

    def inner():
        adam = keras.optimizers.Adam(0.1)
        return keras.optimizers.LossScaleOptimizer(adam) if scaled else adam

    model = half_trained(functional, inner())
    model.save_weights(tmp_path / "w.weights.h5")
    other = functional()
    other.compile(fz.MaskedOptimizer(inner()), "mse", jit_compile=False)
    other.load_weights(tmp_path / "w.weights.h5")
    before = kernel(other).numpy()
    train(model)
    train(other)
    assert_same_state(other, model)
    assert other.optimizer.mask_for(kernel(other)) == fz.Mask.from_array(MASK)
    assert_same_bits(kernel(other).numpy()[~MASK], before[~MASK])


@pytest.mark.parametrize("built", [False, True])
def test_slots_that_do_not_fit_are_refused(tmp_path, built):
    """Keras warns and goes on without them. Here it is an error, at loading, and the optimizer goes on."""
    model = half_trained(functional, keras.optimizers.SGD(0.1, momentum=0.9))
    model.save_weights(tmp_path / "w.weights.h5")
    other = functional()
    other.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    if built:
        other.optimizer.build(other.trainable_variables)
    other.optimizer.freeze("body/kernel", [1])
    message = r"6 arrays for 'adam\w*', which has 10 variables.*skip_mismatch=True"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="replaces masks.*'body/kernel'"):
        other.load_weights(tmp_path / "w.weights.h5")
    if built:
        frozen = np.arange(5)[:, None] == [1] * 8
        assert other.optimizer.mask_for(kernel(other)) == ~fz.Mask.from_array(frozen)
    with pytest.warns(UserWarning, match="could not be loaded"):
        other.load_weights(tmp_path / "w.weights.h5", skip_mismatch=True)
    assert other.optimizer.mask_for(kernel(other)) == fz.Mask.from_array(MASK)
    before = kernel(other).numpy()
    train(other)
    assert_same_bits(kernel(other).numpy()[~MASK], before[~MASK])


def test_trained_state_of_fewer_slots_is_refused(tmp_path):
    """Plain SGD has as many variables as any optimizer that is not built."""
    model = half_trained(functional, keras.optimizers.SGD(0.1))
    model.save_weights(tmp_path / "w.weights.h5")
    other = functional()
    other.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match=r"2 arrays for 'adam\w*', which has 10 variables"):
        other.load_weights(tmp_path / "w.weights.h5")


def test_loaded_and_saved_again_without_being_built(tmp_path):
    model = half_trained(functional, keras.optimizers.Adam(0.1))
    model.save_weights(tmp_path / "a.weights.h5")
    between = functional()
    between.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    between.load_weights(tmp_path / "a.weights.h5")
    between.save_weights(tmp_path / "b.weights.h5")
    other = functional()
    other.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1)), "mse", jit_compile=False)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "b.weights.h5")
    assert_goes_on(other, model)


def test_outer_scaler_that_is_not_built(tmp_path):
    def make():
        model = functional()
        masked = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
        model.compile(keras.optimizers.LossScaleOptimizer(masked, initial_scale=64.0), "mse", jit_compile=False)
        return model

    model = make()
    train(model)
    model.optimizer.dynamic_scale.assign(16.0)
    model.save_weights(tmp_path / "w.weights.h5")
    other = make()
    other.load_weights(tmp_path / "w.weights.h5")
    train(model)
    train(other)
    assert float(other.optimizer.dynamic_scale) == 16.0
    assert_same_state(other, model)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_multi_optimizer_is_stored_once(tmp_path):
    import h5py

    def make():
        maps = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9))
        maps["body/.*"] = keras.optimizers.Adam(0.1)
        model = functional()
        model.compile(fz.MaskedOptimizer(keras.optimizers.MultiOptimizer(maps)), "mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    model = make()
    model.optimizer.register_mask(kernel(model), MASK)
    train(model)
    model.save_weights(tmp_path / "w.weights.h5")
    found = []
    with h5py.File(tmp_path / "w.weights.h5") as file:
        file.visititems(lambda name, item: found.append(name) if getattr(item, "shape", None) == (5, 8) else None)
    assert sum(name.startswith("optimizer") for name in found) == 2, found
    other = make()
    other.load_weights(tmp_path / "w.weights.h5")
    assert_same_state(other, model)


def test_sequential_with_a_whole_path_to_set_aside(tmp_path):
    """`Sequential` loses its name when it is loaded; what was set aside is in the file."""
    model = sequential()
    path = kernel(model).path
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(), maskable={path: "rows"}), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.freeze(kernel(model), [1])
    train(model)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    train(loaded)
    assert loaded.optimizer.mask_for(kernel(loaded)).nbytes == 1
    assert loaded.optimizer.density < 1


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_loss_scaling_is_stored_once(tmp_path, where):
    import h5py

    scaler = keras.optimizers.LossScaleOptimizer
    model = functional()
    adam = keras.optimizers.Adam(0.1)
    optimizer = fz.MaskedOptimizer(scaler(adam)) if where == "inside" else scaler(fz.MaskedOptimizer(adam))
    model.compile(optimizer, "mse", jit_compile=False)
    train(model)
    masked = optimizer if where == "inside" else optimizer.inner_optimizer
    masked.register_mask(kernel(model), MASK)
    train(model)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "w.weights.h5")
    slots = 0
    with h5py.File(tmp_path / "w.weights.h5") as file:

        def count(name, item):
            nonlocal slots
            slots += name.startswith("optimizer/") and getattr(item, "shape", None) == (5, 8)

        file.visititems(count)
    assert slots == 2
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same_state(loaded, model)
    before = kernel(model).numpy()
    train(model)
    train(loaded)
    assert_same_state(loaded, model)
    assert_same_bits(kernel(loaded).numpy()[~MASK], before[~MASK])


def test_rules_that_wait_are_saved(tmp_path):
    model = functional()
    model.compile(fz.MaskedOptimizer(keras.optimizers.SGD(), masks={"body/kernel": False}), "mse")
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    assert keras.models.load_model(tmp_path / "m.keras").optimizer.density < 1
    other = functional()
    other.compile(fz.MaskedOptimizer(keras.optimizers.SGD()), "mse")
    other.load_weights(tmp_path / "m.weights.h5")
    assert other.optimizer.mask_for(kernel(other)).count() == 0
    model.optimizer.freeze(model.get_layer("head").bias)
    for path, save in (("n.keras", model.save), ("n.weights.h5", model.save_weights)):
        with pytest.raises(ValueError, match=r"must name its variables by path.*freeze\('head/bias'"):
            save(tmp_path / path)


def test_saved_before_it_was_built(tmp_path):
    model = functional()
    model.compile(fz.MaskedOptimizer(keras.optimizers.SGD()), "mse")
    model.save(tmp_path / "m.keras")
    assert keras.models.load_model(tmp_path / "m.keras").optimizer.density == 1.0


def test_deepcopy():
    import copy

    model = half_trained(functional, keras.optimizers.SGD(0.1))
    twin = copy.deepcopy(model.optimizer)
    twin.build(model.trainable_variables)
    assert twin.mask_for(kernel(model)) == fz.Mask.from_array(MASK)


# Compact state.


def compact_model(inner=None, **options):
    model = functional()
    inner = inner or keras.optimizers.AdamW(0.1)
    masks = {"body/kernel": MASK, "head/kernel": np.arange(8)[:, None] < 5}
    model.compile(fz.MaskedOptimizer(inner, masks=masks, state="compact", **options), "mse", jit_compile=False)
    return model


def assert_compact_goes_on(resumed, model):
    assert [report.mode for report in resumed.optimizer.describe()] == ["compact", "full", "compact", "full"]
    before = kernel(model).numpy()
    mask = model.optimizer.mask_for(kernel(model))
    assert resumed.optimizer.mask_for(kernel(resumed)) == mask
    for _ in range(2):
        assert_same_state(resumed, model)
        train(model)
        train(resumed)
        resumed.optimizer.freeze(kernel(resumed), [1])
        model.optimizer.freeze(kernel(model), [1])
    assert_same_state(resumed, model)
    frozen = ~mask.to_numpy()
    assert_same_bits(kernel(resumed).numpy()[frozen], before[frozen])


@pytest.mark.parametrize("setup", ["SGD momentum", "Adam amsgrad", "AdamW", "Ftrl", "Nadam", "ScheduleFreeAdamW"])
def test_compact_keras_file(tmp_path, setup):
    if setup not in SETUPS:
        pytest.skip("this Keras has no such optimizer")
    model = compact_model(SETUPS[setup](use_ema=setup == "AdamW"), capacity=0.9)
    train(model)
    model.optimizer.unfreeze("body/kernel", [0])  # other entries than at the build
    train(model)
    model.save(tmp_path / "model.keras")
    assert_compact_goes_on(keras.models.load_model(tmp_path / "model.keras"), model)


def test_compact_weights_file_holds_no_more_than_the_trainable_entries(tmp_path):
    import h5py

    model = compact_model()
    train(model)
    model.save_weights(tmp_path / "w.weights.h5")
    sizes = []
    with h5py.File(tmp_path / "w.weights.h5") as file:
        file["optimizer/inner_optimizer"].visititems(lambda _, item: sizes.append(getattr(item, "size", 0)))
    assert sorted(sizes)[-2:] == [int(MASK.sum())] * 2
    other = compact_model()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "w.weights.h5")
    assert_compact_goes_on(other, model)


def test_compact_weights_into_an_optimizer_that_is_not_built(tmp_path):
    model = compact_model()
    train(model)
    model.save_weights(tmp_path / "w.weights.h5")
    other = compact_model()
    other.load_weights(tmp_path / "w.weights.h5")
    train(model)
    train(other)
    assert_compact_goes_on(other, model)


@pytest.mark.parametrize("restore", ["before the optimizer is built", "after"])
def test_compact_checkpoint(tmp_path, restore):
    model = compact_model(capacity=0.8)
    train(model)
    model.optimizer.unfreeze("body/kernel", [0])
    train(model)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    other = compact_model(capacity=0.8)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    if restore == "after":
        other.optimizer.build(other.trainable_variables)

    def restored():
        status = checkpoint.restore(path)
        other.optimizer.build(other.trainable_variables)
        return status

    with pytest.warns(UserWarning, match=r"A load replaces masks that calls had stated: 'body/kernel' \(\d+ entries\)"):
        status = restored()
    status.assert_existing_objects_matched()
    assert_compact_goes_on(other, model)


def test_compact_checkpoint_after_repack(tmp_path):
    model = compact_model()
    train(model)
    model.optimizer.repack({"body/kernel": True, "head/kernel": np.eye(8, 2, dtype=bool)}, capacity={"body/kernel": 40})
    model.make_train_function(force=True)
    train(model)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    model.save(tmp_path / "model.keras")
    other = functional()
    masks = {"body/kernel": True, "head/kernel": np.eye(8, 2, dtype=bool)}
    other.compile(
        fz.MaskedOptimizer(keras.optimizers.AdamW(0.1), masks=masks, state="compact", capacity={"body/kernel": 40}),
        "mse",
        jit_compile=False,
    )
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    other.optimizer.build(other.trainable_variables)
    checkpoint.restore(path).assert_existing_objects_matched()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for _ in range(2):
        assert_same_state(other, model)
        assert_same_state(loaded, model)
        for each in (model, other, loaded):
            train(each)


def test_compact_config():
    model = compact_model(capacity={"body/kernel": 30})
    train(model)
    config = model.optimizer.get_config()
    assert config["state"] == "compact" and config["capacity"] == {"body/kernel": 30}
    assert config["partitions"]["body/kernel"] == {"way": "compact", "layout": [1, 40, 1], "capacity": 30}
    assert config["partitions"]["head/kernel"] == {"way": "compact", "layout": [1, 8, 2], "capacity": 5}
    assert fz.MaskedOptimizer.from_config(config).get_config() == config
    twin = functional()
    optimizer = fz.MaskedOptimizer.from_config(config)
    before = kernel(twin).numpy()
    optimizer.apply([tf.ones(v.shape) for v in twin.trainable_variables], twin.trainable_variables)
    np.testing.assert_array_equal(kernel(twin).numpy() != before, MASK)
    assert optimizer.describe()[0].capacity == 30


def test_compact_set_weights():
    model = compact_model()
    train(model)
    weights = [v.numpy() for v in model.optimizer.variables]
    other = compact_model()
    other.set_weights(model.get_weights())
    other.optimizer.build(other.trainable_variables)
    other.optimizer.set_weights(weights)
    assert_compact_goes_on(other, model)


def test_compact_file_of_other_masks_is_refused(tmp_path):
    model = compact_model()
    train(model)
    model.save_weights(tmp_path / "w.weights.h5")
    other = functional()
    few = np.zeros_like(MASK)
    few[0] = True
    masks = {"body/kernel": few, "head/kernel": np.arange(8)[:, None] < 5}
    other.compile(fz.MaskedOptimizer(keras.optimizers.AdamW(0.1), masks=masks, state="compact"), "mse")
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="must not have more trainable entries"):
        other.load_weights(tmp_path / "w.weights.h5")
    assert other.optimizer.mask_for(kernel(other)) == fz.Mask.from_array(few)


def test_compact_model_that_is_all_frozen(tmp_path):
    model = compact_model()
    train(model)
    model.optimizer.freeze("body/kernel")
    train(model)
    model.save(tmp_path / "model.keras")
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(str(tmp_path / "c"))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    twin = functional()
    twin.compile(fz.MaskedOptimizer.from_config(model.optimizer.get_config()), "mse", jit_compile=False)
    twin.optimizer.build(twin.trainable_variables)
    tf.train.Checkpoint(model=twin, optimizer=twin.optimizer).restore(path).assert_existing_objects_matched()
    for each in (model, loaded, twin):
        before = kernel(each).numpy()
        train(each)
        assert_same_bits(kernel(each).numpy(), before)
    assert_same_state(loaded, model)
    assert_same_state(twin, model)
