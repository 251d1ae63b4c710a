"""A step of plain SGD on an embedding table, against the size of the table.

The gradient is a `tf.IndexedSlices` of some thousand rows, repeated ones among them; 1,000
rows of the table are trainable. Plain SGD writes the named rows alone, and so should a
masked step: its time must not grow with the table beyond what the bare optimizer's does,
whose rows no longer lie in the cache either.
"""

import gc
import sys
from collections.abc import Callable
from typing import Any

import _common
import keras
import numpy as np
import tensorflow as tf

import freezeops as fz

WIDTH = 64
NAMED = 4096
TRAINABLE = 1000
TARGET = 1.3
"""Masked time at the largest table / at the smallest, less what the bare optimizer's time grows, at most."""


def make_step(rows: int, masked: bool) -> Callable[[], Any]:
    """A function that trains a table by one step."""
    rng = np.random.default_rng(0)
    table = keras.Variable(initializer="ones", shape=(rows, WIDTH), name="table")
    trainable = rng.choice(rows, TRAINABLE, replace=False)
    optimizer: keras.optimizers.Optimizer = keras.optimizers.SGD(1e-3)
    if masked:
        optimizer = fz.MaskedOptimizer(optimizer)
        optimizer.train_only(table, trainable)
    optimizer.build([table])
    # Half of the named rows are trainable ones.
    indices = np.concatenate([rng.choice(trainable, NAMED // 2), rng.integers(0, rows, NAMED // 2)])
    named, values = tf.constant(indices), tf.fill([NAMED, WIDTH], 0.01)

    @tf.function(autograph=False)
    def step(indices: tf.Tensor, values: tf.Tensor) -> None:
        optimizer.apply([tf.IndexedSlices(values, indices, tf.constant([rows, WIDTH]))], [table])

    return lambda: step(named, values)


def measure(rows: int, repeats: int) -> dict[str, Any]:
    """Times one size of the table."""
    gc.collect()
    rounds = _common.interleaved({"bare": [make_step(rows, False)], "masked": [make_step(rows, True)]}, repeats)
    return {
        "rows": rows,
        "megabytes": rows * WIDTH * 4 / 2**20,
        "disturbed": rounds.disturbed,
        "times": rounds.times(),
        "ratio": rounds.ratio("masked", "bare"),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=200)
    parser.add_argument(
        "--rows",
        nargs="+",
        type=_common.size_of,
        default=[_common.size_of(n) for n in ("8K", "64K", "512K", "2M", "4M")],
    )
    options = parser.parse_args(arguments)
    results = [measure(rows, _common.repeats_of(options)) for rows in options.rows]
    first, last = results[0], results[-1]
    growth = {name: last["times"][name]["median_ms"] / first["times"][name]["median_ms"] for name in ("bare", "masked")}
    relative = growth["masked"] / growth["bare"]
    table = _common.table(
        f"Plain SGD, {NAMED} named rows of {WIDTH} float32, {TRAINABLE} rows trainable",
        ["rows", "table MB", "bare ms", "masked ms", "masked / bare"],
    )
    for result in results:
        table.add_row(
            f"{result['rows']:,}",
            f"{result['megabytes']:.0f}",
            *(f"{result['times'][name]['median_ms']:.3f}" for name in ("bare", "masked")),
            _common.mark(f"{result['ratio']:.2f}", result["disturbed"]),
        )
    notes = [
        f"From the smallest table to the largest: bare × {growth['bare']:.2f}, masked × {growth['masked']:.2f}; "
        f"one over the other {relative:.2f}, {_common.verdict(relative, TARGET)}",
        _common.MARK_NOTE,
    ]
    data = {"benchmark": "sparse", "results": results, "growth": growth}
    _common.report([table], notes, data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
