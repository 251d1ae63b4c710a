"""Fused updates of ranges of a variable, as threads share it out, and sums of slices."""

import ctypes

import numpy as np
import numpy_twins as twins
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_fused_kernels import DTYPES, LAYOUTS, RULES, Step, Variable, run
from test_kernels import (
    DENSITIES,
    FLOATS,
    INTEGERS,
    OFFSETS,
    RUNS,
    SEEDS,
    SETTINGS,
    dtype_of,
    int64,
)


def update_range(kernels, step, variable, begin, end, rank=-1, by_index=False):
    """Runs one kernel; returns whether indices are those of the mask."""
    scalars, scales = kernels.put(step.scalars), kernels.put(step.scales)
    numbers = ctypes.c_int * max(len(step.seed_slots), 1)
    return not kernels.functions.fz_update_range(
        FLOATS[step.dtype][0], step.rule.encode(), scalars.pointer, scales.pointer, len(step.seed_slots),
        numbers(*step.seed_slots), numbers(*step.seed_powers), ctypes.byref(variable.pointers), int64(begin),
        int64(end), int64(rank), int(by_index),
    )  # fmt: skip


CUTS = st.lists(st.floats(0, 1), max_size=4)
CASES = dict(rule=RULES, dtype=DTYPES, layout=LAYOUTS, density=DENSITIES, runs=RUNS, cuts=CUTS, seeded=st.booleans())


