"""Code in Markdown files and in docstrings: where it stands, and the names that it is run with."""

import ast
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import freezeops as fz

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    code: str

    @property
    def first_line(self) -> str:
        return self.code.strip().splitlines()[0]


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text, without their indentation."""
    return [
        Block(language, "\n".join(line.removeprefix(indent) for line in code.splitlines()) + "\n")
        for indent, language, code in FENCE.findall(text)
    ]


def docstrings() -> Iterator[tuple[str, str, int]]:
    """The name, text and first line of every docstring in the package: `freezeops/masks/mask.py:Mask.rows`."""
    for path in sorted((ROOT / "freezeops").rglob("*.py")):
        yield from _docstrings_in(ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT)) + ":")


def _docstrings_in(node: ast.AST, name: str) -> Iterator[tuple[str, str, int]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
        yield name.strip("."), text, node.body[0].lineno
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            separator = "" if name.endswith(":") else "."
            yield from _docstrings_in(child, f"{name}{separator}{child.name}")


def usual_names() -> dict[str, Any]:
    """The modules that every example has, by the names that the docs use for them."""
    return {"fz": fz, "tf": tf, "keras": keras, "np": np}


def compiled_model(module: Any = keras, body: str = "body", **wrapping: Any) -> dict[str, Any]:
    """A model as the docs speak of it, with its optimizer, and data for it.

    Args:
        module: Keras or tf_keras, whose model is not compiled.
        body: Name of the first dense layer.
        wrapping: Arguments of `MaskedOptimizer`.
    """
    layers = module.layers
    embedding = layers.Embedding(60_000, 2, name="embedding")
    bn = layers.BatchNormalization(name="bn")
    dense, head = layers.Dense(32, activation="relu", name=body), layers.Dense(4, "softmax", name="head")
    model = module.Sequential([module.Input((3,)), embedding, layers.Flatten(), dense, bn, head])
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 60_000, (32, 3)), rng.integers(0, 4, 32)
    names = {"model": model, "x": x, "y": y, "loss": "sparse_categorical_crossentropy", "embedding": embedding}
    if module is keras:
        names["optimizer"] = fz.MaskedOptimizer(keras.optimizers.Adam(1e-3), **wrapping)
        model.compile(names["optimizer"], names["loss"], jit_compile=False)
    return names


def built_model(**wrapping: Any) -> dict[str, Any]:
    """`compiled_model`, whose optimizer is built, too."""
    names = compiled_model(**wrapping)
    names["optimizer"].build(names["model"].trainable_variables)
    return names


def model_of_tf_keras() -> dict[str, Any]:
    """`compiled_model` of tf_keras, to be compiled by the example."""
    import pytest

    return compiled_model(pytest.importorskip("tf_keras"))


def own_adam() -> dict[str, Any]:
    """An optimizer of the user's own, with Adam's slots."""

    class MyAdam(keras.optimizers.Adam):
        pass

    return {"MyAdam": MyAdam}


def task_of_keras_hub() -> dict[str, Any]:
    """In place of keras_hub: a saved task that comes back with an optimizer of its own."""
    saved = built_model()
    saved["optimizer"].freeze("body/kernel", 0)
    Path("saved").mkdir()
    saved["model"].save_weights("saved/task.weights.h5")

    def from_preset(path):
        assert Path(path).is_dir()
        model = compiled_model()["model"]
        model.compile(keras.optimizers.Adam(), saved["loss"])
        return model

    classifier = types.SimpleNamespace(from_preset=from_preset)
    return {"keras_hub": types.SimpleNamespace(models=types.SimpleNamespace(TextClassifier=classifier))} | saved


def run(code: str, set_up: Callable[[], dict[str, Any]], more: str = "") -> dict[str, Any]:
    """Runs an example with the usual names and those of its set-up, and what checks it; returns all names."""
    names = usual_names() | set_up()
    exec(compile(code, "<example>", "exec"), names)
    exec(more, names)
    return names
