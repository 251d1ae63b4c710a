"""Cases of `test_distribute.py`; each needs a process whose devices were set up before use.

Usage: python distribute_script.py CASE
"""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import tensorflow as tf
from common import MIXING, SETUPS, assert_same_bits
from training import body_and_head, descend

import freezeops as fz

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 6)).astype("float32")
Y = RNG.normal(size=(64, 3)).astype("float32")
MASK = RNG.random((6, 12)) < 0.5


def copies(variable):
    """The value in each replica."""
    return [copy.numpy() for copy in variable.value.values]


def check(variable, before, mask, moves=True):
    first, *others = copies(variable)
    for other in others:
        assert_same_bits(other, first, "replicas differ")
    assert_same_bits(first[~mask], before[~mask], "frozen entries moved")
    if moves:
        assert (first[mask] != before[mask]).all(), "trainable entries did not move"


def in_replicas(step):
    """One step in a `tf.function`, in every replica."""
    tf.function(lambda: strategy.run(step), autograph=False)()


def loop(inner, jit_compile=False, steps=4, during=None, masks=None, **options):
    """A custom loop; returns the kernel, its first value and the optimizer."""
    with strategy.scope():
        model = body_and_head(seed=3)
        optimizer = fz.MaskedOptimizer(inner(), masks=masks or {"body/kernel": MASK}, **options)
        optimizer.build(model.trainable_variables)
    kernel = model.get_layer("body").kernel
    before = copies(kernel)[0]

    def replica_step(x, y):
        descend(model, optimizer, x, y, len(X))

    @tf.function(jit_compile=jit_compile)
    def step(x, y):
        strategy.run(replica_step, args=(x, y))

    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices((X, Y)).batch(64).repeat(steps))
    for i, (x, y) in enumerate(data):
        step(x, y)
        if during:
            during(i, optimizer, kernel)
    return kernel, before, optimizer


def case_loop():
    for name, setup in SETUPS.items():
        kernel, before, optimizer = loop(lambda setup=setup: setup(weight_decay=0.01))
        check(kernel, before, MASK)
        assert int(optimizer.iterations.numpy()) == 4, name


def case_one_device():
    """Trainable entries as in a run on one device with the same global batch."""
    kernel, _, _ = loop(SETUPS["Adam"])
    model = body_and_head(seed=3)
    optimizer = fz.MaskedOptimizer(SETUPS["Adam"](), masks={"body/kernel": MASK})
    for _ in range(4):
        descend(model, optimizer, X, Y, len(X))
    np.testing.assert_allclose(copies(kernel)[0], model.get_layer("body").kernel.numpy(), atol=2e-5)


def case_two_threads():
    """Two threads step at once with one optimizer: what updates for the replicas takes neither step for the other."""
    mask = np.arange(100) % 2 == 0
    with strategy.scope():
        variables = [keras.Variable(np.ones(100, "float32"), name=f"v{i}") for i in range(2)]
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
        for variable in variables:
            optimizer.register_mask(variable, mask)
        optimizer.build(variables)
    first, second_is_done = threading.Event(), threading.Event()
    in_first = threading.local()
    clip = keras.optimizers.Adam._clip_gradients

    def clip_slowly(self, gradients):  # so that the second step is made in the middle of the first
        if getattr(in_first, "yes", False):
            first.set()
            assert second_is_done.wait(60)
        return clip(self, gradients)

    keras.optimizers.Adam._clip_gradients = clip_slowly

    def step(number):
        def replica_step():
            in_first.yes = number == 0
            optimizer.apply([tf.ones(100)], [variables[number]])

        strategy.run(replica_step)

    with ThreadPoolExecutor(1) as pool:
        of_first = pool.submit(step, 0)
        assert first.wait(60)
        step(1)
        second_is_done.set()
        of_first.result(60)
    for variable in variables:
        check(variable, np.ones(100, "float32"), mask)


def case_fit():
    for setup in ("SGD momentum", "AdamW", "Muon" if "Muon" in SETUPS else "Lamb"):
        with strategy.scope():
            model = body_and_head(seed=3)
            optimizer = fz.MaskedOptimizer(SETUPS[setup](), masks={"body/kernel": MASK})
            model.compile(optimizer, "mse", jit_compile=False)
        kernel = model.get_layer("body").kernel
        before = copies(kernel)[0]
        model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
        check(kernel, before, MASK)


