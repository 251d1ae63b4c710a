"""Looks optimizers up in the catalogue: their slots, and properties of an optimizer with all that it wraps."""

from collections.abc import Iterator, Mapping

import keras

from freezeops.keras_compat.variables import Variable, variable_path
from freezeops.keras_compat.wrapped import (
    base_optimizers,
    is_multi_optimizer,
    optimizer_map,
    trained_variables,
    wrapped_optimizers,
)
from freezeops.notices import warn
from freezeops.slots.catalogue import Slot, known_of, known_slots_of

_warned_of: set[type] = set()
"""The classes that `slots_of` warned of."""


def slots_of(optimizer: keras.optimizers.Optimizer) -> Iterator[tuple[Variable, list[tuple[Slot, Variable]]]]:
    """Yields each variable of a built optimizer with its slots of known role and of its own shape.

    Warns, once for each class, where a slot is missing.

    Args:
        optimizer: One that wraps no other.
    """
    cls = type(optimizer)
    if cls not in _warned_of and (missing := missing_slots(optimizer)):
        _warned_of.add(cls)
        warn(
            f"{cls.__name__} must have its slots where this version of freezeops looks for them. Received: an "
            f"optimizer of Keras {keras.__version__} without {', '.join(missing)}. Entries that are unfrozen late do "
            f"not start from their own first gradient then: say where its slots are with "
            f"freezeops.declare_slots({cls.__name__}, ...)"
        )
    slots, _ = known_slots_of(cls)
    for index, variable in enumerate(trained_variables(optimizer)):
        found = []
        for attribute, slot in slots.items():
            variables = getattr(optimizer, attribute, None) or []
            if isinstance(variables, Mapping):
                state = variables.get(variable_path(variable))
            else:
                state = variables[index] if index < len(variables) else None
            if state is not None and tuple(state.shape) == tuple(variable.shape):
                found.append((slot, state))
        yield variable, found


def missing_slots(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """Returns the attributes in which a built optimizer should have slots, by what is known of its class, and has none.

    An attribute that `declare_slots` named is never among them: its slots may depend on options.

    Args:
        optimizer: One that wraps no other.
    """
    slots, made_if = known_slots_of(type(optimizer))
    if made_if is None:
        return []
    count = len(trained_variables(optimizer))
    expected = [attribute for attribute in slots if attribute not in made_if or made_if[attribute](optimizer)]
    return [attribute for attribute in expected if not _has_slots(getattr(optimizer, attribute, None), count)]


def _has_slots(slots: object, count: int) -> bool:
    """Returns `True` if this holds slots as Keras keeps them: one for each of `count` variables, or by path."""
    return isinstance(slots, Mapping) or (isinstance(slots, list | tuple) and len(slots) >= count)


def check_elementwise(optimizer: keras.optimizers.Optimizer) -> None:
    """Raises unless compact state is right for an optimizer and all that it wraps.

    Raises:
        ValueError: If one mixes entries or is not known not to, or cannot be known yet.
    """
    for wrapped in wrapped_optimizers(optimizer):
        if is_multi_optimizer(wrapped) and not isinstance(optimizer_map(wrapped), keras.optimizers.OptimizerMap):
            raise ValueError(
                "`inner_optimizer` must be known with all that it wraps for state='compact': make the MultiOptimizer "
                f"from a keras.optimizers.OptimizerMap. Received: a MultiOptimizer from {optimizer_map(wrapped)!r}"
            )
    for base in base_optimizers(optimizer):
        name, elementwise = type(base).__name__, known_of(type(base)).elementwise
        if elementwise is True:
            continue
        if elementwise is not None:
            why = f"of type {name}, which mixes the entries of a variable: {elementwise}. Use state='full'"
        else:
            why = (
                f"of type {name}, of which that is not known. Use state='full' or, if it is so, "
                f"freezeops.declare_elementwise({name})"
            )
        raise ValueError(
            "`inner_optimizer` must update each entry by that entry, its gradient and its slots alone for "
            f"state='compact'. Received: inner_optimizer {why}"
        )


def writes_only_rows_with_gradients(optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns `True` if a step writes no row of a variable but those that its `tf.IndexedSlices` name."""
    return all(
        (keeps_rows := known_of(type(base)).keeps_rows) is not None
        and keeps_rows(base)
        and base.weight_decay is None  # with 0.0 Keras still writes every row
        and not base.use_ema
        and not base.gradient_accumulation_steps
        and not base.global_clipnorm  # by which the gradient becomes dense
        for base in base_optimizers(optimizer)
    )
