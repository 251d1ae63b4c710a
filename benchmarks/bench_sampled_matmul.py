"""The trainable entries of the gradient of a kernel alone, against TensorFlow's product of which they are a part.

The gradient of a kernel is `x^T dy`. `ops.sampled_matmul` makes those entries of it that a random mask makes trainable.
It is timed beside `tf.matmul(x, dy, transpose_a=True)`, in turn with it in one process, so that neither finds its
operands in the cache because it was there before; each operand is made once. What an empty call of a `tf.function`
takes is taken off both.

By two clocks: CPU time of the process, which other processes disturb little, and time that passes, where threads that
wait for each other count.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import _common
import numpy as np
import tensorflow as tf

from freezeops import ops
from freezeops.masks import packing
from freezeops.masks.visits import visits

SHAPES = ((512, 1024, 1024), (2048, 768, 3072), (256, 4096, 4096), (4096, 512, 2048))
"""Tokens, rows and columns."""

DENSITIES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)

TARGETS = {0.01: (0.10, 0.13), 0.1: (0.26, 0.30), 0.3: (0.56, 0.62)}
"""CPU time of `sampled_matmul` / that of `tf.matmul` at a density, at most: the mean of the shapes, and each."""

CLOCKS = ("CPU time", "wall time")


def both_clocks(function: Callable[[], Any]) -> tuple[float, float]:
    """The seconds of CPU time of the process, and those that pass, while a function runs."""
    passing, working = time.perf_counter(), time.process_time()
    function()
    return time.process_time() - working, time.perf_counter() - passing


def competitors(shape: tuple[int, int, int], densities: list[float], dtype: str) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: an empty call, the whole product, and the entries of a mask of each density."""
    tokens, rows, columns = shape
    rng = np.random.default_rng(0)
    x, dy = (tf.Variable(tf.cast(rng.standard_normal((tokens, width), np.float32), dtype)) for width in (rows, columns))

    def compiled(function: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> Callable[[], Any]:
        step = tf.function(lambda: function(x.read_value(), dy.read_value()), autograph=False)
        return lambda: step().numpy()

    functions = {
        "empty": compiled(lambda x, dy: tf.constant(0.0)),
        # One entry is looked at, so that nothing is copied for the caller.
        "whole": compiled(lambda x, dy: tf.matmul(x, dy, transpose_a=True)[-1, -1]),
    }
    for density in densities:
        packed = packing.pack_bits(rng.random((rows, columns), np.float32) < density)
        indices = packing.bit_indices(packed, rows * columns)
        index = [
            tf.Variable(each, trainable=False)
            for each in (
                visits(packed, rows, columns, indices.size),
                packed,
                packing.rank_offsets(packed, rows * columns),
                indices.astype(np.int32),
            )
        ]
        functions[str(density)] = compiled(lambda x, dy, index=index: ops.sampled_matmul(x, dy, *index)[-1])
    return functions


def measure(shape: tuple[int, int, int], densities: list[float], dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Times one shape; returns a result for each density."""
    functions = competitors(shape, densities, dtype)
    # Both clocks of a call are noted; rounds are chosen by what passed.
    noted: dict[str, list[float]] = {name: [] for name in functions}

    def clock(function: Callable[[], Any]) -> float:
        working, passing = both_clocks(function)
        noted[names[function]].append(working)
        return passing

    names = {function: name for name, function in functions.items()}
    rounds = _common.interleaved({name: [function] for name, function in functions.items()}, repeats, clock=clock)
    by_cpu = _common.Rounds(noted, rounds.disturbed)
    results = []
    for density in densities:
        name = str(density)
        results.append(
            {
                "shape": list(shape),
                "density": density,
                "disturbed": rounds.disturbed,
                "ratio": {
                    clock_name: each.ratio_above(name, "whole", "empty")
                    for clock_name, each in zip(CLOCKS, (by_cpu, rounds), strict=True)
                },
                "cpu_times": {each: by_cpu.times()[each] for each in (name, "whole")},
                "times": {each: rounds.times()[each] for each in (name, "whole")},
            }
        )
    return results


def add_rows(table: Any, results: list[dict[str, Any]], densities: list[float], clock: str) -> list[dict[str, Any]]:
    """Fills a table with the ratios by one clock; returns the means."""
    means = []
    for density in densities:
        ratios = [result["ratio"][clock] for result in results if result["density"] == density]
        disturbed = any(result["disturbed"] for result in results if result["density"] == density)
        mean, largest = sum(ratios) / len(ratios), max(ratios)
        of_mean, of_each = TARGETS.get(density, (None, None)) if clock == CLOCKS[0] else (None, None)
        table.add_row(
            str(density),
            *(_common.mark(f"{ratio:.3f}", disturbed) for ratio in ratios),
            f"{mean:.3f}",
            _common.verdict(mean, of_mean),
            _common.verdict(largest, of_each),
        )
        means.append(
            {
                "clock": clock,
                "density": density,
                "mean": mean,
                "largest": largest,
                "targets": {"mean": of_mean, "each": of_each},
            }
        )
    return means


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=40, size=False)
    parser.add_argument("--dtype", choices=ops.SAMPLED_DTYPES, default="float32")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument(
        "--shape", dest="shapes", nargs=3, type=int, action="append", metavar=("TOKENS", "ROWS", "COLUMNS"),
        help="may be given several times (default: four shapes)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    shapes = [tuple(shape) for shape in options.shapes or SHAPES]
    results = [
        result
        for shape in shapes
        for result in measure(shape, options.densities, options.dtype, _common.repeats_of(options))
    ]
    tables, means = [], []
    for clock in CLOCKS:
        names = [", ".join(map(str, shape)) for shape in shapes]
        table = _common.table(
            f"sampled_matmul / tf.matmul, {clock}, {options.dtype}; tokens, rows, columns",
            ["density", *names, "mean", "target", "of each"],
        )
        means += add_rows(table, results, options.densities, clock)
        tables.append(table)
    whole = ", ".join(f"{result['times']['whole']['median_ms']:.1f}" for result in results[:: len(options.densities)])
    data = {"benchmark": "sampled_matmul", "dtype": options.dtype, "results": results, "means": means}
    _common.report(tables, [f"tf.matmul takes {whole} ms.", _common.MARK_NOTE], data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
