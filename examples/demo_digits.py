"""The main job: a network learns five new digits and keeps the five old ones, bit for bit.

The recipe is PackNet's (arXiv 1711.05769), on scikit-learn's handwritten digits:

1. a small convolutional network learns digits 0-4;
2. in every layer the 40 % of the kernel's entries with the largest magnitude are kept;
   the others are set to zero, frozen there, and the kept ones are trained a little more;
3. the kept entries are frozen, single entries all over every kernel, and the others,
   starting from zero, learn digits 5-9 with AdamW.

Whoever wants the old network back sets the entries that were not frozen to zero: what
is left must be the network of step 2, so it must know the old digits exactly as well
as before. Biases are too few to share out: as in PackNet they are learned with the
first digits and frozen whole. All ten outputs take part throughout, so an old digit
may be mistaken for a new one.

Step 3 then runs a second time, from the same weights, the same AdamW moments and in the
same order of images, with the gradients multiplied by the mask instead. There weight
decay shrinks what should be frozen, by 1 - learning rate * weight decay at every step,
and the moments of step 2 push it for a few steps more. Digits are easy enough that a
shrunken network still gives nearly every right answer; how sure it is of them shows
what became of it, so the demo measures both. The learning rate and weight decay are
those of ViT on ImageNet (arXiv 2010.11929, table 3).

Usage: python examples/demo_digits.py [--output demo.png] [--seed 0] [--epochs 20]

Exit status 0 if every frozen entry kept its bits, 1 if not.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import _digits as digits
import keras
import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import freezeops as fz
from freezeops import ops

OUTPUT = Path(__file__).parent / "output" / "demo_digits.png"
KEPT = 0.4
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.3

COLOURS = {"freezeops": "#0072b2", "gradient * mask": "#d55e00"}
WIDTHS = {"freezeops": 5.0, "gradient * mask": 1.8}  # the thin line shows on top of the wide one

Arrays = list[np.ndarray]


@dataclass(frozen=True)
class Start:
    """Where step 3 starts, for either way of freezing.

    Attributes:
        weights: One array per variable.
        frozen: One boolean array per variable, of its shape: True = must stay.
        slots: What AdamW has gathered so far, in the order of its `variables`.
    """

    weights: Arrays
    frozen: Arrays
    slots: Arrays


@dataclass
class Run:
    """What step 3 came to.

    Attributes:
        weights: One array per variable, afterwards.
        old_accuracy: On old test digits with the frozen entries only, before the first
            epoch and after each.
        old_certainty: Likewise, the mean probability given to the right digit.
        new_accuracy: On new test digits with all entries.
    """

    weights: Arrays = field(default_factory=list)
    old_accuracy: list[float] = field(default_factory=list)
    old_certainty: list[float] = field(default_factory=list)
    new_accuracy: list[float] = field(default_factory=list)


class Watch(keras.callbacks.Callback):
    """Writes down before the first epoch and after each how well a run does.

    The old digits are put to a second network, which gets the frozen entries only, so
    that watching never touches the one in training.
    """

    def __init__(self, run: Run, frozen: Arrays):
        super().__init__()
        self.run, self.frozen = run, frozen
        self.old_network = digits.make_model()
        self.old_test = digits.load(digits.OLD_DIGITS)[1]
        self.new_test = digits.load(digits.NEW_DIGITS)[1]

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Measures the start."""
        self._measure()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Measures what the epoch made of it."""
        self._measure()

    def _measure(self) -> None:
        weights = self.model.get_weights()
        self.old_network.set_weights([np.where(kept, w, 0) for kept, w in zip(self.frozen, weights, strict=True)])
        given = digits.probabilities(self.old_network, self.old_test)
        right = self.old_test.y
        self.run.old_accuracy.append(float(np.mean(given.argmax(axis=1) == right)))
        self.run.old_certainty.append(float(np.mean(given[np.arange(len(right)), right])))
        self.run.new_accuracy.append(digits.accuracy(self.model, self.new_test))


class Progress(keras.callbacks.Callback):
    """Moves the bar by one at the end of every epoch."""

    def __init__(self, bar: tqdm):
        super().__init__()
        self.bar = bar

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Moves the bar."""
        self.bar.update()


def strongest(values: np.ndarray) -> np.ndarray:
    """True for the `KEPT` share of the entries with the largest magnitude."""
    order = np.argsort(np.abs(values), axis=None)[::-1]
    chosen = np.zeros(values.size, bool)
    chosen[order[: round(KEPT * values.size)]] = True
    return chosen.reshape(values.shape)


