"""Whole steps of `fit` that do not compute what is frozen, against unmasked Keras and against whole gradients.

Three trainings of one model in turn: the bare Keras optimizer, `MaskedOptimizer` with compact
state as without the option, and with `skip_frozen_gradients=True`. Masked is every kernel of two
axes or more, as by `--mask`: single entries at random, rows (of the first axis) or columns (of the
last); biases train, and so do an embedding's rows. `fit` is called for a few batches at a time, in
another order every time; a callback takes the wall time of each batch and the process's CPU time,
and the first batch of each call does not count. Ratios are medians over the rounds.

Peak memory is the largest resident set (`VmHWM`) of a fresh process during `fit`, less what was
resident when `fit` began.
"""

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import _common
import keras
import numpy as np
import tensorflow as tf
from rich.table import Table

import freezeops as fz

UNMASKED, WHOLE, PART = "unmasked", "whole", "part"
TIMED_BATCHES = 3
"""In each call of `fit`, after one that does not count."""

Batch = tuple[np.ndarray, np.ndarray]
Made = tuple[keras.Model, Batch]


def make_mlp(width: int = 1024, depth: int = 6, examples: int = 512) -> Made:
    """`depth` dense layers of `width`, and ten classes."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    dense = [layers.Dense(width, "relu") for _ in range(depth)]
    model = keras.Sequential([keras.Input((width,)), *dense, layers.Dense(10)])
    rng = np.random.default_rng(0)
    return model, (rng.standard_normal((examples, width), np.float32), rng.integers(0, 10, examples))


def make_transformer(width: int = 384, blocks: int = 4, tokens: int = 64, vocabulary: int = 4096) -> Made:
    """A transformer that predicts tokens: 10 million parameters, batches of 8."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    given = keras.Input([tokens], dtype="int32")
    x = layers.Embedding(vocabulary, width)(given)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(8, width // 8)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * width, activation="relu")(y)
        x = x + layers.Dense(width)(y)
    model = keras.Model(given, layers.Dense(vocabulary)(layers.LayerNormalization()(x)))
    numbers = np.random.default_rng(0).integers(0, vocabulary, (8, tokens + 1), np.int32)
    return model, (numbers[:, :-1], numbers[:, 1:])


def make_convolutional(channels: int = 128, depth: int = 5, size: int = 16, images: int = 16) -> Made:
    """`depth` convolutions 3 x 3 of `channels`, and ten classes."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    hidden = [layers.Conv2D(channels, 3, padding="same", activation="relu") for _ in range(depth)]
    pooled = [layers.GlobalAveragePooling2D(), layers.Dense(10)]
    model = keras.Sequential([keras.Input((size, size, channels)), *hidden, *pooled])
    rng = np.random.default_rng(0)
    return model, (rng.standard_normal((images, size, size, channels), np.float32), rng.integers(0, 10, images))


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": make_mlp,
    "transformer": make_transformer,
    "convolutional": make_convolutional,
    "wide": lambda: make_mlp(3072, 6, 256),
    "small": lambda: make_mlp(16, 2, 8),
}
CELLS = ("entries 0.01", "entries 0.1", "entries 0.3", "rows 0.1", "columns 0.1")
TARGETS = {
    "mlp": ((0.64, 0.64), (0.70, 0.70), (0.80, 0.82), (0.65, 0.65), (0.67, 0.67)),
    "transformer": ((0.72, 0.73), (0.78, 0.79), (0.88, 0.90), (0.72, 0.73), (0.72, 0.73)),
    "convolutional": (None, None, None, (0.72, 0.74), (0.74, 0.76)),
}
"""Time of a step that skips / time of an unmasked one, at most, by model and cell, without XLA and with it."""
MEMORY_TARGET = 0.30
"""Memory above what was resident before `fit` / that of the unmasked training, at most: `wide`, entries 0.01."""


def mask_of(variable: keras.Variable, kind: str, share: float, rng: np.random.Generator) -> np.ndarray | None:
    """The mask of a variable, which broadcasts; `None` where it is not masked."""
    shape = tuple(variable.shape)
    if "embedding" in variable.path:
        return np.arange(shape[0])[:, None] < share * shape[0]
    if len(shape) < 2:
        return None
    if kind == "entries":
        return rng.random(shape, np.float32) < share
    axis = len(shape) - 1 if kind == "columns" else max(len(shape) - 2, 0) if len(shape) == 4 else 0
    some = np.zeros(shape[axis], bool)
    some[rng.permutation(shape[axis])[: max(1, round(share * shape[axis]))]] = True
    return some.reshape([-1 if i == axis else 1 for i in range(len(shape))])


class BatchTimes(keras.callbacks.Callback):
    """Seconds of each batch: by the clock, and of the process's CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._start = 0.0, 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


class Training:
    """A compiled model in one of the three ways.

    Args:
        way: `UNMASKED`, `WHOLE` or `PART`.
        model: The name of a model.
        cell: Kind and share of the masks, such as `"rows 0.1"`.
        jit: Whether XLA compiles its step.
    """

    def __init__(self, way: str, model: str, cell: str, jit: bool):
        self.model, batch = MODELS[model]()
        optimizer: keras.optimizers.Optimizer = keras.optimizers.Adam(1e-4)
        if way != UNMASKED:
            kind, share = cell.split()
            rng = np.random.default_rng(1)
            masks = {v.path: mask_of(v, kind, float(share), rng) for v in self.model.trainable_variables}
            masks = {path: mask for path, mask in masks.items() if mask is not None}
            optimizer = fz.MaskedOptimizer(optimizer, masks=masks, state="compact", skip_frozen_gradients=way == PART)
        self.optimizer = optimizer
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer, loss, jit_compile=jit)
        self._data = tf.data.Dataset.from_tensors(batch).repeat()
        self.cpu: list[float] = []

    def fit(self, batches: int) -> BatchTimes:
        times = BatchTimes()
        self.model.fit(self._data, steps_per_epoch=batches, verbose=0, shuffle=False, callbacks=[times])
        return times

    def batch(self) -> float:
        """Seconds of a batch, the fastest of a few; keeps the least CPU time as well."""
        times = self.fit(1 + TIMED_BATCHES)
        self.cpu.append(min(times.cpu[1:]))
        return min(times.wall[1:])

    def whole(self) -> list[str]:
        """Variables in compact state of which whole gradients are made."""
        reports = self.optimizer.describe() if isinstance(self.optimizer, fz.MaskedOptimizer) else []
        return [f"{r.path}: {r.gradient_reason}" for r in reports if r.mode == "compact" and r.gradient == "whole"]


