"""Draws the way of a gradient through the package: `python docs/draw_step.py` writes docs/images/step.png.

One step of each kind runs under a profiler; what is drawn are the calls that cross from one folder of the package into
another, in the order in which they were made.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "freezeops"

FOLDERS = ("optimizer", "registry", "step", "partitions", "slots", "Keras", "ops")
"""The columns, from the user's side to the kernels."""

ASIDE = {
    "MaskRegistry.check_stated",
    "MaskRegistry.partitions",
    "TracedWrites.watch",
    "guarded",
    "masks_in_use",
    "check_lengths",
    "Step.__init__",
    "Partition.inner_variable",
    "CompactPartition.inner_variable",
    "dense_shape",
    "SlotBinding.seedings",
    "SlotBinding.averages",
    "known_of",
    "FusedStep.includes",
    "VariableSlots.seeded_among",
    "Seeding.scales",
    "Slot.power",
    "StepHook.includes",
}
"""Checks and questions that are off the way of a gradient."""

KINDS = {
    "full state, unfused": {"fused": False},
    "compact state, unfused": {"state": "compact", "fused": False},
    "full state, fused": {},
}


class Call(NamedTuple):
    """A call from one folder into another.

    Attributes:
        folder: The folder of the called function.
        name: Its name, with the class's.
        depth: How many drawn calls it lies in.
    """

    folder: str
    name: str
    depth: int


def folder_of(code: Any) -> str | None:
    """The column of a function's code; `None` where it is drawn nowhere."""
    path = Path(code.co_filename)
    if path.is_relative_to(PACKAGE):
        parts = path.relative_to(PACKAGE).parts
        name = parts[0].removesuffix(".py")
        return name if name in FOLDERS else None
    in_optimizers = "keras/src" in code.co_filename and "optimizer" in path.name
    return "Keras" if in_optimizers and code.co_name in ("apply", "update_step") else None


def calls_of_a_step(**options: Any) -> list[Call]:
    """The calls between folders in one eager step of a built optimizer, each the first time that it is made.

    Args:
        **options: Of `MaskedOptimizer`.
    """
    import keras
    import numpy as np
    import tensorflow as tf

    import freezeops as fz

    variable = keras.Variable(np.zeros((8, 8), "float32"), name="w")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), **options)
    optimizer.freeze(variable, np.eye(8, dtype=bool))
    gradient = tf.ones((8, 8))
    optimizer.apply([gradient], [variable])  # builds
    calls: list[Call] = []
    stack: list[tuple[Any, str | None]] = []
    seen: set[tuple[str, str]] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call":
            folder = folder_of(code)
            if folder is None or code.co_name.startswith("<"):
                return
            before = stack[-1][1] if stack else None
            name = code.co_qualname if hasattr(code, "co_qualname") else code.co_name
            name = name.rpartition("<locals>.")[2]
            if folder != before and (folder, name) not in seen:
                seen.add((folder, name))
                calls.append(Call(folder, name, len(stack)))
            stack.append((frame, folder))
        elif event == "return" and stack and stack[-1][0] is frame:
            stack.pop()

    sys.setprofile(profile)
    try:
        optimizer.apply([gradient], [variable])
    finally:
        sys.setprofile(None)
    return [call for call in calls if call.name not in ASIDE and not call.name.startswith("_")]


def draw(path: Path) -> None:
    """Draws a panel for each kind of step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {title: calls_of_a_step(**options) for title, options in KINDS.items()}
    heights = [len(calls) + 2 for calls in found.values()]
    figure, panels = pyplot.subplots(len(found), 1, figsize=(12, 0.36 * sum(heights)), height_ratios=heights)
    colors = pyplot.get_cmap("tab10")
    for axes, (title, calls) in zip(panels, found.items(), strict=True):
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xlim(-0.5, len(FOLDERS) - 0.2)
        axes.set_ylim(len(calls) - 0.5, -1.3)
        axes.axis("off")
        for column, folder in enumerate(FOLDERS):
            label = folder if folder in ("Keras", "optimizer") else f"{folder}/"
            axes.text(column, -1.0, label, ha="center", fontsize=10.5, color=colors(column), fontweight="bold")
            axes.plot([column, column], [-0.7, len(calls) - 0.6], color="0.92", linewidth=1, zorder=0)
        places = [(FOLDERS.index(call.folder), row) for row, call in enumerate(calls)]
        for start, end in itertools.pairwise(places):
            arrow = {"arrowstyle": "->", "color": "0.65", "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", end, start, arrowprops=arrow, zorder=1)
        for (column, row), call in zip(places, calls, strict=True):
            axes.plot(column, row, "o", color=colors(column), markersize=6, zorder=2)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.text(column + 0.06, row, call.name, va="center", fontsize=9.5, bbox=box, zorder=3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    draw(ROOT / "docs" / "images" / "step.png")
