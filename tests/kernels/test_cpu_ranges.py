"""Every kernel of the table on ranges of a tensor, as threads share it out: odd begins, ends and alignments."""

import numpy as np
import numpy_twins as twins
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import (
    DENSITIES,
    LAYOUTS,
    OFFSETS,
    RUNS,
    SEEDS,
    SETTINGS,
    WIDTHS,
    int64,
    layout_argument,
    make_bits,
    make_values,
    pointers,
)

RANGES = st.tuples(st.floats(0, 1), st.floats(0, 1))


class Case:
    """A mask, a range of its entries, and which of these are trainable."""

    def __init__(self, kernels, layout, density, runs, where, offset, seed):
        self.kernels, self.offset, self.rng = kernels, offset, np.random.default_rng(seed)
        self.packed = make_bits(self.rng, layout[1], density, runs)
        trainable = twins.expand(self.packed, layout)
        self.begin, self.end = sorted(round(share * trainable.size) for share in where)
        self.trainable = trainable[self.begin : self.end]
        self.bits = kernels.put(self.packed, offset % 4)
        self.mask = (self.bits.pointer, layout_argument(layout), int64(self.begin), int64(self.end))

    def values(self, width, size=None):
        """Values of the range, or `size` of them, and where the kernels see them."""
        values = make_values(self.rng, self.trainable.size if size is None else size, width)
        return values, self.kernels.put(values, self.offset * width)

    def call(self, name, *arguments):
        return getattr(self.kernels.functions, name)(*arguments)


@pytest.fixture(scope="module")
def case(kernels):
    return lambda *arguments: Case(kernels, *arguments)


CASES = dict(layout=LAYOUTS, density=DENSITIES, runs=RUNS, where=RANGES, offset=OFFSETS, seed=SEEDS)


@SETTINGS
@given(**CASES)
def test_counting(case, layout, density, runs, where, offset, seed):
    one = case(layout, density, runs, where, offset, seed)
    assert one.call("fz_count_frozen", *one.mask) == (~one.trainable).sum()
    ones = np.unpackbits(one.packed, count=layout[1], bitorder="little")
    begin, end = sorted(round(share * layout[1]) for share in where)
    assert one.call("fz_count_ones", one.bits.pointer, int64(begin), int64(end)) == ones[begin:end].sum()
    assert one.call("fz_all_trainable", *one.mask[:2]) == ones.all()


@SETTINGS
@given(**CASES, width=WIDTHS, in_memory=st.booleans())
def test_zeroing(case, layout, density, runs, where, offset, seed, width, in_memory):
    one = case(layout, density, runs, where, offset, seed)
    old, data = one.values(width)
    one.call("fz_zero_range", width, data.pointer, *one.mask, int(in_memory))
    np.testing.assert_array_equal(data.get(), twins.zero_frozen(old, one.trainable))
    new, source = one.values(width)
    _, data = one.values(width)
    one.call("fz_copy_and_zero_range", width, data.pointer, source.pointer, *one.mask)
    np.testing.assert_array_equal(data.get(), twins.zero_frozen(new, one.trainable))


@SETTINGS
@given(**CASES, width=WIDTHS, which=st.booleans())
def test_moving(case, layout, density, runs, where, offset, seed, width, which):
    """Copying, gathering and scattering the trainable entries (`which`) or the frozen ones."""
    one = case(layout, density, runs, where, offset, seed)
    selected = one.trainable if which else ~one.trainable
    count = int(selected.sum())
    old, data = one.values(width)
    new, source = one.values(width)
    one.call("fz_copy_range", int(which), width, data.pointer, source.pointer, *one.mask)
    np.testing.assert_array_equal(data.get(), np.where(selected, new, old))

    _, compact = one.values(width, count)
    one.call("fz_gather_range", int(which), width, compact.pointer, int64(count), source.pointer, *one.mask)
    np.testing.assert_array_equal(compact.get(), new[selected])

    few, compact = one.values(width, count)
    old, data = one.values(width)
    one.call("fz_scatter_range", int(which), width, data.pointer, compact.pointer, int64(count), *one.mask)
    np.testing.assert_array_equal(data.get(), twins.scatter(old, selected, few))
    np.testing.assert_array_equal(compact.get(), few)


@SETTINGS
@given(**CASES, width=WIDTHS)
def test_gathering_two(case, layout, density, runs, where, offset, seed, width):
    one = case(layout, density, runs, where, offset, seed)
    count = int(one.trainable.sum())
    sources, targets = [one.values(width) for _ in range(2)], [one.values(width, count)[1] for _ in range(2)]
    at = pointers(*(source for _, source in sources))
    one.call("fz_gather_two_range", width, pointers(*targets), int64(count), at, *one.mask)
    for target, (values, _) in zip(targets, sources, strict=True):
        np.testing.assert_array_equal(target.get(), values[one.trainable])


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("layout", [(1, 300_000, 1), (1, 700, 401), (31, 3001, 1), (3, 7001, 5)], ids=str)
def test_long_runs(case, layout, width):
    """Runs that are written past the cache, or copied by the library."""
    for density, runs in ((0.5, 100_000), (0.0, 1), (1.0, 1), (0.5, 20)):
        one = case(layout, density, runs, (0.001, 0.999), 1, 0)
        old, data = one.values(width)
        one.call("fz_zero_range", width, data.pointer, *one.mask, 1)
        np.testing.assert_array_equal(data.get(), twins.zero_frozen(old, one.trainable))
        new, source = one.values(width)
        one.call("fz_copy_range", 0, width, data.pointer, source.pointer, *one.mask)
        np.testing.assert_array_equal(data.get(), np.where(one.trainable, twins.zero_frozen(old, one.trainable), new))


def test_offsets_between_words(kernels):
    """A range of 200 entries from each of 130 on, in each layout with rows shorter than a word."""
    rng = np.random.default_rng(0)
    for layout in ((1, 1000, 1), (40, 37, 1), (30, 65, 1), (1, 300, 3), (4, 9, 13), (3, 11, 63), (2, 5, 64)):
        packed = make_bits(rng, layout[1], 0.5, 1)
        trainable = twins.expand(packed, layout)
        bits = kernels.put(packed)
        for begin in range(130):
            end = min(begin + 200, trainable.size)
            old = make_values(rng, end - begin, 4)
            data = kernels.put(old)
            kernels.functions.fz_zero_range(
                4, data.pointer, bits.pointer, layout_argument(layout), int64(begin), int64(end), 0
            )
            np.testing.assert_array_equal(data.get(), twins.zero_frozen(old, trainable[begin:end]), f"{layout} {begin}")
