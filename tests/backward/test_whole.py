"""Gradients that are made whole, as without the option: right, and said with a reason."""

import io
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from agreement import PART, assert_agree, assert_frozen_bits, sgd, trained, untrained
from network import Network, in_a_row, layers
from rich.console import Console

import freezeops as fz

WARNING = "With `skip_frozen_gradients=True` a gradient must be a product"


class InAFunction(layers.Layer):
    """A dense layer with a function of its own."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 7), name="kernel")

    def call(self, x):
        return tf.function(lambda x, kernel: tf.tanh(x @ kernel))(x, tf.convert_to_tensor(self.kernel))


class InACondition(layers.Layer):
    """A dense layer that a condition may leave out."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 7), name="kernel")

    def call(self, x):
        return tf.cond(tf.reduce_sum(x) < 1e9, lambda: x @ self.kernel, lambda: tf.zeros([tf.shape(x)[0], 7]))


CASES = {
    "LSTM": (lambda: Network((4, 12), in_a_row(layers.LSTM(7))), "it is made by StatelessWhile"),
    "GRU": (lambda: Network((4, 12), in_a_row(layers.GRU(7))), "it is made by StatelessWhile"),
    "a function of its own": (lambda: Network((12,), in_a_row(InAFunction())), r"it is made by \w*PartitionedCall"),
    "a condition": (lambda: Network((12,), in_a_row(InACondition())), "it is made by (StatelessIf|If)"),
    "BatchNormalization's scale": (
        lambda: Network((4, 12), in_a_row(layers.BatchNormalization()), masked=("gamma",)),
        "something else uses it, too",
    ),
    "3x3 convolution, entries": (
        lambda: Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3))),
        "its mask is not of whole channels of a convolution",
    ),
    "convolution in groups": (
        lambda: Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3, groups=2)), "columns"),
        r"it is made by \w+",
    ),
}


def outcomes(of):
    """How each gradient was made, and the reasons, without repetition."""
    return set(of.outcomes().values())


@pytest.mark.parametrize("name", CASES)
def test_whole(name):
    make, reason = CASES[name]
    with pytest.warns(UserWarning, match=WARNING) as warned:
        part = trained(make, False, True)
    (message,) = [str(each.message) for each in warned if WARNING in str(each.message)]
    for gradient, given in outcomes(part):
        assert gradient == "whole" and re.fullmatch(reason, given), given
        assert given in message
        assert given in summary(part)
    assert_agree(part, trained(make, False, False))


def summary(of):
    console = Console(file=io.StringIO(), width=200)
    of.optimizer.summary(console=console)
    return console.file.getvalue()


@pytest.mark.parametrize(("kind", "share"), [("entries", 0.6), ("rows", 0.9), ("columns", 0.7)])
def test_more_than_is_worth_it(kind, share):
    def make():
        return Network((12,), in_a_row(layers.Dense(16)), kind)

    with pytest.warns(UserWarning, match=WARNING):
        part = trained(make, False, True, share=share)
    assert [gradient for gradient, _ in outcomes(part)] == ["whole"]
    assert re.fullmatch(r"\d\d% of it may be trainable", next(iter(outcomes(part)))[1])
    assert_agree(part, trained(make, False, False, share=share))


def test_more_channels_than_are_worth_it():
    """It does not say that the mask is none of channels."""

    def make():
        return Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3)), "columns")

    for options, share in (({"share": 0.75}, "75%"), ({"share": 0.25, "capacity": 0.75}, "75%")):
        with pytest.warns(UserWarning, match=WARNING):
            part = trained(make, False, True, **options)
        assert outcomes(part) == {("whole", f"{share} of it may be trainable")}
        assert_agree(part, trained(make, False, False, **options))


def test_room_for_more_channels_than_are_trainable():
    def make():
        return Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3)), "columns")

    with pytest.warns(UserWarning, match=WARNING):
        part = trained(make, False, True, capacity=0.5)
    assert outcomes(part) == {("whole", "its mask leaves room, and it is of a convolution")}
    assert_agree(part, trained(make, False, False, capacity=0.5))


def test_single_entries_of_float64():
    with pytest.warns(UserWarning, match=WARNING):
        part = trained("Dense", False, True, "float64")
    assert outcomes(part) == {("whole", "single entries of a product of float64")}
    assert_agree(part, trained("Dense", False, False, "float64"), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["Dense, rows", "Dense, columns"])
def test_rows_and_columns_of_float64_are_parts(name):
    part = trained(name, False, True, "float64")
    assert outcomes(part) == {PART}
    assert_agree(part, trained(name, False, False, "float64"), rtol=1e-12, atol=1e-14)


