"""The option itself: what it takes, when it counts, what is saved of it, and what is said."""

import io
import warnings

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from agreement import PART, assert_agree, trained, untrained
from common import assert_same_bits
from network import every_way
from rich.console import Console

import freezeops as fz
from freezeops.registry import rules_config


def sgd():
    return keras.optimizers.SGD(0.05, momentum=0.9)


# What it takes.


@pytest.mark.parametrize("value", [None, 1, "yes", "auto", np.True_, []])
def test_unknown_values(value):
    message = "`skip_frozen_gradients` must be True or False. Received: skip_frozen_gradients="
    with pytest.raises(ValueError, match=message):
        fz.MaskedOptimizer(sgd(), state="compact", skip_frozen_gradients=value)
    optimizer = fz.MaskedOptimizer(sgd(), state="compact", skip_frozen_gradients=True)
    with pytest.raises(ValueError, match=message):
        optimizer.skip_frozen_gradients = value
    assert optimizer.skip_frozen_gradients is True


def test_full_state():
    message = "`skip_frozen_gradients` must be used with state='compact'.*Received: skip_frozen_gradients=True"
    with pytest.raises(ValueError, match=message):
        fz.MaskedOptimizer(sgd(), skip_frozen_gradients=True)
    optimizer = fz.MaskedOptimizer(sgd(), skip_frozen_gradients=False)
    with pytest.raises(ValueError, match=message):
        optimizer.skip_frozen_gradients = True
    assert optimizer.skip_frozen_gradients is False
    optimizer.skip_frozen_gradients = False


def test_legacy():
    tf_keras = pytest.importorskip("tf_keras")
    from freezeops.legacy import MaskedOptimizer

    with pytest.raises(ValueError, match="`skip_frozen_gradients` must be used with `freezeops.MaskedOptimizer`"):
        MaskedOptimizer(tf_keras.optimizers.SGD(), skip_frozen_gradients=True)


def test_it_is_off_by_default():
    assert fz.MaskedOptimizer(sgd(), state="compact").skip_frozen_gradients is False


# When it counts.


@pytest.mark.parametrize("first", [False, True])
def test_setting_it_counts_from_the_next_trace_on(first):
    of = untrained(every_way, first)
    of.fit(2)
    was = of.outcomes()
    of.optimizer.skip_frozen_gradients = not first
    of.fit(2)  # as it was traced
    if first:
        assert set(was.values()) == {PART}
        assert set(of.outcomes().values()) == {("whole", "skip_frozen_gradients=False")}
    else:
        assert set(was.values()) == {("whole", "skip_frozen_gradients=False")}
        assert set(of.outcomes().values()) == {("whole", "no step was traced yet")}
    of.model.make_train_function(force=True)
    of.fit(2)
    assert set(of.outcomes().values()) == {("whole", "skip_frozen_gradients=False") if first else PART}
    whole = untrained(every_way, False)
    whole.fit(6)
    assert_agree(of, whole)


def test_setting_it_under_a_loss_scaler():
    """Of which `compile` makes one, under `mixed_float16`."""
    of = untrained(every_way, False, policy="mixed_float16")
    of.fit(1)
    of.optimizer.skip_frozen_gradients = True
    of.model.make_train_function(force=True)
    of.fit(1)
    assert set(of.outcomes().values()) == {PART}


# What is saved.


@pytest.mark.parametrize("skips", [True, False])
def test_config(skips):
    optimizer = fz.MaskedOptimizer(sgd(), state="compact", skip_frozen_gradients=skips)
    config = optimizer.get_config()
    assert config["skip_frozen_gradients"] is skips
    assert fz.MaskedOptimizer.from_config(config).skip_frozen_gradients is skips
    del config["skip_frozen_gradients"]  # from before there was one
    assert fz.MaskedOptimizer.from_config(config).skip_frozen_gradients is False
    of = trained(every_way, False, skips)
    again = fz.MaskedOptimizer.from_config(of.optimizer.get_config())
    assert again.skip_frozen_gradients is skips