def case_change_masks():
    other = RNG.random(MASK.shape) < 0.5
    seen = []

    def during(i, optimizer, kernel):
        seen.append(copies(kernel))
        if i == 1:
            optimizer.register_mask(kernel, other)
            assert optimizer.mask_for(kernel) == fz.Mask.from_array(other)

    kernel, _, _ = loop(SETUPS["AdamW"], during=during)
    check(kernel, seen[1][0], other)


def case_unfreeze():
    """The slots of late entries are seeded, in every replica the same."""
    for setup in ("Adam", "RMSprop"):
        steps = []

        def during(i, optimizer, kernel, steps=steps):
            # Outside of the strategy's scope, as a callback is, and with slots that are not zero.
            if i == 1:
                optimizer.register_mask(kernel, MASK)
            if i == 60:
                optimizer.unfreeze(kernel)
                slots = [v for v in optimizer.inner_optimizer.variables if tuple(v.shape) == MASK.shape]
                assert slots
                for copy in (copy for slot in slots for copy in copies(slot)):
                    assert not copy[~MASK].any() and copy[MASK].any()
            steps.append(copies(kernel))

        _, _, optimizer = loop(SETUPS[setup], steps=63, during=during, masks={"body/kernel": True})
        for first, second in steps:
            assert_same_bits(first, second, "replicas differ")
        for i in (2, 60):
            assert_same_bits(steps[i][0][~MASK], steps[1][0][~MASK])
        moved = np.abs(steps[61][0] - steps[60][0])[~MASK] / float(optimizer.learning_rate.numpy())
        assert (moved > 0.99).all() and (moved < 1.001).all(), moved
        slots = [v for v in optimizer.inner_optimizer.variables if tuple(v.shape) == MASK.shape]
        for slot in slots:
            assert_same_bits(*copies(slot))


def case_outside_of_scope():
    """Callbacks of `fit` and what Keras calls at its end run outside of the strategy's scope: every copy is reached."""
    odd = np.array([3e38, -np.inf, 1e-45, -0.0], "float32")
    for swap in (False, True):
        with strategy.scope():
            model = body_and_head(seed=3)
            kernel = model.get_layer("body").kernel
            inner = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.7)
            optimizer = fz.MaskedOptimizer(inner)
            model.compile(optimizer, "mse", jit_compile=False)
            optimizer.build(model.trainable_variables)
        seen = {}

        class Freeze(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None, kernel=kernel, optimizer=optimizer, seen=seen):
                if batch == 1:
                    optimizer.register_mask(kernel, MASK)
                    seen["frozen"] = copies(kernel)[0]
                if batch == 2:
                    optimizer.unfreeze("head/bias")
                    optimizer.freeze("head/bias")

            def on_test_begin(self, logs=None, kernel=kernel, seen=seen):
                check(kernel, seen["frozen"], MASK, moves=False)

        callbacks = [keras.callbacks.SwapEMAWeights()] if swap else []
        if swap:  # finite values, which the average keeps, but that adding does not
            kernel.assign(np.where(MASK, kernel.numpy(), np.resize(odd[[0, 2, 3]], MASK.shape)))
            optimizer.register_mask(kernel, MASK)
        model.fit(X, Y, batch_size=16, verbose=0, callbacks=[*callbacks, Freeze()], validation_data=(X, Y))
        check(kernel, seen["frozen"], MASK, moves=False)
        for variable in optimizer.inner_optimizer.variables:
            if tuple(variable.shape) == MASK.shape:
                assert_same_bits(*copies(variable), variable.path)


def case_ema():
    # Without `ema_overwrite_frequency`, which Keras 3.15 cannot do here: it merges replicas inside of a condition.
    kernel, before, optimizer = loop(lambda: keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.7))
    check(kernel, before, MASK)
    average = optimizer.inner_optimizer._model_variables_moving_average[0]
    check(average, before, MASK)
    optimizer.finalize_variable_values(optimizer._trainable_variables)
    check(kernel, before, MASK)


