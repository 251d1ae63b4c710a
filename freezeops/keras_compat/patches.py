"""Changes to `LossScaleOptimizer` and `SwapEMAWeights`, which act around an optimizer."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import keras

from freezeops.keras_compat import contract
from freezeops.keras_compat.inspection import mentions
from freezeops.keras_compat.variables import Variable
from freezeops.keras_compat.wrapped import base_optimizers, trained_variables, wrapped_optimizers


def loss_scaler_that_builds(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.LossScaleOptimizer | None:
    """Returns the `LossScaleOptimizer` that wraps an optimizer, if it is building it just now.

    `compile` makes the wrapper by itself under `mixed_float16`, and nothing points
    from the inner optimizer to it; but it is on the call stack when it builds.

    Raises:
        ValueError: If there is another optimizer between the two.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.optimizers.LossScaleOptimizer) and caller is not optimizer:
            if caller.inner_optimizer is optimizer:
                return caller
            if any(part is optimizer for part in wrapped_optimizers(caller)):
                raise ValueError(
                    "A LossScaleOptimizer must wrap a MaskedOptimizer directly, or be wrapped by it: what lies "
                    "between would be given gradients that were looked at unmasked. Received: a "
                    f"{type(caller.inner_optimizer).__name__} between the two: wrap that one in MaskedOptimizer"
                )
        frame = frame.f_back
    return None


def mask_before_loss_scaling(
    scaler: keras.optimizers.LossScaleOptimizer,
    masked: Callable[[Sequence[Any], Sequence[Variable] | None], AbstractContextManager[list[Any]]],
) -> None:
    """Makes a `LossScaleOptimizer` mask gradients before it checks that they are finite.

    Args:
        scaler: The wrapper. It is changed, once.
        masked: Around its step: gives masked gradients, given those of the model and the variables or `None` for all.
    """
    if "_tf_apply" in vars(scaler) or not contract.is_on(contract.SCALER):
        return
    apply = scaler._tf_apply

    def masked_apply(grads: Sequence[Any], trainable_variables: Sequence[Variable] | None = None) -> None:
        with masked(grads, trainable_variables) as looked_at:
            apply(looked_at, trainable_variables)

    scaler._tf_apply = masked_apply


Around = Callable[[Any], AbstractContextManager | None]
"""Gives a context manager for a model's optimizer; `None` for those that it does not know."""


def guard_swaps(optimizer: keras.optimizers.Optimizer, around: Around) -> None:
    """Makes Keras's `SwapEMAWeights` keep frozen entries, and find averages behind several wrappers.

    It swaps a variable with its average by adding and subtracting, which turns -0.0
    into 0.0 and an infinity into NaN, and gives nobody a say. And it looks behind one
    wrapper only. Changes the callback's class, once, and only for the first optimizer that has averages; for
    optimizers that `around` does not know the callback does what it did.

    Args:
        optimizer: The inner optimizer, built. Without a moving average nothing is changed: Keras refuses the callback.
        around: What is around a swap.
    """
    if not any(base.use_ema for base in base_optimizers(optimizer)):
        return
    callback = keras.callbacks.SwapEMAWeights
    if not contract.is_on(contract.SWAP):
        _refuse_swaps(callback, around)
        return

    def guarded(all_of: Callable[[Any], None], of_one: str) -> Callable[[Any], None]:
        def call(self: Any) -> None:
            optimizer = self.model.optimizer
            if (guard := around(optimizer)) is None:
                all_of(self)
                return
            averaging = [base for base in base_optimizers(optimizer) if base.use_ema]
            if not averaging or not all(hasattr(base, "_model_variables_moving_average") for base in averaging):
                raise ValueError(
                    "SwapEMAWeights must be used with an optimizer that has `use_ema=True` and is built. Received: "
                    f"use_ema={[base.use_ema for base in base_optimizers(optimizer)]}"
                )
            with guard:
                for base in averaging:
                    _for_variables_of(base, self, of_one)(base)

        call._freezeops_guard = True  # type: ignore[attr-defined]
        return call

    for name, of_one in (
        ("_swap_variables", "_tf_swap_variables"),
        ("_finalize_ema_values", "_tf_finalize_ema_values"),
    ):
        method = getattr(callback, name)
        if not hasattr(method, "_freezeops_guard"):
            setattr(callback, name, guarded(method, of_one))


def _for_variables_of(optimizer: keras.optimizers.Optimizer, callback: Any, name: str) -> Callable[[Any], None]:
    """Returns a method of the callback that pairs averages with the variables of their optimizer.

    Before Keras 3.15 it pairs them with the trainable variables of the model, in order: others with compact state, and
    where some are frozen permanently.
    """
    method = getattr(type(callback), name)
    if mentions(method, "_trainable_variables"):
        return method.__get__(callback)
    return method.__get__(SimpleNamespace(model=SimpleNamespace(trainable_variables=trained_variables(optimizer))))


def _refuse_swaps(callback: type, around: Around) -> None:
    """Makes `SwapEMAWeights` raise before it swaps anything in a model with an optimizer that `around` knows."""

    def refusing(method: Callable[..., None]) -> Callable[..., None]:
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            if around(self.model.optimizer) is not None:
                contract.check(contract.SWAP, "SwapEMAWeights with a MaskedOptimizer")
            method(self, *args, **kwargs)

        call._freezeops_guard = True  # type: ignore[attr-defined]
        return call

    for name in ("on_epoch_end", "on_test_begin", "on_predict_begin"):
        method = getattr(callback, name)
        if not hasattr(method, "_freezeops_guard"):
            setattr(callback, name, refusing(method))
