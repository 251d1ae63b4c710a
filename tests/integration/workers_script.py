"""One worker of `test_workers.py`: a process of a `MultiWorkerMirroredStrategy` on the loopback interface.

Usage: TF_CONFIG=... python workers_script.py CASE FOLDER
"""

import json
import os
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MIXING, SETUPS, assert_same_bits
from training import body_and_head, descend

import freezeops as fz

FOLDER = Path(sys.argv[2])
CONFIG = json.loads(os.environ.get("TF_CONFIG", "null"))
TASK = CONFIG["task"]["index"] if CONFIG else None
strategy = tf.distribute.MultiWorkerMirroredStrategy() if TASK is not None else tf.distribute.get_strategy()

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
Y = RNG.normal(size=(32, 3)).astype("float32")
MASK = RNG.random((6, 12)) < 0.5
OTHER = RNG.random((6, 12)) < 0.5


def value(variable):
    """What this worker holds."""
    return np.array(variable.value.values[0] if hasattr(variable.value, "values") else variable.value)


class Run:
    """A model, its optimizer and a step over this worker's part of the global batch."""

    def __init__(self, inner, masks=None, **options):
        with strategy.scope():
            self.model = body_and_head(seed=3)
            self.optimizer = fz.MaskedOptimizer(inner(), masks=masks or {"body/kernel": MASK}, **options)
            self.optimizer.build(self.model.trainable_variables)
        self.kernel = self.model.get_layer("body").kernel
        model, optimizer = self.model, self.optimizer

        def replica_step():
            workers = strategy.num_replicas_in_sync
            # An equal part of the batch each: the gradients are summed over the workers.
            part = slice(TASK, None, workers) if TASK is not None else slice(None)
            descend(model, optimizer, X[part], Y[part], len(X))

        self.step = tf.function(lambda: strategy.run(replica_step), autograph=False)

    def train_under_both(self, first, second, name, between=lambda: None):
        """Two steps under the kernel's mask `first`, two under `second`; frozen entries stay, all others move."""
        before = value(self.kernel)
        for _ in range(2):
            self.step()
        middle = value(self.kernel)
        assert_same_bits(middle[~first], before[~first], name)
        assert (middle[first] != before[first]).all(), name
        self.optimizer.register_mask(self.kernel, second)
        between()
        for _ in range(2):
            self.step()
        after = value(self.kernel)
        assert_same_bits(after[~second], middle[~second], name)
        assert (after[second] != middle[second]).all(), name
        return after


def report(**arrays):
    """For the test to compare between workers and runs."""
    np.savez(FOLDER / f"{sys.argv[1]}_{'one' if TASK is None else TASK}.npz", **arrays)


def case_every_optimizer():
    """Every family; then masks change in mid-training; frozen entries stay, in every worker."""
    final = {}
    for name, setup in SETUPS.items():
        run = Run(lambda setup=setup: setup(weight_decay=0.01))
        after = run.train_under_both(MASK, OTHER, name, lambda run=run: run.optimizer.freeze("head/bias"))
        assert int(np.array(run.optimizer.iterations)) == 4
        final[name] = after
    report(**final)


def case_compact():
    """As `case_every_optimizer`, in compact state, with masks that differ between the workers at first."""
    final = {}
    for name, setup in SETUPS.items():
        if name in MIXING:
            continue
        run = Run(lambda setup=setup: setup(weight_decay=0.01), state="compact", capacity={"body/kernel": 0.9})
        final[name] = run.train_under_both(MASK, OTHER, name)
    report(**final)


def case_skips():
    """Parts of gradients, by each way; then masks that change; frozen entries stay, in every worker."""
    final = {}
    rows, columns = np.zeros((2, 6, 12), bool)
    rows[:2], columns[:, :3] = True, True
    entries = RNG.permutation(72).reshape(6, 12) < 18
    for name, first, second in (
        ("entries", entries, columns),
        ("rows", rows, rows[::-1]),
        ("columns", columns, entries),
    ):
        run = Run(SETUPS["Adam"], masks={"body/kernel": first}, state="compact", skip_frozen_gradients=True)
        after = run.train_under_both(first, second, name)
        (of_kernel,) = [each for each in run.optimizer.describe() if each.path.endswith("body/kernel")]
        assert of_kernel.gradient == "trainable part only", of_kernel
        final[name] = after
    report(**final)


def case_compact_chief():
    """Workers that were given masks of different counts make room for the chief's."""
    for size in (9, 24, 1000):
        masks = [np.random.default_rng(seed).random(size) < 0.5 for seed in (1, 2)]
        masks[0][:2], masks[1][1:] = [True, False], False
        with strategy.scope():
            variable = keras.Variable(np.ones(size, "float32"), name="v")
            optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v": masks[TASK]}, state="compact")
            optimizer.build([variable])
        assert optimizer.mask_for(variable) == fz.Mask.from_array(masks[0]), size
        tf.function(lambda: strategy.run(lambda: optimizer.apply([tf.ones(size)], [variable])), autograph=False)()  # noqa: B023
        np.testing.assert_array_equal(value(variable) != 1, masks[0])


def case_chief():
    """Workers that were given different masks begin with the chief's, all lengths of packed bits included."""
    for size in (1, 8, 9, 24, 25, 40, 1000):
        masks = [np.random.default_rng(seed).random(size) < 0.5 for seed in (1, 2)]
        with strategy.scope():
            variable = keras.Variable(np.ones(size, "float32"), name="v")
            optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v": masks[TASK]})
            optimizer.build([variable])
        assert optimizer.mask_for(variable) == fz.Mask.from_array(masks[0]), size