def case_loss_scale():
    for around in (False, True):
        with strategy.scope():
            table = keras.Variable(np.ones((4, 3), "float32"), name="table")
            mask = np.eye(4, 3, dtype=bool)
            scaler = keras.optimizers.LossScaleOptimizer
            if around:
                masked = fz.MaskedOptimizer(keras.optimizers.SGD(0.5), masks={"table": mask})
                outer = scale = scaler(masked, initial_scale=2.0)
            else:
                scale = scaler(keras.optimizers.SGD(0.5), initial_scale=2.0)
                outer = masked = fz.MaskedOptimizer(scale, masks={"table": mask})
            outer.build([table])
        gradient = tf.constant(np.where(mask, np.float32(1), np.float32(np.nan)))
        in_replicas(lambda outer=outer, table=table, gradient=gradient: outer.apply([gradient], [table]))
        check(table, np.ones((4, 3), "float32"), mask)
        assert float(scale.dynamic_scale.value.values[0]) == 2.0
        assert int(masked.iterations.numpy()) == 1


def case_sparse():
    for inner in (SETUPS["SGD"], SETUPS["Adam"]):
        with strategy.scope():
            before = RNG.normal(size=(20, 3)).astype("float32")
            before[:10] = -0.0
            table = keras.Variable(before, name="table")
            optimizer = fz.MaskedOptimizer(inner())
            optimizer.freeze(table, np.s_[:10])
            optimizer.build([table])

        def replica_step(optimizer=optimizer, table=table):
            # Each replica names rows of its own; all are written in both.
            index = tf.distribute.get_replica_context().replica_id_in_sync_group
            rows = tf.range(10) * 2 + index
            slices = tf.IndexedSlices(tf.ones((10, 3)), rows, tf.constant([20, 3]))
            optimizer.apply([slices], [table])

        in_replicas(replica_step)
        mask = np.broadcast_to(np.arange(20)[:, None] >= 10, (20, 3))
        check(table, before, mask)


def case_frozen_entries():
    """Around writes in a replica, outside of the replicas, and outside of the strategy's scope."""
    for state in ("full", "compact"):
        with strategy.scope():
            model = body_and_head(seed=3)
            optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"body/kernel": MASK}, state=state)
            optimizer.freeze("head/kernel", permanent=True)
            optimizer.build(model.trainable_variables)
        body, head = (model.get_layer(name).kernel for name in ("body", "head"))
        before = copies(body)[0], copies(head)[0]

        def write(optimizer=optimizer, variables=(body, head)):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            with optimizer.frozen_entries():
                for variable in variables:
                    # Each replica its own copy: what is frozen there must not come from another.
                    variable.value.values[int(tf.get_static_value(replica))].assign_add(tf.ones(variable.shape))

        def check_all(added, variables=(body, head), before=before):
            check(variables[0], before[0], MASK)
            check(variables[1], before[1], np.zeros(before[1].shape, bool))
            np.testing.assert_allclose(copies(variables[0])[0][MASK], before[0][MASK] + added, atol=1e-5)

        strategy.run(write)
        check_all(1)
        in_replicas(write)
        check_all(2)
        with strategy.scope(), optimizer.frozen_entries():
            for variable in (body, head):
                variable.assign(variable.value + 1)
        check_all(3)
        with optimizer.frozen_entries():
            for variable in (body, head):
                for copy in variable.value.values:
                    copy.assign_add(tf.ones(variable.shape))
        check_all(4)


def case_traced_writes():
    """Writes of frozen entries in the forward pass are named, once; nothing else is."""
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.SpectralNormalization(keras.layers.Dense(12, name="body"), name="sn"),
                keras.layers.BatchNormalization(name="bn"),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(3, name="head"),
            ]
        )
        inner = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(0.1))
        optimizer = fz.MaskedOptimizer(inner, masks={"head/.*": False})
        model.compile(optimizer, "mse", metrics=["mae"], jit_compile=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, Y, batch_size=16, verbose=0)
        said = [str(w.message) for w in caught if "forward pass" in str(w.message)]
        assert not said, said
        optimizer.freeze("(body|bn)/.*")
        model.fit(X, Y, batch_size=16, verbose=0)
        said = [str(w.message) for w in caught if "forward pass" in str(w.message)]
    assert len(said) == 1, said
    for path in ("sn/body/kernel']", "moving", "bn/moving_mean'", "bn/moving_variance'"):
        assert path in said[0], (path, said)
    assert "replica" not in said[0], said


