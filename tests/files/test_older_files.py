"""Files that the last version with all modules in one folder wrote: read, and written the same, bit for bit."""

import base64
import importlib.util
import json
import operator
import pickle
import pickletools
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits

import freezeops as fz
from freezeops.storage import checkedfile, stored

FOLDER = Path(__file__).parents[1] / "data" / "before_rooms"

_spec = importlib.util.spec_from_file_location("before_rooms", FOLDER / "write.py")
assert _spec is not None and _spec.loader is not None
before = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(before)


def arrays(name):
    """The arrays of an `.npz` file, by the names that they were written under."""
    with np.load(FOLDER / name) as file:
        return {key.replace("|", "/"): file[key] for key in file.files}


def entries_of(optimizer):
    """What an optimizer writes into a Keras file of its masks."""
    entries = {}
    optimizer.save_own_variables(entries)
    return entries


def assert_as_written(model, state):
    """Checks weights, masks and slots; and that a file written now would hold the same but for the model's name."""
    expected = {key.replace("model/", ""): value for key, value in arrays(f"{state}.expected.npz").items()}
    for variable in model.weights:
        path = variable.path.removeprefix("model/")
        assert_same_bits(variable.numpy(), expected[f"weight {path}"], path)
    for path, mask in model.optimizer.masks_by_path().items():
        assert_same_bits(mask.to_numpy(), expected[f"mask {path.removeprefix('model/')}"], path)
    slots = [value for key, value in expected.items() if key.startswith("slot ")]
    for variable, value in zip(model.optimizer.inner_optimizer.variables, slots, strict=True):
        assert_same_bits(variable.numpy(), value, variable.path)
    assert without_the_model(entries_of(model.optimizer)) == without_the_model(arrays(f"{state}.entries.npz"))


def without_the_model(entries):
    """The records of a Keras file without the model's name, which `Sequential` loses in one."""
    found = {}
    for key, value in entries.items():
        header, content = checkedfile.decode(stored._KIND, value.tobytes(), key)
        if "masks" in header:
            assert [mask["waiting"] for mask in header["masks"]] == ["body%2Fkernel" in key]
            found[key.replace("model%2F", "")] = json.dumps(header).replace("model/", ""), content
    return found


def load(model, store, path):
    if store == "weights":
        model.load_weights(f"{path}.weights.h5")
    else:
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(path).assert_consumed()


@pytest.mark.parametrize("store", ["keras", "weights", "checkpoint"])
@pytest.mark.parametrize("state", before.STATES)
def test_stores_are_read(state, store):
    if store == "keras":
        model = keras.models.load_model(FOLDER / f"{state}.keras")
    else:
        model = before.new_model(before.masked_optimizer(state), seed=9)
        model.optimizer.build(model.trainable_variables)
        with pytest.warns(UserWarning, match="A load replaces masks"):
            load(model, store, str(FOLDER / state))
    assert_as_written(model, state)


@pytest.mark.parametrize("source", ["{}.masks", "{}.keras", "{}.weights.h5", "{}"])
@pytest.mark.parametrize("state", before.STATES)
def test_masks_are_read_from_every_file(state, source):
    model = before.new_model(fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"head/kernel": "rows"}))
    fz.load_masks(model.optimizer, FOLDER / source.format(state))
    model.optimizer.build(model.trainable_variables)
    expected = arrays(f"{state}.expected.npz")
    for path, mask in model.optimizer.masks_by_path().items():
        assert_same_bits(mask.to_numpy(), expected[f"mask {path}"], path)


@pytest.mark.parametrize("state", before.STATES)
def test_the_same_bytes_are_written(tmp_path, state):
    model = before.same_bytes(tmp_path, state)
    assert (tmp_path / f"{state}.masks").read_bytes() == (FOLDER / f"{state}.masks").read_bytes()
    written, expected = entries_of(model.optimizer), arrays(f"{state}.entries.npz")
    assert list(written) == list(expected)
    for key, value in written.items():
        assert value.tobytes() == expected[key].tobytes(), key
    assert_same_config(tmp_path / f"{state}.json", FOLDER / f"{state}.json")
    # Of a checkpoint the string; what is around it is TensorFlow's.
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(tmp_path / state))
    assert checkpoint_strings(tmp_path / state) == checkpoint_strings(FOLDER / state) != {}
    # Of Keras's files the names in the optimizer's group.
    model.save_weights(tmp_path / "m.weights.h5")
    assert h5_entries(tmp_path / "m.weights.h5") == h5_entries(FOLDER / f"{state}.weights.h5") != {}


def checkpoint_strings(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map() if "_masks" in key}