def test_eager_steps():
    """No warning either: whoever runs eagerly looks for something."""
    options = {"compile_options": {"run_eagerly": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = trained("Dense", False, True, **options)
    assert outcomes(part) == {("whole", "steps in eager mode have no graph to look at")}
    assert_agree(part, trained("Dense", False, False, **options))


class WithoutArguments(layers.Layer):
    """A dense layer whose call takes nothing but its input."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 7), name="kernel")

    def call(self, x):
        return tf.tanh(x @ self.kernel)


@pytest.mark.parametrize("layer", [lambda: layers.Dense(7), WithoutArguments])
def test_rematerialized_layers(layer):
    def make():
        with keras.RematScope(mode="full"):
            rematerialized = layer()
        return Network((12,), in_a_row(rematerialized, layers.Dense(5)), masked=(rematerialized.name + "/kernel",))

    try:
        whole = trained(make, False, False)
    except Exception as error:
        pytest.skip(f"Keras's own RematScope fails: {error}")
    with pytest.warns(UserWarning, match=WARNING):
        part = trained(make, False, True)
    assert all(gradient == "whole" and reason for gradient, reason in outcomes(part))
    assert_agree(part, whole)


# `apply` elsewhere than where the gradients are made.


class Loop:
    """A custom loop over a network, of which `apply` may sit somewhere else."""

    def __init__(self, skips, apply):
        self.network = untrained("Dense", skips)
        self.model, self.optimizer = self.network.model, self.network.optimizer
        self.optimizer.build(self.model.trainable_variables)
        self.apply = apply

    def run(self, jit=False):
        @tf.function(jit_compile=jit)
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self.model(x) - y) ** 2)
            gradients = tape.gradient(loss, self.model.trainable_variables)
            self.apply(self, gradients)

        for _ in range(3):
            step(tf.constant(self.network.x), tf.constant(self.network.y))
        return self


def _apply(loop, gradients):
    loop.optimizer.apply(gradients, loop.model.trainable_variables)


def _in_another_function(loop, gradients):
    tf.function(lambda given: _apply(loop, given))(gradients)


def _in_a_closure(loop, gradients):
    tf.function(lambda: _apply(loop, gradients))()


def _in_a_condition(loop, gradients):
    def applied():
        _apply(loop, gradients)
        return True

    tf.cond(gradients[0][0, 0] < 1e9, applied, lambda: False)


def _in_a_condition_that_fails(loop, gradients):
    def applied():
        _apply(loop, gradients)
        return True

    tf.cond(gradients[0][0, 0] > 1e9, applied, lambda: False)


def _in_a_loop(loop, gradients):
    for _ in tf.range(2):
        _apply(loop, gradients)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("apply", [_in_another_function, _in_a_closure, _in_a_condition, _in_a_loop])
def test_apply_elsewhere(apply, jit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part, whole = (Loop(skips, apply).run(jit).network for skips in (True, False))
    assert outcomes(part) == {("whole", "it comes from outside of the function that calls `apply`")}
    assert_agree(part, whole)


def test_a_condition_that_is_not_met():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Loop(True, _in_a_condition_that_fails).run().network
    for path, values in network.values().items():
        np.testing.assert_array_equal(values, network.initial[path])


# What is said.


def test_one_warning_for_a_model_of_which_nothing_is_found():
    network = untrained(CASES["LSTM"][0], True)
    with pytest.warns(UserWarning, match=WARNING) as warned:
        network.fit()
    assert len(warned) == 1
    network.model.make_train_function(force=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network.fit()
    assert "gradient: whole, it is made by StatelessWhile" in summary(network)
    assert_frozen_bits(network)


def test_no_warning_where_something_is_found():
    def make():
        body = in_a_row(layers.LSTM(7, return_sequences=True), layers.Dense(5, name="dense"))
        return Network((4, 12), body)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network = trained(make, False, True)
    text = summary(network)
    assert "gradient: whole, it is made by StatelessWhile" in text and "gradient: trainable part only" in text


def test_a_warning_where_no_variable_has_compact_state():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    optimizer = fz.MaskedOptimizer(sgd(), state="compact", skip_frozen_gradients=True)
    model.compile(optimizer, "mse", jit_compile=False)
    with pytest.warns(UserWarning, match="no variable has compact state"):
        model.fit(np.ones((2, 4)), np.ones((2, 3)), verbose=0)
    assert {report.gradient for report in optimizer.describe()} == {"whole"}
