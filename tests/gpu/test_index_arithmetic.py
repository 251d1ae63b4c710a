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
