"""Compact state against the unmasked Keras optimizer: time, memory, and how both grow.

The general way, `fused=False`; bench_fused.py measures steps in one pass.

Both are given the same gradient, made beforehand. A step of compact state reads it and the
variable, updates a variable of the trainable entries, and writes those back. Bytes of state
are counted from the variables that there are; peak memory is the largest resident set
(`VmHWM`) of a fresh process during steps, after the first ones.

With `--plot FOLDER`: time against size at fixed density, and against density at fixed size,
as compact_size.png and compact_density.png.
"""

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _common
import keras
import numpy as np
import tensorflow as tf
from _masks import make_mask, shape_of

import freezeops as fz

OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "Adam": lambda: keras.optimizers.Adam(1e-4),
    "AdamW": lambda: keras.optimizers.AdamW(1e-4),
}
SLOTS = 2
"""Of each of these, per entry."""

CASES = ((0.01, False), (0.01, True), (0.1, False), (0.5, False))
"""Densities, and whether whole rows are trainable."""

TARGETS = {
    (False, 0.01, False): 0.10,
    (False, 0.01, True): 0.04,
    (False, 0.1, False): 0.30,
    (False, 0.5, False): 1.0,
    (True, 0.01, False): 0.15,
    (True, 0.1, False): 0.7,
}
"""Time of a step / time of the unmasked optimizer's, at most, by `jit_compile`, density and rows."""

SLOT_TARGET = 1.02
"""Bytes of slots / (density * the unmasked optimizer's), at most."""
STATE_TARGET = {0.1: 0.25}
"""All that compact state needs / the unmasked optimizer's slots, at most."""

INSTANCES = 3
"""How often each step is made, where memory allows; see `_common.interleaved`."""
LARGE = _common.size_of("64M")

CURVE_POINTS = 9
"""Sizes, each twice the one before, the last twice the large one."""
CURVE_DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.99)
CURVE_DENSITY = 0.1
MEGABYTE = 2**20


def make_step(
    optimizer: keras.optimizers.Optimizer, gradient: tf.Tensor, jit: bool, name: str = "w"
) -> Callable[[], Any]:
    """A function that trains one variable of the gradient's shape by one step."""
    variable = keras.Variable(initializer="ones", shape=gradient.shape, name=name)
    optimizer.build([variable])

    @tf.function(jit_compile=jit, autograph=False)
    def step(gradient: tf.Tensor) -> None:
        optimizer.apply([gradient], [variable])

    return lambda: step(gradient)


def make_compact(optimizer: str, mask: np.ndarray, gradient: tf.Tensor, jit: bool) -> Callable[[], Any]:
    """The same with compact state."""
    masked = fz.MaskedOptimizer(OPTIMIZERS[optimizer](), masks={"w": mask}, state="compact", fused=False)
    return make_step(masked, gradient, jit)


def state_bytes(optimizer: str, mask: np.ndarray, size: int) -> dict[str, int]:
    """Bytes of all that compact state keeps, by what for."""
    masked = fz.MaskedOptimizer(OPTIMIZERS[optimizer](), masks={"w": mask}, state="compact", fused=False)
    variable = keras.Variable(initializer="ones", shape=shape_of(size), name="w")
    masked.build([variable])
    (managed,) = masked._registry.managed
    slots = [record.slot for record in managed.slot_records]
    bytes_of = {"slots": sum(math.prod(slot.shape) * tf.as_dtype(slot.dtype).size for slot in slots)}
    waiting = {"unseeded bits": managed.slots.unseeded_bytes if managed.slots.unseeded is not None else 0}
    return bytes_of | managed.partition.describe().overhead_bytes | waiting


def measure_here(optimizer: str, jit: bool, size: int, density: float, rows: bool, repeats: int) -> dict[str, Any]:
    """Times one case in this process."""
    shape = shape_of(size)
    instances = 1 if size > LARGE else INSTANCES
    gradient = tf.fill(shape, 0.01)
    mask = make_mask(shape, density, rows)
    bare = [make_step(OPTIMIZERS[optimizer](), gradient, jit) for _ in range(instances)]
    compact = [make_compact(optimizer, mask, gradient, jit) for _ in range(instances)]
    rounds = _common.interleaved({"bare": bare, "compact": compact}, repeats)
    state = state_bytes(optimizer, mask, size)
    exact = np.count_nonzero(mask) / mask.size
    full = SLOTS * 4 * size
    return {
        "optimizer": optimizer,
        "jit": jit,
        "size": size,
        "density": density,
        "rows": rows,
        "disturbed": rounds.disturbed,
        "times": rounds.times(),
        "ratio": rounds.ratio("compact", "bare"),
        "target": TARGETS.get((jit, density, rows)),
        "state_bytes": state,
        "slot_ratio": state["slots"] / (exact * full),
        "state_ratio": sum(state.values()) / full,
        "state_target": STATE_TARGET.get(density),
    }


