"""The gradient of one kernel: its trainable part alone, against the whole product, over density and structure.

`Dense(columns)` on `rows` inputs, plain SGD in compact state, the gradient of the layer's output
given: a step makes `x^T dy`, or the part of it that `skip_frozen_gradients=True` makes, and updates
the weights. Structures of trainable entries: single entries at random, whole rows, whole columns,
pieces of 1 x 16 and 16 x 16, and two in each four of a row (2:4, density 0.5 alone). The ratio is of
whole calls, in turn in one process. The break-even point is the density from which on the part takes
longer than the whole, by a straight line between the densities beside it. Limits on what is skipped
(`ways.MOST` in `freezeops/backward/ways.py`, which came of this script) are lifted here.

Peak memory is the largest resident set (`VmHWM`) of a fresh process during steps, less what was
resident before, for a structure and density each.

With `--plot FOLDER`: both against density, as weight_gradient.png.
"""

import functools
import gc
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common
import keras
import numpy as np
import tensorflow as tf

import freezeops as fz
from freezeops.backward import ways

DENSITIES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
SHAPE = 512, 2048, 2048
"""Tokens, rows and columns."""


def _some(count: int, density: float, rng: np.random.Generator) -> np.ndarray:
    chosen = np.zeros(count, bool)
    chosen[rng.permutation(count)[: max(1, round(density * count))]] = True
    return chosen


def _pieces(height: int, width: int, shape: tuple[int, int], density: float, rng: np.random.Generator) -> np.ndarray:
    grid = shape[0] // height, shape[1] // width
    chosen = _some(grid[0] * grid[1], density, rng).reshape(grid)
    return np.kron(chosen, np.ones((height, width), bool))


