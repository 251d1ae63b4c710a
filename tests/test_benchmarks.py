"""The benchmarks run, and their JSON holds what it should; nothing here looks at a time."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from processes import Script

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


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


@pytest.mark.parametrize("size", ["0", "16X"])
def test_a_bad_size_is_refused(size, tmp_path):
    script = Script(FOLDER / "bench_ops.py", ["--size", size], os.environ, tmp_path / "log")
    assert script.wait(300) == 2
    assert "--size" in script.printed()
