"""How the state of wrapped optimizers is stored: once, and refused where it does not fit.

Keras itself stores what a `LossScaleOptimizer` wraps twice, and skips with a warning what
does not fit, or what comes before the optimizer is built.
"""

import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from freezeops.keras_internals import Untracked, is_multi_optimizer


def store_once_and_check(optimizer: keras.optimizers.Optimizer, refused: Callable[[], None] = lambda: None) -> None:
    """Changes how one optimizer saves and loads its own variables in Keras's files.

    Wrapped optimizers are saved by Keras beside it. State that is loaded before the
    optimizer is built waits for `assign_waiting`.

    Args:
        optimizer: The optimizer. It is changed.
        refused: Called where what is loaded does not fit, before the error.
    """
    optimizer._freezeops_refused = Untracked(refused)
    optimizer.save_own_variables = types.MethodType(_save_own_variables, optimizer)
    optimizer.load_own_variables = types.MethodType(_load_own_variables, optimizer)


def store_scalers_around(cls: type) -> None:
    """Has each `LossScaleOptimizer` that wraps an optimizer of a class do the same.

    `compile` makes them by itself, and state may be loaded before they are built.
    Changes Keras's class, once; around other optimizers it does what it did.
    """
    scaler = keras.optimizers.LossScaleOptimizer
    save, load = scaler.save_own_variables, scaler.load_own_variables
    if hasattr(load, "_freezeops"):
        return

    def save_own_variables(self: Any, store: Any) -> None:
        (_save_own_variables if isinstance(self.inner_optimizer, cls) else save)(self, store)

    def load_own_variables(self: Any, store: Any) -> None:
        (_load_own_variables if isinstance(self.inner_optimizer, cls) else load)(self, store)

    load_own_variables._freezeops = True  # type: ignore[attr-defined]
    scaler.save_own_variables, scaler.load_own_variables = save_own_variables, load_own_variables


def assign_waiting(optimizer: keras.optimizers.Optimizer) -> None:
    """Sets what was loaded before the optimizer was built.

    Raises:
        ValueError: If it does not fit; no variable of this optimizer was changed then.
    """
    waiting = vars(optimizer).get("_freezeops_waiting")
    if waiting is not None and waiting.value is not None:
        _assign(optimizer, waiting.value)
        waiting.value = None


def _own_variables(optimizer: Any) -> list[keras.Variable]:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or is_multi_optimizer(optimizer):
        return list(optimizer._variables)
    return list(optimizer.variables)


def _save_own_variables(self: Any, store: Any) -> None:
    waiting = vars(self).get("_freezeops_waiting")
    loaded = waiting.value if waiting is not None else None  # and not built since
    for i, array in enumerate([v.numpy() for v in _own_variables(self)] if loaded is None else loaded):
        store[str(i)] = array


def _load_own_variables(self: Any, store: Any) -> None:
    keys = [str(i) for i in range(len(store.keys()))]
    if strange := sorted(set(store.keys()) - set(keys)):
        raise ValueError(
            f"The state of an optimizer in a file must be arrays that are counted from 0. Received: {strange}"
        )
    arrays = [np.array(store[key]) for key in keys]
    if self.built:
        try:
            _assign(self, arrays)
        except ValueError:
            if (refused := vars(self).get("_freezeops_refused")) is not None:
                refused.value()
            raise
    else:
        self._freezeops_waiting = Untracked(arrays)


def _assign(optimizer: Any, arrays: list[np.ndarray]) -> None:
    variables = _own_variables(optimizer)
    before_build = 1 + isinstance(getattr(optimizer, "_learning_rate", None), keras.Variable)
    if not arrays or (len(arrays) == before_build and not arrays[0].any()):
        variables = variables[: len(arrays)]  # saved before it was built
    elif len(arrays) == len(optimizer.variables):
        arrays = arrays[: len(variables)]  # as Keras saves it
    if len(arrays) != len(variables):
        raise ValueError(
            "The state of an optimizer in a file must fit the optimizer that loads it. "
            f"Received: {len(arrays)} arrays for {optimizer.name!r}, which has {len(variables)} variables"
        )
    for variable, array in zip(variables, arrays, strict=True):
        if tuple(variable.shape) != array.shape:
            raise ValueError(
                "The state of an optimizer in a file must fit the optimizer that loads it. "
                f"Received: an array of shape {array.shape} for {variable.path!r} of shape {tuple(variable.shape)}"
            )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)
