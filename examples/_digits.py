"""What the examples share: the data, the network, and the comparison of bits.

The data is scikit-learn's copy of the UCI handwritten digits (1797 images of 8 x 8
pixels), which comes inside its package: no example downloads anything.
"""

import os

# Hides TensorFlow's start-up notes, such as the one about a missing GPU; errors still raise.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import keras
import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf
from rich.console import Console
from rich.table import Table

OLD_DIGITS = range(5)
NEW_DIGITS = range(5, 10)
BATCH_SIZE = 16


class Images(NamedTuple):
    """Images `x`, shape `(n, 8, 8, 1)`, float32 from 0 to 1, and their digits `y`, shape `(n,)`."""

    x: np.ndarray
    y: np.ndarray


def load(digits: Iterable[int] = range(10)) -> tuple[Images, Images]:
    """Training and test images of the given digits; the split is the same at every call."""
    data = sklearn.datasets.load_digits()
    x = (data.images / 16.0).astype("float32")[..., np.newaxis]
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        x, data.target, test_size=0.3, stratify=data.target, random_state=0
    )

    def only(x: np.ndarray, y: np.ndarray) -> Images:
        wanted = np.isin(y, list(digits))
        return Images(x[wanted], y[wanted])

    return only(train_x, train_y), only(test_x, test_y)


def make_model(cls: type[keras.Sequential] = keras.Sequential) -> keras.Sequential:
    """A small convolutional network, 38 282 weights, ten outputs (logits).

    It has no layer with moving statistics: a mask on weights would not stop those.

    Args:
        cls: `keras.Sequential` or a subclass with a `train_step` of its own.
    """
    layers = keras.layers
    return cls(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu", name="conv_1"),
            layers.Conv2D(32, 3, padding="same", activation="relu", name="conv_2"),
            layers.MaxPooling2D(name="pool"),
            layers.Flatten(name="flatten"),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dense(10, name="digits"),
        ]
    )


def compile_model(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Compiles with the one loss that every example uses."""
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))


def fit(model: keras.Model, images: Images, epochs: int, **kwargs: Any) -> None:
    """`model.fit` without a word."""
    model.fit(images.x, images.y, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, **kwargs)


def probabilities(model: keras.Model, images: Images) -> np.ndarray:
    """What the model gives each of the ten digits, shape `(n, 10)`."""
    return tf.nn.softmax(model(images.x, training=False)).numpy()


def accuracy(model: keras.Model, images: Images) -> float:
    """Share of the images whose most probable digit, out of all ten, is the right one."""
    return float(np.mean(probabilities(model, images).argmax(axis=1) == images.y))


@lru_cache(maxsize=1)
def pretrained_weights() -> tuple[np.ndarray, ...]:
    """Weights of a network that has learned digits 0-4: where the short examples start."""
    keras.utils.set_random_seed(0)
    model = make_model()
    compile_model(model, keras.optimizers.Adam(2e-3))
    fit(model, load(OLD_DIGITS)[0], epochs=5)
    return tuple(model.get_weights())


def pretrained_model(cls: type[keras.Sequential] = keras.Sequential) -> keras.Sequential:
    """A new network with `pretrained_weights`; the seed is set, so that all ways see one order."""
    weights = pretrained_weights()
    model = make_model(cls)
    model.set_weights(list(weights))
    keras.utils.set_random_seed(1)
    return model


class MultipliedGradients(keras.Sequential):
    """The usual recipe, for comparison: `fit` with every gradient multiplied by its mask.

    Attributes:
        masks: One array per trainable variable, of its shape: 1 = trainable, 0 = frozen.
    """

    masks: Sequence[np.ndarray] = ()

    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Keras's own step but for the multiplication."""
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        masked = [g * tf.cast(m, g.dtype) for g, m in zip(gradients, self.masks, strict=True)]
        self.optimizer.apply_gradients(zip(masked, self.trainable_variables, strict=True))
        return {"loss": loss}


def count_changed(before: np.ndarray, after: np.ndarray, where: np.ndarray | None = None) -> int:
    """Number of float32 entries whose bits differ.

    Compared as integers: as floats, -0.0 equals 0.0 and a NaN differs from itself.

    Args:
        before: float32 values.
        after: float32 values of the same shape.
        where: Boolean array of the same shape, True = count this entry; all by default.
    """
    differ = before.view(np.uint32) != after.view(np.uint32)
    return int(np.count_nonzero(differ if where is None else differ & where))


@dataclass(frozen=True)
class Result:
    """What one way of freezing came to.

    Attributes:
        frozen: Entries that should have stayed.
        changed: Those of them whose bits did not.
        trained: Trainable entries whose bits changed: proof that something was learned.
        accuracy: On the test images of all ten digits, afterwards.
    """

    frozen: int
    changed: int
    trained: int
    accuracy: float


def judge(model: keras.Model, before: Sequence[np.ndarray], frozen: Sequence[np.ndarray]) -> Result:
    """Compares a trained model with what it was.

    Args:
        model: The model after training.
        before: Its weights before, as `model.get_weights()` orders them.
        frozen: One boolean array per weight, of its shape: True = should have stayed.
    """
    triples = list(zip(before, model.get_weights(), frozen, strict=True))
    return Result(
        frozen=sum(int(np.count_nonzero(f)) for _, _, f in triples),
        changed=sum(count_changed(b, a, f) for b, a, f in triples),
        trained=sum(count_changed(b, a, ~f) for b, a, f in triples),
        accuracy=accuracy(model, load()[1]),
    )


def frozen_variables(model: keras.Model, chosen: Iterable[keras.Variable]) -> list[np.ndarray]:
    """`judge`'s `frozen` for variables that are frozen whole."""
    paths = {variable.path for variable in chosen}
    return [np.full(weight.shape, weight.path in paths) for weight in model.weights]


def show(title: str, results: dict[str, Result]) -> dict[str, dict[str, Any]]:
    """Prints the results as a table and returns them as plain figures."""
    table = Table(title=title, title_justify="left")
    table.add_column("way", no_wrap=True)
    for heading in ("frozen: changed", "trained", "accuracy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for way, result in results.items():
        changed = f"{result.changed} of {result.frozen}"
        style = "bold red" if result.changed else "green"
        table.add_row(way, f"[{style}]{changed}[/]", str(result.trained), f"{result.accuracy:.1%}")
    Console().print(table)
    return {way: asdict(result) for way, result in results.items()}
