"""What several tests need: comparison by bits, and the table of optimizers."""

import inspect
from collections.abc import Callable, Iterator

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


_O = keras.optimizers

SETUPS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "SGD": lambda **k: _O.SGD(0.1, **k),
    "SGD momentum": lambda **k: _O.SGD(0.1, momentum=0.9, **k),
    "SGD nesterov": lambda **k: _O.SGD(0.1, momentum=0.9, nesterov=True, **k),
    "RMSprop": lambda **k: _O.RMSprop(0.01, **k),
    "RMSprop momentum centered": lambda **k: _O.RMSprop(0.01, momentum=0.9, centered=True, **k),
    "Adam": lambda **k: _O.Adam(0.01, **k),
    "Adam amsgrad": lambda **k: _O.Adam(0.01, amsgrad=True, **k),
    "AdamW": lambda **k: _O.AdamW(0.01, **k),
    "Adamax": lambda **k: _O.Adamax(0.01, **k),
    "Nadam": lambda **k: _O.Nadam(0.01, **k),
    "Adagrad": lambda **k: _O.Adagrad(0.1, **k),
    "Adadelta": lambda **k: _O.Adadelta(1.0, **k),
    "Adafactor": lambda **k: _O.Adafactor(0.01, **k),
    "Ftrl": lambda **k: _O.Ftrl(0.1, **k),
    "Lion": lambda **k: _O.Lion(0.01, **k),
    "Lamb": lambda **k: _O.Lamb(0.01, **k),
    "Muon": lambda **k: _O.Muon(0.01, **k),
    "ScheduleFreeAdamW": lambda **k: _O.ScheduleFreeAdamW(0.01, **k),
}
"""Every optimizer class of `keras.optimizers`, with its variants."""

# Older versions of Keras lack some, and their own Muon fails on the TensorFlow variables that it is given.
SETUPS = {name: setup for name, setup in SETUPS.items() if hasattr(_O, name.split()[0])}
if not hasattr(_O, "ScheduleFreeAdamW"):
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
NOT_IN_TABLE = {name: why for name, why in NOT_IN_TABLE.items() if hasattr(_O, name)}

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
