"""A model's whole training step in `fit`: fused updates against the unmasked Keras optimizer.

The model is a small transformer for text with random weights (13.7 million parameters, an
embedding among them, whose gradient is sparse), trained on a made-up batch of 4 x 64 tokens.
Every trainable variable is masked at random, full state. `fit` is called for a few batches at a
time, unmasked and masked in turn, in another order every time; a callback times each
batch, the first of each call does not count. The ratio is the median over the rounds of
the ratio of both calls' fastest batches.

The update is a small part of a step, and the rest varies by more than that part on a machine with
other work. So the updates are timed alone too, with a batch's own gradients: their share of the unmasked
step, the ratio of the fused update to the unmasked one, and what ratio of whole steps follows
from both if nothing else differs.
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

OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "sgd_momentum": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(1e-4),
    "adamw": lambda: keras.optimizers.AdamW(1e-4),
    "nadam": lambda: keras.optimizers.Nadam(1e-4),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-4),
    "adagrad": lambda: keras.optimizers.Adagrad(1e-4),
    "lion": lambda: keras.optimizers.Lion(1e-4),
}
DENSITIES = (1.0, 0.5, 0.1, 0.01)
TARGETS = {False: 1.00, True: 1.02}
"""Time of a masked step / time of an unmasked one, at most, by `jit_compile`."""

BATCH, TOKENS, VOCABULARY = 4, 64, 4096
HEADS = 8
FEED_FORWARD = 4
"""How many times as wide as the model its middle layers are."""
UNMASKED, MASKED = "unmasked", "masked"
TIMED_BATCHES = 2
"""In each call of `fit`, after one that does not count."""


def make_model(width: int, blocks: int) -> keras.Model:
    """A transformer that predicts tokens, with random weights, the same each time."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    tokens = keras.Input([TOKENS], dtype="int32")
    x = layers.Embedding(VOCABULARY, width)(tokens)
    for _ in range(blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(HEADS, width // HEADS)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(FEED_FORWARD * width, activation="relu")(y)
        x = x + layers.Dense(width)(y)
    logits = layers.Dense(VOCABULARY)(layers.LayerNormalization()(x))
    return keras.Model(tokens, logits)


def make_batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and those to predict."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (BATCH, TOKENS + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


class BatchTimes(keras.callbacks.Callback):
    """The seconds of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class Training:
    """A compiled model, and what is timed of it.

    Args:
        optimizer: Its optimizer.
        jit: Whether XLA compiles its training step.
        width: Of the model.
        blocks: How many it has.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, jit: bool, width: int, blocks: int):
        self.optimizer = optimizer
        self.model = make_model(width, blocks)
        self.variables = self.model.trainable_variables
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(optimizer, loss, jit_compile=jit)
        x, y = make_batch()
        self._data = tf.data.Dataset.from_tensors((x, y)).repeat()
        with tf.GradientTape() as tape:
            value = loss(y, self.model(x, training=True))
        gradients = tape.gradient(value, [variable.value for variable in self.variables])

        @tf.function(jit_compile=jit, autograph=False)
        def update() -> None:
            optimizer.apply(gradients, self.variables)

        self._update = update

    def batch(self) -> float:
        """Seconds of a batch in `fit`, the fastest of a few."""
        times = BatchTimes()
        self.model.fit(self._data, steps_per_epoch=1 + TIMED_BATCHES, verbose=0, shuffle=False, callbacks=[times])
        return min(times.seconds[1:])

    def update(self) -> float:
        """Seconds of the optimizer's update alone."""
        return _common.timed(self._update)

    def mask(self, density: float) -> None:
        """Makes that share of each variable trainable, at random; nothing is traced anew."""
        rng = np.random.default_rng(0)
        for variable in self.variables:
            # Random numbers are below 1.
            self.optimizer.register_mask(variable, rng.random(variable.shape, np.float32) < density)


def measure(
    name: str, jit: bool, densities: Sequence[float], width: int, blocks: int, repeats: int
) -> list[dict[str, Any]]:
    """Times one optimizer at all densities."""
    gc.collect()
    inner = OPTIMIZERS[name]
    trainings = {
        UNMASKED: Training(inner(), jit, width, blocks),
        MASKED: Training(fz.MaskedOptimizer(inner(), fused=True), jit, width, blocks),
    }
    competitors = {each: [training.batch] for each, training in trainings.items()}
    competitors |= {f"{each} update": [training.update] for each, training in trainings.items()}
    results = []
    for density in densities:
        trainings[MASKED].mask(density)
        # Each says by itself how long it took. Little patience, because there are many cells.
        rounds = _common.interleaved(competitors, repeats, warmup=1, clock=lambda run: run(), patience=2)
        ratios = [a / b for a, b in zip(rounds.seconds[MASKED], rounds.seconds[UNMASKED], strict=True)]
        share = rounds.ratio(f"{UNMASKED} update", UNMASKED)
        update_ratio = rounds.ratio(f"{MASKED} update", f"{UNMASKED} update")
        results.append(
            {
                "optimizer": name,
                "jit": jit,
                "density": density,
                "parameters": trainings[MASKED].model.count_params(),
                "disturbed": rounds.disturbed,
                "times": rounds.times(),
                "ratio": rounds.ratio(MASKED, UNMASKED),
                "quartiles": list(np.quantile(ratios, [0.25, 0.75])),
                "target": TARGETS[jit],
                "share": share,
                "update_ratio": update_ratio,
                "expected": 1 - share + share * update_ratio,
            }
        )
    return results


def table_of(jit: bool, results: Sequence[dict[str, Any]]) -> Table:
    """The table of all optimizers, with XLA or without."""
    parameters = results[0]["parameters"] / 1e6
    title = f"A step of fit, {parameters:.1f} million parameters, jit {'on' if jit else 'off'}"
    columns = ["optimizer", "density", "unmasked ms", "fused ms", "ratio", "quartiles", "target"]
    columns += ["update's share", "its ratio", "expected"]
    table = _common.table(title, columns)
    for result in results:
        medians = {name: f"{times['median_ms']:.1f}" for name, times in result["times"].items()}
        low, high = result["quartiles"]
        table.add_row(
            result["optimizer"],
            f"{result['density']:g}",
            medians[UNMASKED],
            medians[MASKED],
            _common.mark(f"{result['ratio']:.3f}", result["disturbed"]),
            f"{low:.2f} to {high:.2f}",
            _common.verdict(result["ratio"], result["target"]),
            f"{result['share']:.0%}",
            f"{result['update_ratio']:.2f}",
            f"{result['expected']:.3f}",
        )
    return table


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = _common.parser(__doc__, repeats=6, size=False)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--jit", choices=["on", "off", "both"], default="both")
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--width", type=int, default=512, help=f"of the model, a multiple of {HEADS} (default: 512)")
    parser.add_argument("--blocks", type=int, default=3, help="of the model (default: 3)")
    options = parser.parse_args(arguments)
    if options.width < HEADS or options.width % HEADS:
        parser.error(f"argument --width: must be a multiple of {HEADS}. Received: {options.width}")
    repeats = _common.repeats_of(options)
    results = []
    tables = []
    for jit in {"on": [True], "off": [False], "both": [False, True]}[options.jit]:
        of_one = [
            result
            for name in options.optimizer
            for result in measure(name, jit, options.densities, options.width, options.blocks, repeats)
        ]
        results += of_one
        tables.append(table_of(jit, of_one))
    notes = [
        f"Batches of {BATCH} x {TOKENS} tokens. Density: trainable share of every variable, at random; full state.",
        "Ratio: median over the rounds of fused / unmasked, in turn; half of the rounds lie between the quartiles.",
        "Update: the optimizer alone, with a batch's gradients; its share of the unmasked step, and fused / unmasked.",
        "Expected: the ratio of whole steps that follows from both if nothing else differs.",
        _common.MARK_NOTE,
    ]
    data = {"benchmark": "fit", "batch": [BATCH, TOKENS], "results": results}
    _common.report(tables, notes, data, options.json)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