def _two_of_four(shape: tuple[int, int], density: float, rng: np.random.Generator) -> np.ndarray:
    order = np.argsort(rng.random((shape[0], shape[1] // 4, 4)), axis=-1)
    return (order < 2).reshape(shape)


STRUCTURES: dict[str, Callable[[tuple[int, int], float, np.random.Generator], np.ndarray]] = {
    "entries": lambda shape, density, rng: rng.random(shape, np.float32) < density,
    "rows": lambda shape, density, rng: _some(shape[0], density, rng)[:, None],
    "columns": lambda shape, density, rng: _some(shape[1], density, rng)[None, :],
    "1 x 16": functools.partial(_pieces, 1, 16),
    "16 x 16": functools.partial(_pieces, 16, 16),
    "2:4": _two_of_four,
}


class Kernel:
    """One kernel and its steps.

    Args:
        structure: Of the mask; empty: there is none, and the optimizer is Keras's own.
        density: Share of its trainable entries.
        skips: Whether the trainable part of the gradient is made alone.
        jit: Whether XLA compiles the step.
        shape: Tokens, rows and columns.
    """

    def __init__(self, structure: str, density: float, skips: bool, jit: bool, shape: Sequence[int]):
        tokens, rows, columns = shape
        rng = np.random.default_rng(0)
        x = tf.constant(rng.standard_normal((tokens, rows), np.float32))
        dy = tf.constant(rng.standard_normal((tokens, columns), np.float32))
        kernel = keras.Variable(np.zeros((rows, columns), np.float32), name="kernel")
        optimizer: keras.optimizers.Optimizer = keras.optimizers.SGD(1e-3)
        if structure:
            mask = STRUCTURES[structure]((rows, columns), density, rng)
            optimizer = fz.MaskedOptimizer(
                optimizer, masks={"kernel": mask}, state="compact", skip_frozen_gradients=skips
            )
        optimizer.build([kernel])

        @tf.function(jit_compile=jit, autograph=False)
        def step(x: tf.Tensor, dy: tf.Tensor) -> None:
            optimizer.apply([tf.matmul(x, dy, transpose_a=True)], [kernel])

        self.step = lambda: step(x, dy)
        self.optimizer = optimizer


def measure(
    structure: str, densities: Sequence[float], jit: bool, shape: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Times one structure at each density."""
    results = []
    for density in densities if structure != "2:4" else [0.5]:
        gc.collect()
        kernels = {
            "unmasked": Kernel("", density, False, jit, shape),
            "whole": Kernel(structure, density, False, jit, shape),
            "part": Kernel(structure, density, True, jit, shape),
        }
        rounds = _common.interleaved({name: [each.step] for name, each in kernels.items()}, repeats, patience=2)
        (report,) = kernels["part"].optimizer.describe()
        assert report.gradient == "trainable part only", report
        results.append(
            {
                "structure": structure,
                "density": density,
                "jit": jit,
                "disturbed": rounds.disturbed,
                "times": rounds.times(),
                "ratio": rounds.ratio("part", "whole"),
                "unmasked_ratio": rounds.ratio("part", "unmasked"),
            }
        )
    return results


def memory(structure: str, density: float, skips: bool, jit: bool, shape: Sequence[int]) -> float:
    """Bytes above what is resident before steps, at most."""
    kernel = Kernel(structure, density, skips, jit, shape)
    gc.collect()
    _common.forget_peak_memory()
    before = _common.peak_memory()
    for _ in range(3):
        kernel.step()
    return _common.peak_memory() - before


def break_even(results: Sequence[dict[str, Any]]) -> float | None:
    """The density from which on the part takes longer than the whole; `None`: none that was measured."""
    for before, after in itertools.pairwise(results):
        if before["ratio"] <= 1 < after["ratio"]:
            share = (1 - before["ratio"]) / (after["ratio"] - before["ratio"])
            return before["density"] + share * (after["density"] - before["density"])
    return None


def plot(
    results: Sequence[dict[str, Any]], peaks: Sequence[dict[str, Any]], shape: Sequence[int], folder: Path
) -> None:
    """Draws time and peak memory against density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    off = [result for result in results if not result["jit"]]
    for number, structure in enumerate(dict.fromkeys(result["structure"] for result in off)):
        style = {"color": f"C{number}", "label": structure, "marker": "s" if structure == "2:4" else "o", "ms": 4}
        points = [result for result in off if result["structure"] == structure]
        time_axes.plot([p["density"] for p in points], [p["ratio"] for p in points], **style)
        of_memory = [peak for peak in peaks if peak["structure"] == structure and not peak["jit"]]
        memory_axes.plot([p["density"] for p in of_memory], [p["ratio"] for p in of_memory], **style)
    for axes, label in ((time_axes, "time"), (memory_axes, "peak memory")):
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlim(0.8 * min(each["density"] for each in off), 1)
        axes.set_ylim(0, 1.6)
        axes.set_xlabel("density: share of trainable entries")
        axes.set_ylabel(f"{label}: trainable part only / whole gradient")
        axes.grid(True, which="both", alpha=0.3)
    time_axes.legend(title="trainable")
    figure.suptitle(f"A step of one kernel, {shape[0]} tokens, {shape[1]} x {shape[2]}, float32, without XLA")
    figure.savefig(folder / "weight_gradient.png", dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=24, size=False)
    parser.add_argument("--structure", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--jit", choices=["on", "off", "both"], default="both")
    parser.add_argument("--shape", nargs=3, type=int, default=list(SHAPE), metavar=("TOKENS", "ROWS", "COLUMNS"))
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--memory-of", nargs=4, metavar=("STRUCTURE", "DENSITY", "SKIPS", "JIT"), help="print it alone")
    parser.add_argument("--plot", type=Path, help="folder for the plot")
    options = parser.parse_args(arguments)
    ways.MOST.update(dict.fromkeys(ways.MOST, 1.0))
    if options.memory_of:
        structure, density, skips, jit = options.memory_of
        print(memory(structure, float(density), skips == "on", jit == "on", options.shape))
        return {}
    repeats = _common.repeats_of(options)
    results, peaks, tables, notes = [], [], [], []
    for jit in {"on": [True], "off": [False], "both": [False, True]}[options.jit]:
        table = _common.table(
            f"A step of one kernel, {options.shape}, jit {'on' if jit else 'off'}: part / whole",
            ["trainable", *map(str, options.densities), "break-even"],
        )
        for structure in options.structure:
            found = measure(structure, options.densities, jit, options.shape, repeats)
            results += found
            by_density = {each["density"]: _common.mark(f"{each['ratio']:.2f}", each["disturbed"]) for each in found}
            even = break_even(found)
            even_text = f"{even:.2f}" if even else ("below" if found[0]["ratio"] > 1 else "above")
            cells = [by_density.get(density, "") for density in options.densities]
            table.add_row(structure, *cells, even_text if len(found) > 1 else "")
        tables.append(table)
    if not options.no_memory:
        shape = ["--shape", *map(str, options.shape)]
        table = _common.table("Peak memory, jit off: part / whole", ["trainable", *map(str, options.densities)])
        for structure in options.structure:
            cells = []
            for density in options.densities:
                if structure == "2:4" and density != 0.5:
                    cells.append("")
                    continue
                command = "--memory-of", structure, str(density)
                used = [
                    float(_common.in_fresh_process(__file__, *command, skips, "off", *shape)) for skips in ("off", "on")
                ]
                ratio = used[1] / max(used[0], 1.0)
                peaks.append({"structure": structure, "density": density, "jit": False, "bytes": used, "ratio": ratio})
                cells.append(f"{ratio:.2f}")
            table.add_row(structure, *cells)
        tables.append(table)
    if options.plot is not None:
        plot(results, peaks, options.shape, options.plot)
        notes.append(f"Plot: {options.plot / 'weight_gradient.png'}")
    notes.append(_common.MARK_NOTE)
    data = {"benchmark": "weight_gradient", "shape": options.shape, "results": results, "memory": peaks}
    _common.report(tables, notes, data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