def measure(model: str, cell: str, jit: bool, repeats: int) -> dict[str, Any]:
    """Times one cell."""
    gc.collect()
    trainings = {way: Training(way, model, cell, jit) for way in (UNMASKED, WHOLE, PART)}
    competitors = {way: [training.batch] for way, training in trainings.items()}
    rounds = _common.interleaved(competitors, repeats, warmup=1, clock=lambda run: run(), patience=2)
    cpu = {way: np.array(training.cpu[1:]) for way, training in trainings.items()}
    index = CELLS.index(cell) if cell in CELLS else None
    targets = TARGETS[model][index] if model in TARGETS and index is not None else None
    return {
        "model": model,
        "cell": cell,
        "jit": jit,
        "parameters": trainings[PART].model.count_params(),
        "disturbed": rounds.disturbed,
        "times": rounds.times(),
        "ratio": rounds.ratio(PART, UNMASKED),
        "cpu_ratio": float(np.median(cpu[PART] / cpu[UNMASKED])),
        "whole_ratio": rounds.ratio(WHOLE, UNMASKED),
        "target": None if targets is None else targets[int(jit)],
        "whole": trainings[PART].whole(),
    }


def memory(way: str, model: str, cell: str, jit: bool) -> float:
    """Bytes above what is resident before `fit`, at most, in a process of its own."""
    training = Training(way, model, cell, jit)
    if isinstance(training.optimizer, fz.MaskedOptimizer):
        training.optimizer.build(training.model.trainable_variables)
    gc.collect()
    _common.forget_peak_memory()
    before = _common.peak_memory()
    training.fit(4)
    return _common.peak_memory() - before


def table_of(results: Sequence[dict[str, Any]]) -> Table:
    """The table of all cells."""
    columns = ["model", "masks", "jit", "unmasked ms", "whole ms", "part ms"]
    columns += ["whole / unmasked", "part / unmasked", "CPU", "target"]
    table = _common.table("A step of fit, Adam, float32", columns)
    for result in results:
        medians = [f"{result['times'][way]['median_ms']:.1f}" for way in (UNMASKED, WHOLE, PART)]
        table.add_row(
            result["model"],
            result["cell"],
            "on" if result["jit"] else "off",
            *medians,
            f"{result['whole_ratio']:.3f}",
            _common.mark(f"{result['ratio']:.3f}", result["disturbed"]),
            f"{result['cpu_ratio']:.3f}",
            _common.verdict(result["ratio"], result["target"]),
        )
    return table


def memory_table(results: Sequence[dict[str, Any]]) -> Table:
    """The table of peak memory."""
    table = _common.table(
        "Peak memory above what was resident before fit, MB", ["way", "jit", "MB", "/ unmasked", "target"]
    )
    for result in results:
        table.add_row(
            result["way"],
            "on" if result["jit"] else "off",
            f"{result['bytes'] / 1e6:.0f}",
            f"{result['ratio']:.2f}",
            _common.verdict(result["ratio"], MEMORY_TARGET if result["way"] == PART and not result["jit"] else None),
        )
    return table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=12, size=False)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["mlp", "transformer", "convolutional"])
    parser.add_argument("--mask", nargs="+", default=list(CELLS), help="kind and share, such as 'rows 0.1'")
    parser.add_argument("--jit", choices=["on", "off", "both"], default="both")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--memory-of", nargs=4, metavar=("WAY", "MODEL", "MASK", "JIT"), help="print that alone")
    options = parser.parse_args(arguments)
    if options.memory_of:
        way, model, cell, jit = options.memory_of
        print(memory(way, model, cell, jit == "on"))
        return {}
    jits = {"on": [True], "off": [False], "both": [False, True]}[options.jit]
    results = []
    for model in options.model:
        for cell in options.mask:
            if model == "convolutional" and cell.startswith("entries"):
                continue  # single entries of filters are made with the whole
            results += [measure(model, cell, jit, _common.repeats_of(options)) for jit in jits]
    tables = [table_of(results)]
    peaks = []
    if not options.no_memory:
        for jit in jits:
            of_unmasked = 0.0
            for way in (UNMASKED, WHOLE, PART):
                command = "--memory-of", way, "wide", "entries 0.01", "on" if jit else "off"
                used = float(_common.in_fresh_process(__file__, *command))
                of_unmasked = of_unmasked or used
                peaks.append({"way": way, "jit": jit, "bytes": used, "ratio": used / of_unmasked})
        tables.append(memory_table(peaks))
    notes = [
        f"{each['model']}, {each['cell']}: whole gradients of {each['whole']}" for each in results if each["whole"]
    ]
    notes += ["Masks: kind and share of trainable entries. Memory: 6 x Dense(3072), entries 0.01.", _common.MARK_NOTE]
    data = {"benchmark": "backward", "results": results, "memory": peaks}
    _common.report(tables, notes, data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