def case_compact():
    """Compact state trains the same bits in every replica as full state, masks that change included."""

    def during(i, optimizer, kernel):
        if i == 1:
            optimizer.freeze(kernel, [0])
            optimizer.unfreeze(kernel, [1, 2])

    for name, setup in SETUPS.items():
        if name in MIXING or name == "Ftrl":
            continue
        last = {}
        for state in ("full", "compact"):
            options = {"capacity": 1.0} if state == "compact" else {}
            kernel, before, optimizer = loop(
                lambda setup=setup: setup(weight_decay=0.01), during=during, state=state, **options
            )
            never = ~MASK
            never[[1, 2]] = False
            check(kernel, before, ~never, moves=False)
            last[state] = copies(kernel)[0]
            for variable in optimizer.inner_optimizer.variables:
                if variable.shape.rank:
                    assert_same_bits(*copies(variable), f"{name} {variable.path}")
        np.testing.assert_allclose(last["compact"], last["full"], rtol=1e-6, err_msg=name)


def count_sent_bytes():
    """The bytes of each sum over the replicas from now on, as a list that grows."""
    sent = []
    context = tf.distribute.ReplicaContext
    all_reduce = context.all_reduce

    def counted(self, op, value, *args, **kwargs):
        if self.replica_id_in_sync_group is not None and isinstance(value, list):
            sent.append(sum(int(v.shape.num_elements()) * v.dtype.size for v in value))
        return all_reduce(self, op, value, *args, **kwargs)

    context.all_reduce = counted
    return sent


def case_compact_traffic():
    """Only gradients of trainable entries are summed over the replicas."""
    sent = count_sent_bytes()
    mask = np.zeros((6, 12), bool)
    mask[1, :7] = True
    size = {}
    for state in ("full", "compact"):
        sent.clear()
        loop(SETUPS["Adam"], steps=1, masks={"body/kernel": mask, "head/.*": False}, state=state)
        size[state] = sent[0]
        assert set(sent) == {sent[0]}
    # body/kernel 6 x 12, body/bias 12, head/kernel 12 x 3, head/bias 3
    assert size == {"full": 4 * (72 + 12 + 36 + 3), "compact": 4 * (7 + 12)}, size


def case_compact_outside_of_scope():
    """Repacking, unfreezing and swapping averages from callbacks of `fit`."""
    with strategy.scope():
        model = body_and_head(seed=3)
        kernel = model.get_layer("body").kernel
        inner = keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.7)
        optimizer = fz.MaskedOptimizer(inner, masks={"body/kernel": MASK}, state="compact", capacity=0.8)
        model.compile(optimizer, "mse", jit_compile=False)
    first = copies(kernel)[0]
    more = MASK.copy()
    more[0] = True
    seen = {}

    class Change(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                optimizer.unfreeze(kernel, [0])

        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                optimizer.repack({"body/kernel": True})
                model.make_train_function(force=True)
                seen["before"] = copies(kernel)[0]

        def on_test_begin(self, logs=None):
            check(kernel, first, more if "before" not in seen else np.ones_like(MASK), moves=False)

    callbacks = [keras.callbacks.SwapEMAWeights(), Change()]
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0, callbacks=callbacks, validation_data=(X, Y))
    check(kernel, seen["before"], np.ones_like(MASK))
    assert_same_bits(seen["before"][~more], first[~more])
    for variable in optimizer.inner_optimizer.variables:
        if variable.shape.rank:
            assert_same_bits(*copies(variable), variable.path)


