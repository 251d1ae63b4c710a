"""The benchmarks run, and their JSON holds what it should; nothing here looks at a time."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from common import assert_same_bits
from processes import Script

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


@pytest.fixture
def benchmark_module(monkeypatch):
    """Imports a benchmark by name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


def run(script, *arguments, path):
    command = [sys.executable, str(FOLDER / script), "--json", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)  # a busy machine
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def check_facts(data):
    assert {"date", "cpu", "cores", "tensorflow", "keras", "freezeops", "paths"} <= set(data["facts"])
    assert all(isinstance(result["disturbed"], bool) for result in data["results"])


def test_bench_ops(tmp_path):
    data, text = run("bench_ops.py", "--size", "4K", "--repeats", "3", path=tmp_path / "ops.json")
    check_facts(data)
    assert data["shape"] == [4, 1024]
    assert [result["frozen"] for result in data["results"]] == [
        "0 %", "1 %", "50 %", "99 %", "100 %", "50 % of rows",
    ]  # fmt: skip
    for result in data["results"]:
        assert set(result["added_ms"]) == {"freezeops", "where", "cast", "float"}
        assert set(result["times"]) == {*result["added_ms"], "producer", "memcpy"}
        assert all(times["min_ms"] > 0 for times in result["times"].values())
    assert "50 % of rows" in text


def test_bench_step(tmp_path):
    data, text = run(
        "bench_step.py", "--size", "1000", "--quick", "--repeats", "8", "--optimizer", "SGD",
        "--jit", "both", "--density", "1", "0.5", path=tmp_path / "step.json",
    )  # fmt: skip
    check_facts(data)
    assert data["size"] == 1000
    assert [(result["jit"], result["density"]) for result in data["results"]] == [
        (False, 1.0), (False, 0.5), (True, 1.0), (True, 0.5),
    ]  # fmt: skip
    for result in data["results"]:
        assert result["optimizer"] == "SGD"
        assert result["ratio"] > 0
        assert (result["ratio_without_producer"] is None) == result["jit"]
        assert min(result["peak_bytes"].values()) > 2**20
    assert "peak resident set" in text


def test_bench_sparse(tmp_path):
    data, text = run("bench_sparse.py", "--rows", "2K", "4K", "--repeats", "3", path=tmp_path / "sparse.json")
    check_facts(data)
    assert [result["rows"] for result in data["results"]] == [2048, 4096]
    for result in data["results"]:
        assert result["ratio"] > 0 and set(result["times"]) == {"bare", "masked"}
    assert set(data["growth"]) == {"bare", "masked"}
    assert "4096 named rows" in text


def test_bench_sampled_matmul(tmp_path):
    data, text = run(
        "bench_sampled_matmul.py", "--repeats", "3", "--densities", "0.01", "0.2", "--shape", "40", "64", "96",
        "--shape", "30", "70", "20", path=tmp_path / "sampled.json",
    )  # fmt: skip
    check_facts(data)
    assert [(result["shape"], result["density"]) for result in data["results"]] == [
        ([40, 64, 96], 0.01), ([40, 64, 96], 0.2), ([30, 70, 20], 0.01), ([30, 70, 20], 0.2),
    ]  # fmt: skip
    for result in data["results"]:
        assert set(result["ratio"]) == {"CPU time", "wall time"}
        assert set(result["times"]) == set(result["cpu_times"]) == {"whole", str(result["density"])}
    assert [(each["clock"], each["density"]) for each in data["means"]] == [
        ("CPU time", 0.01), ("CPU time", 0.2), ("wall time", 0.01), ("wall time", 0.2),
    ]  # fmt: skip
    assert data["means"][0]["targets"] == {"mean": 0.10, "each": 0.13}
    assert "sampled_matmul / tf.matmul, wall time" in text


def test_bench_compact(tmp_path):
    data, text = run(
        "bench_compact.py", "--size", "8K", "--large", "16K", "--quick", "--repeats", "8", "--optimizer", "Adam",
        "--one-process", "--no-memory", "--plot", str(tmp_path / "plots"), path=tmp_path / "compact.json",
    )  # fmt: skip
    check_facts(data)
    cases = [(0.01, False), (0.01, True), (0.1, False), (0.5, False)]
    assert [(r["size"], r["jit"], r["density"], r["rows"]) for r in data["results"]] == [
        (size, jit, *case) for size in (8192, 16384) for jit in (False, True) for case in cases
    ]
    for result in data["results"]:
        assert result["ratio"] > 0
        assert 0.99 <= result["slot_ratio"] <= 1.02
        assert set(result["state_bytes"]) == {
            "slots", "compact values", "mask bits", "rank offsets", "indices", "unseeded bits",
        }  # fmt: skip
    assert set(data["curves"]["line"]) == {"off", "on"}
    for name in ("size", "density"):
        assert (tmp_path / "plots" / f"compact_{name}.png").stat().st_size > 10_000
    assert "Time against size" in text


