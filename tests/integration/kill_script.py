"""A `fit` that `test_kill.py` kills at random moments. Usage: python kill_script.py WAY FOLDER

Resumes from what it finds in the folder, and checks masks and frozen entries before it goes on and at every step.
"""

import os
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from common import assert_same_bits
from training import body_and_head

import freezeops as fz

WAY, FOLDER = sys.argv[1], Path(sys.argv[2])
EPOCHS, BATCHES, CHANGE = 10, 4, 22
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16 * BATCHES, 6)).astype("float32")
Y = RNG.normal(size=(16 * BATCHES, 3)).astype("float32")
MASKS = [RNG.random((6, 12)) < 0.5 for _ in range(2)]


def make_model():
    model = body_and_head(seed=3)
    kernel = model.get_layer("body").kernel
    odd = kernel.numpy()
    odd[~MASKS[0]] = np.resize(np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32).view("f4"), 72)[
        : (~MASKS[0]).sum()
    ]
    kernel.assign(np.where(MASKS[0] | MASKS[1], np.nan_to_num(odd, posinf=1.0), odd))
    inner = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    state = os.environ.get("STATE", "full")
    options = {"state": state, "capacity": 1.0 if state == "compact" else None}
    model.compile(fz.MaskedOptimizer(inner, masks={"body/kernel": MASKS[0]}, **options), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def replace(save, path):
    """A new file, or the old one."""
    temporary = path.with_name("new_" + path.name)
    save(temporary)
    os.replace(temporary, path)


class Guard(keras.callbacks.Callback):
    """Changes the mask in mid-training, and looks at the frozen entries after every batch."""

    def on_train_begin(self, logs=None):
        self.kernel = self.model.get_layer("body").kernel
        self.optimizer = self.model.optimizer
        steps = int(self.optimizer.iterations)
        mask = MASKS[steps > CHANGE]
        assert self.optimizer.mask_for(self.kernel) == fz.Mask.from_array(mask), f"another mask after {steps} steps"
        original = make_model().get_layer("body").kernel.numpy()
        never = ~(MASKS[0] | MASKS[1]) if steps > CHANGE else ~MASKS[0]
        assert_same_bits(self.kernel.numpy()[never], original[never], "frozen entries moved")
        slots = [v.numpy() for v in self.optimizer.inner_optimizer.variables[2:]]
        assert len(slots) == 8 and (steps == 0 or any(slot.any() for slot in slots))
        self.seen = self.kernel.numpy()
        (FOLDER / "begun").touch()

    def on_train_batch_begin(self, batch, logs=None):
        if int(self.optimizer.iterations) == CHANGE:
            self.optimizer.register_mask(self.kernel, MASKS[1])
            self.seen = self.kernel.numpy()

    def on_train_batch_end(self, batch, logs=None):
        mask = self.optimizer.mask_for(self.kernel).to_numpy()
        assert_same_bits(self.kernel.numpy()[~mask], self.seen[~mask], "frozen entries moved")
        if "SLOWLY" in os.environ:
            time.sleep(0.03)


class EveryBatch(keras.callbacks.Callback):
    """Calls something after every batch."""

    def __init__(self, save):
        super().__init__()
        self.save = save

    def on_train_batch_end(self, batch, logs=None):
        self.save()


def fit_rest(model, save):
    """What is left of the batches, in one go."""
    order = [i % BATCHES for i in range(int(model.optimizer.iterations), EPOCHS * BATCHES)]
    data = tf.data.Dataset.from_tensor_slices((X.reshape(BATCHES, 16, 6), Y.reshape(BATCHES, 16, 3)))
    batches = [batch for batch in data]

    def rest():
        for i in order:
            yield batches[i]

    data = tf.data.Dataset.from_generator(rest, output_signature=(tf.TensorSpec((16, 6)), tf.TensorSpec((16, 3))))
    if order:
        model.fit(data, verbose=0, callbacks=[Guard(), EveryBatch(save)])


def way_manager():
    model = make_model()
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    manager = tf.train.CheckpointManager(checkpoint, str(FOLDER / "checkpoints"), max_to_keep=2)
    if manager.latest_checkpoint:
        checkpoint.restore(manager.latest_checkpoint).assert_existing_objects_matched()
    fit_rest(model, manager.save)
    return model


def way_keras_file():
    path = FOLDER / "model.keras"
    model = keras.models.load_model(path) if path.exists() else make_model()
    fit_rest(model, lambda: replace(model.save, path))
    return model


def way_backup():
    model = make_model()
    # Its writing is not atomic: without `double_checkpoint` a process killed in it leaves nothing to resume from.
    backup = keras.callbacks.BackupAndRestore(FOLDER / "backup", double_checkpoint=True)
    model.fit(X, Y, batch_size=16, shuffle=False, epochs=EPOCHS, verbose=0, callbacks=[backup, Guard()])
    return model


if __name__ == "__main__":
    trained = globals()[f"way_{WAY}"]()
    arrays = {f"v{i}": v.numpy() for i, v in enumerate(trained.trainable_variables + trained.optimizer.variables)}
    np.savez(FOLDER / "new.npz", steps=int(trained.optimizer.iterations), **arrays)
    os.replace(FOLDER / "new.npz", FOLDER / "done.npz")
