"""Training with trainable parts of gradients: the settings of optimizers and of `fit`, and what users' own steps do."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from agreement import PART, assert_agree, trained, untrained
from network import Trained, every_way


def both(name, jit=False, rtol=2e-5, atol=2e-6, outcome=PART, run=Trained.fit, **options):
    """A network that was trained with parts of gradients, compared with one that was trained with whole ones."""
    part = untrained(name, True, jit, **options)
    run(part)
    whole = untrained(name, False, False, **options)  # which XLA need not compile as well
    run(whole)
    assert part.outcomes() == dict.fromkeys(part.masks, outcome)
    assert_agree(part, whole, rtol, atol)
    return part, whole


@functools.cache
def plain_values():
    """Values after three steps, without a setting, by path."""
    return trained(every_way, False, True).values()


def assert_unlike_plain(part):
    """Fails where what was set has done nothing."""
    assert any((part.values()[path] != plain_values()[path]).any() for path in part.masks)


SETTINGS = {
    "clipvalue": {"clipvalue": 1e-3},
    "clipnorm": {"clipnorm": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.01},
    "weight decay": {"weight_decay": 0.3},
    "average": {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2},
    "accumulation": {"gradient_accumulation_steps": 2},
    "loss_scale_factor": {"loss_scale_factor": 64.0},
}


@pytest.mark.parametrize(
    ("setting", "jit", "fused"),
    [
        *((setting, False, fused) for setting in SETTINGS for fused in (True, False)),
        *((setting, True, True) for setting in ("global_clipnorm", "accumulation")),
    ],
)
def test_settings_of_the_inner_optimizer(setting, jit, fused):
    if setting == "weight decay":

        def inner():
            return keras.optimizers.AdamW(0.01, epsilon=1e-3, **SETTINGS[setting])
    else:

        def inner():
            return keras.optimizers.SGD(0.05, momentum=0.9, **SETTINGS[setting])

    part, _ = both(every_way, jit, inner=inner, fused=fused)
    if setting != "loss_scale_factor":
        assert_unlike_plain(part)


def scaler(inner):
    return keras.optimizers.LossScaleOptimizer(inner, initial_scale=256.0, dynamic_growth_steps=2)


@pytest.mark.parametrize(
    ("where", "policy", "jit"),
    [
        *((where, policy, False) for where in ("inside", "outside") for policy in ("float32", "mixed_float16")),
        ("inside", "float32", True),
        ("outside", "mixed_float16", True),
    ],
)
def test_loss_scaling(where, policy, jit):
    options = {"inner": lambda: scaler(keras.optimizers.SGD(0.05, momentum=0.9))}
    if where == "outside":
        options = {"around": scaler}
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if policy == "mixed_float16" else {}
    part, _ = both(every_way, jit, policy=policy, **tolerance, **options)
    outer = part.model.optimizer if where == "outside" else part.optimizer.inner_optimizer
    assert int(part.optimizer.iterations) == 3
    assert float(outer.dynamic_scale) == 512.0


@pytest.mark.parametrize("jit", [False, True, "auto"])
def test_several_steps_in_one_call(jit):
    part, _ = both(every_way, jit, run=lambda each: each.fit(6), compile_options={"steps_per_execution": 3})
    assert int(part.optimizer.iterations) == 6


def fit_with_a_short_batch(of):
    of.model.fit(of.x[:7], of.y[:7], batch_size=4, epochs=2, verbose=0, shuffle=False)


IN_XLA = ("Dense of rank 4", "Conv2D, inputs", "LayerNormalization")


@pytest.mark.parametrize(
    "name",
    [
        "Dense", "Dense of rank 4", "EinsumDense", "MultiHeadAttention, rows", "GroupQueryAttention", "Embedding",
        "tied embedding, entries", "Conv2D, inputs", "Conv2D 1x1, entries", "DepthwiseConv2D", "TimeDistributed",
        "unrolled GRU", "LayerNormalization", "GroupNormalization",
    ],
)  # fmt: skip
def test_batches_of_any_size(name):
    """The batch axis is unknown when the step is traced, and the last batch is short."""
    both(name, run=fit_with_a_short_batch)
    if name in IN_XLA:
        both(name, True, run=fit_with_a_short_batch)


@pytest.mark.parametrize(
    ("name", "jit"),
    [(name, False) for name in ("Dense, bias", "Dense, rows", "Dense, columns", "Embedding", "l2")]
    + [("Dense, bias", True), ("Dense, rows", True)],
)
def test_room_that_is_left(name, jit):
    """Norms see nothing but the trainable entries."""

    def inner():
        return keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=0.01)

    part, _ = both(name, jit, inner=inner, capacity=0.4, share=0.2)
    full = [report for report in part.optimizer.describe() if report.path in part.masks]
    assert all(report.capacity > report.trainable for report in full)
    exact = trained(name, False, True, inner=inner, share=0.2)
    for path, values in exact.values().items():
        np.testing.assert_allclose(part.values()[path], values, rtol=2e-5, atol=2e-6, err_msg=path)


# What a user's own step does with gradients.


def own_step(change, after=lambda self, whole: {}):
    """A model class whose step changes its gradients before they are applied, and logs something afterwards."""

    class Own(keras.Model):
        def train_step(self, data):
            x, y, *_ = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            whole = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(change(self, whole), self.trainable_variables)
            return {"loss": loss, **after(self, whole)}

    return Own


def _by_a_variable(self, gradients):
    if not hasattr(self, "rate"):
        with tf.init_scope():
            self.rate = tf.Variable(0.5)
    return [gradient * self.rate for gradient in gradients]


SEEN_THROUGH = {
    "times a number": lambda self, gradients: [0.5 * gradient for gradient in gradients],
    "by a number": lambda self, gradients: [-(gradient / 3.0) for gradient in gradients],
    "times a variable": _by_a_variable,
    "times a tensor": lambda self, gradients: [
        gradient * tf.cast(self.optimizer.iterations + 1, "float32") for gradient in gradients
    ],
    "clip_by_value": lambda self, gradients: [tf.clip_by_value(gradient, -1e-3, 1e-3) for gradient in gradients],
}

CLIPPED = {
    "clip_by_norm": lambda self, gradients: [tf.clip_by_norm(gradient, 0.01) for gradient in gradients],
    "clip_by_global_norm": lambda self, gradients: tf.clip_by_global_norm(gradients, 0.01)[0],
    "keras.ops": lambda self, gradients: [
        gradient * (0.01 / keras.ops.sqrt(keras.ops.sum(gradient**2))) for gradient in gradients
    ],
}


@pytest.mark.parametrize("change", SEEN_THROUGH)
def test_a_factor_of_the_users(change):
    part, _ = both(every_way, model_class=own_step(SEEN_THROUGH[change]))
    assert_unlike_plain(part)


@pytest.mark.parametrize(("change", "jit"), [*((change, False) for change in CLIPPED), ("clip_by_global_norm", True)])
def test_norms_of_the_users(change, jit):
    """They are of whole gradients, with frozen entries."""
    outcome = ("whole", "something else uses it, too")
    with pytest.warns(UserWarning, match="something else uses it, too"):
        both(every_way, jit, model_class=own_step(CLIPPED[change]), outcome=outcome)


def norms(self, gradients):
    return {"norm": tf.linalg.global_norm(gradients)}


@pytest.mark.parametrize(("before", "jit"), [(False, False), (True, False), (False, True)])
def test_norms_that_the_user_logs(before, jit):
    """Of whole gradients; those that are taken before `apply` keep the optimizer from making parts."""
    logged = {}

    def change(self, gradients):
        logged.update(norms(self, gradients) if before else {})
        return gradients

    def after(self, gradients):
        return logged if before else norms(self, gradients)

    def run(each):
        data = tf.data.Dataset.from_tensors((each.x, each.y)).repeat(3)
        each.norms = [each.model.train_on_batch(x, y, return_dict=True)["norm"] for x, y in data]

    options = {"model_class": own_step(change, after), "run": run}
    if before:
        with pytest.warns(UserWarning, match="something else uses it, too"):
            part, whole = both(every_way, jit, outcome=("whole", "something else uses it, too"), **options)
    else:
        part, whole = both(every_way, jit, **options)
    np.testing.assert_allclose(part.norms, whole.norms, rtol=1e-5)
    assert part.norms[0] > 0
