"""Time and memory of a whole `MaskedOptimizer` step against the bare inner optimizer.

The general way, `fused=False`; bench_fused.py measures steps in one pass.

Both get the same gradient, made inside the compiled function as a backward pass would
make it (`x + s`: a fresh buffer with one consumer; `x * s` Grappler would merge into the
bare optimizer's multiplication by the learning rate). The ratio is that of whole calls; the
ratio without the time of making the gradient stands beside it where XLA does not fuse
the two.

Peak memory is the largest resident set (`VmHWM`) of a fresh process that runs a few steps
of one configuration.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import _common
import keras
import numpy as np
import tensorflow as tf

import freezeops as fz

OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "Adam": lambda: keras.optimizers.Adam(1e-4),
    "SGD": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
}
DENSITIES = (1.0, 0.99, 0.5, 0.01)
JIT_TARGET = 1.08
TARGETS = {
    ("Adam", 1.0): 1.03,
    ("Adam", 0.99): 1.10,
    ("Adam", 0.01): 1.30,
    ("SGD", 1.0): 1.03,
    ("SGD", 0.99): 1.10,
    ("SGD", 0.01): 1.65,
}
"""Time of a step / time of the bare optimizer's, at most, without `jit_compile`."""

INSTANCES = 3
"""How often each step is made; see `_common.interleaved`."""

MEMORY_STEPS = 3
MEGABYTE = 2**20


def target_of(optimizer: str, jit: bool, density: float) -> float | None:
    """The ratio to reach, where there is one."""
    return JIT_TARGET if jit else TARGETS.get((optimizer, density))


def make_step(optimizer: keras.optimizers.Optimizer, x: tf.Variable, jit: bool) -> Callable[[], Any]:
    """A function that trains one variable of the shape of `x` by one step."""
    variable = keras.Variable(initializer="ones", shape=x.shape, name="w")
    optimizer.build([variable])
    shift = tf.constant(0.5)

    @tf.function(jit_compile=jit, autograph=False)
    def step(s: tf.Tensor) -> None:
        optimizer.apply([x + s], [variable])

    return lambda: step(shift)


def make_producer(x: tf.Variable) -> Callable[[], Any]:
    """What makes the gradient, alone."""
    shift = tf.constant(0.5)

    @tf.function(autograph=False)
    def step(s: tf.Tensor) -> tf.Tensor:
        return (x + s)[-1]

    return lambda: step(shift).numpy()


def make_masked(optimizer: str, density: float, x: tf.Variable, jit: bool) -> Callable[[], Any]:
    """A step of the wrapped optimizer with that share of the entries trainable, at random."""
    masked = fz.MaskedOptimizer(OPTIMIZERS[optimizer](), fused=False)
    step = make_step(masked, x, jit)
    if density < 1:
        rng = np.random.default_rng(0)
        masked.register_mask("w", rng.random(x.shape[0], dtype=np.float32) < density)
    return step


def make_gradient_source(size: int) -> tf.Variable:
    return tf.Variable(tf.fill([size], 0.01))


def measure(optimizer: str, jit: bool, densities: list[float], size: int, repeats: int) -> list[dict]:
    """Times one optimizer at all densities."""
    x = make_gradient_source(size)
    bare = [make_step(OPTIMIZERS[optimizer](), x, jit) for _ in range(INSTANCES)]
    producer = make_producer(x)
    results = []
    for density in densities:
        gc.collect()
        masked = [make_masked(optimizer, density, x, jit) for _ in range(INSTANCES)]
        rounds = _common.interleaved({"bare": bare, "masked": masked, "producer": [producer]}, repeats)
        without = None if jit else rounds.ratio_above("masked", "bare", "producer")
        results.append(
            {
                "optimizer": optimizer,
                "jit": jit,
                "density": density,
                "disturbed": rounds.disturbed,
                "times": rounds.times(),
                "ratio": rounds.ratio("masked", "bare"),
                "ratio_without_producer": without,
                "target": target_of(optimizer, jit, density),
            }
        )
    return results


def peak_here(optimizer: str, jit: bool, density: float | None, size: int) -> float:
    """Largest resident set of this process after some steps, in bytes."""
    x = make_gradient_source(size)
    bare = density is None
    step = make_step(OPTIMIZERS[optimizer](), x, jit) if bare else make_masked(optimizer, density, x, jit)
    for _ in range(MEMORY_STEPS):
        step()
    return _common.peak_memory()


def peak_elsewhere(optimizer: str, jit: bool, density: float | None, size: int) -> float:
    """`peak_here` in a fresh process."""
    return float(_common.in_fresh_process(__file__, "--memory-of", json.dumps([optimizer, jit, density, size])))


def add_memory(results: list[dict[str, Any]], size: int) -> None:
    """Adds peak memory to results; the bare optimizer's is measured once per kind of step."""
    bare: dict[tuple[str, bool], float] = {}
    for result in results:
        kind = result["optimizer"], result["jit"]
        if kind not in bare:
            bare[kind] = peak_elsewhere(*kind, None, size)
        result["peak_bytes"] = {
            "bare": bare[kind],
            "masked": peak_elsewhere(*kind, result["density"], size),
        }


def row_of(result: dict[str, Any]) -> list[str]:
    """A result as cells of the table."""
    without = result["ratio_without_producer"]
    row = [
        result["optimizer"],
        "on" if result["jit"] else "off",
        f"{result['density']:g}",
        *(f"{result['times'][name]['median_ms']:.1f}" for name in ("bare", "masked")),
        _common.mark(f"{result['ratio']:.2f}", result["disturbed"]),
        _common.verdict(result["ratio"], result["target"]),
        "" if without is None else f"{without:.2f}",
    ]
    peak = result.get("peak_bytes")
    return row + ([f"{peak[name] / MEGABYTE:.0f}" for name in ("bare", "masked")] if peak else [])


def main(arguments: list[str] | None = None) -> dict[str, Any] | None:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=40)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--jit", choices=["on", "off", "both"], default="both")
    parser.add_argument("--density", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    # For the processes that `peak_elsewhere` starts.
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        print(peak_here(*options.memory_of))
        return None
    results = [
        result
        for optimizer in options.optimizer
        for jit in {"on": [True], "off": [False], "both": [False, True]}[options.jit]
        for result in measure(optimizer, jit, options.density, options.size, _common.repeats_of(options))
    ]
    columns = ["optimizer", "jit", "density", "bare ms", "masked ms", "ratio", "target", "less producer"]
    if not options.no_memory:
        add_memory(results, options.size)
        columns += ["bare MB", "masked MB"]
    table = _common.table(f"A whole step, float32 [{options.size}]", columns)
    for result in results:
        table.add_row(*row_of(result))
    notes = ["SGD: momentum=0.9. Density: share of trainable entries, at random.", _common.MARK_NOTE]
    if not options.no_memory:
        notes.append("MB: peak resident set of a fresh process, TensorFlow itself included.")
    data = {"benchmark": "step", "size": options.size, "results": results}
    _common.report([table], notes, data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