def learn_and_prune(model: keras.Model, optimizer: fz.MaskedOptimizer, epochs: int, bar: tqdm) -> tuple[Start, int]:
    """Steps 1 and 2, which prune `model` and leave its kept entries frozen in `optimizer`.

    Returns:
        Where step 3 starts, and how many of the pruned entries did not stay at zero.
    """
    train = digits.load(digits.OLD_DIGITS)[0]
    bar.set_description("digits 0-4: learn")
    digits.compile_model(model, optimizer)
    digits.fit(model, train, epochs, callbacks=[Progress(bar)])

    bar.set_description("digits 0-4: prune, train on")
    frozen = []
    for variable in model.trainable_variables:
        values = variable.numpy()
        is_bias = values.ndim == 1
        kept = np.ones(values.shape, bool) if is_bias else strongest(values)
        variable.assign(np.where(kept, values, 0))
        optimizer.freeze(variable, ~kept)
        frozen.append(kept)
    pruned = model.get_weights()
    digits.fit(model, train, retraining(epochs), callbacks=[Progress(bar)])
    weights = model.get_weights()
    moved = sum(
        digits.count_changed(before, after, ~kept) for before, after, kept in zip(pruned, weights, frozen, strict=True)
    )

    for variable, kept in zip(model.trainable_variables, frozen, strict=True):
        optimizer.train_only(variable, ~kept)
    slots = [slot.numpy() for slot in optimizer.inner_optimizer.variables]
    return Start(weights, frozen, slots), moved


