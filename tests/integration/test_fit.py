"""Keras `fit` in its modes, masks that change inside it, and XLA's corners."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits
from training import body_and_head

import freezeops as fz

X = np.random.default_rng(0).normal(size=(96, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(96, 3)).astype("float32")
MASK = np.random.default_rng(2).random((6, 12)) < 0.5

FIT_MODES = {
    "jit_compile=False": {"jit_compile": False},
    "jit_compile=True": {"jit_compile": True},
    "jit_compile=auto": {"jit_compile": "auto"},
    "run_eagerly": {"run_eagerly": True},
}


def new_optimizer(**kwargs):
    return fz.MaskedOptimizer(keras.optimizers.AdamW(0.01, weight_decay=0.1), **kwargs)


@pytest.mark.parametrize("mode", FIT_MODES)
def test_fit(mode, backend):
    model = body_and_head()
    kernel = model.get_layer("body").kernel
    optimizer = new_optimizer(masks={"body/kernel": MASK, "head/bias": False})
    before, bias = kernel.numpy(), model.get_layer("head").bias.numpy()
    model.compile(optimizer, "mse", **FIT_MODES[mode])
    model.fit(X, Y, batch_size=16, epochs=3, verbose=0)
    assert_same_bits(kernel.numpy()[~MASK], before[~MASK])
    assert (kernel.numpy()[MASK] != before[MASK]).all()
    assert_same_bits(model.get_layer("head").bias.numpy(), bias)
    assert int(optimizer.iterations) == 18


@pytest.mark.parametrize("mode", ["jit_compile=False", "jit_compile=True"])
def test_masks_change_inside_fit_without_retracing(mode):
    model = body_and_head()
    kernel = model.get_layer("body").kernel
    optimizer = new_optimizer()
    seen: list = []
    traces: list = []
    counts: list = []

    class ChangeMasks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(kernel.numpy())
            counts.append(len(traces))
            if batch == 1:
                optimizer.register_mask(kernel, MASK)
            elif batch == 3:
                optimizer.unfreeze(kernel, 0)
                optimizer.freeze("head/.*")

    train_step = model.train_step

    def counted(data):
        traces.append(1)
        return train_step(data)

    model.train_step = counted
    model.compile(optimizer, "mse", **FIT_MODES[mode])
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0, callbacks=[ChangeMasks()])
    assert len(seen) == 6 and counts == [counts[0]] * 6
    moved = [(b != a) for a, b in zip(seen, seen[1:], strict=False)]
    assert moved[0].all()
    later = MASK.copy()
    later[0] = True
    for change, mask in zip(moved[1:], [MASK, MASK, later, later], strict=True):
        assert np.array_equal(change, mask)


def test_traced_outside_and_called_inside_jit(backend):
    """Such a function is not traced again, so every op needs an XLA kernel."""
    variable = keras.Variable(X[:6], name="v")
    mask = np.random.default_rng(3).random((6, 6)) < 0.5
    optimizer = new_optimizer(masks={"v": mask})
    optimizer.build([variable])

    @tf.function
    def step(gradient):
        optimizer.apply([gradient], [variable])

    gradient = tf.ones((6, 6))
    before = variable.numpy()
    step(gradient)
    tf.function(lambda g: step(g), jit_compile=True)(gradient)
    assert step.experimental_get_tracing_count() == 1
    assert_same_bits(variable.numpy()[~mask], before[~mask])
    assert int(optimizer.iterations) == 2


@pytest.mark.parametrize("order", ["freezeops first", "XLA first"])
def test_library_loaded_before_and_after_xla_was_used(order):
    use_xla = "tf.function(lambda x: x + 1, jit_compile=True)(tf.ones(3))"
    load = "import freezeops as fz; fz.mask_gradient(tf.ones(3), [True, False, True])"
    lines = [load, use_xla] if order == "freezeops first" else [use_xla, load]
    script = (
        "import tensorflow as tf\n"
        + "\n".join(lines)
        + textwrap.dedent(
            """
        @tf.function(jit_compile=True)
        def masked(x):
            return fz.mask_gradient(x * 2, [True, False, True])
        assert masked(tf.ones(3)).numpy().tolist() == [2.0, 0.0, 2.0]
        """
        )
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_callbacks_that_set_the_learning_rate():
    model = body_and_head()
    optimizer = new_optimizer(masks={"body/kernel": MASK})
    model.compile(optimizer, "mse")
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (epoch + 1))
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[schedule])
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.1, patience=1, min_delta=1e9)
    model.fit(X, Y, epochs=3, verbose=0, callbacks=[plateau])
    assert float(optimizer.learning_rate) == pytest.approx(0.0025)


def test_models_in_two_threads():
    import threading

    results = {}

    def run(name):
        model = body_and_head()
        kernel = model.get_layer("body").kernel
        before = kernel.numpy()
        mask = np.random.default_rng(len(name)).random(MASK.shape) < 0.5
        model.compile(new_optimizer(masks={"body/kernel": mask}), "mse", jit_compile=False)
        model.fit(X, Y, epochs=5, verbose=0)
        results[name] = (before, kernel.numpy(), mask)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for before, after, mask in results.values():
        assert_same_bits(after[~mask], before[~mask])
        assert (after[mask] != before[mask]).all()
