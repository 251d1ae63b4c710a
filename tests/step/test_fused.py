"""Fused updates: the native op against its twin, a step against Keras's own, and which variables are fused at all."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from common import FUSED, OPTIONS, ROUNDED_OTHERWISE, SETUPS, assert_same_bits, bits, in_mode
from fused_variables import (
    DTYPES,
    RULES,
    assert_same_state,
    fused_notes,
    variables_of,
    with_compact_gradient,
    with_gradient_of_rows,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import run_script
from training import Training

import freezeops as fz
from freezeops import ops
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.ops import native, reference_updates
from freezeops.step.fused import FusedStep

LENGTHS = st.sampled_from([0, 1, 7, 8, 15, 16, 17, 63, 64, 65, 129, 200, 513, 5000])
LAYOUTS = st.one_of(
    st.builds(Layout, st.just(1), LENGTHS, st.just(1)),
    st.builds(Layout, st.just(1), st.sampled_from([1, 5, 64, 130]), st.sampled_from([1, 3, 16, 64, 100])),
    st.builds(Layout, st.sampled_from([2, 3, 70]), st.sampled_from([1, 5, 64, 130]), st.sampled_from([1, 4])),
)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def update_by_way_of_compact_variables(rule, variables, told):
    """The trainable entries into variables of their own, an update of these, and back."""
    inner = []
    indices = [[tf.convert_to_tensor(variable) for variable in (one.bits, *one.ranks)] for one in variables]
    for one, index in zip(variables, indices, strict=True):
        value = tf.Variable(ops.read_trainable(one.variable, *index, one.layout))
        gradient = ops.gather_trainable(one.gradient, *index, one.layout)
        all_of_it = Layout(1, 1, value.shape[0])
        inner.append(one._replace(variable=value, gradient=gradient, layout=all_of_it, bits=None, ranks=None))
    ops.fused_update(rule, inner, *told)
    for one, compact, index in zip(variables, inner, indices, strict=True):
        ops.scatter_trainable(one.variable, compact.variable, *index, one.layout)


def assert_same_used(one, other):
    """Variables and slots bit for bit, but for what room holds."""
    assert_same_bits(one.variable.numpy(), other.variable.numpy(), "variable")
    used = packing.count_bits(one.bits.numpy(), one.layout.kept) * one.layout.inner
    for number, (slot, expected) in enumerate(zip(one.slots, other.slots, strict=True)):
        assert_same_bits(slot.numpy()[:used], expected.numpy()[:used], f"slot {number}")
    if one.unseeded is not None:
        waits = [np.unpackbits(each.unseeded.numpy(), bitorder="little")[:used] for each in (one, other)]
        np.testing.assert_array_equal(*waits)


@pytest.mark.skipif(native.op_library() is None, reason="no native library for this TensorFlow")
class TestAgainstTheTwin:
    @pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
    @SETTINGS
    @given(
        rule=st.sampled_from(list(RULES)),
        dtype=st.sampled_from(list(DTYPES)),
        layouts=st.lists(LAYOUTS, min_size=1, max_size=3),
        density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0]),
        seeded=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    @example("adam", "float32", [Layout(1, 40000, 1)], 0.01, True, 0)
    @example("adam", "float32", [Layout(1, 40000, 1), Layout(1, 3, 1)], 0.5, True, 1)
    @example("lion", "bfloat16", [Layout(1, 40000, 1)], 0.02, False, 2)
    @example("adam_amsgrad", "float64", [Layout(1, 500, 100)], 0.5, True, 3)
    def test_dense(self, compact_state, rule, dtype, layouts, density, seeded, seed):
        if compact_state:
            layouts = [Layout(1, layout.kept, layout.inner) for layout in layouts]
        rng = np.random.default_rng(seed)
        ours, twins, told = variables_of(rng, rule, dtype, layouts, density, compact_state, seeded and RULES[rule][0])
        ops.fused_update(rule, ours, *told)
        reference_updates.fused_update(rule, twins, *told)
        assert_same_state(ours, twins, f"{rule} {dtype} {layouts}")

    @pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
    @settings(SETTINGS, max_examples=60)
    @given(
        rule=st.sampled_from(["sgd_momentum", "sgd_nesterov", "adam", "adam_amsgrad", "nadam"]),
        dtype=st.sampled_from(["float32", "float64"]),
        rows=st.sampled_from([1, 5, 64, 300]),
        width=st.sampled_from([1, 3, 16, 100]),
        count=st.sampled_from([0, 1, 7, 50]),
        by_rows=st.booleans(),
        density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        seeded=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_slices(self, compact_state, rule, dtype, rows, width, count, by_rows, density, seeded, seed):
        rng = np.random.default_rng(seed)
        layout = Layout(1, rows, width) if by_rows else Layout(1, rows * width, 1)
        ours, twins, told = variables_of(rng, rule, dtype, [layout], density, compact_state, seeded)
        indices = tf.constant(rng.integers(0, rows, count), tf.int64)
        values = tf.constant(rng.normal(size=(count, width)).astype(dtype))
        slices = tf.IndexedSlices(values, indices, tf.constant([rows, width], tf.int64))
        ours, twins = ([with_gradient_of_rows(each[0], slices)] for each in (ours, twins))
        ops.fused_update(rule, ours, *told)
        reference_updates.fused_update(rule, twins, *told)
        assert_same_state(ours, twins, f"{rule} {dtype} {layout}")

    @pytest.mark.parametrize("mode", ["eager", "function", "jit"])
    @settings(SETTINGS, max_examples=60)
    @given(
        rule=st.sampled_from(list(RULES)),
        dtype=st.sampled_from(list(DTYPES)),
        layouts=st.lists(LAYOUTS, min_size=1, max_size=3),
        density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.5, 0.99, 1.0]),
        seeded=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
    @example("adam", "float32", [Layout(1, 40000, 1)], 0.01, True, 0)
    @example("adam", "float32", [Layout(1, 40000, 1), Layout(1, 3, 1)], 0.5, True, 1)
    @example("nadam", "bfloat16", [Layout(1, 40000, 1)], 0.02, True, 2)
    @example("lion", "float16", [Layout(1, 40000, 1)], 0.3, False, 2)
    @example("adam_amsgrad", "float64", [Layout(1, 500, 100)], 0.5, True, 3)
    def test_compact_gradients(self, mode, rule, dtype, layouts, density, seeded, seed):
        """As the twin; and bit for bit as with the whole gradient, and as by way of a compact variable."""
        layouts = [Layout(1, layout.kept, layout.inner) for layout in layouts]
        case = rule, dtype, layouts, density, True, seeded and RULES[rule][0]
        ours, twins, told = variables_of(np.random.default_rng(seed), *case)
        whole, by_way, _ = variables_of(np.random.default_rng(seed), *case)
        ours, twins = ([with_compact_gradient(one, np.nan) for one in each] for each in (ours, twins))
        in_mode(lambda: ops.fused_update(rule, ours, *told), mode)()
        reference_updates.fused_update(rule, twins, *told)
        ops.fused_update(rule, whole, *told)
        update_by_way_of_compact_variables(rule, by_way, told)
        assert_same_state(ours, twins, f"{rule} {dtype} {layouts}")
        for one, *others in zip(ours, whole, by_way, strict=True):
            for other in others:
                assert_same_used(one, other)

    @pytest.mark.parametrize("mode", ["eager", "function"])
    def test_refuses_compact_gradients_that_cannot_be(self, mode):
        def update(compact_state=True, **changed):
            (one,), _, told = variables_of(
                np.random.default_rng(0), "adam", "float32", [Layout(1, 20, 5)], 0.5, compact_state, False
            )
            one = one._replace(**{"gathered": True, **changed})
            before = [array.numpy() for array in (one.variable, *one.slots)]
            with pytest.raises((tf.errors.InvalidArgumentError, ValueError)) as error:
                in_mode(lambda: ops.fused_update("adam", [one], *told), mode)()
            for array, value in zip((one.variable, *one.slots), before, strict=True):
                assert_same_bits(array.numpy(), value, "changed before the error")
            return str(error.value)

        (one,), _, _ = variables_of(np.random.default_rng(0), "adam", "float32", [Layout(1, 20, 5)], 0.5, True, False)
        size = one.slots[0].shape[0]
        assert size < 100
        for wrong in (tf.ones([100]), tf.ones([20, 5]), tf.ones([size - 1]), tf.ones([0]), tf.ones([])):
            assert f"gradient must have an entry for each of a slot, {size}" in update(gradient=wrong)
        assert "gathered must be variables with compact state" in update(False)
        rows = tf.IndexedSlices(tf.zeros([1, 5]), tf.constant([0], tf.int64), tf.constant([20, 5], tf.int64))
        assert "and not in sparse. Received: gathered=[0], sparse=[0]" in update(gradient=rows)

    def test_a_compact_gradient_may_have_rows(self):
        ours, others, told = variables_of(
            np.random.default_rng(0), "adam", "float32", [Layout(1, 20, 5)], 0.5, True, False
        )
        (one,), (other,) = ([with_compact_gradient(each[0])] for each in (ours, others))
        ops.fused_update("adam", [one._replace(gradient=tf.reshape(one.gradient, [-1, 5]))], *told)
        ops.fused_update("adam", [other], *told)
        assert_same_used(one, other)

    @pytest.mark.parametrize("isa", ["generic", "avx2"])
    def test_lower_instruction_sets(self, isa, tmp_path):
        """In a process of its own: the choice is made once."""
        script = Path(__file__).with_name("instruction_set_script.py")
        environment = os.environ | {"FREEZEOPS_ISA": isa, "TF_CPP_MIN_LOG_LEVEL": "3"}
        assert run_script(script, [isa], environment, tmp_path / "log", seconds=600).endswith("done\n")

    def test_refuses_what_does_not_belong_together(self):
        rng = np.random.default_rng(0)
        layout = Layout(1, 100, 1)

        def update(**changed):
            (one,), _, told = variables_of(rng, "adam", "float32", [layout], 0.5, False, False)
            one = one._replace(**changed)
            before = [array.numpy() for array in (one.variable, *one.slots)]
            with pytest.raises(tf.errors.InvalidArgumentError) as error:
                ops.fused_update("adam", [one], *told)
            for array, value in zip((one.variable, *one.slots), before, strict=True):
                assert_same_bits(array.numpy(), value, "changed before the error")
            return str(error.value)

        assert "slot must be" in update(slots=[tf.Variable(tf.zeros([100])), tf.Variable(tf.zeros([99]))])
        assert "gradient must have the shape of the variable, [100]" in update(gradient=tf.zeros([99]))
        assert "gradient must have the shape of the variable, [100]" in update(gradient=tf.zeros([10, 10]))
        assert "mask must have shape [13]" in update(bits=tf.Variable(tf.zeros([12], tf.uint8)))
        assert "must be of dtype float" in update(variable=tf.Variable(tf.zeros([100], tf.float64)))
        bad_rows = tf.IndexedSlices(tf.zeros([1, 10]), tf.constant([10], tf.int64), tf.constant([10, 10], tf.int64))
        assert "indices must be in [0, 10)" in update(gradient=bad_rows, variable=tf.Variable(tf.ones([10, 10])))
        wide_rows = tf.IndexedSlices(tf.zeros([1, 20]), tf.constant([0], tf.int64), tf.constant([5, 20], tf.int64))
        assert "values must be rows of the variable" in update(
            gradient=wide_rows, variable=tf.Variable(tf.ones([10, 10]))
        )

    def test_refuses_a_variable_that_is_there_twice(self):
        (one,), _, told = variables_of(
            np.random.default_rng(0), "adam", "float32", [Layout(1, 100, 1)], 0.5, False, False
        )
        value = one.variable.numpy()
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=r"must be different ones. Received: one of shape \[100"
        ):
            ops.fused_update("adam", [one, one], *told)
        assert_same_bits(one.variable.numpy(), value)

    @pytest.mark.parametrize("density", [0.5, 0.05], ids=["by bits", "by index"])
    def test_nothing_is_written_where_one_of_several_masks_is_another(self, density):
        ours, _, told = variables_of(
            np.random.default_rng(0), "adam", "float32", [Layout(1, 5000, 1)] * 2, density, True, False
        )
        other = np.roll(ours[1].bits.numpy(), 256)  # as many ones, in other blocks
        ours[1].bits.assign(other)
        arrays = [array for one in ours for array in (one.variable, *one.slots)]
        before = [array.numpy() for array in arrays]
        with pytest.raises(tf.errors.InvalidArgumentError, match="offsets"):
            ops.fused_update("adam", ours, *told)
        for array, value in zip(arrays, before, strict=True):
            assert_same_bits(array.numpy(), value)

    def test_ranks_of_another_mask_are_refused(self):
        (one,), _, told = variables_of(
            np.random.default_rng(0), "adam", "float32", [Layout(1, 5000, 1)], 0.5, True, False
        )
        one.bits.assign(np.full(625, 255, np.uint8))
        value = one.variable.numpy()
        with pytest.raises(tf.errors.InvalidArgumentError, match="offsets"):
            ops.fused_update("adam", [one], *told)
        assert_same_bits(one.variable.numpy(), value)


def apply_one(optimizer, variable, gradient):
    optimizer.apply([gradient], [variable])


def apply_rows(optimizer, variable, values, rows):
    optimizer.apply([tf.IndexedSlices(values, rows, tf.constant([10, 4]))], [variable])


def skipped(setup, mode, monkeypatch, by_way=False, wrap=None, dtype="float32", options=None):
    """Six steps that make trainable parts of gradients alone.

    Args:
        setup: The optimizer's.
        mode: Of the steps.
        monkeypatch: The fixture.
        by_way: Whether the trainable entries are gathered into a variable of their own, and scattered.
        wrap: Wraps the optimizer.
        dtype: Of the variables.
        options: Of the optimizer.

    Returns:
        The variables, the slots' trainable entries, and whether updates were given compact gradients.
    """
    rng = np.random.default_rng(2)
    of_each, compact = [], set()
    optimizer = fz.MaskedOptimizer(SETUPS[setup](**(options or {})), state="compact", skip_frozen_gradients=True)
    for name, (rows, columns), mask in (("entries", (60, 50), (60, 50)), ("rows", (40, 16), (40, 1))):
        variable = keras.Variable(rng.normal(size=(rows, columns)).astype(dtype), name=name)
        optimizer.register_mask(variable, rng.random(mask) < 0.2)
        of_each.append((variable, rng.normal(size=(64, rows)), rng.normal(size=(64, columns))))
    variables = [variable for variable, _, _ in of_each]
    optimizer.build(variables)
    outer = optimizer if wrap is None else wrap(optimizer)
    before = [variable.numpy() for variable in variables]

    def step(factors):
        outer.apply([tf.cast(tf.matmul(x, dy, transpose_a=True), dtype) for x, dy in factors], variables)

    def spy(rule, operands, *args, update=ops.fused_update):
        compact.update(operand.gathered for operand in operands)
        update(rule, operands, *args)

    begin = FusedStep.__init__

    def gathering(self, updates, direct):
        begin(self, updates, direct)
        self._gathers = self._gathers or by_way

    with monkeypatch.context() as patch:
        patch.setattr(ops, "fused_update", spy)
        patch.setattr(FusedStep, "__init__", gathering)
        run = in_mode(step, mode)
        for number in range(6):
            run([[tf.constant((x * (1 + number)).astype("float32")), tf.constant(dy.astype("float32"))]
                 for _, x, dy in of_each])  # fmt: skip
    for variable, value in zip(variables, before, strict=True):
        frozen = ~optimizer.mask_for(variable).to_numpy()
        assert_same_bits(variable.numpy()[frozen], value[frozen], "frozen")
        assert np.any(variable.numpy() != value)
    assert fused_notes(optimizer) == ["fused"] * 2
    assert [each.gradient for each in optimizer.describe()] == ["trainable part only"] * 2
    counts = [optimizer.mask_for(variable).count() for variable in variables]
    slots = [each.numpy().reshape(-1) for each in optimizer.inner_optimizer.variables if len(each.shape)]
    used = [slot[:count] for slot in slots for count in counts if slot.size == count]
    return [variable.numpy() for variable in variables], used, compact


@pytest.mark.parametrize("mode", ["function", "jit"])
@pytest.mark.parametrize("option", ["plain", "weight_decay", "clipvalue"])
@pytest.mark.parametrize("setup", FUSED)
def test_trainable_parts_of_gradients(setup, option, mode, monkeypatch):
    """They go into the update as they are: bit for bit as by way of a compact variable."""
    *ours, compact = skipped(setup, mode, monkeypatch, options=OPTIONS[option])
    assert compact == {True}
    *by_way, compact = skipped(setup, mode, monkeypatch, by_way=True, options=OPTIONS[option])
    assert compact == {False}
    for arrays, expected in zip(ours, by_way, strict=True):
        for actual, other in zip(arrays, expected, strict=True):
            assert_same_bits(actual, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_trainable_parts_of_gradients_in_other_dtypes(dtype, monkeypatch):
    (ours, slots, compact), (by_way, others, _) = (
        skipped("AdamW", "function", monkeypatch, by_way, dtype=dtype, options={"beta_2": 0.9})
        for by_way in (False, True)
    )
    assert compact == {True}
    for actual, other in zip([*ours, *slots], [*by_way, *others], strict=True):
        assert_same_bits(actual, other)


def test_trainable_parts_of_gradients_behind_a_loss_scale(monkeypatch):
    wrap = functools.partial(keras.optimizers.LossScaleOptimizer, initial_scale=4.0)
    (ours, _, compact), (by_way, _, _) = (
        skipped("Adam", "function", monkeypatch, by_way, wrap=wrap) for by_way in (False, True)
    )
    assert compact == {True}
    for actual, other in zip(ours, by_way, strict=True):
        assert_same_bits(actual, other)


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm", "accumulation"])
def test_what_looks_at_gradients_goes_by_way_of_a_compact_variable(option, monkeypatch):
    _, _, compact = skipped("Adam", "function", monkeypatch, options=OPTIONS[option])
    assert compact == {False}


SHAPES = {"v0": (37, 41), "v1": (129,), "v2": (3,), "v3": (500, 7)}


def train(setup, mode, fused, dtype="float32", state="full", steps=6, options=None):
    """Trains with masks; `fused=None`: by Keras's own optimizer, with gradients and variables masked by hand."""
    training = Training(SHAPES, density=0.6, dtype=dtype, seed=3, mean=0.0)
    optimizer = SETUPS[setup](**(options or {}))
    training.start(optimizer if fused is None else fz.MaskedOptimizer(optimizer, state=state, fused=fused), mode)
    training.step(steps)
    return list(training.values().values()), list(training.masks.values()), training.optimizer


