"""Fused updates compiled by XLA, both ways: plain HLO (the only way on GPUs) and, on the CPU, a call of the kernel."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits
from test_fused import DTYPES, RULES, passing_of, variables_of

from freezeops import _native, ops, reference_updates
from freezeops.layout import Layout

pytestmark = pytest.mark.skipif(_native.op_library() is None, reason="no native library for this TensorFlow")

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
        values = one.variable.numpy()
        if one.bits is not None:
            frozen = np.flatnonzero(~passing_of(one.bits.numpy(), one.layout))[: odd.size]
            values[frozen] = odd[: frozen.size]
        one.variable.assign(values)
        twin.variable.assign(values)


def with_slices(ours, twins, number, rng, rows, dtype):
    """The variable of this number gets slices for its gradient, some of rows that are named more than once."""
    width = ours[number].layout.size // rows
    named = tf.constant([3, 1, rows - 1, 3, 0, 3], tf.int64)
    values = tf.constant(rng.normal(size=(6, width)).astype(DTYPES[dtype]))
    slices = tf.IndexedSlices(values, named, tf.constant([rows, width], tf.int64))
    for variables in (ours, twins):
        variables[number] = variables[number]._replace(gradient=slices)


def assert_close_and_frozen_exact(ours, twins, before, dtype, told, units=4):
    """Frozen entries, and with full state those of their slots, bit for bit; trainable ones by units of rounding."""
    unit = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    for number, (one, twin) in enumerate(zip(ours, twins, strict=True)):
        bits = np.array([255], np.uint8) if one.bits is None else one.bits.numpy()
        for array, (actual, expected) in enumerate(
            [(one.variable, twin.variable), *zip(one.slots, twin.slots, strict=True)]
        ):
            where = f"{told} variable {number} array {array}"
            actual, expected = actual.numpy(), expected.numpy()
            if one.ranks is not None and array:
                used = ops.count_bits(bits, one.layout.kept) * one.layout.inner
                passing = np.arange(actual.size) < used
            else:
                passing = passing_of(bits, one.layout)
            assert_same_bits(actual[~passing], before[number][array][~passing], f"{where}: frozen")
            actual, expected, old = (x[passing].astype(np.float64) for x in (actual, expected, before[number][array]))
            # Of what took part in the sum.
            size = np.maximum.reduce([np.abs(expected), np.abs(old), np.abs(expected - old)])
            error = np.abs(actual - expected) / (unit * np.maximum(size, 0.1))
            print("ERR", told, array, np.max(error, initial=0), size[np.argmax(error)] if error.size else 0)
            assert np.all(error <= units), f"{where}: {np.nanmax(error)} units, {np.isnan(error).sum()} NaN"
        if one.unseeded is not None:
            assert_same_bits(one.unseeded.numpy(), twin.unseeded.numpy(), f"{told} variable {number}: unseeded")


def state_of(variables):
    return [[array.numpy() for array in (one.variable, *one.slots)] for one in variables]


@pytest.mark.parametrize("seeded", [False, True], ids=["", "seeded"])
@pytest.mark.parametrize("compact_state", [False, True], ids=["full", "compact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_as_the_twin(rule, dtype, compact_state, seeded, way):
    if seeded and not RULES[rule][0]:
        pytest.skip("has no slots")
    rng = np.random.default_rng(len(rule))
    layouts = COMPACT if compact_state else FULL
    ours, twins, told = variables_of(rng, rule, dtype, layouts, 0.6, compact_state, seeded)
    with_odd_values(ours, twins, dtype)
    with_slices(ours, twins, 4, rng, 12, dtype)
    with_slices(ours, twins, 5, rng, 16, dtype)
    if rule.startswith("rmsprop"):
        # Not the root of what is below zero: the mean square is seeded by squares, and larger than the squared mean.
        told = (told[0], [0][: len(told[1])], [2][: len(told[1])], told[3][:1])
        for one in (*ours, *twins):
            if rule.endswith("centered"):
                one.slots[-1].assign(one.slots[-1] * 0.25)
    before = state_of(ours)
    jitted(rule, ours, told)()
    reference_updates.fused_update(rule, twins, *told)
    assert_close_and_frozen_exact(ours, twins, before, dtype, f"{rule} {dtype} {way}")