def case_loss_scale():
    """A NaN under a frozen entry, in one worker only, skips nothing; under a trainable one, in all of them, it does.

    (In one worker only, under a trainable entry, it ends the run: Keras's LossScaleOptimizer looks at gradients before
    they are summed, so that one worker waits for the other, which skips. A bare one does the same.)
    """
    with strategy.scope():
        table = keras.Variable(np.ones((4, 3), "float32"), name="table")
        scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.5), initial_scale=4.0)
        optimizer = fz.MaskedOptimizer(scaler)
        optimizer.build([table])
    optimizer.freeze(table, [0])

    def step(row):
        bad = np.ones((4, 3), "float32")
        if TASK == 1 or row == 2:
            bad[row] = np.nan
        tf.function(lambda: strategy.run(lambda: optimizer.apply([tf.constant(bad)])), autograph=False)()
        return value(table)

    first = step(0)
    assert_same_bits(first[0], np.ones(3, "float32"))
    assert (first[1:] < 1).all() and float(np.array(scaler.dynamic_scale)) == 4.0
    second = step(2)
    assert_same_bits(second, first)
    assert float(np.array(scaler.dynamic_scale)) == 2.0
    report(table=second)


def case_keras_fit():
    """Keras's own `fit`, with a bare optimizer."""
    with strategy.scope():
        model = body_and_head(seed=3)
        model.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    try:
        model.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(16), verbose=0)
        report(fails=np.array(False))
    except ValueError as error:
        report(fails=np.array("PerReplica" in str(error)))


def case_tf_keras_fit():
    """`fit` through tf_keras."""
    import tf_keras

    from freezeops.legacy import MaskedOptimizer

    final = {}
    for name, inner in {
        "AdamW": lambda: tf_keras.optimizers.AdamW(0.01, weight_decay=0.1),
        "SGD": lambda: tf_keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.5),
    }.items():
        with strategy.scope():
            model = body_and_head(tf_keras, seed=3)
            optimizer = MaskedOptimizer(inner(), masks={"body/kernel": MASK})
            model.compile(optimizer, "mse", jit_compile=False)
        kernel = model.layers[0].kernel
        before = kernel.numpy()
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
        model.fit(data, epochs=2, verbose=0)
        middle = kernel.numpy()
        assert_same_bits(middle[~MASK], before[~MASK], name)
        assert (middle[MASK] != before[MASK]).all()
        optimizer.register_mask(kernel, OTHER)
        model.fit(data, epochs=2, verbose=0)
        after = kernel.numpy()
        assert_same_bits(after[~OTHER], middle[~OTHER], name)
        assert (after[OTHER] != middle[OTHER]).all()
        final[name] = after
    report(**final)


def case_resume():
    """Up to 12 steps, a checkpoint every second one; goes on from the last one that is there."""
    run = Run(SETUPS["AdamW"])
    done = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=run.model, optimizer=run.optimizer, done=done)
    shared = FOLDER / "checkpoints"
    # Every worker has to save; only the chief's files are kept.
    own = shared if TASK in (None, 0) else FOLDER / f"scratch_{TASK}_{os.getpid()}"
    latest = tf.train.latest_checkpoint(str(shared))
    if latest:
        checkpoint.restore(latest).assert_existing_objects_matched()
    manager = tf.train.CheckpointManager(checkpoint, str(own), max_to_keep=3)
    start = int(done)
    (FOLDER / f"started_{TASK}_at_{start}").touch()
    if start >= 4:
        assert run.optimizer.mask_for(run.kernel) == fz.Mask.from_array(OTHER)
    seen = value(run.kernel)
    for i in range(start, 12):
        if i == 3:
            run.optimizer.register_mask(run.kernel, OTHER)
            seen = value(run.kernel)
        run.step()
        mask = MASK if i < 3 else OTHER
        assert_same_bits(value(run.kernel)[~mask], seen[~mask], f"step {i}")
        done.assign_add(1)
        if int(done) % 2 == 0:
            manager.save(checkpoint_number=int(done))
            (FOLDER / f"saved_{TASK}_{int(done)}").touch()
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
    report(**{f"v{i}": value(v) for i, v in enumerate(run.model.trainable_variables + run.optimizer.variables)})


def case_parameter_server():
    """Refused at construction, and where an optimizer that was made outside is built inside."""
    ports = [int(port) for port in os.environ["PORTS"].split()]
    cluster = {"worker": [f"127.0.0.1:{ports[0]}"], "ps": [f"127.0.0.1:{ports[1]}"]}
    servers = [tf.distribute.Server(cluster, job, 0, "grpc", start=True) for job in cluster]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(tf.train.ClusterSpec(cluster), rpc_layer="grpc")
    made_before = fz.MaskedOptimizer(keras.optimizers.SGD())
    with tf.distribute.ParameterServerStrategy(resolver).scope():
        for attempt in (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD()),
            lambda: made_before.build([keras.Variable(np.ones(3), name="v")]),
        ):
            with pytest.raises(NotImplementedError, match="without parameter servers.*ParameterServerStrategyV2"):
                attempt()
    assert not made_before.built and servers
    print("parameter_server passed", flush=True)
    os._exit(0)  # the servers cannot be stopped


def wait_for_the_others(seconds=30):
    """Until every worker has ended its case: one may be receiving still what this process sends of the last sum."""
    ended = [FOLDER / f"{sys.argv[1]}_{task}.ended" for task in range(len(CONFIG["cluster"]["worker"]))]
    ended[TASK].touch()
    deadline = time.monotonic() + seconds
    while not all(file.exists() for file in ended) and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    globals()[f"case_{sys.argv[1]}"]()
    if TASK is not None:
        wait_for_the_others()
    print(f"{sys.argv[1]} passed", flush=True)