def options_for(setup, dtype):
    # Keras computes in the variable's dtype, where the default 0.999 is 1.
    return {"beta_2": 0.9} if dtype == "bfloat16" and setup.split()[0] in ("Adam", "AdamW", "Nadam") else {}


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("setup", FUSED)
def test_as_keras(setup, mode, dtype, state):
    options = options_for(setup, dtype)
    ours, masks, optimizer = train(setup, mode, True, dtype, state, options=options)
    assert fused_notes(optimizer) == ["fused"] * len(SHAPES)
    expected, _, _ = train(setup, mode, None, dtype, options=options)
    for actual, by_keras, mask in zip(ours, expected, masks, strict=True):
        frozen = ~np.broadcast_to(mask, actual.shape)
        assert_same_bits(actual[frozen], by_keras[frozen], "frozen")
        if mode == "eager" or setup.split()[0] not in ROUNDED_OTHERWISE:
            assert_same_bits(actual, by_keras, f"{setup} {mode} {dtype} {state}")
        else:
            # Six steps of at most 2 units in the last place, and what the rounding of the sum makes of them.
            wide, unit = by_keras.astype("float64"), float(ml_dtypes.finfo(actual.dtype).eps)
            assert np.max(np.abs(actual.astype("float64") - wide)) <= 16 * unit * max(np.max(np.abs(wide)), 1)


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("setup", ["SGD momentum", "AdamW", "Nadam", "Lion"])
def test_with_options_as_unfused(setup, option, state):
    ours, _, _ = train(setup, "function", True, state=state, options=OPTIONS[option])
    expected, _, _ = train(setup, "function", False, state=state, options=OPTIONS[option])
    for actual, unfused in zip(ours, expected, strict=True):
        assert_same_bits(actual, unfused, f"{setup} {option}")


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("setup", FUSED)
def test_under_xla_as_keras(setup, state):
    ours, masks, _ = train(setup, "jit", True, state=state)
    expected, _, _ = train(setup, "eager", None)
    for actual, by_keras, mask in zip(ours, expected, masks, strict=True):
        assert_same_bits(actual[~mask], by_keras[~mask], "frozen")
        # The native kernel is called; what differs is how XLA calculates the scalars.
        np.testing.assert_allclose(actual, by_keras, rtol=2e-6, atol=2e-6)


