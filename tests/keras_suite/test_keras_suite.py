"""A `MaskedOptimizer` with nothing frozen is the inner optimizer.

Keras's own optimizer tests run with every optimizer wrapped (`keras_suite.py` does the
wrapping, `keras_suite_exclusions.py` names those that can't pass), and every optimizer
is compared with a wrapped one, weights and slots, bit for bit.
"""

import fnmatch
import inspect
import re

import keras
import keras_suite
import numpy as np
import pytest
import tensorflow as tf
from common import FUSED, OPTIONS, ROUNDED_OTHERWISE, SETUPS, WAYS, assert_same_bits, bits, in_mode
from keras_suite_exclusions import EXCLUSIONS, MAIN_KERAS, SKIPPED, WRAPS_NOTHING

import freezeops as fz

IS_MAIN_KERAS = keras.__version__.startswith(f"{MAIN_KERAS}.")
CASES = keras_suite.collect()
STEPS = 5
JIT_ULPS = {"RMSprop": 8, "RMSprop momentum centered": 16}
"""Units in the last place by which XLA's order of operations may move weights and slots, where it is more than 4.

Seeding chooses the second moment by its bits, where XLA would contract it with what follows; a centered denominator is
a difference, which makes more of that.
"""


def matches(case, patterns):
    return any(fnmatch.fnmatchcase(str(case), pattern) for pattern in patterns)


def exclusion_of(case):
    found = [exclusion for exclusion in EXCLUSIONS if matches(case, exclusion.tests)]
    assert len(found) <= 1, f"{case} is excluded twice"
    return found[0] if found else None


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keras_optimizer_suite(case):
    outcome = keras_suite.run(case)
    if outcome.status == "skipped":
        expected = [text for pattern, text in SKIPPED.items() if matches(case, [pattern])]
        assert any(text in outcome.text for text in expected), f"skipped: {outcome.text}"
        pytest.skip(outcome.text)
    exclusion = exclusion_of(case)
    if exclusion is None:
        assert outcome.status == "passed", outcome.text
        assert outcome.wrapped or matches(case, WRAPS_NOTHING), "no optimizer was wrapped"
    elif outcome.status == "passed":
        assert not IS_MAIN_KERAS, f"passes, but is excluded: {exclusion.reason}"
    else:
        as_expected = re.search(exclusion.error, outcome.text)
        assert as_expected or not IS_MAIN_KERAS, (
            f"is excluded because it {exclusion.reason}, but fails otherwise:\n{outcome.text}"
        )
        pytest.xfail(exclusion.reason)


def test_the_suite_is_found():
    assert len(CASES) > 200
    assert {case.arrangement for case in CASES} == set(keras_suite.ARRANGEMENTS)
    modules = {case.module for case in CASES}
    assert modules > {"adam_test", "sgd_test", "optimizer_test", *keras_suite.OWN_PROCESS}


@pytest.mark.skipif(not IS_MAIN_KERAS, reason=f"the exclusions are for Keras {MAIN_KERAS}")
def test_every_exclusion_names_a_test():
    patterns = [pattern for exclusion in EXCLUSIONS for pattern in exclusion.tests]
    for pattern in [*patterns, *WRAPS_NOTHING, *SKIPPED]:
        assert any(matches(case, [pattern]) for case in CASES), pattern


@pytest.mark.parametrize("arrangement, name", list(keras_suite.modules()))
def test_no_optimizer_class_is_left_unwrapped(arrangement, name):
    replaced = keras_suite.stand_ins(arrangement)
    module = keras_suite.load(arrangement, name)
    members = list(vars(module).values())
    if hasattr(module, "optimizers"):
        members += list(vars(module.optimizers).values())
    left = [member for member in members if inspect.isclass(member) and member in replaced]
    assert not left
    assert [m for m in members if isinstance(m, keras_suite.StandIn)], "nothing to wrap"


@pytest.mark.parametrize("arrangement, name", [("leaves", "Adam"), ("wrappers", "LossScaleOptimizer")])
def test_stand_ins_wrap(arrangement, name):
    real = getattr(keras.optimizers, name)
    argument = 0.25 if arrangement == "leaves" else keras.optimizers.SGD()
    optimizer = keras_suite.stand_ins(arrangement)[real](argument)
    assert type(optimizer) is not real
    assert isinstance(optimizer, fz.MaskedOptimizer)
    assert isinstance(optimizer.inner_optimizer, real)


