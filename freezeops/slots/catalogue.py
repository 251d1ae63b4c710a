"""What the slots of an optimizer mean, so that entries which are unfrozen late can start from sane ones.

Read in Keras 3.15.1 and 3.12.4, `optimizers/*.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import keras
import tensorflow as tf

from freezeops.keras_compat.variables import Variable, variable_path
from freezeops.keras_compat.wrapped import trained_variables
from freezeops.messages import short

Role = Literal["first_moment", "second_moment", "history", "weight"]

Scale = Callable[[Any, tf.Tensor], Any]
"""From an optimizer and the number of steps it has made (a scalar float64 tensor) to a factor."""

_ROLES = get_args(Role)


@dataclass(frozen=True)
class Slot:
    """One slot of an optimizer's class: what it holds, and how it is seeded.

    Args:
        role: `"first_moment"`: a moving average of gradients. `"second_moment"`: one
            of their squares. `"history"`: what past updates left behind, such as a
            velocity or a sum of squares; it starts at `initial`. `"weight"`: something
            that stands for the weight itself, and is never reset.
        scale: For moments: the factor of the seed, `scale * g` or `scale * g**2`, as a
            function of the optimizer and the number of steps it has made. Without it
            a first moment starts at zero, and a second one at `g**2`. A moment whose
            bias the optimizer corrects has the scale `1 - beta**steps`.
        initial: What a new optimizer starts the slot with, as a function of the
            optimizer; `None`: with the variable's value. Zero by default.

    Raises:
        ValueError: If `role` is no known one.
    """

    __module__ = "freezeops.slots"  # as pickles have it

    role: Role
    scale: Scale | None = None
    initial: Callable[[Any], float] | None = lambda optimizer: 0.0

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise ValueError(f"`role` must be one of {_ROLES}. Received: role={short(self.role)}")


def _corrected(beta: str) -> Scale:
    """The weight that an average with bias correction has given to its gradients so far."""
    return lambda optimizer, steps: 1.0 - tf.pow(tf.cast(getattr(optimizer, beta), tf.float64), steps)


def _rmsprop_scale(optimizer: Any, steps: tf.Tensor) -> float:
    """So that the first step is one learning rate, also where the mean, begun at zero, is subtracted."""
    return 1.0 + (1.0 - optimizer.rho) ** 2 / optimizer.rho if optimizer.centered else 1.0


_ADAM = {
    "_momentums": Slot("first_moment", _corrected("beta_1")),
    "_velocities": Slot("second_moment", _corrected("beta_2")),
    "_velocity_hats": Slot("second_moment", _corrected("beta_2")),
}

_DECLARED: dict[str, Mapping[str, Slot]] = {
    "SGD": {"momentums": Slot("history")},
    "RMSprop": {
        "_velocities": Slot("second_moment", _rmsprop_scale),
        "_momentums": Slot("history"),
        "_average_gradients": Slot("first_moment"),
    },
    "Adam": _ADAM,
    "Nadam": _ADAM,
    "Lamb": _ADAM,
    "Adamax": {"_m": Slot("first_moment", _corrected("beta_1")), "_u": Slot("history")},
    "Adagrad": {"_accumulators": Slot("history", initial=lambda optimizer: optimizer.initial_accumulator_value)},
    "Adadelta": {"_accumulated_grads": Slot("second_moment"), "_accumulated_delta_vars": Slot("history")},
    "Adafactor": {"_v": Slot("second_moment")},
    "Lion": {"_momentums": Slot("first_moment")},
    "Ftrl": {"_accumulators": Slot("weight"), "_linears": Slot("weight")},
    "Muon": {
        "momentums": Slot("first_moment", _corrected("adam_beta_1")),
        "adam_momentums": Slot("first_moment", _corrected("adam_beta_1")),  # so called until Keras 3.12
        "adam_velocities": Slot("second_moment", _corrected("adam_beta_2")),
    },
    "ScheduleFreeAdamW": {
        "_momentums": Slot("weight", initial=None),
        "_velocities": Slot("second_moment", _corrected("beta_2")),
    },
}

_SLOTS: dict[type, Mapping[str, Slot]] = {
    getattr(keras.optimizers, name): slots for name, slots in _DECLARED.items() if hasattr(keras.optimizers, name)
}


def declare_slots(optimizer_class: type[keras.optimizers.Optimizer], slots: Mapping[str, Slot]) -> None:
    """Says what the slots of a user-written optimizer mean; see `MaskedOptimizer`'s `unfreeze_policy`.

    Slots that nobody declared keep what they hold when entries are unfrozen. What is
    declared for a class holds for its subclasses, unless they declare their own.

    Args:
        optimizer_class: A subclass of `keras.optimizers.Optimizer`.
        slots: By the name of the attribute that holds the slot variables: a list with one
            for each variable that the optimizer was built with, or a mapping by path.

    Raises:
        TypeError: If the class is no optimizer's, or a value no `Slot`.

    Example:

    ```python
    fz.declare_slots(MyAdam, {
        "_m": fz.Slot("first_moment", lambda optimizer, steps: 1 - optimizer.beta_1**steps),
        "_v": fz.Slot("second_moment", lambda optimizer, steps: 1 - optimizer.beta_2**steps),
    })
    ```
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, keras.optimizers.Optimizer)):
        raise TypeError(
            "`optimizer_class` must be a subclass of keras.optimizers.Optimizer. "
            f"Received: optimizer_class={short(optimizer_class)}"
        )
    for name, slot in slots.items():
        if not isinstance(slot, Slot):
            raise TypeError(f"`slots` must map attributes to fz.Slot. Received: slots={short({name: slot})}")
    _SLOTS[optimizer_class] = dict(slots)


def slots_of(optimizer: keras.optimizers.Optimizer) -> Iterator[tuple[Variable, list[tuple[Slot, Variable]]]]:
    """Each variable of a built optimizer with its slots of known role and of its own shape.

    Args:
        optimizer: One that wraps no other.
    """
    declared = next((_SLOTS[cls] for cls in type(optimizer).__mro__ if cls in _SLOTS), {})
    for index, variable in enumerate(trained_variables(optimizer)):
        found = []
        for attribute, slot in declared.items():
            variables = getattr(optimizer, attribute, None) or []
            if isinstance(variables, Mapping):
                state = variables.get(variable_path(variable))
            else:
                state = variables[index] if index < len(variables) else None
            if state is not None and tuple(state.shape) == tuple(variable.shape):
                found.append((slot, state))
        yield variable, found