def typical_difference(some, others):
    """The root of the mean square: the largest is one unit of the largest entry, here and there."""
    squares = [np.square(a.astype("float64") - b).reshape(-1) for a, b in zip(some, others, strict=True)]
    return np.sqrt(np.mean(np.concatenate(squares)))


@pytest.mark.parametrize("setup", ["Adam", "RMSprop", "RMSprop momentum centered", "Adagrad"])
def test_no_drift(setup):
    """Over 1,000 steps no further from Keras than Keras is from itself where XLA compiles it."""
    expected, _, _ = train(setup, "function", None, steps=1000)
    ours, _, _ = train(setup, "function", True, steps=1000)
    if setup.split()[0] not in ROUNDED_OTHERWISE:
        for actual, by_keras in zip(ours, expected, strict=True):
            assert_same_bits(actual, by_keras)
    compiled, _, _ = train(setup, "jit", None, steps=1000)
    drift, of_keras = typical_difference(ours, expected), typical_difference(compiled, expected)
    assert drift <= of_keras, f"{drift} > {of_keras}"


@pytest.mark.parametrize("setup", [setup for setup in FUSED if setup.split()[0] in ROUNDED_OTHERWISE])
def test_two_units_per_step_where_tensorflow_rounds_otherwise(setup):
    """Each step begins with Keras's own variables and slots."""
    rng = np.random.default_rng(1)
    of_keras = keras.Variable(rng.normal(size=5000).astype("float32"), name="w")
    ours = keras.Variable(of_keras.numpy(), name="w")
    optimizers = SETUPS[setup](), fz.MaskedOptimizer(SETUPS[setup](), maskable={"w": "none"})
    optimizers[0].build([of_keras])
    optimizers[1].build([ours])
    steps = [
        in_mode(functools.partial(apply_one, optimizer, variable), "function")
        for optimizer, variable in zip(optimizers, (of_keras, ours), strict=True)
    ]
    differ, before = 0, {}
    for _ in range(20):
        earlier = before
        before = {variable.path: variable.numpy() for variable in (of_keras, *optimizers[0].variables)}
        gradient = tf.constant(rng.normal(size=5000).astype("float32"))
        for step in steps:
            step(gradient)
        pairs = [(of_keras, ours), *zip(optimizers[0].variables, optimizers[1].inner_optimizer.variables, strict=True)]
        for theirs, own in pairs:
            if theirs.dtype != "float32":
                continue
            # Of what took part, the last step as momentum among it: entries near zero came there by cancellation.
            moved = np.abs(before[theirs.path] - earlier.get(theirs.path, 0))
            largest = np.abs(theirs.numpy()) + np.abs(before[theirs.path]) + moved
            units = np.abs(own.numpy() - theirs.numpy()) / np.spacing(largest)
            assert np.max(units) <= 2, theirs.path
            differ += np.count_nonzero(units)
            own.assign(theirs.numpy())
    assert differ, "they round alike: compare them bit for bit"


