"""The index arithmetic that host and device share (`csrc/mask_layout.h`), and the 16-bit floats, on the host."""

import ctypes

import library
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from under_test import on_host


@pytest.fixture(scope="module")
def functions():
    return on_host().functions


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    outer=st.integers(1, 9),
    kept=st.sampled_from([1, 2, 3, 7, 8, 31, 32, 33, 40, 64, 65, 1000]),
    inner=st.sampled_from([1, 2, 3, 31, 64, 100]),
    ahead=st.integers(0, 5000),
    data=st.data(),
)
def test_bits_of_entries(functions, outer, kept, inner, ahead, data):
    count = outer * kept * inner
    start = data.draw(st.integers(0, count - 1))
    ahead = min(ahead, count - 1 - start)
    rng = np.random.default_rng(start)
    bits = rng.random(kept) < 0.5
    packed = np.packbits(bits, bitorder="little")
    results = (ctypes.c_int64 * 5)()
    functions.fz_layout(
        packed.ctypes.data_as(ctypes.c_void_p), (ctypes.c_int64 * 3)(outer, kept, inner),
        ctypes.c_int64(start), ahead, results,
    )  # fmt: skip
    bit = (start + ahead) // inner % kept
    flags = np.unpackbits(packed, bitorder="little")

    def number(flags):
        return sum(int(flag) << i for i, flag in enumerate(flags))

    assert results[0] == results[1] == bit
    assert results[2] == number(flags[bit : bit + 32])
    assert results[3] == number(np.resize(np.roll(bits, -bit), 32))
    assert results[4] % 2**64 == number(flags[bit : bit + 64])


