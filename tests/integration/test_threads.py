"""Two threads that step different variables with one optimizer at once.

The first is held in the middle of its step, when weight decay has moved frozen entries, until the second is in the
middle of its own; that one ends last.
"""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits

import freezeops as fz

MASK = np.arange(100) % 3 == 0
SECONDS = 30
"""Nothing waits for longer."""


class Meeting:
    """Where the two threads wait for each other."""

    def __init__(self):
        self.first_inside, self.second_inside, self.first_done = (threading.Event() for _ in range(3))
        self.calls = 0

    def pause(self, after=1):
        """Called in the middle of a step, by either thread; the first waits at its call number `after`."""
        if threading.current_thread().name == "first":
            self.calls += 1
            if self.calls == after:
                self.first_inside.set()
                assert self.second_inside.wait(SECONDS)
        elif threading.current_thread().name == "second" and not self.second_inside.is_set():
            self.second_inside.set()
            assert self.first_done.wait(SECONDS)

    def run(self, first, second):
        errors = []

        def guarded(call):
            try:
                call()
            except BaseException as error:
                errors.append(error)

        def call_first():
            first()
            self.first_done.set()

        def call_second():
            assert self.first_inside.wait(SECONDS)
            second()

        threads = [
            threading.Thread(target=guarded, args=(call,), name=name)
            for name, call in (("first", call_first), ("second", call_second))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * SECONDS)
        assert not errors, errors
        assert self.second_inside.is_set() and self.first_done.is_set()


class PausingRate(keras.optimizers.schedules.LearningRateSchedule):
    """Keras asks for the rate in weight decay and then once more for the update."""

    def __init__(self, meeting):
        self.meeting = meeting

    def __call__(self, step):
        self.meeting.pause(after=2)
        return tf.constant(0.01)


OPTIMIZERS = {
    "SGD": lambda rate, **k: keras.optimizers.SGD(rate, weight_decay=0.5, **k),
    "momentum": lambda rate, **k: keras.optimizers.SGD(rate, momentum=0.9, weight_decay=0.5, **k),
    "Adam": lambda rate, **k: keras.optimizers.Adam(rate, weight_decay=0.5, **k),
    "AdamW": lambda rate, **k: keras.optimizers.AdamW(rate, weight_decay=0.5, **k),
    "Lamb": lambda rate, **k: keras.optimizers.Lamb(rate, weight_decay=0.5, **k),
    "AdamW averaged": lambda rate, **k: keras.optimizers.AdamW(rate, weight_decay=0.5, use_ema=True, **k),
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("others", ["not given", "without a gradient"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "name, state",
    [(name, "full") for name in OPTIMIZERS] + [(name, "compact") for name in ("SGD", "momentum", "Adam", "AdamW")],
)
def test_disjoint_variables(name, state, fused, others):
    meeting = Meeting()
    variables = [tf.Variable(tf.ones([100]), name=f"w{i}") for i in range(2)]
    optimizer = fz.MaskedOptimizer(
        OPTIMIZERS[name](PausingRate(meeting)), masks={"w.*": MASK}, state=state, fused=fused
    )
    optimizer.build(variables)

    def step(number):
        if others == "not given":
            optimizer.apply([tf.ones([100])], [variables[number]])
        else:
            optimizer.apply([tf.ones([100]) if i == number else None for i in range(2)], variables)

    meeting.run(lambda: step(0), lambda: step(1))
    for v in variables:
        assert_same_bits(v.numpy()[~MASK], np.ones((~MASK).sum(), "float32"))
        assert (v.numpy()[MASK] < 1).all(), "an update was lost"
        if name in ("SGD", "momentum"):
            np.testing.assert_allclose(v.numpy()[MASK], 0.985, rtol=1e-6)  # decayed and updated once


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "AdamW averaged"])
def test_disjoint_variables_of_tf_keras(name):
    tf_keras = pytest.importorskip("tf_keras")
    from freezeops import legacy

    meeting = Meeting()

    def constraint(value):
        meeting.pause()
        return tf.identity(value)

    variables = [tf.Variable(tf.ones([100]), name=f"w{i}", constraint=constraint) for i in range(2)]
    options = {"use_ema": True} if "averaged" in name else {}
    inner = getattr(tf_keras.optimizers, name.split()[0])(0.01, weight_decay=0.5, jit_compile=False, **options)
    optimizer = legacy.MaskedOptimizer(inner, masks={"w.*": MASK})
    optimizer.build(variables)
    meeting.run(*(lambda v=v: optimizer.apply_gradients([(tf.ones([100]), v)]) for v in variables))
    for v in variables:
        assert_same_bits(v.numpy()[~MASK], np.ones((~MASK).sum(), "float32"))
        assert (v.numpy()[MASK] < 1).all(), "an update was lost"
    if options:
        for average in inner._model_variables_moving_average:
            assert_same_bits(average.numpy()[~MASK], np.ones((~MASK).sum(), "float32"))


# What may write more than it is given is still kept from it.


class Everywhere(keras.optimizers.SGD):
    """Writes whatever it was built with."""

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)
        for each in self._trainable_variables:
            each.assign(each + 1.0)


def replaced(optimizer):
    update = optimizer.update_step

    def update_step(gradient, variable, learning_rate):
        update(gradient, variable, learning_rate)
        for each in optimizer._trainable_variables:
            each.assign(each + 1.0)

    optimizer.update_step = update_step
    return optimizer


class Wrapper(keras.optimizers.LossScaleOptimizer):
    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for each in self.inner_optimizer._trainable_variables:
            each.assign(each + 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Everywhere(0.1),
        lambda: replaced(keras.optimizers.SGD(0.1)),
        lambda: Wrapper(keras.optimizers.SGD(0.1)),
        lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=1),
    ],
    ids=["subclass", "replaced", "wrapper", "averages"],
)
@pytest.mark.parametrize("function", [False, True])
def test_writes_of_others_are_put_back(make, function):
    variables = [tf.Variable(tf.ones([100]), name=f"w{i}") for i in range(2)]
    optimizer = fz.MaskedOptimizer(make(), masks={"w.*": MASK})
    optimizer.build(variables)
    for average in getattr(optimizer.inner_optimizer, "_model_variables_moving_average", []):
        average.assign(tf.fill([100], 3.0))
    optimizer.iterations.assign(1)  # in the first step Keras begins an average anew
    variables[1].assign(tf.fill([100], 2.0))

    def step():
        optimizer.apply([tf.ones([100])], [variables[0]])

    (tf.function(step) if function else step)()
    assert_same_bits(variables[0].numpy()[~MASK], np.ones((~MASK).sum(), "float32"))
    assert_same_bits(variables[1].numpy()[~MASK], np.full((~MASK).sum(), 2, "float32"))
    assert (variables[1].numpy()[MASK] != 2).all()


def test_writes_of_others_are_put_back_in_tf_keras():
    tf_keras = pytest.importorskip("tf_keras")
    from freezeops import legacy

    variables = [tf.Variable(tf.ones([100]), name=f"w{i}") for i in range(2)]

    class Everywhere(tf_keras.optimizers.SGD):
        def update_step(self, gradient, variable):
            super().update_step(gradient, variable)
            for each in variables:
                each.assign(each + 1.0)

    optimizer = legacy.MaskedOptimizer(Everywhere(0.1, jit_compile=False), masks={"w.*": MASK})
    optimizer.build(variables)
    optimizer.apply_gradients([(tf.ones([100]), variables[0])])
    for v in variables:
        assert_same_bits(v.numpy()[~MASK], np.ones((~MASK).sum(), "float32"))
        assert (v.numpy()[MASK] != 1).all()