@pytest.mark.parametrize(
    "setup", ["SGD", "SGD momentum", "SGD nesterov", "Adam", "Adam amsgrad", "Nadam", "RMSprop", "Lion"]
)
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("repeated", [False, True])
def test_slices_as_keras(setup, state, repeated):
    """Where Keras makes a sparse gradient dense, every trainable row moves; where it does not, the named ones do."""
    results = []
    for fused in (True, False):
        rng = np.random.default_rng(5)
        variable = keras.Variable(rng.normal(size=(40, 6)).astype("float32"), name="table")
        optimizer = fz.MaskedOptimizer(SETUPS[setup](), state=state, fused=fused)
        optimizer.register_mask(variable, rng.random((40, 1)) < 0.5)
        optimizer.build([variable])
        step = in_mode(functools.partial(apply_one, optimizer, variable), "function")
        for _ in range(4):
            rows = rng.integers(0, 40, 9) if repeated else rng.permutation(40)[:9]
            values = tf.constant(rng.normal(size=(9, 6)).astype("float32"))
            step(tf.IndexedSlices(values, tf.constant(rows), tf.constant([40, 6], tf.int64)))
        results.append(variable.numpy())
    if repeated and setup == "Nadam":
        # Keras divides each of the repeated rows before it sums them.
        np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
    else:
        assert_same_bits(*results, setup)


