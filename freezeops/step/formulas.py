"""Which optimizers a fused step can stand in for."""

import keras

from freezeops.keras_compat.hooks import can_update_together
from freezeops.keras_compat.known import replaced_methods, unknown_wrappers
from freezeops.keras_compat.wrapped import wrapped_optimizers
from freezeops.slots.catalogue import FORMULAS, UpdateFormula


def formula_of(optimizer: keras.optimizers.Optimizer, outermost: keras.optimizers.Optimizer) -> UpdateFormula | str:
    """The formula of a built optimizer that wraps no other; or the reason that there is none, for `summary()`.

    Args:
        optimizer: The optimizer.
        outermost: What `MaskedOptimizer` wraps: this one, or what wraps it.
    """
    cls = type(optimizer)
    if not any(cls is getattr(keras.optimizers, name) for name in FORMULAS):
        return f"not one of {', '.join(FORMULAS)} itself"
    if unknown := unknown_wrappers(outermost):
        return f"{type(unknown[0]).__name__} around it may write variables"
    for part in wrapped_optimizers(outermost):
        if replaced := replaced_methods(part):
            return f"its `{replaced[0]}` was replaced"
    if not can_update_together(optimizer):
        return "this version of Keras updates variables in a way that freezeops does not know"
    if optimizer.use_ema:
        return "a moving average looks at what each step wrote"
    formula = FORMULAS[cls.__name__](optimizer)
    if any(not isinstance(getattr(optimizer, name, None), list | tuple) for name in formula.slots):
        return "its slots are not where this version of freezeops knows them"
    return formula
