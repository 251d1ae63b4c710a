"""The CUDA kernels against NumPy, bit for bit: the same code on the host (always) and on a GPU (where there is one)."""

import ctypes
import os

import numpy as np
import numpy_twins as twins
import pytest
from arrays import zero_entries
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}

EXAMPLES = int(os.environ.get("FREEZEOPS_TEST_EXAMPLES", 150))
"""Fewer for compute-sanitizer, more for a thorough search."""

THOROUGH = EXAMPLES > 150

SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LAYOUTS = st.one_of(
    # One bit for each entry: around words, groups of 512 bytes and tiles.
    st.sampled_from([0, 1, 31, 32, 33, 127, 128, 129, 255, 256, 1023, 1024, 1025, 4096, 4097, 9999]).map(
        lambda n: (1, n, 1)
    ),
    # Rows, short and long; columns; an axis in the middle; empty ones.
    st.tuples(st.just(1), st.integers(1, 70), st.sampled_from([2, 3, 7, 31, 32, 33, 64, 100, 127])),
    st.tuples(st.just(1), st.integers(1, 40), st.sampled_from([64, 128, 255, 256, 257, 300, 1000])),
    st.tuples(st.integers(2, 80), st.sampled_from([1, 2, 5, 8, 31, 32, 33, 63, 64, 65, 100, 3000]), st.just(1)),
    st.tuples(st.integers(2, 5), st.integers(1, 40), st.sampled_from([2, 5, 33, 127, 256, 300])),
    st.sampled_from([(0, 5, 3), (4, 0, 3), (4, 5, 0), (1, 3, 20000), (2, 2, 16385)]),
)
DENSITIES = st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0])
WIDTHS = st.sampled_from([2, 4, 8])
OFFSETS = st.sampled_from([0, 0, 1, 3, 8])  # entries past an alignment of 256 bytes
SEEDS = st.integers(0, 2**32 - 1)