def case_compact_sparse():
    for name in ("SGD", "Adam"):
        last = {}
        for state in ("full", "compact"):
            with strategy.scope():
                before = np.random.default_rng(5).normal(size=(20, 3)).astype("float32")
                table = keras.Variable(before, name="table")
                optimizer = fz.MaskedOptimizer(SETUPS[name](), state=state)
                optimizer.freeze(table, np.s_[:10])
                optimizer.build([table])

            def replica_step(optimizer=optimizer, table=table):
                index = tf.distribute.get_replica_context().replica_id_in_sync_group
                rows = tf.range(10) * 2 + index
                optimizer.apply([tf.IndexedSlices(tf.ones((10, 3)), rows, tf.constant([20, 3]))], [table])

            in_replicas(replica_step)
            check(table, before, np.broadcast_to(np.arange(20)[:, None] >= 10, (20, 3)))
            last[state] = copies(table)[0]
        assert_same_bits(last["compact"], last["full"], name)


def masks_of_every_way():
    """Masks of `body/kernel` for each way in which a gradient's part is made, each with another that fits."""
    entries, others = (RNG.permutation(72).reshape(6, 12) < 20 for _ in range(2))
    grid = np.zeros((6, 12), bool)
    grid[:, :3] = True
    return {
        "entries": (entries, others),
        "rows": (np.arange(6)[:, None] < 2, np.arange(6)[:, None] > 3),
        "columns": (grid, grid[:, ::-1]),
        "columns, then entries": (grid, RNG.permutation(72).reshape(6, 12) < 18),
    }


def gradient_of(optimizer):
    """How the gradient of `body/kernel` was made."""
    (report,) = [report for report in optimizer.describe() if report.path.endswith("body/kernel")]
    return report.gradient


def case_skips():
    """Parts of gradients train as whole ones, in every replica the same, masks that change included."""
    for name, (first, second) in masks_of_every_way().items():
        last = {}
        for skips in (True, False):
            frozen = {}

            def during(i, optimizer, kernel, second=second, frozen=frozen):
                if i == 1:
                    frozen["values"] = copies(kernel)[0]
                    optimizer.register_mask(kernel, second)

            options = {"masks": {"body/kernel": first}, "state": "compact", "skip_frozen_gradients": skips}
            kernel, before, optimizer = loop(SETUPS["SGD momentum"], during=during, **options)
            check(kernel, before, np.broadcast_to(first | second, (6, 12)), moves=False)
            check(kernel, frozen["values"], np.broadcast_to(second, (6, 12)))
            assert (gradient_of(optimizer) == "trainable part only") == skips, name
            last[skips] = copies(kernel)[0]
        np.testing.assert_allclose(last[True], last[False], rtol=1e-5, atol=1e-6, err_msg=name)


def case_skips_fit():
    """In `fit`, under a loss scaler as well."""
    warnings.filterwarnings("ignore", "With `skip_frozen_gradients=True`")
    masks = masks_of_every_way()
    for name in ("entries", "columns"):
        mask, _ = masks[name]
        for scaled in (False, True):
            last = []
            for skips in (True, False):
                with strategy.scope():
                    model = body_and_head(seed=3)
                    optimizer = fz.MaskedOptimizer(
                        SETUPS["SGD momentum"](), {"body/kernel": mask}, state="compact", skip_frozen_gradients=skips
                    )
                    outer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
                    model.compile(outer, "mse", jit_compile=False)
                kernel = model.get_layer("body").kernel
                before = copies(kernel)[0]
                model.fit(X, Y, batch_size=32, verbose=0, shuffle=False)
                check(kernel, before, np.broadcast_to(mask, (6, 12)))
                # Under a scaler that is outside: Keras makes its step in other threads.
                assert (gradient_of(optimizer) == "trainable part only") == (skips and not scaled), name
                last.append(copies(kernel)[0])
            np.testing.assert_allclose(*last, rtol=1e-5, atol=1e-6, err_msg=name)


def case_skips_traffic():
    """As without parts, only gradients of trainable entries are summed over the replicas."""
    sent = count_sent_bytes()
    mask = np.zeros((6, 12), bool)
    mask[1, :7] = True
    masks = {"body/kernel": mask, "head/.*": False}
    loop(SETUPS["Adam"], steps=1, masks=masks, state="compact", skip_frozen_gradients=True)
    assert set(sent) == {4 * (7 + 12)}, sent


if __name__ == "__main__":
    globals()[f"case_{sys.argv[1]}"]()
    print(f"{sys.argv[1]} passed")
