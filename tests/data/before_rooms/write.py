"""Writes the files of this folder.

They were written by commit c902287, the last with all modules in one folder, and hold that later versions read what it
wrote and write the same bytes. To write them again, check that commit out elsewhere and run there, with its compiled
ops: `PYTHONPATH=CHECKOUT python write.py FOLDER`.
"""

import json
import operator
import pickle
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import freezeops as fz

STATES = ("full", "compact")
ODD = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000, 0x3F800000, 0xBF8CCCCD], np.uint32).view("f4")
"""A NaN with a payload, -0.0, a subnormal, infinity and two common values."""

BODY = np.arange(30).reshape(5, 6) % 3 != 0
LATE = (np.array([0, 1]), np.array([0, 2]))
"""Entries of the body's kernel that are unfrozen after two steps and wait to be seeded."""


def masked_optimizer(state):
    """An optimizer whose masks are of every kind; built, it holds one frozen variable for good."""
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.AdamW(0.01, weight_decay=0.004),
        state=state,
        capacity={"body/kernel": 24} if state == "compact" else None,
        maskable={"head/kernel": "rows"},
        masks={"body/kernel": BODY},
        name="masked",
    )
    optimizer.freeze("head/kernel", [1, 4])
    optimizer.freeze("head/bias", permanent=True)
    return optimizer


def new_model(optimizer, seed=3):
    """A model with odd values under the frozen entries."""
    keras.utils.clear_session()
    layers = [keras.layers.Dense(6, name="body"), keras.layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((5,)), *layers], name="model")
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.integers(-8, 8, variable.shape) / 4)
    kernel = model.get_layer("body").kernel.numpy()
    kernel[~BODY] = np.resize(ODD, (~BODY).sum())
    model.get_layer("body").kernel.assign(kernel)
    if optimizer is not None:
        model.compile(optimizer, "mse", jit_compile=False)
    return model


def trained_model(state):
    """A model after three steps; a part of its entries was unfrozen after two and waits for a gradient."""
    model = new_model(masked_optimizer(state))
    optimizer, variables = model.optimizer, model.trainable_variables
    optimizer.build(variables)
    rng = np.random.default_rng(4)
    gradients = [tf.constant(rng.integers(1, 8, v.shape) / 8, v.dtype) for v in variables]
    for _ in range(2):
        optimizer.apply(gradients, variables)
    optimizer.unfreeze("body/kernel", LATE)
    gradients[0] = tf.constant(np.where(np.indices((5, 6))[0] > 1, 0.5, 0.0), tf.float32)
    optimizer.apply(gradients, variables)
    return model


def unbuilt_optimizer():
    """An optimizer with rules of every kind that wait."""
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.5), masks={"body/kernel": fz.Mask.rows((5, 6), [0, 2])})
    optimizer.freeze("body/kernel", np.s_[1:3, ::2])
    optimizer.freeze("body/kernel", (Ellipsis, 3))
    optimizer.unfreeze("body/kernel", np.s_[2:4])
    optimizer.train_only("head/kernel", [0, 5])
    optimizer.freeze(["body/bias"], np.array([True, False] * 3))
    optimizer.freeze("head/kernel", LATE)
    optimizer.freeze("head/bias", permanent=True)
    return optimizer


def masks():
    """One mask of each layout, and the empty ones."""
    return {
        "entries": fz.Mask.from_array(BODY),
        "rows": fz.Mask.rows((5, 6), [0, 3]),
        "columns": fz.Mask.columns((5, 6), [2]),
        "middle": fz.Mask.from_array(np.array([True, False, True])[None, :, None], (2, 3, 4)),
        "whole": fz.Mask.frozen((7,)),
        "scalar": fz.Mask.trainable(()),
        "empty": fz.Mask.frozen((0, 3)),
    }


def slots():
    """Slots of an optimizer, as far as they can be pickled."""
    return [fz.Slot("weight", initial=None), fz.Slot("second_moment", operator.mul, None)]


def legacy_optimizer():
    """A `tf_keras` optimizer with masks."""
    import tf_keras

    from freezeops.legacy import MaskedOptimizer

    optimizer = MaskedOptimizer(tf_keras.optimizers.Adam(0.01), masks={"kernel": BODY}, name="legacy")
    optimizer.freeze("bias", [0, 3])
    return optimizer


def legacy_variables():
    """TensorFlow variables with odd values."""
    return [tf.Variable(np.resize(ODD, (5, 6)), name="kernel"), tf.Variable(np.resize(ODD, 6), name="bias")]


def delta_models():
    """A base, and a model with changes that are written as positions and as bits."""
    base, model = new_model(None), new_model(None)
    kernel, bias = model.get_layer("body").kernel.numpy(), model.get_layer("body").bias.numpy()
    kernel[0, 1] = ODD[0]
    model.get_layer("body").kernel.assign(kernel)
    model.get_layer("body").bias.assign(np.resize(ODD, bias.shape))
    return base, model


def optimizer_state(optimizer):
    """The variables of the inner optimizer, by path and number."""
    return {f"{i} {v.path}": v.numpy() for i, v in enumerate(optimizer.inner_optimizer.variables)}


def config_text(optimizer):
    """An optimizer's config as text."""
    return json.dumps(keras.saving.serialize_keras_object(optimizer), sort_keys=True, indent=1) + "\n"


def same_bytes(folder, state):
    """Writes the files that hold the same bytes whenever they are written."""
    model = trained_model(state)
    fz.save_masks(model.optimizer, folder / f"{state}.masks")
    (folder / f"{state}.json").write_text(config_text(model.optimizer))
    entries = {}
    model.optimizer.save_own_variables(entries)
    np.savez(folder / f"{state}.entries.npz", **{key.replace("/", "|"): value for key, value in entries.items()})
    return model


def main(folder):
    """Writes all files."""
    for state in STATES:
        model = same_bytes(folder, state)
        model.save(folder / f"{state}.keras")
        model.save_weights(folder / f"{state}.weights.h5")
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / state))
        expected = {f"weight {v.path}": v.numpy() for v in model.weights}
        expected |= {f"mask {path}": mask.to_numpy() for path, mask in model.optimizer.masks_by_path().items()}
        expected |= {f"slot {name}": value for name, value in optimizer_state(model.optimizer).items()}
        np.savez(folder / f"{state}.expected.npz", **{key.replace("/", "|"): value for key, value in expected.items()})
    (folder / "unbuilt.json").write_text(config_text(unbuilt_optimizer()))
    (folder / "masks.pickle").write_bytes(pickle.dumps(masks(), protocol=4))
    (folder / "slots.pickle").write_bytes(pickle.dumps(slots(), protocol=4))
    optimizer, variables = legacy_optimizer(), legacy_variables()
    optimizer.build(variables)
    (folder / "legacy.json").write_text(json.dumps(optimizer.get_config(), sort_keys=True, indent=1) + "\n")
    tf.train.Checkpoint(optimizer=optimizer, variables=variables).write(str(folder / "legacy"))
    base, model = delta_models()
    fz.export_delta(model, base, folder / "delta")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
