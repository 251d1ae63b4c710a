"""Optimizers inside optimizers, and the variables of built ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras
import numpy as np

from freezeops.keras_compat.variables import Variable

_MULTI_OPTIMIZER = getattr(keras.optimizers, "MultiOptimizer", None)
"""New in Keras 3.15."""


def trained_variables(optimizer: keras.optimizers.Optimizer) -> Sequence[Variable]:
    """Returns the variables that an optimizer was built with, in the order of its slots."""
    return optimizer._trainable_variables


def strategy_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """Returns the `tf.distribute.Strategy` in whose scope an optimizer was made."""
    return optimizer._distribution_strategy


def optimizer_map(optimizer: Any) -> Any:
    """Returns what a `MultiOptimizer` was made from: a `keras.optimizers.OptimizerMap`, or a function."""
    return optimizer._optimizer_map


def momentum_product(optimizer: Any) -> keras.Variable:
    """Returns the product of a `Nadam`'s momentum factors so far."""
    return optimizer._u_product


def decays_weight(optimizer: keras.optimizers.Optimizer, variable: Variable) -> bool:
    """Returns `True` if an optimizer with weight decay applies it to a variable."""
    return optimizer._use_weight_decay(variable)


def hide_trained_variables(optimizer: keras.optimizers.Optimizer) -> None:
    """Keeps the list of trained variables out of TensorFlow's checkpoints, and free to change."""
    for part in wrapped_optimizers(optimizer):
        variables = list(getattr(part, "_trainable_variables", []))
        if variables:
            del part._trainable_variables
            # Past Keras's and TensorFlow's tracking.
            object.__setattr__(part, "_trainable_variables", variables)


def build_without_slots(optimizer: keras.optimizers.Optimizer, variables: Sequence[Variable]) -> None:
    """Builds a wrapper as Keras's base class does, but without slots: its options are the inner optimizer's."""
    for i, variable in enumerate(variables):
        optimizer._trainable_variables_indices[optimizer._var_key(variable)] = i
    # Past Keras's and TensorFlow's tracking.
    del optimizer._trainable_variables
    object.__setattr__(optimizer, "_trainable_variables", list(variables))
    optimizer.built = True


def replace_variable(optimizer: keras.optimizers.Optimizer, old: Variable, new: Variable) -> None:
    """Makes a built optimizer train another variable of the same identity, with the slots as they are."""
    for part in wrapped_optimizers(optimizer):
        for i, variable in enumerate(getattr(part, "_trainable_variables", [])):
            if variable is old:
                part._trainable_variables[i] = new


class SlotRecord(NamedTuple):
    """A slot that an optimizer made for one of its variables.

    Attributes:
        variable: What it was made for.
        slot: The slot.
        initializer: What it began with, as Keras's initializers are given.
    """

    variable: Variable
    slot: keras.Variable
    initializer: Any


@contextmanager
def recording_slots(optimizer: keras.optimizers.Optimizer) -> Iterator[list[SlotRecord]]:
    """Records the slots that an optimizer makes with `add_variable_from_reference`, while this is entered."""
    records: list[SlotRecord] = []
    parts = list(base_optimizers(optimizer))
    name = "add_variable_from_reference"
    # Where one wrapper lies in another, both note.
    before = [vars(part).get(name) for part in parts]

    def noting(add: Callable[..., keras.Variable]) -> Callable[..., keras.Variable]:
        def add_variable_from_reference(
            reference_variable: Variable, name: str | None = None, initializer: Any = "zeros"
        ) -> keras.Variable:
            slot = add(reference_variable, name=name, initializer=initializer)
            records.append(SlotRecord(reference_variable, slot, initializer))
            return slot

        return add_variable_from_reference

    for part in parts:
        vars(part)[name] = noting(part.add_variable_from_reference)
    try:
        yield records
    finally:
        for part, noted in zip(parts, before, strict=True):
            vars(part).pop(name)
            if noted is not None:
                vars(part)[name] = noted


def base_optimizers(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """Yields the optimizers that update variables, behind any wrappers."""
    return (part for part in wrapped_optimizers(optimizer) if not _wraps(part))


def _wraps(optimizer: keras.optimizers.Optimizer) -> bool:
    return hasattr(optimizer, "inner_optimizer") or is_multi_optimizer(optimizer)


def wrapped_optimizers(optimizer: keras.optimizers.Optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """Yields an optimizer and all that it wraps, outermost first."""
    yield optimizer
    if hasattr(optimizer, "inner_optimizer"):
        yield from wrapped_optimizers(optimizer.inner_optimizer)
    elif is_multi_optimizer(optimizer):
        for inner in optimizer.optimizers:
            yield from wrapped_optimizers(inner)


def is_multi_optimizer(optimizer: Any) -> bool:
    """Returns `True` for a `keras.optimizers.MultiOptimizer`."""
    return _MULTI_OPTIMIZER is not None and isinstance(optimizer, _MULTI_OPTIMIZER)


def step_counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Returns the variable that counts calls of `apply`, of the first optimizer that has a live one."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer._iterations


def own_step_counter(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Returns the step counter of an optimizer itself; a `LossScaleOptimizer`'s stands still."""
    return optimizer._iterations


def step_count(optimizer: keras.optimizers.Optimizer) -> int:
    """Returns the number of updates that an optimizer has made; accumulated gradients count once."""
    return int(np.asarray(optimizer.iterations))


def average_slots(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[tuple[Variable, keras.Variable]]:
    """Yields each variable with the slot of its moving average, for optimizers with `use_ema=True`."""
    for base in base_optimizers(optimizer):
        if not base.use_ema or not base.built:
            continue
        slots = base._model_variables_moving_average
        for variable, average in zip(base._trainable_variables, slots, strict=True):
            if average is not None:
                yield variable, average


def accumulators(
    optimizer: keras.optimizers.Optimizer,
) -> Iterator[tuple[Variable, keras.Variable]]:
    """Yields each variable with its accumulated gradient, for optimizers that accumulate."""
    for base in base_optimizers(optimizer):
        if base.gradient_accumulation_steps and base.built:
            yield from zip(base._trainable_variables, base._accumulated_gradients, strict=True)