def pieces(cuts, size, multiple):
    """Ranges that cover `size` entries, each with its end at a multiple."""
    ends = sorted(round(cut * size) // multiple * multiple for cut in cuts)
    return list(zip([0, *ends], [*ends, size], strict=True))


@SETTINGS
@given(**CASES, offset=OFFSETS, seed=SEEDS)
def test_full_state(kernels, rule, dtype, layout, density, runs, cuts, seeded, offset, seed):
    rng = np.random.default_rng(seed)
    step = Step.make(rng, rule, dtype, seeded)
    variable = Variable(kernels, rng, step, layout, density, runs, decays=True, offset=offset)
    for begin, end in pieces(cuts, variable.passing.size, 1):
        update_range(kernels, step, variable, begin, end)
    variable.check()


@SETTINGS
@given(**CASES, gathered=st.booleans(), offset=OFFSETS, seed=SEEDS)
def test_compact_state(kernels, rule, dtype, layout, density, runs, cuts, seeded, gathered, offset, seed):
    rng = np.random.default_rng(seed)
    step = Step.make(rng, rule, dtype, seeded)
    variable = Variable(
        kernels, rng, step, (1, *layout[1:]), density, runs, compact=True, room=3, offset=offset, gathered=gathered
    )  # fmt: skip
    ranks = np.concatenate([[0], np.cumsum(variable.passing)])
    for begin, end in pieces(cuts, variable.passing.size, 1):
        update_range(kernels, step, variable, begin, end, rank=ranks[begin])
    variable.check()


@SETTINGS
@given(**CASES, wide=st.booleans(), gathered=st.booleans(), offset=OFFSETS, seed=SEEDS)
def test_by_index(kernels, rule, dtype, layout, density, runs, cuts, seeded, wide, gathered, offset, seed):
    rng = np.random.default_rng(seed)
    step = Step.make(rng, rule, dtype, seeded)
    kept = layout[1] * layout[2]
    variable = Variable(
        kernels, rng, step, (1, kept, 1), density, runs, compact=True, room=3, wide=wide, offset=offset,
        gathered=gathered,
    )  # fmt: skip
    for begin, end in pieces(cuts, variable.used, 1):
        assert update_range(kernels, step, variable, begin, end, by_index=True)
    variable.check()


@pytest.mark.parametrize("wide", [False, True])
def test_indices_of_frozen_entries_are_reported(kernels, wide):
    """And nothing frozen is written, nor anything beside the arrays."""
    rng = np.random.default_rng(0)
    step = Step.make(rng, "adam", "float32", True)
    for wrong in (-1, 3000, 2**31 - 1, "frozen"):
        one = Variable(kernels, rng, step, (1, 3000, 1), 0.4, compact=True, room=2, wide=wide)
        indices = one.held["indices"].get().copy()
        indices[one.used // 2] = np.flatnonzero(~one.passing)[7] if wrong == "frozen" else wrong
        one.held["indices"] = kernels.put(indices)
        one.pointers.indices = one.held["indices"].pointer.value
        assert not update_range(kernels, step, one, 0, one.used, by_index=True)
        value = one.arrays[0].get()
        frozen = ~one.passing
        np.testing.assert_array_equal(value.view(np.uint32)[frozen], one.value.view(np.uint32)[frozen])
        for array in (*one.arrays, one.unseeded, *one.held.values()):
            array.get()


@pytest.mark.parametrize("compact, gathered", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("density", [0.002, 0.1, 0.5])
def test_large_variables(kernels, compact, gathered, density):
    """Pieces on several threads, among small variables."""
    rng = np.random.default_rng(0)
    step = Step.make(rng, "nadam", "float32", True)
    layouts = [(1, 70_001, 1), (1, 3, 1), (1, 0, 1), (1, 700, 130), (1, 200_000, 1)]
    run(
        kernels,
        step,
        [Variable(kernels, rng, step, layout, density, compact=compact, gathered=gathered) for layout in layouts],
    )


@pytest.mark.parametrize("compact", [False, True])
def test_repeated_rows_that_wait_to_be_seeded(kernels, compact):
    """Gradients that cancel leave a second moment behind: the larger of the two squares seeds it."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        step = Step.make(rng, "adam", "float32", True)
        run(kernels, step, [Variable(kernels, rng, step, (1, 400, 1), 0.7, compact=compact, slices=9, row_size=100)])


@SETTINGS
@given(dtype=DTYPES, width=st.sampled_from([0, 1, 7, 8, 15, 16, 17, 33, 100]), offset=OFFSETS, seed=SEEDS)
def test_adding_rows(kernels, dtype, width, offset, seed):
    rng = np.random.default_rng(seed)
    floats = dtype_of(dtype)
    total, squares, row = (rng.normal(size=width).astype(floats) for _ in range(3))
    scale = rng.normal(size=1).astype(floats)
    arrays = [kernels.put(array, offset * array.itemsize) for array in (total, squares, row, scale)]
    kernels.functions.fz_add_row(FLOATS[dtype][0], *(array.pointer for array in arrays), int64(width))
    scaled = row * scale
    for array, wanted in zip(arrays, (total + scaled, squares + scaled * scaled), strict=False):
        integers = INTEGERS[wanted.itemsize]
        np.testing.assert_array_equal(array.get().view(integers), wanted.view(integers))


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.125])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_float(kernels, dtype, scale):
    """All 65,536 as entries: to float32 and back. Powers of two make products half way between two subnormal floats."""
    floats = dtype_of(dtype)
    row = np.arange(65536, dtype=np.uint16).view(floats)
    rng = np.random.default_rng(0)
    total, squares = (np.where(scale == 0.3, rng.normal(size=row.size), 0).astype(floats) for _ in range(2))
    scale = np.array([scale], floats)
    arrays = [kernels.put(array) for array in (total, squares, row, scale)]
    kernels.functions.fz_add_row(FLOATS[dtype][0], *(array.pointer for array in arrays), int64(row.size))
    with np.errstate(all="ignore"):
        scaled = row * scale
        wanted = total + scaled, squares + scaled * scaled
    for array, expected in zip(arrays, wanted, strict=False):
        actual = array.get()
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(actual), nan)
        np.testing.assert_array_equal(actual.view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


@SETTINGS
@given(
    kept=st.sampled_from([40, 5000]),
    inner=st.sampled_from([1, 4, 600]),
    density=st.sampled_from([0.01, 0.3]),  # found by indices, and by bits
    wrong=st.sampled_from(["offsets up", "offsets down", "one offset up", "one offset down", "capacity"]),
    seed=SEEDS,
)
def test_what_does_not_belong_to_the_mask_is_reported(kernels, kept, inner, density, wrong, seed):
    """Before anything is written."""
    rng = np.random.default_rng(seed)
    inner = inner if kept < 1000 else 1
    step = Step.make(rng, "adam", "float32", True)
    one = Variable(kernels, rng, step, (1, kept, inner), density, compact=True, room=2)
    if wrong == "capacity":
        if one.used == 0:
            return
        one.pointers.capacity = one.used // inner - 1
    else:
        offsets = one.held["offsets"].get().copy()
        at = 1 if wrong.startswith("one") else slice(None)  # of the second block, if there are two
        offsets[at] += 50 if wrong.endswith("up") else -5
        one.held["offsets"] = kernels.put(offsets)
        one.pointers.offsets = one.held["offsets"].pointer.value
    one.check = lambda: None
    with pytest.raises(RuntimeError, match="not those of the mask"):
        run(kernels, step, [one])
    for array, old in zip(one.arrays, [one.value, *one.slots], strict=True):
        np.testing.assert_array_equal(array.get().view(np.uint32), old.view(np.uint32))
    np.testing.assert_array_equal(one.unseeded.get(), one.waiting)


def test_twins_and_kernels_know_the_same_rules():
    text = (twins.__file__).replace("tests/gpu/numpy_twins.py", "csrc/kernels/common/update_rules.h")
    with open(text, encoding="utf-8") as file:
        content = file.read()
    for rule in twins.RULES:
        assert f'{{"{rule}", UpdateRule::' in content
    assert content.count('", UpdateRule::') == len(twins.RULES)