Run = Callable[..., Any]
"""Carries a task out: from the name of one of `TASKS` and its arguments to the result."""


def elsewhere(name: str, *arguments: Any) -> Any:
    """Carries a task out in a process of its own: what one leaves in memory is no other's."""
    return json.loads(_common.in_fresh_process(__file__, f"--{name}-of", json.dumps(arguments)))


def here(name: str, *arguments: Any) -> Any:
    """Carries a task out in this process."""
    return TASKS[name](*arguments)


def peak_here(optimizer: str, jit: bool, size: int, density: float | None, rows: bool) -> float:
    """Largest resident set of this process during steps after the first ones, in bytes."""
    gradient = tf.fill(shape_of(size), 0.01)
    if density is None:
        step = make_step(OPTIMIZERS[optimizer](), gradient, jit)
    else:
        step = make_compact(optimizer, make_mask(shape_of(size), density, rows), gradient, jit)
    for _ in range(2):
        step()
    gc.collect()
    _common.forget_peak_memory()
    for _ in range(2):
        step()
    return _common.peak_memory()


def add_memory(results: list[dict[str, Any]]) -> None:
    """Adds peak memory to results, each from a fresh process."""
    bare: dict[tuple, float] = {}
    for result in results:
        kind = result["optimizer"], result["jit"], result["size"]
        if kind not in bare:
            bare[kind] = elsewhere("memory", *kind, None, False)
        result["peak_bytes"] = {
            "bare": bare[kind],
            "compact": elsewhere("memory", *kind, result["density"], result["rows"]),
        }


