"""Fused updates compiled by XLA, both ways: plain HLO (the only way on GPUs) and, on the CPU, a call of the kernel."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from common import FUSED, OPTIONS, assert_same_bits
from fused_variables import (
    DTYPES,
    RULES,
    fused_notes,
    passing_of,
    variables_of,
    with_compact_gradient,
    with_gradient_of_rows,
)
from test_fused import options_for, train
from training import check_promise

from freezeops import ops
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.ops import native, reference_updates

pytestmark = pytest.mark.skipif(native.op_library() is None, reason="no native library for this TensorFlow")

ODD_BITS = {
    # A signalling NaN, one with a payload, -0.0, subnormals, infinity.
    "float16": [0x7C01, 0xFE55, 0x8000, 0x0001, 0x83FF, 0x7C00],
    "bfloat16": [0x7F81, 0xFFD5, 0x8000, 0x0001, 0x807F, 0x7F80],
    "float32": [0x7F800001, 0xFFC00055, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000],
    "float64": [0x7FF0000000000001, 0xFFF8000000000055, 1 << 63, 1, (1 << 63) + 1, 0x7FF << 52],
}
FULL = [
    Layout(1, 203, 1),
    Layout(1, 77, 1),  # without a mask
    Layout(1, 9, 16),
    Layout(5, 11, 3),
    Layout(1, 12, 10),
    Layout(1, 160, 1),
]
COMPACT = [Layout(1, layout.kept, layout.inner) for layout in FULL]


@pytest.fixture(params=["hlo", "call"])
def way(request, monkeypatch):
    """How XLA updates: read when a kernel is made, which XLA does for each compilation."""
    if request.param == "hlo":
        monkeypatch.setenv("FREEZEOPS_FUSED_HLO", "1")
    else:
        monkeypatch.delenv("FREEZEOPS_FUSED_HLO", raising=False)
    return request.param


@pytest.fixture
def hlo(monkeypatch):
    monkeypatch.setenv("FREEZEOPS_FUSED_HLO", "1")


def jitted(rule, variables, told):
    return tf.function(lambda: ops.fused_update(rule, variables, *told), jit_compile=True, autograph=False)


def with_odd_values(ours, twins, dtype):
    """Puts values that arithmetic or copies of floats would change where nothing may be written."""
    odd = np.array(ODD_BITS[dtype], f"u{DTYPES[dtype].itemsize}").view(DTYPES[dtype])
    for one, twin in zip(ours, twins, strict=True):
        if one.bits is None:
            continue
        frozen = np.flatnonzero(~passing_of(one.bits.numpy(), one.layout))[: odd.size]
        for number, array in enumerate((one.variable, *one.slots)):
            if number == 0 or one.ranks is None:
                values = array.numpy()
                values.reshape(-1)[frozen] = odd[: frozen.size]
                for variable in (array, (twin.variable, *twin.slots)[number]):
                    variable.assign(values)


def with_slices(ours, twins, number, rng, rows, dtype):
    """The variable of this number gets slices for its gradient, some of rows that are named more than once."""
    width = ours[number].layout.size // rows
    named = tf.constant([3, 1, rows - 1, 3, 0, 3], tf.int64)
    values = tf.constant(rng.normal(size=(6, width)).astype(DTYPES[dtype]))
    slices = tf.IndexedSlices(values, named, tf.constant([rows, width], tf.int64))
    for variables in (ours, twins):
        variables[number] = with_gradient_of_rows(variables[number], slices)


def assert_close_and_frozen_exact(ours, twins, before, dtype, told, units=4):
    """Frozen entries, and with full state those of their slots, bit for bit; trainable ones by units of rounding."""
    unit = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    for number, (one, twin) in enumerate(zip(ours, twins, strict=True)):
        bits = np.array([255], np.uint8) if one.bits is None else one.bits.numpy()
        for array, (actual, expected) in enumerate(
            [(one.variable, twin.variable), *zip(one.slots, twin.slots, strict=True)]
        ):
            where = f"{told} variable {number} array {array}"
            actual, expected = actual.numpy().reshape(-1), expected.numpy().reshape(-1)
            if one.ranks is not None and array:
                used = packing.count_bits(bits, one.layout.kept) * one.layout.inner
                passing = np.arange(actual.size) < used
            else:
                passing = passing_of(bits, one.layout)
            assert_same_bits(actual[~passing], before[number][array][~passing], f"{where}: frozen")
            actual, expected, old = (x[passing].astype(np.float64) for x in (actual, expected, before[number][array]))
            # Of what took part in the sum.
            size = np.maximum.reduce([np.abs(expected), np.abs(old), np.abs(expected - old)])
            error = np.abs(actual - expected) / (unit * np.maximum(size, 0.1))
            assert np.all(error <= units), f"{where}: {np.nanmax(error)} units, {np.isnan(error).sum()} NaN"
        if one.unseeded is not None:
            assert_same_bits(one.unseeded.numpy(), twin.unseeded.numpy(), f"{told} variable {number}: unseeded")


def state_of(variables):
    return [[array.numpy().reshape(-1) for array in (one.variable, *one.slots)] for one in variables]


def check_against_the_twin(rule, dtype, compact_state, seeded):
    rng = np.random.default_rng(len(rule))
    layouts = COMPACT if compact_state else FULL
    ours, twins, told = variables_of(rng, rule, dtype, layouts, 0.6, compact_state, seeded)
    with_odd_values(ours, twins, dtype)
    with_slices(ours, twins, 4, rng, 12, dtype)
    with_slices(ours, twins, 5, rng, 16, dtype)
    for number in (0, 2) if compact_state else ():
        for variables in (ours, twins):
            variables[number] = with_compact_gradient(variables[number], np.nan)
    if rule.startswith("rmsprop"):
        # Not the root of what is below zero: the mean square is seeded by squares, and larger than the squared mean.
        told = (told[0], [0][: len(told[1])], [2][: len(told[1])], told[3][:1])
        for one in (*ours, *twins):
            if rule.endswith("centered"):
                one.slots[-1].assign(one.slots[-1] * 0.25)
    before = state_of(ours)
    jitted(rule, ours, told)()
    reference_updates.fused_update(rule, twins, *told)
    assert_close_and_frozen_exact(ours, twins, before, dtype, f"{rule} {dtype}")


@pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_as_the_twin(rule, dtype, compact_state, hlo):
    check_against_the_twin(rule, dtype, compact_state, seeded=RULES[rule][0] > 0)


@pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("rule", RULES)
def test_without_seeding_as_the_twin(rule, compact_state, hlo):
    check_against_the_twin(rule, "float32", compact_state, seeded=False)


@pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("rule", RULES)
def test_a_call_as_the_twin(rule, compact_state):
    check_against_the_twin(rule, "bfloat16", compact_state, seeded=RULES[rule][0] > 0)


@pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
def test_rows_out_of_range_are_dropped(compact_state, hlo):
    """XLA has no errors at run time; the native kernel would have one."""
    rng = np.random.default_rng(1)
    ours, twins, told = variables_of(rng, "adam", "float32", [Layout(1, 12, 10)], 0.6, compact_state, False)
    before = state_of(ours)
    values = rng.normal(size=(4, 10)).astype("float32")
    for variables, rows in ((ours, [12, 3, -1, 5]), (twins, [3, 5])):
        kept = values if len(rows) == 4 else values[[1, 3]]
        slices = tf.IndexedSlices(tf.constant(kept), tf.constant(rows, tf.int64), tf.constant([12, 10], tf.int64))
        variables[0] = with_gradient_of_rows(variables[0], slices)
    jitted("adam", ours, told)()
    reference_updates.fused_update("adam", twins, *told)
    assert_close_and_frozen_exact(ours, twins, before, "float32", "adam")


@pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
def test_nothing_waits(compact_state, way):
    """The other branch: no entry is seeded, also where slots are zero."""
    rng = np.random.default_rng(1)
    layouts = [Layout(1, 203, 1), Layout(1, 9, 16)]
    ours, twins, told = variables_of(rng, "adam", "float32", layouts, 0.6, compact_state, True)
    for one in (*ours, *twins):
        one.unseeded.assign(tf.zeros_like(one.unseeded))
    before = state_of(ours)
    jitted("adam", ours, told)()
    reference_updates.fused_update("adam", twins, *told)
    assert_close_and_frozen_exact(ours, twins, before, "float32", "adam")


def test_indices_of_another_mask_reach_no_frozen_entry(hlo):
    """As after `repack`, which empties the masks of functions that were traced before."""
    rng = np.random.default_rng(0)
    (one,), _, told = variables_of(rng, "adam", "float32", [Layout(1, 203, 1)], 0.5, True, False)
    one.bits.assign(tf.zeros_like(one.bits))
    before = state_of([one])[0]
    jitted("adam", [one], told)()
    for array, value in zip((one.variable, *one.slots), before, strict=True):
        assert_same_bits(array.numpy(), value)


def test_refuses_what_does_not_belong_together(hlo):
    def update(**changed):
        rng = np.random.default_rng(0)
        (one,), _, told = variables_of(rng, "adam", "float32", [Layout(1, 100, 1)], 0.5, False, True)
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)) as error:
            jitted("adam", [one._replace(**changed)], told)()
        return str(error.value)

    assert "slot must have the 100 entries" in update(slots=[tf.Variable(tf.zeros([100])), tf.Variable(tf.zeros([99]))])
    assert "mask must have shape [13]" in update(bits=tf.Variable(tf.zeros([12], tf.uint8)))
    assert "variable must have the 100 entries" in update(variable=tf.Variable(tf.zeros([99])), gradient=tf.ones([99]))
    assert "mask must have shape [13]" in update(unseeded=tf.Variable(tf.zeros([12], tf.uint8)))
    rows = tf.IndexedSlices(tf.zeros([1, 7]), tf.constant([0], tf.int64), tf.constant([10, 7], tf.int64))
    assert "values must be rows of the variable" in update(gradient=rows, variable=tf.Variable(tf.ones([20, 5])))
    assert "gradient must have the shape of the variable" in update(gradient=tf.ones([10, 10]))


def test_refuses_compact_gradients_of_another_size(way):
    (one,), _, told = variables_of(np.random.default_rng(0), "adam", "float32", [Layout(1, 20, 5)], 0.5, True, False)
    one = with_compact_gradient(one)
    size = one.gradient.shape[0]
    for wrong in (tf.ones([size + 5]), tf.ones([100]), tf.ones([0])):
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=f"entry for each of a slot, {size}"):
            jitted("adam", [one._replace(gradient=wrong)], told)()


def test_the_way_that_is_asked_for(way):
    rng = np.random.default_rng(0)
    ours, _, told = variables_of(rng, "adam", "float32", [Layout(1, 100, 1)], 0.5, False, False)
    text = jitted("adam", ours, told).experimental_get_compiler_ir()(stage="hlo")
    assert ("freezeops_fused_update" in text) == (way == "call")


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setup", FUSED)
def test_as_keras(setup, dtype, state, hlo):
    options = options_for(setup, dtype)
    ours, masks, optimizer = train(setup, "jit", True, dtype, state, options=options)
    assert set(fused_notes(optimizer)) == {"fused"}
    by_keras, _, _ = train(setup, "jit", None, dtype, options=options)
    unit = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    for actual, expected, mask in zip(ours, by_keras, masks, strict=True):
        assert_same_bits(actual[~mask], expected[~mask], "frozen")
        actual, expected = actual.astype("float64"), expected.astype("float64")
        # Six steps, each of a few roundings.
        assert np.max(np.abs(actual - expected)) <= 16 * unit * np.max(np.abs(expected))


@pytest.mark.parametrize("option", ["plain", "weight_decay"])
@pytest.mark.parametrize(
    "setup", ["SGD momentum", "AdamW", "Adam amsgrad", "Nadam", "RMSprop momentum centered", "Lion"]
)
def test_the_promise(setup, option, hlo):
    check_promise(setup, OPTIONS[option], "jit", fused=True)


STEPS = """
import os, sys
import keras, numpy as np, tensorflow as tf
import freezeops as fz

variable = keras.Variable(np.ones((40, 6), "float32"), name="table")
optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), state=sys.argv[1], fused=True)
optimizer.register_mask(variable, np.random.default_rng(0).random((40, 6)) < 0.5)
optimizer.build([variable])

@tf.function(jit_compile=True, autograph=False)
def step(values, rows):
    optimizer.apply([tf.IndexedSlices(values, rows, tf.constant([40, 6], tf.int64))], [variable])

for number in range(5):
    step(tf.random.normal([9, 6]), tf.random.uniform([9], 0, 40, tf.int64))
    optimizer.learning_rate = 0.1 / (number + 2)
    if number == 2:
        optimizer.freeze(variable, np.s_[:3])
        if sys.argv[1] == "full":
            optimizer.unfreeze(variable, np.s_[3:5])
assert step.experimental_get_tracing_count() == 1
"""


@pytest.mark.parametrize("state", ["full", "compact"])
def test_compiled_once(state, way, tmp_path):
    """Slices of other rows, another learning rate and another mask are no new program: XLA writes each one down."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*inference_step.*",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", STEPS, state], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("*inference_step*before_optimizations.txt"))) == 1