def retraining(epochs: int) -> int:
    """Epochs that the pruned network gets on the old digits."""
    return max(1, epochs // 2)


def learn_new_digits(model: keras.Model, start: Start, epochs: int, seed: int, bar: tqdm) -> Run:
    """Step 3, with a compiled model; the seed gives every run the same order of images."""
    run = Run()
    keras.utils.set_random_seed(seed)
    callbacks = [Watch(run, start.frozen), Progress(bar)]
    digits.fit(model, digits.load(digits.NEW_DIGITS)[0], epochs, callbacks=callbacks)
    run.weights = model.get_weights()
    return run


def with_multiplied_gradients(start: Start) -> keras.Model:
    """A model at `start` whose gradients are multiplied by the mask, with an AdamW at `start`."""
    model = digits.make_model(digits.MultipliedGradients)
    model.set_weights(start.weights)
    model.masks = [~frozen for frozen in start.frozen]
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer.build(model.trainable_variables)
    for variable, value in zip(optimizer.variables, start.slots, strict=True):
        variable.assign(value)
    digits.compile_model(model, optimizer)
    return model


def figures(start: Start, run: Run) -> dict[str, float]:
    """A run in numbers; `largest_move` is of frozen entries."""
    triples = list(zip(start.weights, run.weights, start.frozen, strict=True))
    return {
        "frozen": sum(int(np.count_nonzero(f)) for _, _, f in triples),
        "changed": sum(digits.count_changed(b, a, f) for b, a, f in triples),
        "largest_move": max(float(np.abs(a - b)[f].max()) for b, a, f in triples),
        "old_accuracy_before": run.old_accuracy[0],
        "old_accuracy_after": run.old_accuracy[-1],
        "old_certainty_before": run.old_certainty[0],
        "old_certainty_after": run.old_certainty[-1],
        "new_accuracy": run.new_accuracy[-1],
    }


def print_table(console: Console, results: dict[str, dict[str, float]]) -> None:
    """One column per way of freezing."""
    table = Table(
        title="After learning digits 5-9 on top of 0-4",
        title_justify="left",
        caption="frozen only: every other entry set to zero, before → after\n"
        "certainty: mean probability given to the right digit",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for way in results:
        table.add_column(way, justify="right", no_wrap=True)

    def row(label: str, text: Callable[[dict[str, float]], str]) -> None:
        table.add_row(label, *(text(result) for result in results.values()))

    def before_after(name: str) -> Callable[[dict[str, float]], str]:
        return lambda r: f"{r[name + '_before']:.1%} → {r[name + '_after']:.1%}"

    row("[bold]frozen entries that changed", lambda r: f"[bold]{r['changed']} of {r['frozen']}")
    row("largest move of a frozen entry", lambda r: f"{r['largest_move']:.2g}")
    row("old digits, frozen only: accuracy", before_after("old_accuracy"))
    row("old digits, frozen only: certainty", before_after("old_certainty"))
    row("new digits, all entries: accuracy", lambda r: f"{r['new_accuracy']:.1%}")
    console.print(table)


def plot_epochs(axes: Axes, title: str, lines: dict[str, list[float]]) -> None:
    """One line per way of freezing, on an axis from 0 to 100 %."""
    for way, values in lines.items():
        label = f"{way}: {values[0]:.1%} → {values[-1]:.1%}"
        axes.plot(values, label=label, color=COLOURS[way], linewidth=WIDTHS[way])
        axes.set_xlim(0, len(values) - 1)
    axes.set(title=title, xlabel="epochs on the new digits", ylim=(0, 1.05))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_entries(axes: Axes, start: Start, runs: dict[str, Run]) -> None:
    """Every frozen entry: its value after step 3 over its value before."""

    def frozen_of(weights: Arrays) -> np.ndarray:
        return np.concatenate([w[f] for w, f in zip(weights, start.frozen, strict=True)])

    before = frozen_of(start.weights)
    for way, run in runs.items():
        after = frozen_of(run.weights)
        label = f"{way}: {digits.count_changed(before, after)} changed"
        axes.plot(before, after, ".", label=label, color=COLOURS[way], markersize=3)
    axes.set(
        title=f"The {before.size} frozen entries",
        xlabel="value before",
        ylabel="value after",
        aspect="equal",
    )


def save_picture(path: Path, start: Start, runs: dict[str, Run]) -> None:
    """Draws four panels: the old digits twice, the frozen entries, the new digits."""
    figure = Figure(figsize=(11, 9.5), layout="constrained")
    figure.suptitle(
        "A network that knows digits 0-4 learns 5-9 "
        f"while the strongest {KEPT:.0%} of every kernel and all biases are frozen"
    )
    panels = figure.subplots(2, 2)
    for axes, title, name in (
        (panels[0, 0], "Old digits, frozen entries only: accuracy", "old_accuracy"),
        (
            panels[0, 1],
            "Old digits, frozen entries only:\nmean probability given to the right digit",
            "old_certainty",
        ),
        (panels[1, 1], "New digits, all entries: accuracy", "new_accuracy"),
    ):
        plot_epochs(axes, title, {way: getattr(run, name) for way, run in runs.items()})
    plot_entries(panels[1, 0], start, runs)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for axes, place in zip(panels.flat, ("lower left", "lower left", "lower right", "lower right"), strict=True):
        axes.legend(loc=place, markerscale=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def run_demo(output: Path, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Runs all steps, prints the table and writes the picture.

    Args:
        output: The PNG to write.
        seed: For the weights and the order of images.
        epochs: On the old digits and again on the new ones; half as many after pruning.

    Returns:
        `figures` by way of freezing; `"freezeops"` also has `pruned_changed`, the number
        of pruned entries that did not stay at zero in step 2.
    """
    console = Console()
    began = time.perf_counter()
    devices = sorted({device.device_type for device in tf.config.list_logical_devices()})
    console.print(f"freezeops {fz.__version__} on {', '.join(devices)}", highlight=False)
    for path in sorted(set(ops.paths().values())):
        names = ", ".join(name for name, taken in ops.paths().items() if taken == path)
        console.print(f"  {path}: {names}", highlight=False)

    keras.utils.set_random_seed(seed)
    model = digits.make_model()
    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY))
    total = 3 * epochs + retraining(epochs)
    with tqdm(total=total, unit="epoch", mininterval=1.0) as bar:
        start, pruned_changed = learn_and_prune(model, optimizer, epochs, bar)
        bar.set_description("digits 5-9: freezeops")
        ours = learn_new_digits(model, start, epochs, seed, bar)
        bar.set_description("digits 5-9: gradient * mask")
        theirs = learn_new_digits(with_multiplied_gradients(start), start, epochs, seed, bar)
        bar.set_description("done")

    results = {
        "freezeops": figures(start, ours) | {"pruned_changed": pruned_changed},
        "gradient * mask": figures(start, theirs),
    }
    print_table(console, results)
    save_picture(output, start, {"freezeops": ours, "gradient * mask": theirs})
    console.print(f"Picture: {output}. Took {time.perf_counter() - began:.0f} s.", highlight=False)
    return results


def kept_promise(ours: dict[str, float]) -> bool:
    """Whether nothing that was frozen moved, and the old digits are known exactly as before."""
    return (
        ours["changed"] == 0
        and ours["pruned_changed"] == 0
        and ours["old_accuracy_after"] == ours["old_accuracy_before"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Learn new digits without touching the old ones.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="PNG to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=20, help="on each half of the digits (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1. Received: {options.epochs}")
    ours = run_demo(options.output, options.seed, options.epochs)["freezeops"]
    if kept_promise(ours):
        return 0
    print("The promise is broken: a frozen entry changed.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
