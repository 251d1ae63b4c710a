"""Tells optimizers that run Keras's own code from those that may write anything."""

from typing import Any

import keras

from freezeops.keras_compat.hooks import _UPDATES, _behind_hooks
from freezeops.keras_compat.wrapped import _MULTI_OPTIMIZER, _wraps, base_optimizers, wrapped_optimizers


def replaced_methods(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Returns the names of an optimizer's methods that somebody replaced.

    Any on the instance; those of a step on the class, too.
    """
    cls = type(optimizer)
    on_instance = [
        name
        for name, value in vars(optimizer).items()
        if callable(value) and callable(getattr(cls, name, None)) and not _is_from("freezeops.", _behind_hooks(value))
    ]
    in_a_step = [getattr(cls, name, None) for name in ("apply_gradients", "apply", "update_step", *_UPDATES)]
    return on_instance + [
        method.__name__ for method in in_a_step if callable(method) and not _is_from(("keras.", "tf_keras."), method)
    ]


def _is_from(package: str | tuple[str, ...], function: Any) -> bool:
    """Returns `True` if a function was defined in a package (one of several) and wraps no other function."""
    own = (getattr(function, "__module__", None) or "").startswith(package)
    return own and not hasattr(function, "__wrapped__")


def unknown_wrappers(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Returns the wrappers of a class other than Keras's own, which may do more: write variables, for example."""
    known = keras.optimizers.LossScaleOptimizer, _MULTI_OPTIMIZER
    return [part for part in wrapped_optimizers(optimizer) if _wraps(part) and type(part) not in known]


def writes_only_given(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns `True` if a step writes no variables but those that it is given with a gradient.

    So it is for Keras's own optimizers, unless they put averages into all variables now and then. Any other may write
    whatever it was built with.
    """
    return (
        not unknown_wrappers(optimizer)
        and not any(map(replaced_methods, wrapped_optimizers(optimizer)))
        and all(
            type(base) is getattr(keras.optimizers, type(base).__name__, None)
            and not (base.use_ema and base.ema_overwrite_frequency)
            for base in base_optimizers(optimizer)
        )
    )
