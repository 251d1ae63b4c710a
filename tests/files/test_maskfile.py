"""Files of masks: what comes back, and what is refused."""

import os

import keras
import numpy as np
import pytest
from file_mutations import map_header, sealed

import freezeops as fz
from freezeops.files import maskfile

SHAPES = {"a/kernel": (6, 8), "a/bias": (8,), "b/kernel": (8, 3)}


def variables(order=tuple(SHAPES), rename=None):
    made = {}
    for path in order:
        scope, name = (rename or {}).get(path, path).split("/")
        with keras.name_scope(scope):
            made[path] = keras.Variable(np.zeros(SHAPES[path], "float32"), name=name)
    return made


def optimizer_for(made):
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.build(list(made.values()))
    return optimizer


@pytest.fixture
def saved(tmp_path):
    made = variables()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.freeze("a/kernel", [0, 2])
    optimizer.freeze("b/kernel", (3, 1))
    optimizer.build(list(made.values()))
    masks = {path: optimizer.mask_for(variable) for path, variable in made.items()}
    fz.save_masks(optimizer, tmp_path / "masks")
    return tmp_path / "masks", masks


@pytest.mark.parametrize("built", [True, False])
def test_round_trip_in_another_order(saved, built):
    path, masks = saved
    made = variables(order=reversed(SHAPES))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    if built:
        optimizer.build(list(made.values()))
    fz.load_masks(optimizer, path)
    optimizer.build(list(made.values()))
    assert {name: optimizer.mask_for(v) for name, v in made.items()} == masks


def test_rename(saved):
    path, masks = saved
    made = variables(rename={"a/kernel": "c/weight"})
    optimizer = optimizer_for(made)
    with pytest.raises(ValueError, match="matches nothing"):
        fz.load_masks(optimizer, path)
    assert optimizer.density == 1.0
    fz.load_masks(optimizer, path, rename={"a/kernel": "c/weight"})
    assert optimizer.mask_for(made["a/kernel"]) == masks["a/kernel"]
    counted = variables(rename={"a/kernel": "a_1/kernel"})
    again = optimizer_for(counted)
    fz.load_masks(again, path)
    assert again.mask_for(counted["a/kernel"]) == masks["a/kernel"]
    with pytest.raises(ValueError, match=r"paths that are in the file. Received: \['c'\]"):
        fz.load_masks(optimizer, path, rename={"c": "d"})
    with pytest.raises(ValueError, match=r"a path of its own"):
        fz.load_masks(optimizer, path, rename={"a/kernel": "b/kernel"})


def resealed(content, change):
    """The file with its header changed and a checksum that is right again."""
    return sealed(maskfile._KIND, *map_header(maskfile._KIND, content, change))


def flip(content):
    changed = bytearray(content)
    changed[-1] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "truncated or was altered"),
        (lambda c: c[:40], "truncated or was altered"),
        (lambda c: c[:20], "truncated or was altered"),
        (lambda c: b"", "does not begin as a mask file does"),
        (lambda c: b"PK" + c, "does not begin as a mask file does"),
        (flip, "truncated or was altered"),
        (lambda c: resealed(c, lambda h: h.update(version=2)), "version 2"),
        (lambda c: resealed(c, lambda h: h.update(polarity="1 = frozen")), "polarity is '1 = frozen'"),
        (lambda c: resealed(c, lambda h: h["masks"][0].update(shape=[8, 6])), r"\(8, 6\), shape=\(6, 8\)"),
        (lambda c: resealed(c, lambda h: h["masks"][0].pop("layout")), "`layout` must be of type list"),
        (lambda c: resealed(c, lambda h: h["masks"][0].update(layout=[1, 2**20, 1])), "does not describe masks"),
        (lambda c: resealed(c, lambda h: h.update(masks=3)), "does not describe masks: `masks` must be of type list"),
    ],
)
def test_refused_with_nothing_changed(saved, damage, message):
    path, _ = saved
    path.write_bytes(damage(path.read_bytes()))
    made = variables()
    optimizer = optimizer_for(made)
    with pytest.raises(ValueError, match=message):
        fz.load_masks(optimizer, path)
    assert optimizer.density == 1.0


def test_crash_while_writing_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    before = path.read_bytes()

    def crash(*args):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        fz.save_masks(optimizer_for(variables()), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_unbuilt_optimizer_has_no_masks_to_save(tmp_path):
    with pytest.raises(ValueError, match="must be built"):
        fz.save_masks(fz.MaskedOptimizer(keras.optimizers.SGD()), tmp_path / "masks")


def test_int_variables_and_the_mode_of_the_file(tmp_path):
    count = keras.Variable(np.zeros(3, "int32"), dtype="int32", name="count")
    made = variables()
    optimizer = optimizer_for(made | {"count": count})
    optimizer.freeze(made["a/bias"])
    fz.save_masks(optimizer, tmp_path / "masks")
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "masks").stat().st_mode == (tmp_path / "other").stat().st_mode
    other = fz.MaskedOptimizer(keras.optimizers.SGD())
    fz.load_masks(other, tmp_path / "masks")
    other.build([*made.values(), count])
    assert other.mask_for(made["a/bias"]).count() == 0
