"""Time that masking adds to the op that makes a gradient, inside `tf.function`.

A gradient is made (`x + s`: a fresh buffer with one consumer, and nothing that Grappler
would merge with a multiplication after it), masked, and consumed; the time of making and
consuming alone is subtracted. freezeops masks it in its own buffer by packed bits. Beside
it:

- where: `tf.where` with a boolean mask;
- cast: multiplied by a boolean mask that is cast at every step;
- float: multiplied by a mask that is kept as floats, four bytes per entry;
- memcpy: a copy of as many bytes by two threads, for scale.

Multiplying does not mask a NaN and is listed for its speed only.
"""

import sys
from collections.abc import Callable
from typing import Any

import _common
import numpy as np
import tensorflow as tf

import freezeops as fz
from freezeops import ops

TARGETS = {"0 %": 0.08, "1 %": 0.30, "50 %": 0.58, "50 % of rows": 0.30}
"""Time added by freezeops / time added by `tf.where`, at most."""

FROZEN = {"0 %": 0.0, "1 %": 0.01, "50 %": 0.5, "99 %": 0.99, "100 %": 1.0}
ROWS = "50 % of rows"
MASKERS = ("freezeops", "where", "cast", "float")


def make_mask(name: str, shape: tuple[int, int]) -> fz.Mask:
    """A mask in which the named share is frozen, at random."""
    rng = np.random.default_rng(0)
    if name == ROWS:
        return fz.Mask.from_array(rng.random((shape[0], 1)) >= 0.5, shape)
    # Blocks keep the random numbers small beside what is measured.
    trainable = np.empty(shape, bool)
    for row in trainable:
        row[:] = rng.random(shape[1], dtype=np.float32) >= FROZEN[name]
    return fz.Mask.from_array(trainable, shape)


def maskers(mask: fz.Mask) -> dict[str, Callable[[tf.Tensor], tf.Tensor]]:
    """Each way to mask a gradient, over masks that are kept in variables."""
    array = mask.to_numpy()
    bits = tf.Variable(mask.packed, trainable=False)
    boolean = tf.Variable(array, trainable=False)
    floats = tf.Variable(array.astype(np.float32), trainable=False)
    return {
        "freezeops": lambda g: ops.mask_gradient(g, bits.read_value(), mask.layout),
        "where": lambda g: tf.where(boolean, g, 0.0),
        "cast": lambda g: g * tf.cast(boolean, g.dtype),
        "float": lambda g: g * floats,
    }


def competitors(mask: fz.Mask, x: tf.Variable) -> dict[str, list[Callable[[], Any]]]:
    """What is timed: the producer alone and with each way to mask."""
    shift = tf.constant(0.5)

    def with_masker(masker: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[], Any]:
        @tf.function(autograph=False)
        def step(s: tf.Tensor) -> tf.Tensor:
            # One entry is returned, not the tensor: its buffer is then free within the step.
            return masker(x + s)[-1, -1]

        return lambda: step(shift).numpy()

    functions = {"producer": [with_masker(lambda g: g)]}
    functions |= {name: [with_masker(masker)] for name, masker in maskers(mask).items()}
    return functions


def measure(name: str, shape: tuple[int, int], x: tf.Variable, repeats: int) -> dict[str, Any]:
    """Times one mask."""
    passes, pool = _common.two_thread_passes(shape[0] * shape[1])
    with pool:
        rounds = _common.interleaved(competitors(make_mask(name, shape), x) | {"memcpy": [passes["copy"]]}, repeats)
    added = {key: rounds.added(key, "producer") for key in MASKERS}
    where = added["where"]
    return {
        "frozen": name,
        "disturbed": rounds.disturbed,
        "times": rounds.times(),
        "added_ms": added,
        "against_where": added["freezeops"] / where if where > 0 else float("nan"),
        "target": TARGETS.get(name),
        "slower_than_float": added["freezeops"] > added["float"],
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=80)
    options = parser.parse_args(arguments)
    columns = min(1024, options.size)
    shape = (options.size // columns, columns)
    x = tf.Variable(tf.random.stateless_normal(shape, [1, 2]))
    results = [measure(name, shape, x, _common.repeats_of(options)) for name in [*FROZEN, ROWS]]
    names = ["frozen", "producer", *MASKERS, "memcpy", "freezeops / where", "target"]
    table = _common.table(f"Time added to a gradient's producer, ms, float32 {list(shape)}", names)
    for result in results:
        added = [f"{result['added_ms'][key]:.2f}" for key in MASKERS]
        table.add_row(
            result["frozen"],
            f"{result['times']['producer']['median_ms']:.2f}",
            *added,
            f"{result['times']['memcpy']['median_ms']:.2f}",
            _common.mark(f"{result['against_where']:.2f}", result["disturbed"]),
            _common.verdict(result["against_where"], result["target"]),
        )
    slower = [result["frozen"] for result in results if result["slower_than_float"]]
    note = f"Slower than the mask kept as floats at: {', '.join(slower) or 'none'} (target: none)"
    data = {"benchmark": "ops", "shape": list(shape), "results": results}
    _common.report([table], [note, _common.MARK_NOTE], data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
