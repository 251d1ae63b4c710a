"""Changes to `LossScaleOptimizer` and `SwapEMAWeights`, which act around an optimizer."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from freezeops.keras_compat import contract
from freezeops.keras_compat.inspection import mentions
from freezeops.keras_compat.variables import Variable
from freezeops.keras_compat.wrapped import base_optimizers, trained_variables, wrapped_optimizers


def loss_scaler_that_builds(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.LossScaleOptimizer | None:
    """The `LossScaleOptimizer` that wraps an optimizer, if it is now building it.

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
    mask: Callable[[Sequence[Any], Sequence[Variable] | None], list[Any]],
) -> None:
    """Has a `LossScaleOptimizer` mask gradients before it looks whether they are finite.

    Args:
        scaler: The wrapper. It is changed, once.
        mask: Masks gradients, given the variables or `None` for all.
    """
    if "_tf_apply" in vars(scaler) or not contract.is_on(contract.SCALER):
        return
    apply = scaler._tf_apply

    def masked_apply(grads: Sequence[Any], trainable_variables: Sequence[Variable] | None = None) -> None:
        apply(mask(grads, trainable_variables), trainable_variables)

    scaler._tf_apply = masked_apply


Around = Callable[[Any], AbstractContextManager | None]
"""Gives a context manager for a model's optimizer; `None` for those that it does not know."""


def guard_swaps(optimizer: keras.optimizers.Optimizer, around: Around) -> None:
    """Has Keras's `SwapEMAWeights` do its work inside of a guard, and on the optimizers that have averages.

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
            for base in averaging:
                _check_pairs(self, of_one, base)
            with guard:
                for base in averaging:
                    getattr(self, of_one)(base)

        call._freezeops_guard = True  # type: ignore[attr-defined]
        return call

    for name, of_one in (
        ("_swap_variables", "_tf_swap_variables"),
        ("_finalize_ema_values", "_tf_finalize_ema_values"),
    ):
        method = getattr(callback, name)
        if not hasattr(method, "_freezeops_guard"):
            setattr(callback, name, guarded(method, of_one))


def _check_pairs(callback: Any, method: str, optimizer: keras.optimizers.Optimizer) -> None:
    """Raises if the callback would pair variables with averages of others.

    Before Keras 3.13 it pairs an optimizer's averages with the model's trainable variables, in order.

    Raises:
        ValueError: If these are not the optimizer's variables.
    """
    if mentions(getattr(type(callback), method), "_trainable_variables"):
        return
    model, own = callback.model.trainable_variables, trained_variables(optimizer)
    if len(model) != len(own) or any(a is not b for a, b in zip(model, own, strict=True)):
        raise ValueError(
            "SwapEMAWeights must be used with an optimizer that averages all trainable variables of the model, in full "
            f"state, before Keras 3.13. Received: {optimizer.name!r} with {len(own)} variables of its own, of a model "
            f"with {len(model)}. Install a newer Keras, or freeze nothing permanently and use state='full'"
        )


def _refuse_swaps(callback: type, around: Around) -> None:
    """Has `SwapEMAWeights` raise before it swaps anything in a model with an optimizer that `around` knows."""

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
