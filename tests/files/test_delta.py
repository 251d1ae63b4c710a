"""Files of what training changed: applied to the base they give the trained weights, bit for bit."""

import keras
import numpy as np
import pytest
from common import assert_same_bits

import freezeops as fz

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(64, 3)).astype("float32")


def make_model(seed=3, name="body"):
    keras.utils.set_random_seed(seed)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(200, activation="tanh", name=name),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(3, name="head", dtype="bfloat16"),
    ]
    return keras.Sequential(layers)


def values(model):
    return {v.path: v.numpy() for v in model.weights}


def assert_same_weights(model, expected):
    for a, b in zip(model.weights, expected.weights, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.path)


@pytest.fixture
def trained():
    model = make_model()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01))
    optimizer.train_only("body/kernel", np.random.default_rng(2).random((6, 200)) < 0.02)
    optimizer.freeze("head/bias")
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(X, Y, verbose=0)
    return model


@pytest.mark.parametrize("as_mapping", [False, True])
def test_round_trip(trained, tmp_path, as_mapping):
    base = make_model()
    # Bits that no arithmetic would see, or keep.
    odd = np.array([0x7FC12345, 0x7F812345, 0x80000000, 0x00000001], np.uint32).view("f4")
    base.get_layer("body").bias.assign(np.resize(odd, 200))
    trained.get_layer("body").bias.assign(np.resize(odd[::-1], 200))
    fz.export_delta(trained, values(base) if as_mapping else base, tmp_path / "d")
    fz.apply_delta(base, tmp_path / "d")
    assert_same_weights(base, trained)


def test_it_is_small(tmp_path):
    base, model = (keras.Sequential([keras.Input((500,)), keras.layers.Dense(1000, name="d")]) for _ in range(2))
    model.set_weights(base.get_weights())
    kernel = model.layers[0].kernel.numpy()
    kernel.reshape(-1)[np.random.default_rng(0).choice(kernel.size, 5000, replace=False)] += 1
    model.layers[0].kernel.assign(kernel)
    fz.export_delta(model, base, tmp_path / "d")
    assert (tmp_path / "d").stat().st_size < 5000 * 8 + 1000  # of 2,004,000 bytes of weights
    kernel += 1
    model.layers[0].kernel.assign(kernel)
    fz.export_delta(model, base, tmp_path / "d")
    assert (tmp_path / "d").stat().st_size < kernel.size * (4 + 1 / 8) + 1000
    fz.apply_delta(base, tmp_path / "d")
    assert_same_bits(base.layers[0].kernel.numpy(), kernel)


def refused(model, path, message):
    before = values(model)
    with pytest.raises(ValueError, match=message):
        fz.apply_delta(model, path)
    for name, value in values(model).items():
        assert_same_bits(value, before[name])


def test_another_base_is_refused(trained, tmp_path):
    fz.export_delta(trained, make_model(), tmp_path / "d")
    refused(make_model(seed=4), tmp_path / "d", "must be applied to the weights that it was made against")
    nearly = make_model()
    statistics = nearly.get_layer("norm").moving_mean
    statistics.assign(-statistics)  # -0.0 for 0.0, in the last weights but one
    refused(nearly, tmp_path / "d", "other values in '\\w+/norm/moving_mean'")
    refused(trained, tmp_path / "d", "must be applied to")
    refused(make_model(name="other"), tmp_path / "d", "'sequential/body/bias'.* that the model has not")


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"freezeops masks\n" + c[16:], lambda c: c[:-9] + b"x" + c[-8:]]
)
def test_a_damaged_file_is_refused(trained, tmp_path, damage):
    fz.export_delta(trained, make_model(), tmp_path / "d")
    (tmp_path / "d").write_bytes(damage((tmp_path / "d").read_bytes()))
    refused(make_model(), tmp_path / "d", "A delta file must be one that `export_delta` wrote, whole")


def test_bad_bases(trained, tmp_path):
    kernel, bias = (v.path for v in trained.get_layer("body").weights)
    with pytest.raises(ValueError, match=f"not \\['{kernel}'\\] that it has"):
        fz.export_delta(trained, {k: v for k, v in values(trained).items() if k != kernel}, tmp_path / "d")
    with pytest.raises(ValueError, match="must have the shapes and dtypes"):
        fz.export_delta(trained, values(trained) | {bias: np.zeros(200)}, tmp_path / "d")
    with pytest.raises(TypeError, match="`base` must be a model"):
        fz.export_delta(trained, 3, tmp_path / "d")
    assert not list(tmp_path.iterdir())
