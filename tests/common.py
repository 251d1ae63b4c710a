"""What several tests need: comparison by bits, and the table of optimizers."""

import functools
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import keras
import numpy as np

_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

MODES = ("eager", "function", "jit")


def bits(array) -> np.ndarray:
    """The array's entries as unsigned integers, so that NaN and -0.0 compare exactly."""
    array = np.ascontiguousarray(array)
    return array.view(_INTEGERS[array.dtype.itemsize])


def assert_same_bits(actual, expected, message: str = "") -> None:
    """Fails where two arrays differ in any bit."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    different = np.flatnonzero(bits(actual) != bits(expected))
    assert different.size == 0, (
        f"{message}: {different.size} of {actual.size} entries differ, first at "
        f"{different[:5]}: {actual.ravel()[different[:5]]} != {expected.ravel()[different[:5]]}"
    )


def in_mode(function: Callable, mode: str) -> Callable:
    """The function as it is, in a `tf.function`, or compiled by XLA."""
    import tensorflow as tf

    if mode == "eager":
        return function
    return tf.function(function, jit_compile=mode == "jit", autograph=False)


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"learning_rate": 0.1},
    "SGD momentum": {"learning_rate": 0.1, "momentum": 0.9},
    "SGD nesterov": {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"learning_rate": 0.01},
    "RMSprop momentum centered": {"learning_rate": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"learning_rate": 0.01},
    "Adam amsgrad": {"learning_rate": 0.01, "amsgrad": True},
    "AdamW": {"learning_rate": 0.01},
    "Adamax": {"learning_rate": 0.01},
    "Nadam": {"learning_rate": 0.01},
    "Adagrad": {"learning_rate": 0.1},
    "Adadelta": {"learning_rate": 1.0},
    "Adafactor": {"learning_rate": 0.01},
    "Ftrl": {"learning_rate": 0.1},
    "Lion": {"learning_rate": 0.01},
    "Lamb": {"learning_rate": 0.01},
    "Muon": {"learning_rate": 0.01},
    "ScheduleFreeAdamW": {"learning_rate": 0.01},
}
"""Every optimizer class of Keras, with its variants: arguments by the class's name and a word for the variant."""


def setups_of(optimizers: ModuleType) -> dict[str, Callable[..., Any]]:
    """Returns functions that make the optimizers above, with more arguments if wanted, by name.

    Args:
        optimizers: `keras.optimizers` or `tf_keras.optimizers`; of either, some classes are missing in some versions.
    """
    return {
        name: functools.partial(getattr(optimizers, name.split()[0]), **arguments)
        for name, arguments in _ARGUMENTS.items()
        if hasattr(optimizers, name.split()[0])
    }


SETUPS = setups_of(keras.optimizers)

if "ScheduleFreeAdamW" not in SETUPS:
    # Muon of older versions of Keras fails on the TensorFlow variables that it is given.
    SETUPS.pop("Muon", None)

FUSED = [name for name in SETUPS if name.split()[0] in ("SGD", "RMSprop", "Adam", "AdamW", "Nadam", "Adagrad", "Lion")]
"""Those that can be updated in one native pass."""

WAYS = [(name, fused) for name in SETUPS for fused in ((True, False) if name in FUSED else (True,))]
"""Each with `fused=True`; those for which that makes a difference without it, too."""

ROUNDED_OTHERWISE = ("RMSprop", "Adagrad")
"""In `tf.function` TensorFlow turns x / sqrt(y) into x * rsqrt(y), and its rsqrt is not rounded correctly."""

OPTIONS: dict[str, dict] = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "ema_overwrite": {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2},
    "clipnorm": {"clipnorm": 0.5},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.3},
    "accumulation": {"gradient_accumulation_steps": 2},
}

NOT_IN_TABLE = {
    "Optimizer": "the abstract base class: test_user_written_optimizer in test_optimizer.py",
    "LossScaleOptimizer": "a wrapper: test_loss_scale_optimizer_inside in test_optimizer.py",
    "MultiOptimizer": "a wrapper: test_multi_optimizer_inside in test_optimizer.py",
    "OptimizerMap": "MultiOptimizer's argument: test_multi_optimizer_inside",
}

if "Muon" not in SETUPS:
    NOT_IN_TABLE["Muon"] = "fails by itself in this Keras"
NOT_IN_TABLE = {name: why for name, why in NOT_IN_TABLE.items() if hasattr(keras.optimizers, name)}

MIXING = ("Lamb", "Adafactor", "Muon")
"""Optimizers whose update of an entry looks at other entries of its variable."""


def optimizer_classes() -> Iterator[str]:
    """The names of all classes in `keras.optimizers`."""
    for name, value in vars(keras.optimizers).items():
        if inspect.isclass(value):
            yield name


def mask_variables(optimizer):
    """The variables of an optimizer's masks, as TensorFlow tracks them for a SavedModel, by a key."""
    return optimizer._trackable_children("savedmodel")["_masks"]._trackable_children("savedmodel")


def waiting_mask(optimizer, shape):
    """The entries of the first variable, in full state, that wait to be seeded."""
    import freezeops as fz

    size = int(np.prod(shape))
    return fz.Mask(shape, (1, size, 1), mask_variables(optimizer)["unseeded 0"].numpy())