@pytest.mark.parametrize("setup", ["Adam", "Nadam", "RMSprop"])
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("policy", ["seed", "zero", "keep"])
def test_unfreezing_as_unfused(setup, state, policy):
    results = []
    for fused in (True, False):
        rng = np.random.default_rng(8)
        variable = keras.Variable(rng.normal(size=(30, 30)).astype("float32"), name="w")
        mask = rng.random((30, 30)) < 0.4
        optimizer = fz.MaskedOptimizer(
            SETUPS[setup](),
            state=state,
            unfreeze_policy=policy,
            capacity=1.0 if state == "compact" else None,
            fused=fused,
        )
        optimizer.register_mask(variable, mask)
        optimizer.build([variable])
        for number in range(8):
            if number == 4:
                optimizer.unfreeze(variable, rng.random((30, 30)) < 0.3)
            gradient = rng.normal(size=(30, 30)).astype("float32")
            gradient[rng.random((30, 30)) < 0.3] = 0
            optimizer.apply([tf.constant(gradient)], [variable])
        slots = [v.numpy() for v in optimizer.inner_optimizer.variables if v.dtype == "float32" and v.shape != ()]
        count, passing = optimizer.mask_for(variable).count(), optimizer.mask_for(variable).to_numpy()
        # The bits of frozen entries' slots are nobody's business.
        slots = [slot.reshape(-1)[:count] if state == "compact" else slot[passing] for slot in slots]
        results.append([variable.numpy(), *slots])
    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected, f"{setup} {policy}")


