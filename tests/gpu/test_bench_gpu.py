"""What `benchmarks/bench_gpu.py` counts, without a GPU and without TensorFlow; no time is looked at."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    pytest.importorskip("rich")
    sys.path.insert(0, str(BENCHMARKS))
    import bench_gpu

    return bench_gpu


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 8, 1000, 100_000])
def test_bytes_are_counted_from_the_mask(bench, size, density, rows):
    case = bench.make_case(size, density, rows)
    flags = np.unpackbits(case.packed, count=case.kept, bitorder="little").astype(bool)
    trainable = np.repeat(flags, case.inner)
    sector = np.arange(trainable.size) * 4 // 32
    frozen_sectors = np.unique(sector[~trainable]).size
    trainable_sectors = np.unique(sector[trainable]).size
    assert bench.touched_sectors(case, trainable=False) == frozen_sectors
    assert bench.touched_sectors(case, trainable=True) == trainable_sectors
    bits, ones = -(-case.kept // 8), int(flags.sum())
    compact = -(-int(trainable.sum()) * 4 // 32) * 32
    assert bench.fewest_bytes("mask", case) == bits + 32 * frozen_sectors
    assert bench.fewest_bytes("remember", case) == bench.fewest_bytes("restore", case) == bits + 64 * frozen_sectors
    expected = min(bits, 4 * ones) + 32 * trainable_sectors + compact
    assert bench.fewest_bytes("gather", case) == bench.fewest_bytes("scatter", case) == expected
    assert bench.fewest_bytes("adam", case) == bits + 7 * 32 * trainable_sectors
    assert bench.fewest_bytes("compact adam", case) == expected + 2 * 32 * trainable_sectors + 3 * compact


def test_masks_have_the_density_that_was_asked_for(bench):
    case = bench.make_case(1 << 20, 0.1, False)
    assert case.entries == 1 << 20 and abs(case.ones / case.entries - 0.1) < 0.01
    assert bench.make_case(1 << 20, 0.5, True).kept == 1024


def test_fractions_and_verdicts(bench):
    case = bench.make_case(1 << 20, 0.5, True)
    fewest = bench.fewest_bytes("mask", case)
    seconds = {"mask": 1e-3, "where": 2e-3, "mul": 0.5e-3, "fill": 3e-3}
    good = bench.result("mask", case, seconds, copy_rate=fewest / 0.95e-3)
    assert good["fraction_of_copy"] == pytest.approx(0.95) and good["target_reached"]
    assert good["slower_than"] == ["mul"]
    assert not bench.result("mask", case, seconds, copy_rate=fewest / 0.85e-3)["target_reached"]
    each = [good | {"kernel": kernel} for kernel in bench.KERNELS]
    rates, beside = bench.tables([{"density": 0.5, "rows": True, "kernels": each}])
    assert rates.row_count == beside.row_count == 1


def test_without_a_gpu_nothing_is_measured():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import bench_gpu; status = bench_gpu.main([]);"
        "assert not {'tensorflow', 'keras', 'freezeops'} & set(sys.modules); sys.exit(status)"
    )
    # A PyTorch that sees no GPU, or none at all.
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARKS)], env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Nothing was measured" in done.stdout