def test_bench_compact_measures_peak_memory():
    command = [sys.executable, str(FOLDER / "bench_compact.py"), "--memory-of", '["Adam", false, 65536, 0.1, false]']
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 2**20


def test_bench_fused(tmp_path):
    data, text = run(
        "bench_fused.py", "--sizes", "16K", "--repeats", "3", "--optimizer", "sgd_momentum", "--densities", "1", "0.5",
        "--no-peers", "--tensors", "1", "4", "--tensor-entries", "4000", "--one-process",
        path=tmp_path / "fused.json",
    )  # fmt: skip
    check_facts(data)
    full, compact = [(1.0, False), (0.5, False), (0.01, True)], [(0.5, False), (0.01, True)]
    ours = [("full", *case) for case in full] + [("compact", *case) for case in compact]
    for jit in (False, True):
        results = [result for result in data["results"] if result["jit"] == jit]
        assert [result["kind"] for result in results] == [
            "Keras, unmasked", "TensorFlow's own", "Keras + where", "Keras + keep and restore",
            *["fused"] * 5, *["not fused"] * 5,
        ]  # fmt: skip
        assert [(result["state"], result["density"], result["rows"]) for result in results[4:]] == ours * 2
        assert results[0]["ratio"] == results[1]["own_ratio"] == 1
        for result in results:
            assert result["size"] == 16384 and result["ratio"] > 0 and result["own_ratio"] > 0
            assert set(result["of_limit"]) == set(result["bytes_per_second"]) == {"copy", "rewrite"}
    assert [(result["variables"], result["entries"]) for result in data["tensors"]] == [(1, 4000), (4, 1000)] * 7
    assert data["peers"] is None
    assert "4 x 1,000, ms" in text and "groups" not in text


def test_bench_fused_where_nothing_fits_into_memory_and_without_peers(tmp_path):
    data, text = run(
        "bench_fused.py", "--sizes", "16K", "--repeats", "3", "--jit", "off", "--no-unfused", "--tensors",
        "--densities", "0.5", "--memory", "0", "--one-process", path=tmp_path / "fused.json",
    )  # fmt: skip
    assert [result["group"] for result in data["results"][:8]] == [None, None, 1, 2, 3, 4, 5, 6]
    assert "in up to " in text
    for library, peers in {"torch": ["torch, fused", "torch, foreach"], "optax": ["optax, jitted"]}.items():
        for peer in peers:
            there = importlib.util.find_spec(library) is not None
            assert (peer in data["peers"]) == (peer in {result["kind"] for result in data["results"]}) == there
            assert (f"{peer}: not installed, left out." in text) == (not there)


def test_a_group_of_bench_fused_has_a_process_of_its_own(benchmark_module):
    bench_fused = benchmark_module("bench_fused")
    variants = [bench_fused.Variant(bench_fused.UNMASKED), bench_fused.Variant(bench_fused.FUSED, 0.5)]
    setting = bench_fused.Setting("adam", False, 16384)
    measured = bench_fused.measure_group_elsewhere(setting, variants, 3, sys.executable)
    assert set(measured["seconds"]) == {"copy", "rewrite", "Keras, unmasked, unmasked", "ours, full, fused, 0.5"}
    assert measured["versions"] == {}


@pytest.mark.parametrize("optimizer", ["adam", "sgd_momentum"])
@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_all_that_bench_fused_compares_make_the_same_step(optimizer, jit, benchmark_module):
    bench_fused, masks = (benchmark_module(name) for name in ("bench_fused", "_masks"))
    shape = (2, 1024)
    gradients = bench_fused.tf.Variable(np.full((3, *shape), 0.01, np.float32))
    variants = [bench_fused.Variant(kind) for kind in (bench_fused.UNMASKED, bench_fused.OWN)]
    for variant in [*variants, *bench_fused.variants_of((1.0, 0.5), unfused=True, peers=False)]:
        mask = masks.make_mask(shape, variant.density, variant.rows) if variant.masked else np.array(True)
        step = bench_fused.Step(variant, optimizer, jit, gradients, mask if variant.masked else None)
        assert len(step.variables) == 3
        for _ in range(3):
            step()
        frozen = ~np.broadcast_to(mask, shape)
        # With a constant gradient Adam moves by the learning rate in each step.
        moved = 3 * 1e-4 if optimizer == "adam" else 1e-6 * (1 + 1.9 + 2.71)
        for variable in step.variables:
            values = variable.numpy()
            assert_same_bits(values[frozen], np.ones_like(values)[frozen], variant.competitor)
            np.testing.assert_allclose(1 - values[~frozen], moved, atol=2e-7, err_msg=variant.competitor)