def test_switched_in_mid_training():
    rng = np.random.default_rng(2)
    gradients = [rng.normal(size=(50, 3)).astype("float32") for _ in range(9)]
    results = []
    for switching in (False, True):
        variable = keras.Variable(np.ones((50, 3), "float32"), name="w")
        optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(0.1), fused=switching)
        optimizer.freeze(variable, np.s_[:10])
        for number, gradient in enumerate(gradients):
            if switching:
                optimizer.fused = number % 3 != 1
            optimizer.apply([tf.constant(gradient)], [variable])
        results.append(variable.numpy())
    assert_same_bits(*results)


def test_saved_and_loaded(tmp_path):
    def model(fused):
        keras.utils.set_random_seed(0)
        keras.utils.clear_session()
        made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(1, name="b")])
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), fused=fused)
        optimizer.freeze("a/kernel", np.s_[:2])
        made.compile(optimizer, "mse", jit_compile=False)
        return made

    x, y = np.random.default_rng(0).normal(size=(64, 4)).astype("float32"), np.ones((64, 1), "float32")
    whole = model(False)
    whole.fit(x, y, epochs=4, shuffle=False, verbose=0)
    first = model(True)
    first.fit(x, y, epochs=2, shuffle=False, verbose=0)
    first.save(tmp_path / "m.keras")
    second = keras.models.load_model(tmp_path / "m.keras")
    assert second.optimizer.fused is True
    second.compile(second.optimizer, "mse", jit_compile=False)
    second.fit(x, y, epochs=2, shuffle=False, verbose=0)
    for actual, expected in zip(second.get_weights(), whole.get_weights(), strict=True):
        assert_same_bits(actual, expected)


def test_no_pass_over_whole_variables_is_left():
    """A fused step is one op: neither masking nor remembering nor restoring, nor any arithmetic on tensors."""
    variable = keras.Variable(np.ones((64, 64), "float32"), name="w")
    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(0.1), fused=True)
    optimizer.register_mask(variable, np.random.default_rng(0).random((64, 64)) < 0.5)
    optimizer.build([variable])
    step = tf.function(lambda g: optimizer.apply([g], [variable]), autograph=False)
    graph = step.get_concrete_function(tf.TensorSpec((64, 64))).graph
    assert "Freezeops>FusedUpdate" in {op.type for op in graph.get_operations()}
    large = {op.type for op in graph.get_operations() for out in op.outputs if out.shape.num_elements() == 64 * 64}
    assert large <= {"Placeholder", "Identity", "IdentityN"}


def fused_note(inner, variable=None, **arguments):
    variable = keras.Variable(np.ones((4, 4), "float32"), name="w") if variable is None else variable
    optimizer = fz.MaskedOptimizer(inner, fused=arguments.pop("fused", True), **arguments)
    optimizer.freeze(variable, 0)
    optimizer.build([variable])
    return fused_notes(optimizer)[0]


def test_who_is_fused_and_who_is_not(capsys):
    class MyAdam(keras.optimizers.Adam):
        pass

    assert fused_note(keras.optimizers.Adam()) == "fused"
    assert fused_note(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())) == "fused"
    assert "not one of" in fused_note(MyAdam())
    assert "not one of" in fused_note(keras.optimizers.Ftrl())
    assert "moving average" in fused_note(keras.optimizers.Adam(use_ema=True))
    constrained = keras.layers.Dense(2, kernel_constraint="non_neg")
    constrained.build((3, 2))
    assert "constraint" in fused_note(keras.optimizers.Adam(), constrained.kernel)
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), fused=True)
    variable = keras.Variable(np.ones(3, "float32"), name="w")
    optimizer.build([variable])
    optimizer.summary()
    assert "fused" in capsys.readouterr().out


def test_a_clipnorm_set_late_does_not_see_frozen_entries():
    variable = keras.Variable(np.zeros(4, "float32"), name="w")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0), fused=True)
    optimizer.freeze(variable, [0])
    optimizer.build([variable])
    optimizer.inner_optimizer.clipnorm = 1.0
    optimizer.apply([tf.constant([1e6, 3.0, 0.0, 4.0])], [variable])
    np.testing.assert_allclose(variable.numpy(), [0, -0.6, 0, -0.8], rtol=1e-6)


def masked_variable(entries=100):
    rng = np.random.default_rng(4)
    variable = keras.Variable(rng.normal(size=entries).astype("float32"), name="w")
    return variable, rng.random(entries) < 0.5, tf.constant(rng.normal(size=entries).astype("float32"))


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("inner_class", [keras.optimizers.Adam, keras.optimizers.AdamW])
@pytest.mark.parametrize("other_fused", [True, False])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_an_optimizer_that_is_wrapped_twice(inner_class, other_fused, state, mode):
    """What the second wrapper did to the optimizer leaves the first one's masks in force, and the other way round."""
    variable, mask, gradient = masked_variable()
    inner = inner_class(0.1)
    first = fz.MaskedOptimizer(inner, masks={"w": mask}, state=state)
    first.build([variable])
    before = variable.numpy()
    second = fz.MaskedOptimizer(inner, masks={"w": ~mask}, fused=other_fused)
    second.build([variable])
    in_mode(lambda: first.apply([gradient], [variable]), mode)()
    assert_same_bits(variable.numpy()[~mask], before[~mask], "frozen by the first")
    assert np.all(variable.numpy()[mask] != before[mask])
    if state == "compact":
        return  # Its slots are of the first's trainable entries: nobody else can use it.
    before = variable.numpy()
    in_mode(lambda: second.apply([gradient], [variable]), mode)()
    assert_same_bits(variable.numpy()[mask], before[mask], "frozen by the second")
    # By itself the optimizer is what it was: all moves.
    before = variable.numpy()
    inner.apply([gradient], [variable])
    assert np.all(variable.numpy() != before)