def arrays_of(path):
    """All arrays of an HDF5 file, by key."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda key, item: found.update({key: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def test_files_have_the_same_keys_and_shapes(tmp_path):
    """Indices of gradients are made from the masks, and not saved."""
    keys, shapes = [], []
    for skips in (True, False):
        of = trained(every_way, False, skips)
        of.model.save_weights(tmp_path / f"{skips}.weights.h5")
        of.model.save(tmp_path / f"{skips}.keras")
        prefix = tf.train.Checkpoint(model=of.model, optimizer=of.optimizer).write(str(tmp_path / f"{skips}"))
        arrays = arrays_of(tmp_path / f"{skips}.weights.h5")
        keys.append({key: (value.shape, value.dtype) for key, value in arrays.items()})
        shapes.append(dict(tf.train.list_variables(prefix)))
        fz.save_masks(of.optimizer, tmp_path / f"{skips}.masks")
    assert keys[0] == keys[1] and shapes[0] == shapes[1]
    assert keys[0] and shapes[0]
    assert (tmp_path / "True.masks").read_bytes() == (tmp_path / "False.masks").read_bytes()


def _weights(of, folder):
    of.model.save_weights(folder / "m.weights.h5")
    return lambda other: other.model.load_weights(folder / "m.weights.h5")


def _whole_model(of, folder):
    of.model.save(folder / "m.keras")

    def load(other):
        other.model = keras.models.load_model(folder / "m.keras")
        assert other.model.optimizer.skip_frozen_gradients is of.optimizer.skip_frozen_gradients
        other.optimizer = other.model.optimizer

    return load


def _checkpoint(of, folder):
    prefix = tf.train.Checkpoint(model=of.model, optimizer=of.optimizer).write(str(folder / "m"))
    return lambda other: tf.train.Checkpoint(model=other.model, optimizer=other.optimizer).read(prefix)


@pytest.mark.parametrize("built", [True, False], ids=["trained", "new"])
@pytest.mark.parametrize("save", [_weights, _whole_model, _checkpoint])
@pytest.mark.parametrize("skips", [True, False])
def test_states_load_either_way(skips, save, built, tmp_path):
    """Other masks come with them, also where a step was traced before."""
    of = trained(every_way, False, skips)
    load = save(of, tmp_path)
    other = untrained(every_way, not skips, seed=1)
    if built:
        other.fit(1)
    else:
        other.optimizer.build(other.model.trainable_variables)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A load replaces masks that calls had stated")
        load(other)
    for each in of.model.trainable_variables:
        assert_same_bits(next(v for v in other.model.trainable_variables if v.path == each.path).numpy(), each.numpy())
    other.x, other.y, other.masks, other.initial = of.x, of.y, of.masks, of.initial
    of.fit(2)
    other.fit(2)
    assert_agree(other, of)


def test_clones():
    of = trained(every_way, False, True)
    clone = keras.models.clone_model(of.model)
    clone.compile(fz.MaskedOptimizer.from_config(of.optimizer.get_config()), "mse", jit_compile=False)
    clone.set_weights(of.model.get_weights())
    clone.optimizer.build(clone.trainable_variables)
    before = [each.numpy() for each in clone.trainable_variables]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clone.fit(of.x, of.y, verbose=0)
    reports = [report for report in clone.optimizer.describe() if report.mode == "compact"]
    assert len(reports) == len(of.masks) and {(r.gradient, r.gradient_reason) for r in reports} == {PART}
    for variable, old in zip(clone.trainable_variables, before, strict=True):
        frozen = ~clone.optimizer.mask_for(variable).to_numpy()
        assert_same_bits(variable.numpy()[frozen], old[frozen])


def test_a_config_without_its_masks(monkeypatch):
    """Nothing trains before they are there; then parts are made."""
    monkeypatch.setattr(rules_config, "LIMIT", 4)  # too little room for masks
    of = untrained(every_way, True)
    of.optimizer.build(of.model.trainable_variables)
    other = untrained(every_way, True)
    other.optimizer = fz.MaskedOptimizer.from_config(of.optimizer.get_config())
    other.model.compile(other.optimizer, "mse", jit_compile=False)
    with pytest.raises(ValueError, match="must be given the masks that the config left out"):
        other.fit(1)
    for path, values in other.values().items():
        assert_same_bits(values, other.initial[path])
    other.optimizer.register_masks(other.masks)
    other.model.make_train_function(force=True)
    other.fit(3)
    assert set(other.outcomes().values()) == {PART}
    assert_agree(other, trained(every_way, False, False))


class TrainStep(tf.Module):
    """A train step that is saved as a SavedModel."""

    def __init__(self, jit, skips, fused):
        super().__init__()
        rng = np.random.default_rng(0)
        masks = {
            "entries": rng.random((12, 16)) < 0.25,
            "rows": np.arange(12)[:, None] < 3,
            "columns": np.arange(16) < 4,
        }
        masks["columns"] = np.broadcast_to(masks["columns"], (12, 16))
        self.masks = {name: np.broadcast_to(mask, (12, 16)) for name, mask in masks.items()}
        self.weights = [tf.Variable(rng.normal(size=(12, 16)).astype("float32"), name=name) for name in masks]
        self.optimizer = fz.MaskedOptimizer(sgd(), masks, state="compact", skip_frozen_gradients=skips, fused=fused)
        self.optimizer.build(self.weights)
        self.x = tf.constant(rng.normal(size=(8, 12)).astype("float32"))
        self.step = tf.function(self._step, jit_compile=jit, autograph=False, input_signature=[])

    def _step(self):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(tf.tanh(self.x @ weights)) for weights in self.weights])
        self.optimizer.apply(tape.gradient(loss, self.weights), self.weights)
        return [each.read_value() for each in self.weights]


@pytest.mark.parametrize(
    ("jit", "skips", "fused"), [(False, True, True), (True, True, True), (False, True, False), (False, False, False)]
)
def test_saved_model(jit, skips, fused, tmp_path):
    module = TrainStep(jit, skips, fused)
    before = [each.numpy() for each in module.step()]
    assert {r.gradient for r in module.optimizer.describe()} == {PART[0] if skips else "whole"}
    tf.saved_model.save(module, str(tmp_path / "m"))
    expected = [each.numpy() for each in module.step()]
    again = tf.saved_model.load(str(tmp_path / "m"))
    loaded = [each.numpy() for each in again.step()]
    for mask, old, new, of_loaded in zip(module.masks.values(), before, expected, loaded, strict=True):
        assert_same_bits(of_loaded, new)
        assert_same_bits(new[~mask], old[~mask])
        assert (new[mask] != old[mask]).all()


# What is said.


def summary(optimizer):
    console = Console(file=io.StringIO(), width=200)
    optimizer.summary(console=console)
    return console.file.getvalue()


def test_before_a_step():
    of = untrained(every_way, True)
    of.optimizer.build(of.model.trainable_variables)
    assert set(of.outcomes().values()) == {("whole", "no step was traced yet")}
    assert "gradient: whole, no step was traced yet" in summary(of.optimizer)


def test_after_a_step():
    of = trained(every_way, False, True)
    reports = {report.path: report for report in of.optimizer.describe()}
    for path, report in reports.items():
        expected = PART if path in of.masks else ("whole", "mode unmasked")
        assert (report.gradient, report.gradient_reason) == expected or report.mode == "full"
    assert "gradient: trainable part only" in summary(of.optimizer)


def test_without_the_option():
    of = trained(every_way, False, False)
    assert {r.gradient_reason for r in of.optimizer.describe()} == {"skip_frozen_gradients=False"}
    assert "gradient" not in summary(of.optimizer)


def test_frozen_for_good_and_frozen_for_now():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, name="a"), keras.layers.Dense(3, name="b")])
    optimizer = fz.MaskedOptimizer(sgd(), state="compact", skip_frozen_gradients=True)
    optimizer.freeze("a/kernel", permanent=True)
    optimizer.freeze("a/bias")
    optimizer.register_mask("b/kernel", np.eye(5, 3, dtype=bool))
    model.compile(optimizer, "mse", jit_compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0)
    gradients = {
        report.path.split("/", 1)[1]: (report.gradient, report.gradient_reason) for report in optimizer.describe()
    }
    assert [gradients[path] for path in ("a/kernel", "a/bias", "b/kernel")] == [PART] * 3
    assert gradients["b/bias"][0] == "whole"