@pytest.mark.parametrize("start", [2**31 - 5, 2**40 + 3, 2**62])
@pytest.mark.parametrize("kept, inner", [(2**31 + 11, 1), (7, 3), (2**33, 100), (5000, 2)])
def test_bits_of_entries_beyond_31_bits(functions, start, kept, inner):
    results = (ctypes.c_int64 * 5)()
    outer = 2**62 // (kept * inner)
    start = min(start, outer * kept * inner - 5000)
    bits = np.zeros(16, np.uint8)
    for ahead in (0, 1, 31, 4095):
        bit = (start + ahead) // inner % kept
        # The words at that bit are not there to be read, so they are asked for in a mask that ends before it.
        if bit > 100:
            position = (start // inner % kept, start % inner)
            passed = (position[1] + ahead) // inner
            assert (position[0] + passed) % kept == bit
            continue
        functions.fz_layout(bits.ctypes.data_as(ctypes.c_void_p), (ctypes.c_int64 * 3)(outer, kept, inner),
                            ctypes.c_int64(start), ahead, results)  # fmt: skip
        assert results[0] == results[1] == bit


def walk(functions, variable, tile, at):
    """Positions of entries (-1 for none) and of slots in one group of a tile of a fused update."""
    entries, slots = (np.zeros(128, np.int64) for _ in range(2))
    functions.fz_walk_tile(
        ctypes.byref(variable), ctypes.c_int64(tile), at, *(x.ctypes.data_as(ctypes.c_void_p) for x in (entries, slots))
    )
    return entries, slots


BEYOND = [2**31 - 700, 2**31 - 1, 2**31 + 100, 2**33 - 3, 2**33 + 4097, 2**40]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "kept, inner", [(5000, 2**20 + 1), (5000, 511), (3, 2**30 - 1), (3, 2**30), (3, 2**31 + 7), (2, 2**40), (1, 2**41)]
)
def test_tiles_of_fused_updates_beyond_31_bits(functions, kept, inner, compact):
    """Long rows and, in full state, rows that repeat."""
    rng = np.random.default_rng(0)
    bits = rng.random(kept) < 0.5
    bits[:2] = [True, False][:kept]
    packed = np.packbits(bits, bitorder="little")
    ones = np.flatnonzero(bits)
    outer = 1 if compact else 2**42 // (kept * inner) + 1
    rest = {}
    if compact:
        offsets = np.zeros(9, np.int64)  # which are not looked at
        rest = {"offsets": offsets.ctypes.data, "indices": ones.ctypes.data, "capacity": ones.size, "wide": True}
    variable = library.FusedVariable(bits=packed.ctypes.data, layout=(outer, kept, inner), **rest)
    count = ones.size * inner if compact else outer * kept * inner
    for start in [0, *BEYOND, inner, 2 * inner - 1, count - 1]:
        if start >= count:
            continue
        tile, at = start // 512, start % 512 // 128 * 128
        entries, slots = walk(functions, variable, tile, at)
        expected = []
        for slot in range(tile * 512 + at, tile * 512 + at + 128):
            if slot >= count:
                expected.append(-1)
            elif compact:
                expected.append(int(ones[slot // inner]) * inner + slot % inner)
            else:
                expected.append(slot if bits[slot // inner % kept] else -1)
        assert entries.tolist() == expected, (start, count)
        found = entries >= 0
        assert (slots[found] == tile * 512 + at + np.flatnonzero(found)).all()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("start", [2**31 - 2048, 2**31, 2**33, 2**40])
def test_tiles_of_single_entries_beyond_31_bits(functions, start, compact):
    """Of the mask only what is near is there: nothing else is read."""
    flags = np.random.default_rng(0).random(4096) < 0.5
    packed = np.packbits(flags, bitorder="little")
    kept = start + 2048 + 77
    variable = library.FusedVariable(bits=packed.ctypes.data - start // 8, layout=(1, kept, 1))
    size = 2048 if compact else 512
    tile, before = start // size, 2**39 + 5
    if compact:
        offsets = np.full(2, before)
        variable.offsets, variable.capacity = offsets.ctypes.data - 8 * tile, 2**41
    for at in range(0, size, 128):
        entries, slots = walk(functions, variable, tile, at)
        near = np.flatnonzero(flags[at : at + 128])
        assert (entries[near] == start + at + near).all() and (entries >= 0).sum() == near.size
        expected = before + flags[:at].sum() + np.arange(near.size) if compact else start + at + near
        assert (slots[near] == expected).all()


def test_every_16_bit_float(functions):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    every = np.arange(2**16, dtype=np.uint16)
    for brain, dtype in ((0, np.float16), (1, ml_dtypes.bfloat16)):
        wide = np.array([functions.fz_float16(brain, int(bits), 0) for bits in every], np.uint32)
        expected = every.view(dtype).astype(np.float32)
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(wide[numbers], expected.view(np.uint32)[numbers])
        assert np.isnan(wide.view(np.float32)[~numbers]).all()


def test_rounding_to_16_bits(functions):
    """At, just below and just above the middle between neighbours, subnormals and overflow included."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for brain, dtype in ((0, np.float16), (1, ml_dtypes.bfloat16)):
        every = np.arange(0, 0x7C01 if not brain else 0x7F81, 3, dtype=np.uint16)
        with np.errstate(all="ignore"):
            low = every.view(dtype).astype(np.float64)
            high = (every + 1).astype(np.uint16).view(dtype).astype(np.float64)
            middle = ((low + high) / 2).astype(np.float32)
        around = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))])
        around = around[~np.isnan(around)]
        around = np.concatenate([around, -around, np.float32([65519, 65520, 1e-30, np.inf, np.nan])])
        actual = [functions.fz_float16(brain, int(bits), 1) for bits in around.view(np.uint32)]
        with np.errstate(all="ignore"):
            expected = around.astype(dtype)
        numbers = ~np.isnan(around)
        np.testing.assert_array_equal(np.array(actual, np.uint16)[numbers], expected.view(np.uint16)[numbers])
        assert np.isnan(np.array(actual, np.uint16).view(dtype)[~numbers].astype(np.float32)).all()


def test_the_library_is_made_anew_when_a_source_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_TEST_BUILD", str(tmp_path))
    made = []
    monkeypatch.setattr(library.subprocess, "run", lambda command, **_: made.append(command) or Done(command))
    monkeypatch.setattr(library, "SOURCE", tmp_path / "kernels.cu")
    for content in ("one", "one", "two"):
        library.SOURCE.write_text(content)
        library.host_library()
    assert len(made) == 2


class Done:
    returncode = 0

    def __init__(self, command):
        library.Path(command[-1]).touch()