@pytest.mark.parametrize("inner_class", [keras.optimizers.Adam, keras.optimizers.AdamW])
def test_two_threads_with_one_optimizer(inner_class):
    """Steps of different threads do not take each other's variables."""
    of_each = [masked_variable(200_000) for _ in range(2)]
    variables = [variable for variable, _, _ in of_each]
    optimizer = fz.MaskedOptimizer(inner_class(0.1))
    for variable, mask, _ in of_each:
        optimizer.register_mask(variable, mask)
    optimizer.build(variables)
    before = [variable.numpy() for variable in variables]
    together = threading.Barrier(2)

    def train(variable, gradient):
        together.wait()
        for _ in range(30):
            optimizer.apply([gradient], [variable])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, variables, [gradient for _, _, gradient in of_each]))
    for (variable, mask, _), value in zip(of_each, before, strict=True):
        assert_same_bits(variable.numpy()[~mask], value[~mask], "frozen")
        assert np.all(variable.numpy()[mask] != value[mask])


@pytest.mark.parametrize("kind", ["dense", "slices"])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_a_variable_that_is_named_twice(state, kind):
    results = []
    for fused in (True, False):
        variable, _, gradient = masked_variable(60)
        variable = keras.Variable(variable.numpy().reshape(20, 3), name="w")
        gradient = tf.reshape(gradient, [20, 3])
        if kind == "slices":
            gradient = tf.IndexedSlices(gradient, tf.range(20), tf.constant([20, 3], tf.int64))
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1, 0.9), state=state, fused=fused)
        optimizer.freeze(variable, np.s_[:7])
        before = variable.numpy()
        optimizer.apply([gradient, gradient], [variable, variable])
        assert_same_bits(variable.numpy()[:7], before[:7], "frozen")
        results.append(variable.numpy())
    assert_same_bits(*results)


@pytest.mark.parametrize(
    "inner, option, value",
    [
        (keras.optimizers.SGD(0.1, momentum=0.9), "momentum", 0.0),
        (keras.optimizers.SGD(0.1, momentum=0.9), "nesterov", True),
        (keras.optimizers.RMSprop(0.1, momentum=0.9), "momentum", 0.0),
        (keras.optimizers.Adam(0.1), "weight_decay", 0.1),
        (keras.optimizers.Adam(0.1), "epsilon", 1.0),
        (keras.optimizers.Lion(0.1), "clipvalue", 1e-3),
    ],
)
def test_an_option_that_is_set_late(inner, option, value):
    results = []
    for fused in (True, False):
        variable, mask, gradient = masked_variable()
        optimizer = fz.MaskedOptimizer(type(inner).from_config(inner.get_config()), masks={"w": mask}, fused=fused)
        optimizer.apply([gradient], [variable])
        setattr(optimizer.inner_optimizer, option, value)
        optimizer.apply([gradient], [variable])
        results.append(variable.numpy())
    assert_same_bits(*results)


def test_an_update_that_passes_by_is_an_error(monkeypatch):
    variable, mask, gradient = masked_variable()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"w": mask})
    optimizer.build([variable])
    monkeypatch.setattr(keras.optimizers.Adam, "_backend_apply_gradients", lambda self, gradients, variables: None)
    with pytest.raises(RuntimeError, match="must update variables by Keras's own `apply`"):
        optimizer.apply([gradient], [variable])