def make_bits(rng, kept, density, runs):
    """Packed bits; in runs of equal ones, so that whole groups of entries are frozen or trainable. Junk behind."""
    bits = np.repeat(rng.random(kept // runs + 1) < density, runs)[:kept]
    packed = np.packbits(bits, bitorder="little")
    if kept % 8:
        packed[-1] |= 0xFF << kept % 8 & 0xFF
    return packed


def make_values(rng, shape, width):
    return rng.integers(0, 2 ** (8 * width) - 1, shape, INTEGERS[width], endpoint=True)


def layout_argument(layout):
    return (ctypes.c_int64 * 3)(*layout)


def int64(value):
    return ctypes.c_int64(int(value))


RUNS = st.sampled_from([1, 1, 2, 4, 8, 16, 128])


@SETTINGS
@given(layout=LAYOUTS, density=DENSITIES, runs=RUNS, width=WIDTHS, offset=OFFSETS, source_offset=OFFSETS, seed=SEEDS)
def test_masking(kernels, layout, density, runs, width, offset, source_offset, seed):
    """Zeroing in place, copying and zeroing, and copying what is frozen."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(layout))
    packed = make_bits(rng, layout[1], density, runs)
    trainable = twins.expand(packed, layout)
    old, new = make_values(rng, count, width), make_values(rng, count, width)
    bits = kernels.put(packed, offset % 4)
    shape = layout_argument(layout)

    data = kernels.put(old, offset * width)
    kernels.run("fz_zero_frozen", width, data.pointer, bits.pointer, shape)
    np.testing.assert_array_equal(data.get(), twins.zero_frozen(old, trainable))

    source = kernels.put(new, source_offset * width)
    data = kernels.put(old, offset * width)
    kernels.run("fz_copy_and_zero_frozen", width, data.pointer, source.pointer, bits.pointer, shape)
    np.testing.assert_array_equal(data.get(), twins.zero_frozen(new, trainable))

    data = kernels.put(old, offset * width)
    kernels.run("fz_copy_frozen", width, data.pointer, source.pointer, bits.pointer, shape)
    np.testing.assert_array_equal(data.get(), np.where(trainable, old, new))
    np.testing.assert_array_equal(source.get(), new)
    np.testing.assert_array_equal(bits.get(), packed)


def check_masking(kernels, layout, packed, width, rng):
    """All three ways, from arrays that begin at a boundary."""
    trainable = twins.expand(packed, layout)
    old, new = (make_values(rng, trainable.size, width) for _ in range(2))
    bits, source, shape = kernels.put(packed), kernels.put(new), layout_argument(layout)
    data = [kernels.put(old) for _ in range(3)]
    kernels.run("fz_zero_frozen", width, data[0].pointer, bits.pointer, shape)
    kernels.run("fz_copy_and_zero_frozen", width, data[1].pointer, source.pointer, bits.pointer, shape)
    kernels.run("fz_copy_frozen", width, data[2].pointer, source.pointer, bits.pointer, shape)
    expected = [twins.zero_frozen(old, trainable), twins.zero_frozen(new, trainable), np.where(trainable, old, new)]
    for actual, wanted in zip(data, expected, strict=True):
        np.testing.assert_array_equal(actual.get(), wanted, f"{layout}, {width} bytes, {packed[:40]}")


@pytest.mark.parametrize("width", [2, 4, 8])
def test_every_length(kernels, width):
    """All frozen, all trainable, and both; the mask's last bits 0 or 1."""
    rng = np.random.default_rng(0)
    for count in [*range(1, 264, 1 if THOROUGH else 9), *range(8, 264, 8), 1016, 1023, 1025, 1032, 4095, 4104]:
        ones = np.full(-(-count // 8), 0xFF, np.uint8)
        for packed in (ones, 0 * ones, np.packbits(np.ones(count, bool), bitorder="little")):
            check_masking(kernels, (1, count, 1), packed, width, rng)


SINGLE = [(1, 256, 1), (1, 5000, 1), (1, 300, 7), (5, 3000, 1), (3, 70, 33), (1, 40, 300), (2, 5, 256), (90, 65, 1)]


@pytest.mark.parametrize("layout", SINGLE, ids=str)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_single_bits(kernels, layout, width):
    """One frozen bit among trainable ones, and the reverse: what looks at several bits at once must see it."""
    rng = np.random.default_rng(0)
    kept = layout[1]
    for bit in np.unique(
        np.concatenate([np.arange(0, kept, max(kept // 40, 1)), np.arange(min(kept, 70)), [kept - 1]])
    ):
        if not THOROUGH and bit % 3 and layout != (1, 256, 1):
            continue
        flags = np.ones(kept, bool)
        flags[bit] = False
        check_masking(kernels, layout, np.packbits(flags, bitorder="little"), width, rng)
        check_masking(kernels, layout, np.packbits(~flags, bitorder="little"), width, rng)


@SETTINGS
@given(
    rows=st.integers(0, 50),
    width_of_row=st.sampled_from([0, 1, 3, 16, 64, 127, 128, 300]),
    by=st.sampled_from(["elements", "rows", "columns"]),
    density=DENSITIES,
    width=WIDTHS,
    count=st.sampled_from([0, 1, 5, 40]),
    wide=st.booleans(),
    in_place=st.booleans(),
    offset=OFFSETS,
    seed=SEEDS,
)
def test_slices(kernels, rows, width_of_row, by, density, width, count, wide, in_place, offset, seed):
    rng = np.random.default_rng(seed)
    layout = {
        "elements": (1, rows * width_of_row, 1),
        "rows": (1, rows, width_of_row),
        "columns": (rows, width_of_row, 1),
    }[by]
    packed = make_bits(rng, layout[1], density, 1)
    values = make_values(rng, (count, width_of_row), width)
    # Repeated rows, and some that do not exist.
    indices = rng.integers(-2, rows + 2, count).astype(np.int64 if wide else np.int32)
    source = kernels.put(values, offset * width)
    target = source if in_place else kernels.put(make_values(rng, values.shape, width))
    named, bits = kernels.put(indices), kernels.put(packed)
    arguments = (named.pointer, int(wide), int64(count), int64(rows), int64(width_of_row), bits.pointer)
    kernels.run("fz_mask_slices", width, target.pointer, source.pointer, *arguments, layout_argument(layout))
    expected = twins.mask_slices(values, indices, twins.expand(packed, layout), rows)
    np.testing.assert_array_equal(target.get(), expected)


class Index:
    """Bits, offsets and indices of a mask, where the kernels want them."""

    def __init__(self, kernels, packed, layout, room, wide, **other):
        _, kept, _ = layout
        values = {
            "packed": packed,
            "offsets": twins.rank_offsets(packed, kept),
            "indices": twins.indices_of(packed, kept, room, np.int64 if wide else np.int32),
        } | other
        self.capacity = values["indices"].size
        self.arrays = [kernels.put(array) for array in values.values()]
        bits, offsets, indices = (array.pointer for array in self.arrays)
        self.arguments = (bits, layout_argument(layout), offsets, indices, int(wide), int64(self.capacity))


def pointers(*arrays):
    return (ctypes.c_void_p * len(arrays))(*(array.pointer for array in arrays))


COMPACT_LAYOUTS = st.one_of(
    st.sampled_from([1, 31, 33, 255, 256, 257, 2047, 2048, 2049, 4097, 9000, 70_000]).map(lambda n: (1, n, 1)),
    st.tuples(st.just(1), st.integers(1, 70), st.sampled_from([2, 3, 31, 100, 128, 257, 300])),
    st.sampled_from([(1, 0, 1), (1, 5, 0), (1, 3, 17_000)]),
)


@SETTINGS
@given(
    layout=COMPACT_LAYOUTS,
    density=st.sampled_from([0.0, 0.004, 0.1, 0.5, 0.99, 1.0]),
    runs=st.sampled_from([1, 1, 256, 300]),
    room=st.sampled_from([0, 0, 1, 9000]),
    wide=st.booleans(),
    width=WIDTHS,
    offset=OFFSETS,
    seed=SEEDS,
)
def test_compact(kernels, layout, density, runs, room, wide, width, offset, seed):
    """Gathering from one and two arrays, and scattering."""
    rng = np.random.default_rng(seed)
    _, kept, inner = layout
    packed = make_bits(rng, kept, density, runs)
    trainable = twins.expand(packed, layout)
    index = Index(kernels, packed, layout, min(room, 70_000 // max(inner, 1)), wide)
    length = index.capacity * inner
    values = [make_values(rng, trainable.size, width) for _ in range(2)]
    sources = [kernels.put(each, offset * width) for each in values]
    for arrays in (1, 2):
        junk = [kernels.put(make_values(rng, length, width), offset % 3 * width) for _ in range(arrays)]
        kernels.run("fz_gather_trainable", width, arrays, pointers(*junk), pointers(*sources), *index.arguments)
        for gathered, value in zip(junk, values[:arrays], strict=True):
            np.testing.assert_array_equal(gathered.get(), twins.gather(value, trainable, length))

    compact = make_values(rng, length, width)
    source = kernels.put(compact, offset * width)
    kernels.run("fz_scatter_trainable", width, sources[0].pointer, source.pointer, *index.arguments)
    np.testing.assert_array_equal(sources[0].get(), twins.scatter(values[0], trainable, compact))


@pytest.mark.parametrize("wrong", ["packed", "offsets", "negative offsets", "indices", "capacity"])
@pytest.mark.parametrize("layout", [(1, 20_000, 1), (1, 600, 5), (1, 200, 300)])
@pytest.mark.parametrize("density", [0.005, 0.3])
def test_index_that_does_not_belong_to_its_mask(kernels, wrong, layout, density):
    """Nothing is read or written out of bounds (there are guards), and no frozen entry is written."""
    rng = np.random.default_rng(0)
    _, kept, inner = layout
    packed = make_bits(rng, kept, density, 1)
    offsets = twins.rank_offsets(packed, kept)
    indices = twins.indices_of(packed, kept, 4, np.int32)
    if wrong == "packed":
        packed = np.roll(packed, 7)
    elif wrong.endswith("offsets"):
        offsets = offsets + (50 if wrong == "offsets" else -5)
    elif wrong == "capacity":
        indices = indices[: indices.size // 2]
    else:
        indices[:3] = [2**31 - 1, -1, kept]
    index = Index(kernels, packed, layout, 0, False, offsets=offsets, indices=indices)
    source = kernels.put(make_values(rng, kept * inner, 4))
    gathered = kernels.put(make_values(rng, index.capacity * inner, 4))
    kernels.run("fz_gather_trainable", 4, 1, pointers(gathered), pointers(source), *index.arguments)
    gathered.get()
    old = make_values(rng, kept * inner, 4)
    target = kernels.put(old)
    kernels.run("fz_scatter_trainable", 4, target.pointer, gathered.pointer, *index.arguments)
    frozen = ~twins.expand(packed, layout)
    np.testing.assert_array_equal(target.get()[frozen], old[frozen])


@SETTINGS
@given(
    kept=st.sampled_from([1, 7, 31, 64, 2047, 2048, 2049, 9000]),
    density=DENSITIES,
    last=st.sampled_from([-1, 0, 10, 10**6]),
    seed=SEEDS,
)
def test_ranks(kernels, kept, density, last, seed):
    rng = np.random.default_rng(seed)
    packed = make_bits(rng, kept, density, 1)
    asked = rng.integers(-2, kept + 2, 77)
    arrays = [kernels.put(each) for each in (np.zeros(77, np.int64), asked, packed, twins.rank_offsets(packed, kept))]
    ranks, bits, mask, offsets = (array.pointer for array in arrays)
    kernels.run("fz_rank_of_bits", ranks, bits, int64(77), mask, int64(kept), offsets, int64(last))
    np.testing.assert_array_equal(arrays[0].get(), twins.ranks(asked, packed, kept, last))


def make_slots(rng, size, dtype, count):
    """Slots of which the first is zero at some entries."""
    slots = [rng.normal(size=size).astype(dtype) for _ in range(count)]
    slots[0][rng.random(size) < 0.6] = 0
    return slots


FLOATS = {
    "float16": (0, np.float32),
    "bfloat16": (1, np.float32),
    "float32": (2, np.float32),
    "float64": (3, np.float64),
}


def dtype_of(name):
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return np.dtype(name).type


@SETTINGS
@given(
    dtype=st.sampled_from(list(FLOATS)),
    shape=st.sampled_from([(1, 1), (1, 31), (9, 3), (40, 8), (70, 33), (6, 900), (1, 4097)]),
    powers=st.sampled_from([(2,), (2, 1), (2, 2, 1)]),
    waiting=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    sparse=st.booleans(),
    seed=SEEDS,
)
def test_seeding(kernels, dtype, shape, powers, waiting, sparse, seed):
    rng = np.random.default_rng(seed)
    number, wide = FLOATS[dtype]
    rows, width = shape
    size = rows * width
    floats = dtype_of(dtype)
    slots = make_slots(rng, size, floats, len(powers))
    scales = rng.uniform(0.5, 2, len(powers))
    packed = make_bits(rng, size, waiting, 1)
    waits = twins.expand(packed, (1, size, 1))
    if sparse:
        indices = rng.integers(-1, rows + 1, 50)
        values = rng.normal(size=(50, width)).astype(floats)
        sums, squares = np.zeros((rows, width), wide), np.zeros((rows, width), wide)
        named = np.zeros(rows, bool)
        for row, value in zip(indices, values.astype(wide), strict=True):  # in this order
            if 0 <= row < rows:
                sums[row] += value
                squares[row] += value * value
                named[row] = True
        squares = np.maximum(sums * sums, squares)
        waits = waits & np.repeat(named, width)
    else:
        indices = np.zeros(0, np.int64)
        values = rng.normal(size=size).astype(floats)
        values[rng.random(size) < 0.3] = 0
        sums = values.astype(wide)
        squares = sums * sums
    expected, still = twins.seed(waits, slots, powers, scales, sums.reshape(-1), squares.reshape(-1), wide)

    bits, factors, gradient = kernels.put(packed), kernels.put(scales), kernels.put(values)
    targets = [kernels.put(slot) for slot in slots]
    named = kernels.put(indices)
    kernels.run(
        "fz_seed_slots", number, bits.pointer, int64(size), pointers(*targets), (ctypes.c_int * len(powers))(*powers),
        len(powers), factors.pointer, gradient.pointer, named.pointer if sparse else None, int64(indices.size),
        int64(width),
    )  # fmt: skip
    for target, slot in zip(targets, expected, strict=True):
        actual = target.get()
        np.testing.assert_array_equal(actual.view(INTEGERS[actual.itemsize]), slot.view(INTEGERS[slot.itemsize]))
    if sparse:
        np.testing.assert_array_equal(bits.get(), packed)  # none is cleared
    else:
        np.testing.assert_array_equal(twins.expand(bits.get(), (1, size, 1)), still)


def test_long_tiles(kernels):
    """From 16M entries on tiles are longer: a few frozen entries, one in the last words."""
    count = (1 << 24) + 77
    rng = np.random.default_rng(0)
    frozen = np.unique(np.concatenate([rng.integers(0, count, 5), [0, 127, 128, 4096, count - 1]]))
    trainable = np.ones(count, bool)
    trainable[frozen] = False
    packed = np.packbits(trainable, bitorder="little")
    old = np.full(count, 7, np.uint16)
    data, bits = kernels.put(old), kernels.put(packed)
    kernels.run("fz_zero_frozen", 2, data.pointer, bits.pointer, layout_argument((1, count, 1)))
    np.testing.assert_array_equal(np.flatnonzero(data.get() != 7), frozen)


@pytest.mark.parametrize("layout", [(1, 2**31 + 65, 1), (1, 2**17 + 1, 2**14 + 1), (2**16 + 1, 2**15 + 3, 1)])
def test_more_entries_than_31_bits_count(gpu_kernels, layout):
    """A few entries beyond the largest int32, looked at on the GPU without copying all to the host."""
    arrays = gpu_kernels.arrays
    count = int(np.prod(layout))
    need = 2 * count + 2 * layout[1]
    if arrays.free_bytes() < need + 2**30:
        pytest.skip(f"{need / 2**30:.0f} GiB of GPU memory are not free")
    values, pointer = arrays.empty(2 * count)
    values[:] = 0x55
    rng = np.random.default_rng(0)
    outer, kept, inner = layout
    frozen_bits = np.unique(np.concatenate([rng.integers(0, kept, 20), [0, kept - 1]]))
    trainable = np.ones(kept, bool)
    trainable[frozen_bits] = False
    bits = gpu_kernels.put(np.packbits(trainable, bitorder="little"))
    gpu_kernels.run("fz_zero_frozen", 2, ctypes.c_void_p(pointer), bits.pointer, layout_argument(layout))
    entries = zero_entries(arrays, values, count)
    assert entries.size == frozen_bits.size * outer * inner
    np.testing.assert_array_equal(np.unique(entries // inner % kept), frozen_bits)


def test_failed_launch_is_reported(gpu_kernels):
    with pytest.raises(RuntimeError, match="invalid"):
        gpu_kernels.run("fz_failing_launch")
    # And not again by the next one.
    data = gpu_kernels.put(np.ones(5, np.uint32))
    gpu_kernels.run("fz_zero_frozen", 4, data.pointer, gpu_kernels.put(np.zeros(1, np.uint8)).pointer,
                    layout_argument((1, 5, 1)))  # fmt: skip
    assert not data.get().any()


def test_copies(gpu_kernels):
    values = np.arange(1000, dtype=np.uint64)
    source, target = gpu_kernels.put(values), gpu_kernels.put(np.zeros_like(values))
    gpu_kernels.run("fz_copy_bytes", target.pointer, source.pointer, int64(values.nbytes))
    np.testing.assert_array_equal(target.get(), values)
