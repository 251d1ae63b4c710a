"""The fused formula of an optimizer at hand."""

import keras

from freezeops.keras_compat.hooks import can_update_together
from freezeops.keras_compat.known import replaced_methods, unknown_wrappers
from freezeops.keras_compat.wrapped import wrapped_optimizers
from freezeops.slots.catalogue import FUSED, UpdateFormula, known_of


def formula_of(optimizer: keras.optimizers.Optimizer, outermost: keras.optimizers.Optimizer) -> UpdateFormula | str:
    """Returns the formula by which a fused step stands in for an optimizer; or why none does, for `summary()`.

    Args:
        optimizer: A built one that wraps no other.
        outermost: What `MaskedOptimizer` wraps: this one, or what wraps it.
    """
    make_formula = known_of(type(optimizer)).formula
    if make_formula is None:
        return f"not one of {', '.join(FUSED)} itself"
    if unknown := unknown_wrappers(outermost):
        return f"{type(unknown[0]).__name__} around it may write variables"
    for wrapped in wrapped_optimizers(outermost):
        if replaced := replaced_methods(wrapped):
            return f"its `{replaced[0]}` was replaced"
    if not can_update_together():
        return "this version of Keras updates variables in a way that freezeops does not know"
    if optimizer.use_ema:
        return "a moving average looks at what each step wrote"
    formula = make_formula(optimizer)
    if any(not isinstance(getattr(optimizer, name, None), list | tuple) for name in formula.slots):
        return "its slots are not where this version of freezeops knows them"
    return formula
