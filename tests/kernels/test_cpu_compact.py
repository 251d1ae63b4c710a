"""Gathering, scattering and seeding with what does not belong to the mask, on several threads, and in every form."""

import ctypes

import numpy as np
import numpy_twins as twins
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import (
    FLOATS,
    INTEGERS,
    SEEDS,
    SETTINGS,
    Index,
    dtype_of,
    int64,
    make_bits,
    make_slots,
    make_values,
    pointers,
)


@pytest.mark.parametrize("wrong", ["packed", "offsets up", "offsets down", "capacity", "indices"])
@pytest.mark.parametrize("layout", [(1, 20_000, 1), (1, 600, 5), (1, 200, 300)], ids=str)
@pytest.mark.parametrize("density", [0.005, 0.3])
def test_index_that_does_not_belong_to_its_mask(kernels, wrong, layout, density):
    """Reported where it can be seen; nothing is read or written beside the arrays, and no frozen entry is written."""
    rng = np.random.default_rng(0)
    _, kept, inner = layout
    packed = make_bits(rng, kept, density, 1)
    ones = int(np.unpackbits(packed, count=kept, bitorder="little").sum())
    offsets = twins.rank_offsets(packed, kept)
    indices = twins.indices_of(packed, kept, 4, np.int32)
    by_index = inner == 1 and ones < kept / 32
    if wrong == "packed":
        packed = np.roll(packed, 7)
    elif wrong.startswith("offsets"):
        offsets = offsets + (50 if wrong.endswith("up") else -5)
    elif wrong == "capacity":
        indices = indices[: ones // 2]
    else:
        indices[:3] = [2**31 - 1, -1, kept]
    index = Index(kernels, packed, layout, 0, False, offsets=offsets, indices=indices)
    source = kernels.put(make_values(rng, kept * inner, 4))
    gathered = kernels.put(make_values(rng, index.capacity * inner, 4))
    gather = "fz_gather_trainable", 4, 1, pointers(gathered), pointers(source), *index.arguments
    # By the bits, indices are not looked at; by indices, offsets for fewer entries stand for the first ones. A rotated
    # mask has as many ones in all, and is noticed where it has not in a thread's shard.
    fitting = {"offsets down"} if by_index else {"indices"}
    fits = kernels.fits(*gather)
    assert wrong == "packed" or fits == (wrong in fitting)
    gathered.get()
    old = make_values(rng, kept * inner, 4)
    target = kernels.put(old)
    fits = kernels.fits("fz_scatter_trainable", 4, target.pointer, gathered.pointer, *index.arguments)
    assert fits == (wrong in fitting) or (wrong == "packed" and not by_index)
    frozen = ~twins.expand(packed, layout)
    np.testing.assert_array_equal(target.get()[frozen], old[frozen])


@pytest.mark.parametrize("density", [0.01, 0.5])
@pytest.mark.parametrize("layout", [(1, 400_001, 1), (1, 3001, 70), (1, 5000, 33)], ids=str)
def test_several_threads(kernels, layout, density):
    rng = np.random.default_rng(0)
    packed = make_bits(rng, layout[1], density, 1)
    trainable = twins.expand(packed, layout)
    index = Index(kernels, packed, layout, 10, True)
    values = [make_values(rng, trainable.size, 4) for _ in range(2)]
    sources = [kernels.put(each) for each in values]
    length = index.capacity * layout[2]
    targets = [kernels.put(make_values(rng, length, 4)) for _ in range(2)]
    kernels.run("fz_gather_trainable", 4, 2, pointers(*targets), pointers(*sources), *index.arguments)
    for target, value in zip(targets, values, strict=True):
        np.testing.assert_array_equal(target.get(), twins.gather(value, trainable, length))
    kernels.run("fz_scatter_trainable", 4, sources[0].pointer, targets[1].pointer, *index.arguments)
    np.testing.assert_array_equal(sources[0].get(), twins.scatter(values[0], trainable, targets[1].get()))


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
    """From a dense gradient, and from slices that name rows more than once. Bits are cleared."""
    rng = np.random.default_rng(seed)
    number, wide = FLOATS[dtype]
    rows, width = shape
    size = rows * width
    floats = dtype_of(dtype)
    slots = make_slots(rng, size, floats, len(powers))
    scales = rng.uniform(0.5, 2, len(powers))
    packed = make_bits(rng, size, waiting, 1)
    waits = twins.expand(packed, (1, size, 1))
    indices = rng.integers(0, rows, 50 if sparse else 0)
    values = rng.normal(size=(50, width) if sparse else (rows, width)).astype(floats)
    values[rng.random(values.shape) < 0.3] = 0
    if sparse:
        sums, squares = np.zeros(shape, wide), np.zeros(shape, wide)
        for row, value in zip(indices, values.astype(wide), strict=True):  # in this order
            sums[row] += value
            squares[row] += value * value
        squares = np.maximum(sums * sums, squares)
        named = np.repeat(np.isin(np.arange(rows), indices), width)
    else:
        sums = values.astype(wide)
        squares = sums * sums
        named = np.ones(size, bool)
    expected, still = twins.seed(waits & named, slots, powers, scales, sums.reshape(-1), squares.reshape(-1), wide)

    bits, factors, gradient, rows_of = (kernels.put(each) for each in (packed, scales, values, indices))
    targets = [kernels.put(slot) for slot in slots]
    kernels.run(
        "fz_seed_slots", number, bits.pointer, int64(size), pointers(*targets), (ctypes.c_int * len(powers))(*powers),
        len(powers), factors.pointer, gradient.pointer, rows_of.pointer if sparse else None, int64(indices.size),
        int64(width),
    )  # fmt: skip
    for target, slot in zip(targets, expected, strict=True):
        actual = target.get()
        np.testing.assert_array_equal(actual.view(INTEGERS[actual.itemsize]), slot.view(INTEGERS[slot.itemsize]))
    np.testing.assert_array_equal(twins.expand(bits.get(), (1, size, 1)), np.where(named, still, waits))