class Shrinking(keras.optimizers.LossScaleOptimizer):
    """Writes variables by itself."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for variable in trainable_variables:
            variable.assign(variable * 0.9)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_a_wrapper_that_writes_variables(mode):
    variable, mask, gradient = masked_variable()
    optimizer = fz.MaskedOptimizer(Shrinking(keras.optimizers.AdamW(0.1), initial_scale=1.0), masks={"w": mask})
    optimizer.build([variable])
    before = variable.numpy()
    in_mode(lambda: optimizer.apply([gradient], [variable]), mode)()
    assert_same_bits(variable.numpy()[~mask], before[~mask])
    assert fused_notes(optimizer) == ["Shrinking around it may write variables"]


@pytest.mark.parametrize("method", ["apply", "_backend_update_step", "update_step"])
@pytest.mark.parametrize("late", [False, True])
def test_a_method_that_was_replaced(method, late):
    """What stands on the instance runs, and frozen entries stay."""
    results = []
    for fused in (True, False):
        variable, mask, gradient = masked_variable()
        optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(0.1), masks={"w": mask}, fused=fused)
        inner = optimizer.inner_optimizer
        if late:
            optimizer.apply([gradient], [variable])
        real = getattr(inner, method)

        def replaced(*args, real=real, variable=variable):
            real(*args)
            variable.assign(variable * 0.9)

        setattr(inner, method, replaced)
        before = variable.numpy()
        optimizer.apply([gradient], [variable])
        assert_same_bits(variable.numpy()[~mask], before[~mask])
        results.append(variable.numpy())
        if fused and method == "apply":
            assert fused_notes(optimizer) == ["its `apply` was replaced"]
    assert_same_bits(*results)


@pytest.mark.parametrize("method", ["apply", "apply_gradients", "update_step"])
def test_a_method_of_the_class_that_was_replaced(method, monkeypatch):
    """As loggers do; `fused=True` is the default, and theirs runs all the same."""
    variable, mask, gradient = masked_variable()
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"w": mask})
    optimizer.build([variable])
    before, calls = variable.numpy(), []
    real = getattr(keras.optimizers.Adam, method)

    @functools.wraps(real)
    def replaced(self, *args, **kwargs):
        calls.append(method)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(keras.optimizers.Adam, method, replaced)
    optimizer.apply_gradients([(gradient, variable)])
    assert calls == [method]
    assert fused_notes(optimizer) == [f"its `{method}` was replaced"]
    assert_same_bits(variable.numpy()[~mask], before[~mask])


class Halves(keras.constraints.Constraint):
    def __call__(self, w):
        return w * 0.5


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("name, value", [("constraint", Halves()), ("overwrite_with_gradient", True)])
def test_what_a_variable_is_told_late(name, value, state):
    variable, mask, gradient = masked_variable()
    other = keras.Variable(np.ones(3, "float32"), name="other")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"w": mask}, state=state)
    optimizer.apply([gradient, tf.ones(3)], [variable, other])
    before = variable.numpy()
    setattr(variable, name, value)
    optimizer.apply([gradient, tf.ones(3)], [variable, other])
    assert_same_bits(variable.numpy()[~mask], before[~mask])
    assert np.all(variable.numpy()[mask] != before[mask])


@pytest.mark.parametrize("option", ["epsilon", "beta_2"])
@pytest.mark.parametrize("kind", [tf.constant, tf.Variable])
def test_options_that_are_tensors(option, kind):
    results = []
    for fused in (True, False):
        variable, mask, gradient = masked_variable()
        variable = keras.Variable(variable.numpy(), dtype="float16", name="w")
        inner = keras.optimizers.Adam(0.1, **{option: kind(0.25)})
        optimizer = fz.MaskedOptimizer(inner, masks={"w": mask}, fused=fused)
        optimizer.apply([tf.cast(gradient, "float16")], [variable])
        results.append(variable.numpy().astype("float32"))
    np.testing.assert_allclose(*results, rtol=2e-3, atol=1e-4)


def test_slots_that_were_replaced():
    results = []
    for fused in (True, False):
        variable, mask, gradient = masked_variable()
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"w": mask}, fused=fused)
        optimizer.apply([gradient], [variable])
        optimizer.inner_optimizer._momentums = [keras.Variable(np.ones(100, "float32"))]
        optimizer.apply([gradient], [variable])
        results.append(variable.numpy())
    assert_same_bits(*results)


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_rows_out_of_range(mode, state):
    """As unfused: an error outside of XLA, which has none and drops the row."""
    results = []
    for fused in (True, False):
        variable = keras.Variable(np.ones((10, 4), "float32"), name="w")
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1, 0.9), state=state, fused=fused)
        optimizer.register_mask(variable, np.arange(10)[:, None] < 8)
        optimizer.build([variable])
        values, rows = tf.ones((3, 4)), tf.constant([1, 12, 9])
        step = in_mode(functools.partial(apply_rows, optimizer, variable), mode)
        if mode == "jit":
            step(values, rows)
        else:
            with pytest.raises(tf.errors.InvalidArgumentError):
                step(values, rows)
            assert np.all(variable.numpy() == 1)
        results.append(variable.numpy())
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_fused_must_be_a_bool(value):
    with pytest.raises(TypeError, match="`fused` must be a bool. Received: fused="):
        fz.MaskedOptimizer(keras.optimizers.Adam(), fused=value)
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    with pytest.raises(TypeError, match="`fused` must be a bool"):
        optimizer.fused = value


def test_variables_without_a_mask_are_fused_too():
    results = []
    for fused in (True, False):
        variable = keras.Variable(np.linspace(-1, 1, 100).astype("float32"), name="w")
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), maskable={"w": "none"}, fused=fused)
        for _ in range(3):
            optimizer.apply([variable.value * 2], [variable])
        assert fused_notes(optimizer) == ["fused" if fused else "fused=False"]
        results.append(variable.numpy())
    assert_same_bits(*results)
    assert bits(results[0]).size == 100


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("reordered", [False, True])
def test_a_global_norm_in_a_function(momentum, reordered):
    """Grappler multiplies the clipping factor with the learning rate first, which a fused step can not."""
    before = tf.config.optimizer.get_experimental_options().get("arithmetic_optimization", True)
    kernels = []
    x, y = np.random.default_rng(0).normal(size=(2, 64, 8)).astype("float32")
    try:
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": reordered})
        for wrap in (lambda inner: inner, fz.MaskedOptimizer):
            keras.utils.set_random_seed(1)
            model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(8)])
            optimizer = wrap(keras.optimizers.SGD(0.1, momentum=momentum, global_clipnorm=0.05))
            model.compile(optimizer, "mse", jit_compile=False)
            model.fit(x, y, batch_size=16, verbose=0, shuffle=False)
            kernels.append(np.concatenate([weight.numpy().ravel() for weight in model.weights]))
    finally:
        tf.config.optimizer.set_experimental_options({"arithmetic_optimization": before})
    if reordered:
        # Updates of up to 0.005 in a step, each off by 2 units in its last place at most.
        np.testing.assert_allclose(*kernels, rtol=0, atol=1e-7)
    else:
        assert_same_bits(*kernels)