def h5_entries(path):
    h5py = pytest.importorskip("h5py")
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and item.dtype == np.uint8:
            found[name] = item[()].tobytes()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def readable(value):
    """A config with its compressed masks as numbers: compressors differ."""
    if isinstance(value, list):
        return [readable(each) for each in value]
    if not isinstance(value, dict):
        return value
    value = {key: readable(each) for key, each in value.items() if key != "inner_optimizer"}
    for key in ("bits", "of"):
        if isinstance(value.get(key), str):
            value[key] = zlib.decompress(base64.b64decode(value[key])).hex()
    return value


NEW_OPTIONS = {"skip_frozen_gradients": False}
"""Options that configs have since, with the values that older ones stand for."""


def assert_same_config(path, other):
    """Compares a config with an older one, but for the inner optimizer's own, which is Keras's."""
    config, older = (json.loads(each.read_text()) for each in (path, other))
    if "config" in older:  # of Keras 3; that of tf_keras has no such options
        older["config"] = NEW_OPTIONS | older["config"]
    assert readable(config) == readable(older)


@pytest.mark.parametrize("name", [*before.STATES, "unbuilt"])
def test_configs_are_read_and_written_again(tmp_path, name):
    optimizer = keras.saving.deserialize_keras_object(json.loads((FOLDER / f"{name}.json").read_text()))
    assert type(optimizer) is fz.MaskedOptimizer
    (tmp_path / "config.json").write_text(before.config_text(optimizer))
    assert_same_config(tmp_path / "config.json", FOLDER / f"{name}.json")
    model = before.new_model(optimizer)
    optimizer.build(model.trainable_variables)
    if name == "unbuilt":
        expected = before.new_model(before.unbuilt_optimizer()).optimizer
        expected.build(model.trainable_variables)
        assert optimizer.masks_by_path() == expected.masks_by_path()
    else:
        expected = arrays(f"{name}.expected.npz")
        for path, mask in optimizer.masks_by_path().items():
            assert_same_bits(mask.to_numpy(), expected[f"mask {path}"], path)


def test_a_config_of_waiting_rules_is_the_same(tmp_path):
    (tmp_path / "config.json").write_text(before.config_text(before.unbuilt_optimizer()))
    assert_same_config(tmp_path / "config.json", FOLDER / "unbuilt.json")


def test_pickles():
    masks = pickle.loads((FOLDER / "masks.pickle").read_bytes())
    expected = before.masks()
    assert list(masks) == list(expected)
    for name, mask in masks.items():
        assert type(mask) is fz.Mask
        assert mask.shape == expected[name].shape and mask.layout == expected[name].layout
        assert mask.packed.tobytes() == expected[name].packed.tobytes()
    slots = pickle.loads((FOLDER / "slots.pickle").read_bytes())
    assert slots == before.slots() and slots[1].scale is operator.mul
    # They name `freezeops.mask` and `freezeops.slots`, and that these do not change holds older versions able to read.
    # By `freezeops.mask` and `freezeops.slots` older versions find the classes.
    assert modules_in(pickle.dumps(expected, protocol=4)) == modules_in((FOLDER / "masks.pickle").read_bytes())
    assert modules_in(pickle.dumps(slots, protocol=4)) == modules_in((FOLDER / "slots.pickle").read_bytes())


def modules_in(data):
    """The names of our modules in a pickle."""
    found = {text for _, text, _ in pickletools.genops(data) if isinstance(text, str) and "freezeops" in text}
    assert found
    return found


def test_a_delta(tmp_path):
    base, model = before.delta_models()
    fz.export_delta(model, base, tmp_path / "delta")
    assert (tmp_path / "delta").read_bytes() == (FOLDER / "delta").read_bytes()
    fz.apply_delta(base, FOLDER / "delta")
    for a, b in zip(base.weights, model.weights, strict=True):
        assert_same_bits(a.numpy(), b.numpy(), a.path)


def test_legacy(tmp_path):
    pytest.importorskip("tf_keras", reason="tf_keras is not installed: nothing to wrap")
    from freezeops.legacy import MaskedOptimizer

    config = json.loads((FOLDER / "legacy.json").read_text())
    optimizer, variables = MaskedOptimizer.from_config(config), before.legacy_variables()
    optimizer.build(variables)
    (tmp_path / "config.json").write_text(json.dumps(optimizer.get_config()))
    assert_same_config(tmp_path / "config.json", FOLDER / "legacy.json")
    other = before.legacy_optimizer()
    other.build(variables)
    expected = other.masks_by_path()
    assert optimizer.masks_by_path() == expected
    other.unfreeze("kernel")
    with pytest.warns(UserWarning, match="A load replaces masks"):
        tf.train.Checkpoint(optimizer=other, variables=variables).read(str(FOLDER / "legacy")).assert_consumed()
    assert other.masks_by_path() == expected
    tf.train.Checkpoint(optimizer=other, variables=variables).write(str(tmp_path / "again"))
    assert checkpoint_strings(tmp_path / "again") == checkpoint_strings(FOLDER / "legacy") != {}
