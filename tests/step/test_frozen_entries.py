"""`with optimizer.frozen_entries():` around writes of a training step's own."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MODES, assert_same_bits, in_mode
from training import numpy_dtype, odd_values

import freezeops as fz
from freezeops.registry import rules_config

STATES = ("full", "compact")
DOC = Path(__file__).resolve().parents[2] / "docs" / "training.md"
DOC_BLOCKS = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
MASK = np.random.default_rng(0).random((13, 7)) < 0.5


def make_optimizer(kind, masks=None, **options):
    """An optimizer of Keras 3, or of tf_keras for `legacy`; not built."""
    inner = options.pop("inner", {})
    if kind == "legacy":
        tf_keras = pytest.importorskip("tf_keras")
        from freezeops import legacy

        return legacy.MaskedOptimizer(tf_keras.optimizers.Adam(0.1, **inner), masks=masks)
    return fz.MaskedOptimizer(keras.optimizers.Adam(0.1, **inner), masks=masks, state=kind, **options)


KINDS = (*STATES, "legacy")


def odd_variable(dtype="float32", name="w"):
    """Signed zeros, infinities, subnormals and NaN payloads everywhere."""
    values = np.resize(odd_values(dtype, finite=False), MASK.shape)
    return tf.Variable(values, name=name)


def step(optimizer, gradients, variables):
    optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_frozen_entries_come_out_as_they_went_in(kind, mode, dtype, backend):
    rows = np.arange(13) % 3 == 0
    variables = [odd_variable(dtype, "w"), odd_variable(dtype, "rows"), odd_variable(dtype, "for_good")]
    free = tf.Variable(np.ones(3, numpy_dtype(dtype)), name="free")
    optimizer = make_optimizer(kind, {"w": MASK, "rows": rows[:, None]})
    optimizer.freeze("for_good", permanent=True)
    optimizer.build([*variables, free])
    before = [v.numpy() for v in variables]

    def write(value):
        with optimizer.frozen_entries():
            for v in [*variables, free]:
                v.assign(tf.fill(v.shape, value))

    write = in_mode(write, mode)
    for value in (2.5, -1.5):
        write(tf.constant(value, variables[0].dtype))
        masks = MASK, np.broadcast_to(rows[:, None], MASK.shape), np.zeros(MASK.shape, bool)
        for v, old, mask in zip(variables, before, masks, strict=True):
            assert_same_bits(v.numpy()[~mask], old[~mask])
            assert_same_bits(v.numpy()[mask], np.full(mask.sum(), value, numpy_dtype(dtype)))
        assert_same_bits(free.numpy(), np.full(3, value, numpy_dtype(dtype)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_blocks_may_be_nested_around_steps(kind, mode, fused, backend):
    if kind == "legacy" and not fused:
        pytest.skip("there is nothing fused")
    v = odd_variable()
    free = tf.Variable(tf.ones([3]), name="free")
    optimizer = make_optimizer(kind, {"w": MASK}, **({} if kind == "legacy" else {"fused": fused}))
    optimizer.build([v, free])
    before = v.numpy()

    def train():
        block = optimizer.frozen_entries()
        with block:
            v.assign_add(tf.ones_like(v))
            with optimizer.frozen_entries(), block:
                v.assign(tf.ones_like(v))
                step(optimizer, [tf.ones_like(v), tf.ones([3])], [v, free])
                v.assign(v * 2)
            step(optimizer, [tf.ones_like(v), tf.ones([3])], [v, free])
            v.assign(v - 0.0)

    train = in_mode(train, mode)
    for _ in range(2):
        train()
        assert_same_bits(v.numpy()[~MASK], before[~MASK])
        np.testing.assert_allclose(v.numpy()[MASK], 1.7, atol=0.05)
    assert int(optimizer.iterations.numpy()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_entries_keep_what_the_block_made_of_them(kind):
    """Compact state trains on from there."""
    v = tf.Variable(np.ones(MASK.shape, np.float32), name="w")
    optimizer = make_optimizer(kind, {"w": MASK})
    optimizer.build([v])
    step(optimizer, [tf.ones_like(v)], [v])
    with optimizer.frozen_entries():
        v.assign(tf.fill(MASK.shape, 5.0))
    step(optimizer, [tf.ones_like(v)], [v])
    np.testing.assert_allclose(v.numpy(), np.where(MASK, 4.9, 1.0), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_restored_on_an_exception(kind, backend):
    v = odd_variable()
    optimizer = make_optimizer(kind, {"w": MASK})
    optimizer.build([v])
    before = v.numpy()
    for error in (RuntimeError("out"), KeyboardInterrupt()):

        def fails(error=error):
            with optimizer.frozen_entries():
                v.assign(tf.ones_like(v))
                raise error

        with pytest.raises(type(error)):
            fails()
        assert_same_bits(v.numpy()[~MASK], before[~MASK])
        assert_same_bits(v.numpy()[MASK], np.ones(MASK.sum(), np.float32))

    @tf.function
    def fails_as_it_runs(x):
        v.assign(tf.zeros_like(v))
        tf.debugging.assert_positive(x)
        v.assign_add(tf.ones_like(v))

    with pytest.raises(tf.errors.InvalidArgumentError), optimizer.frozen_entries():
        fails_as_it_runs(tf.constant(-1.0))
    assert_same_bits(v.numpy()[~MASK], before[~MASK])


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_that_fails_leaves_everything(kind):
    v = odd_variable()
    optimizer = make_optimizer(kind, {"w": MASK})
    optimizer.build([v])
    before = v.numpy()

    @tf.function
    def traced(fail):
        with optimizer.frozen_entries():
            v.assign(tf.ones_like(v))
            if fail:
                raise RuntimeError("out")

    with pytest.raises(RuntimeError, match="out"):
        traced(True)
    assert_same_bits(v.numpy(), before)
    traced(False)
    assert_same_bits(v.numpy()[~MASK], before[~MASK])
    assert (v.numpy()[MASK] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_branches_and_loops(kind, backend):
    v = odd_variable()
    optimizer = make_optimizer(kind, {"w": MASK})
    optimizer.build([v])
    before = v.numpy()

    @tf.function
    def traced(x):
        for _ in tf.range(3):
            if x > 0:
                with optimizer.frozen_entries():
                    v.assign(tf.fill(v.shape, x))
        return x

    traced(tf.constant(2.0))
    assert_same_bits(v.numpy()[~MASK], before[~MASK])
    assert (v.numpy()[MASK] == 2).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_under_a_tape(kind, mode, backend):
    v = tf.Variable(np.ones(MASK.shape, np.float32), name="w")
    optimizer = make_optimizer(kind, {"w": MASK})
    optimizer.build([v])

    def gradient():
        with tf.GradientTape() as tape:
            with optimizer.frozen_entries():
                v.assign(tf.fill(v.shape, 2.0))
            loss = tf.reduce_sum(v**2)
        return tape.gradient(loss, v)

    assert_same_bits(in_mode(gradient, mode)().numpy(), np.where(MASK, 4, 2).astype("float32"))


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_replica_under_xla(kind):
    """Several replicas: `case_frozen_entries` in distribute_script.py."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        v = odd_variable()
        optimizer = make_optimizer(kind, {"w": MASK})
        optimizer.build([v])
    before = v.numpy()

    def write():
        with optimizer.frozen_entries():
            v.assign(tf.ones(v.shape))

    tf.function(lambda: strategy.run(write), jit_compile=True)()
    assert_same_bits(v.numpy()[~MASK], before[~MASK])
    assert (v.numpy()[MASK] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_build_is_an_error(kind):
    optimizer = make_optimizer(kind, {"w": MASK})
    with pytest.raises(ValueError, match=r"must be built before `frozen_entries\(\)` .*optimizer.build\(.*Received: "):
        optimizer.frozen_entries()


def test_masks_that_are_still_to_come_are_an_error(monkeypatch):
    monkeypatch.setattr(rules_config, "LIMIT", 4)  # a config that leaves the mask out
    v = odd_variable()
    optimizer = make_optimizer("compact", {"w": MASK})
    optimizer.build([v])
    copy = fz.MaskedOptimizer.from_config(optimizer.get_config())
    copy.build([v])
    with pytest.raises(ValueError, match="must be given its masks"), copy.frozen_entries():
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_is_what_is_frozen_as_the_block_begins(kind):
    v = tf.Variable(np.ones(MASK.shape, np.float32), name="w")
    optimizer = make_optimizer(kind, {"w": MASK}, **({"capacity": 1.0} if kind == "compact" else {}))
    optimizer.build([v])
    with optimizer.frozen_entries():
        v.assign(v * 2)
        optimizer.register_mask(v, ~MASK)
    assert_same_bits(v.numpy(), np.where(MASK, 2, 1).astype("float32"))
    with optimizer.frozen_entries():
        v.assign(v * 3)
    assert_same_bits(v.numpy(), np.where(MASK, 2, 3).astype("float32"))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_change_without_a_trace(kind):
    v = tf.Variable(np.ones(MASK.shape, np.float32), name="w")
    optimizer = make_optimizer(kind, {"w": MASK}, **({"capacity": 1.0} if kind == "compact" else {}))
    optimizer.build([v])

    @tf.function
    def double():
        with optimizer.frozen_entries():
            v.assign(v * 2)

    double()
    optimizer.register_mask(v, ~MASK)
    double()
    assert_same_bits(v.numpy(), np.full(MASK.shape, 2, "float32"))
    assert double.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_function_that_was_traced_before_repack_fails(jit_compile):
    v = tf.Variable(np.ones(MASK.shape, np.float32), name="w")
    optimizer = make_optimizer("compact", {"w": MASK})
    optimizer.build([v])

    @tf.function(jit_compile=jit_compile)
    def double():
        with optimizer.frozen_entries():
            v.assign(v * 2)

    double()
    optimizer.repack(masks={"w": np.ones(MASK.shape, bool)})
    before = v.numpy()
    with pytest.raises(tf.errors.OpError):
        double()
    assert_same_bits(v.numpy(), before)


@pytest.mark.parametrize("kind", ["full", "legacy"])
def test_averages_of_frozen_entries_are_kept(kind):
    v = odd_variable()
    optimizer = make_optimizer(kind, {"w": MASK}, inner={"use_ema": True})
    optimizer.build([v])
    before = v.numpy()
    (average,) = optimizer.inner_optimizer._model_variables_moving_average
    average.assign(v)
    with optimizer.frozen_entries():
        v.assign(v + average)
        average.assign(v - average)
    assert_same_bits(v.numpy()[~MASK], before[~MASK])
    assert_same_bits(average.numpy()[~MASK], before[~MASK])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("state", STATES)
def test_sharpness_aware_minimization_of_the_docs(state, mode, recwarn):
    (code,) = [block for block in DOC_BLOCKS if "frozen_entries" in block]
    x, y = (tf.random.stateless_normal([64, n], [1, n]) for n in (8, 2))
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, name="hidden"), keras.layers.Dense(2)])
    kernel = model.get_layer("hidden").kernel
    odd = kernel.numpy()
    odd[:, :3] = -0.0
    kernel.assign(odd)
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(1e-2), state=state)
    optimizer.freeze("hidden/kernel", np.s_[:, :6])
    names = {"tf": tf, "model": model, "optimizer": optimizer, "loss_fn": keras.losses.MeanSquaredError()}
    exec(code, names)
    optimizer.build(model.trainable_variables)
    step = in_mode(names["sam_step"], mode)
    losses = [float(step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert_same_bits(kernel.numpy()[:, :6], odd[:, :6])
    assert (kernel.numpy()[:, 6:] != odd[:, 6:]).any()
    assert not [w for w in recwarn if "frozen" in str(w.message)]