class TestFewestBytes:
    """Of a step of Adam (`slots=2`) or SGD with momentum (`slots=1`), float32."""

    @pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001])
    def test_random_masks_are_as_expected(self, density, benchmark_module):
        masks = benchmark_module("_masks")
        lines = masks.make_mask((MIB // 1024, 1024), density, False).reshape(-1, 16).any(axis=1)
        assert masks.touched_share(density, False) == pytest.approx(lines.mean(), rel=0.05)

    def test_rows_are_whole_lines(self, benchmark_module):
        masks = benchmark_module("_masks")
        rows = masks.make_mask((1000, 1024), 0.01, True)
        assert rows.shape == (1000, 1)
        lines = np.broadcast_to(rows, (1000, 1024)).reshape(-1, 16).any(axis=1)
        assert masks.touched_share(0.01, True) == lines.mean() == 0.01

    @pytest.mark.parametrize(
        "slots, density, rows, state, expected",
        [
            # Gradient read, variable and slots read and written, a bit per entry.
            (2, 1.0, False, "full", (1 + 2 + 4) * 4 * MIB + MIB / 8),
            (1, 1.0, False, "full", (1 + 2 + 2) * 4 * MIB + MIB / 8),
            # A bit per row.
            (2, 0.25, True, "full", 7 * MIB + MIB / 1024 / 8),
            # Slots of trainable entries alone.
            (2, 1.0, False, "compact", (1 + 2 + 4) * 4 * MIB + MIB / 8),
            (2, 0.25, True, "compact", 7 * MIB + MIB / 1024 / 8),
            (1, 0.5, False, "compact", 3 * 4 * (1 - 2**-16) * MIB + 0.5 * 2 * 4 * MIB + MIB / 8),
            # Four bytes for each trainable entry are less than a bit for each of all.
            (2, 1 / 64, False, "compact", 12 * (1 - (63 / 64) ** 16) * MIB + MIB / 4 + MIB / 16),
        ],
    )
    def test_accounting(self, slots, density, rows, state, expected, benchmark_module):
        masks = benchmark_module("_masks")
        assert masks.fewest_bytes(MIB, slots, density, rows, state) == pytest.approx(expected, rel=1e-12)

    def test_what_is_not_ours_updates_all_entries(self, benchmark_module):
        bench_fused = benchmark_module("bench_fused")
        for kind, mask in {"Keras, unmasked": 0, "TensorFlow's own": 0, "Keras + where": 1, "optax, jitted": 0}.items():
            # A boolean mask has a byte per entry.
            assert bench_fused.fewest_bytes(bench_fused.Variant(kind, 0.5), "adam", MIB) == (28 + mask) * MIB


def test_bench_fit(tmp_path):
    data, text = run(
        "bench_fit.py", "--repeats", "3", "--optimizer", "lion", "--densities", "1", "0.1", "--width", "8",
        "--blocks", "1", path=tmp_path / "fit.json",
    )  # fmt: skip
    check_facts(data)
    assert [(result["jit"], result["density"]) for result in data["results"]] == [
        (False, 1.0), (False, 0.1), (True, 1.0), (True, 0.1),
    ]  # fmt: skip
    for result in data["results"]:
        low, high = result["quartiles"]
        assert 0 < low <= result["ratio"] <= high
        assert result["share"] > 0 and result["update_ratio"] > 0
        assert result["target"] == (1.02 if result["jit"] else 1.00)
        assert set(result["times"]) == {"unmasked", "masked", "unmasked update", "masked update"}
    assert "jit on" in text and "Expected" in text


def test_the_model_of_bench_fit_is_large_enough(benchmark_module):
    bench_fit = benchmark_module("bench_fit")
    assert bench_fit.make_model(512, 3).count_params() > 10e6


@pytest.mark.parametrize("size", ["0", "16X"])
def test_a_bad_size_is_refused(size, tmp_path):
    script = Script(FOLDER / "bench_ops.py", ["--size", size], os.environ, tmp_path / "log")
    assert script.wait(300) == 2
    assert "--size" in script.printed()


def test_bench_backward(tmp_path):
    data, _ = run(
        "bench_backward.py", "--model", "small", "--mask", "rows 0.25", "entries 0.1", "--jit", "off", "--repeats", "2",
        "--no-memory", path=tmp_path / "backward.json",
    )  # fmt: skip
    check_facts(data)
    assert [result["cell"] for result in data["results"]] == ["rows 0.25", "entries 0.1"]
    for result in data["results"]:
        assert set(result["times"]) == {"unmasked", "whole", "part"}
        assert result["ratio"] > 0 and result["cpu_ratio"] > 0 and result["whole"] == []


def test_bench_weight_gradient(tmp_path):
    data, _ = run(
        "bench_weight_gradient.py", "--shape", "8", "64", "64", "--densities", "0.1", "0.5", "--jit", "off",
        "--repeats", "2", "--no-memory", "--plot", str(tmp_path), path=tmp_path / "gradient.json",
    )  # fmt: skip
    check_facts(data)
    found = [(result["structure"], result["density"]) for result in data["results"]]
    spread = [(name, density) for name in ("entries", "rows", "columns", "1 x 16", "16 x 16") for density in (0.1, 0.5)]
    assert found == [*spread, ("2:4", 0.5)]
    assert (tmp_path / "weight_gradient.png").stat().st_size > 10_000