class Pair:
    """One optimizer bare and one wrapped, on equal variables.

    Args:
        make: Makes the optimizer.
        mode: How it runs: see `common.in_mode`.
        sparse: Whether the gradients are `tf.IndexedSlices`.
        wrapping: What `MaskedOptimizer` is given besides.
    """

    SHAPES = ((6, 7), (13,), (3, 2, 5))
    SPARSE_SHAPES = ((6, 7), (9, 2, 3))

    def __init__(self, make, mode, sparse=False, **wrapping):
        self.rng = np.random.default_rng(5)
        self.sparse = sparse
        self.shapes = self.SPARSE_SHAPES if sparse else self.SHAPES
        values = [self.normal(shape) for shape in self.shapes]
        self.optimizers = [make(), fz.MaskedOptimizer(make(), **wrapping)]
        self.variables = [
            [keras.Variable(value, name=f"v{i}") for i, value in enumerate(values)] for _ in self.optimizers
        ]
        self.steps = []
        for optimizer, variables in zip(self.optimizers, self.variables, strict=True):
            optimizer.build(variables)
            self.steps.append(in_mode(self.step_of(optimizer, variables), mode))

    def normal(self, shape):
        return self.rng.normal(size=shape).astype("float32")

    @staticmethod
    def step_of(optimizer, variables):
        return lambda gradients: optimizer.apply(gradients, variables)

    def gradient(self, shape):
        if not self.sparse:
            return tf.constant(self.normal(shape))
        # A row twice: TensorFlow adds such rows up.
        indices = tf.constant([0, shape[0] - 1, 2, 2])
        values = tf.constant(self.normal((4, *shape[1:])))
        return tf.IndexedSlices(values, indices, tf.constant(shape))

    def train(self):
        for _ in range(STEPS):
            gradients = [self.gradient(shape) for shape in self.shapes]
            for step in self.steps:
                step(gradients)

    def states(self):
        """(name, bare value, wrapped value) of weights, slots and counters."""
        bare, wrapped = self.optimizers
        pairs = [*zip(*self.variables, strict=True)]
        pairs += zip(bare.variables, wrapped.inner_optimizer.variables, strict=True)
        return [(a.path, a.numpy(), b.numpy()) for a, b in pairs]


NOTHING_FROZEN = [(setup, fused, "plain", mode) for setup, fused in WAYS for mode in ("eager", "function")]
NOTHING_FROZEN += [
    (setup, fused, option, "function")
    for setup, fused in WAYS
    for option in OPTIONS
    if option != "plain" and setup in ("SGD momentum", "Adam", "Nadam")
]


@pytest.mark.parametrize("setup, fused, option, mode", NOTHING_FROZEN)
def test_nothing_frozen_is_the_inner_optimizer(setup, fused, option, mode):
    pair = Pair(lambda: SETUPS[setup](**OPTIONS[option]), mode, fused=fused)
    before = [value for _, value, _ in pair.states()]
    pair.train()
    after = pair.states()
    for name, bare, wrapped in after:
        if fused and mode == "function" and setup.split()[0] in ROUNDED_OTHERWISE:
            assert units_apart(bare, wrapped) <= 2 * STEPS, name
        else:
            assert_same_bits(wrapped, bare, name)
    assert any((a != b).any() for a, (_, b, _) in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("setup, fused", WAYS)
def test_nothing_frozen_with_sparse_gradients(setup, fused, mode):
    if setup in ("Muon", "Lamb"):
        pytest.skip(f"Keras's {setup} does not take tf.IndexedSlices")
    pair = Pair(SETUPS[setup], mode, sparse=True, fused=fused)
    pair.train()
    for name, bare, wrapped in pair.states():
        assert_same_bits(wrapped, bare, name)


def test_sparse_gradients_stay_sparse(monkeypatch):
    pair = Pair(SETUPS["SGD momentum"], "function", sparse=True, fused=False)
    inner = pair.optimizers[1].inner_optimizer
    seen = []
    real = inner.update_step

    def update_step(gradient, variable, learning_rate):
        seen.append(gradient)
        return real(gradient, variable, learning_rate)

    monkeypatch.setattr(inner, "update_step", update_step)
    pair.train()
    assert len(seen) == len(pair.shapes)
    assert all(isinstance(gradient, tf.IndexedSlices) for gradient in seen)


def ulp_distance(a, b):
    """How many representable numbers apart the entries are, at most."""
    if a.dtype.kind != "f":
        return int((a != b).any()) * 1000
    ordered = [np.where(x >> 31, (1 << 31) - x, x) for x in (bits(a).astype(np.int64), bits(b).astype(np.int64))]
    return int(np.abs(ordered[0] - ordered[1]).max(initial=0))


def units_apart(a, b):
    """How far apart entries are, at most, in units in the last place of the largest one."""
    if a.dtype.kind != "f":
        return int((a != b).any()) * 1000
    return np.max(np.abs(a - b), initial=0) / np.spacing(np.max(np.abs(a), initial=0))


@pytest.mark.parametrize("setup, fused", WAYS)
def test_nothing_frozen_under_jit(setup, fused):
    pair = Pair(SETUPS[setup], "jit", fused=fused)
    pair.train()
    if fused and setup in FUSED:
        # XLA contracts what is multiplied and added; a fused update rounds as Keras does elsewhere.
        assert max(units_apart(bare, wrapped) for _, bare, wrapped in pair.states()) <= 8
    else:
        worst = max(ulp_distance(bare, wrapped) for _, bare, wrapped in pair.states())
        assert worst <= JIT_ULPS.get(setup, 4)
