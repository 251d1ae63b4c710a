"""Which optimizers update an entry by looking at that entry alone, so that compact state is right for them."""

from typing import TypeVar

import keras

from freezeops.keras_compat.wrapped import base_optimizers, is_multi_optimizer, optimizer_map, wrapped_optimizers
from freezeops.messages import short

_Class = TypeVar("_Class", bound=type)

_NAMES = (
    "SGD",
    "RMSprop",
    "Adam",
    "AdamW",
    "Adamax",
    "Adagrad",
    "Adadelta",
    "Nadam",
    "Lion",
    "Ftrl",
    "ScheduleFreeAdamW",
)

_ELEMENTWISE: set[type] = {getattr(keras.optimizers, name) for name in _NAMES if hasattr(keras.optimizers, name)}

_MIXING = {
    "Adafactor": "it keeps one second moment per row and column, and scales by the variable's norm",
    "Lamb": "it scales by the norms of the variable and of its update",
    "Muon": "it makes the update of a matrix orthogonal",
}


def declare_elementwise(optimizer_class: _Class) -> _Class:
    """Says that an optimizer's update of an entry looks at that entry, its gradient and its slots alone.

    Then `MaskedOptimizer(..., state="compact")` takes it. Clipping by a norm, which Keras
    does before, does not count. Slots must be made with `add_optimizer_variables` or
    `add_variable_from_reference`. Holds for the class itself, not for subclasses, which may
    do anything.

    Args:
        optimizer_class: A subclass of `keras.optimizers.Optimizer`.

    Returns:
        The class: this may be used as a decorator.

    Raises:
        TypeError: If it is no optimizer's class.

    Example:

    ```python
    @fz.declare_elementwise
    class SignSGD(keras.optimizers.Optimizer):
        ...
    ```
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, keras.optimizers.Optimizer)):
        raise TypeError(
            "`optimizer_class` must be a subclass of keras.optimizers.Optimizer. "
            f"Received: optimizer_class={short(optimizer_class)}"
        )
    _ELEMENTWISE.add(optimizer_class)
    return optimizer_class


def check_elementwise(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises unless compact state is right for an optimizer and all that it wraps.

    Raises:
        ValueError: If one mixes entries or is not known not to, or cannot be known yet.
    """
    for part in wrapped_optimizers(optimizer):
        if is_multi_optimizer(part) and not isinstance(optimizer_map(part), keras.optimizers.OptimizerMap):
            raise ValueError(
                "`inner_optimizer` must be known with all that it wraps for state='compact': make the MultiOptimizer "
                f"from a keras.optimizers.OptimizerMap. Received: a MultiOptimizer from {optimizer_map(part)!r}"
            )
    for base in base_optimizers(optimizer):
        if type(base) in _ELEMENTWISE:
            continue
        name = type(base).__name__
        if type(base).__module__.startswith("keras.") and name in _MIXING:
            why = f"of type {name}, which mixes the entries of a variable: {_MIXING[name]}. Use state='full'"
        else:
            why = (
                f"of type {name}, of which that is not known. Use state='full' or, if it is so, "
                f"freezeops.declare_elementwise({name})"
            )
        raise ValueError(
            "`inner_optimizer` must update each entry by that entry, its gradient and its slots alone for "
            f"state='compact'. Received: inner_optimizer {why}"
        )