def point_here(jit: bool, size: int, density: float, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step with Adam, in this process."""
    shape = shape_of(size)
    gradient = tf.fill(shape, 0.01)
    mask = make_mask(shape, density, False)
    instances = [make_compact("Adam", mask, gradient, jit) for _ in range(1 if size > LARGE else INSTANCES)]
    rounds = _common.interleaved({"compact": instances}, repeats)
    time = rounds.times()["compact"]["median_ms"]
    return {"size": size, "density": density, "median_ms": time, "disturbed": rounds.disturbed}


def straightness(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The line of least relative squares through time against size, and how far the points are from it."""
    sizes = np.array([point["size"] for point in points], float)
    times = np.array([point["median_ms"] for point in points])
    columns = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    (intercept, slope), *_ = np.linalg.lstsq(columns, np.ones_like(times), rcond=None)
    fitted = intercept + slope * sizes
    return {
        "intercept_ms": float(intercept),
        "ms_per_million": float(slope * 1e6),
        "largest_deviation": float(np.max(np.abs(fitted / times - 1))),
        "r_squared": float(1 - np.sum((times - fitted) ** 2) / np.sum((times - times.mean()) ** 2)),
    }


def plot(curves: dict[str, Any], folder: Path) -> None:
    """Draws time against size and against density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name, label, scale in (("size", "weights, MB (float32)", "log"), ("density", "density", "log")):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for jit, colour in (("off", "tab:blue"), ("on", "tab:orange")):
            points = curves[name][jit]
            x = [point["size"] * 4 / 1e6 if name == "size" else point["density"] for point in points]
            axes.plot(x, [point["median_ms"] for point in points], "o-", color=colour, label=f"jit_compile {jit}")
            if name == "size":
                line = curves["line"][jit]
                fitted = [line["intercept_ms"] + line["ms_per_million"] * point["size"] / 1e6 for point in points]
                axes.plot(
                    x, fitted, "--", color=colour, alpha=0.6, label=f"straight line, $R^2$={line['r_squared']:.4f}"
                )
        axes.set_xscale(scale)
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("one step, ms")
        fixed = (
            f"density {CURVE_DENSITY:g}, random"
            if name == "size"
            else f"{curves['size_of_densities'] // 2**20}M entries"
        )
        axes.set_title(f"Adam with compact state, {fixed}")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"compact_{name}.png", dpi=150)
        plt.close(figure)


TASKS: dict[str, Callable[..., Any]] = {"measure": measure_here, "memory": peak_here, "point": point_here}


def measure_curves(sizes: Sequence[int], size: int, repeats: int, run: Run) -> dict[str, Any]:
    """Both curves, with and without XLA."""
    curves: dict[str, Any] = {"size": {}, "density": {}, "line": {}, "size_of_densities": size}
    for name, jit in (("off", False), ("on", True)):
        curves["size"][name] = [run("point", jit, each, CURVE_DENSITY, repeats) for each in sizes]
        curves["line"][name] = straightness(curves["size"][name])
        curves["density"][name] = [run("point", jit, size, each, repeats) for each in CURVE_DENSITIES]
    return curves


def row_of(result: dict[str, Any]) -> list[str]:
    """A result as cells of the table."""
    row = [
        result["optimizer"],
        f"{result['size'] / MEGABYTE:g}M",
        "on" if result["jit"] else "off",
        f"{result['density']:g}" + (" rows" if result["rows"] else ""),
        *(f"{result['times'][name]['median_ms']:.1f}" for name in ("bare", "compact")),
        _common.mark(f"{result['ratio']:.3f}", result["disturbed"]),
        _common.verdict(result["ratio"], result["target"]),
        f"{result['slot_ratio']:.3f}",
        f"{result['state_ratio']:.3f}",
        _common.verdict(result["state_ratio"], result["state_target"]),
    ]
    peak = result.get("peak_bytes")
    return row + ([f"{peak[name] / MEGABYTE:.0f}" for name in ("bare", "compact")] if peak else [])


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=32)
    parser.add_argument("--large", type=_common.size_of, default=_common.size_of("128M"), help="a second size")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--jit", choices=["on", "off", "both"], default="both")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--plot", type=Path, help="folder for the plots, which take some minutes more")
    parser.add_argument("--one-process", action="store_true", help="faster, and less comparable")
    # For the processes that `elsewhere` starts.
    for name in TASKS:
        parser.add_argument(f"--{name}-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in TASKS:
        if given := getattr(options, f"{name}_of"):
            print(json.dumps(here(name, *given)))
            return None
    run = here if options.one_process else elsewhere
    repeats = _common.repeats_of(options)
    results = [
        run("measure", optimizer, jit, size, *case, repeats if size <= LARGE else max(repeats // 4, 3))
        for size in dict.fromkeys((options.size, options.large))
        for optimizer in options.optimizer
        for jit in {"on": [True], "off": [False], "both": [False, True]}[options.jit]
        for case in CASES
    ]
    columns = ["optimizer", "size", "jit", "density", "bare ms", "compact ms", "ratio", "target"]
    columns += ["slots", "all state", "target"]
    if not options.no_memory:
        add_memory(results)
        columns += ["bare MB", "compact MB"]
    table = _common.table("A step with compact state, float32", columns)
    for result in results:
        table.add_row(*row_of(result))
    notes = [
        f"slots: bytes of slots / (density * those of the unmasked optimizer), at most {SLOT_TARGET}.",
        "all state: slots, compact values, mask bits, rank offsets, indices and unseeded bits / those slots.",
        _common.MARK_NOTE,
    ]
    if not options.no_memory:
        notes.append("MB: peak resident set of a fresh process during steps, TensorFlow itself included.")
    data: dict[str, Any] = {"benchmark": "compact", "results": results}
    if options.plot is not None:
        sizes = [max(2 * options.large >> halvings, 1) for halvings in reversed(range(CURVE_POINTS))]
        curves = measure_curves(sizes, options.size, max(repeats // 2, 3), run)
        plot(curves, options.plot)
        data["curves"] = curves
        for name, line in curves["line"].items():
            notes.append(
                f"Time against size, jit {name}: {line['intercept_ms']:.2f} ms + {line['ms_per_million']:.3f} ms per "
                f"million entries, R2 {line['r_squared']:.4f}, no point further than {line['largest_deviation']:.0%}."
            )
    _common.report([table], notes, data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
