"""What the slots of an optimizer mean, so that entries which are unfrozen late can start from sane ones.

Read in Keras 3.15.1 and 3.12.4, `optimizers/*.py`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import keras
import tensorflow as tf

from freezeops.keras_compat.variables import Variable, variable_path
from freezeops.keras_compat.wrapped import momentum_product, trained_variables
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


@dataclass(frozen=True)
class UpdateFormula:
    """How an optimizer updates one entry, so that a native kernel can do it.

    Attributes:
        name: Its name in `csrc/kernels/fused_rules.h` and in `ops/reference_updates.py`.
        slots: Attributes of the optimizer that hold the slots, in the order given there.
        scalars: Function of an optimizer, its learning rate and the variables' dtype. It returns the
            factor of an update, then the further numbers of the formula, in the order given there.
            Each is calculated by Keras's own operations, so that no rounding differs.
        sparse: Whether it takes `tf.IndexedSlices`.
    """

    name: str
    slots: tuple[str, ...]
    scalars: Callable[[Any, tf.Tensor, str], list[Any]]
    sparse: bool = False


def _sgd(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    return [rate, keras.ops.cast(optimizer.momentum, dtype)] if optimizer.momentum else [rate]


def _adam(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    step = keras.ops.cast(optimizer.iterations + 1, dtype)
    power_1 = keras.ops.power(keras.ops.cast(optimizer.beta_1, dtype), step)
    power_2 = keras.ops.power(keras.ops.cast(optimizer.beta_2, dtype), step)
    alpha = rate * keras.ops.sqrt(1 - power_2) / (1 - power_1)
    return [alpha, 1 - optimizer.beta_1, 1 - optimizer.beta_2, optimizer.epsilon]


def _nadam(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    step, next_step = (keras.ops.cast(optimizer.iterations + ahead, dtype) for ahead in (1, 2))
    decay, beta_1, beta_2 = (keras.ops.cast(value, dtype) for value in (0.96, optimizer.beta_1, optimizer.beta_2))
    u = beta_1 * (1.0 - 0.5 * keras.ops.power(decay, step))
    next_u = beta_1 * (1.0 - 0.5 * keras.ops.power(decay, next_step))
    product = keras.ops.cast(momentum_product(optimizer), dtype)
    rest = [next_u, 1 - product * next_u, 1 - u, 1 - product, 1 - keras.ops.power(beta_2, step)]
    return [rate, 1 - beta_1, 1 - beta_2, optimizer.epsilon, *rest]


def _rmsprop(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    momentum = [optimizer.momentum] if optimizer.momentum > 0 else []
    return [rate, optimizer.rho, 1 - optimizer.rho, optimizer.epsilon, *momentum]


def _adagrad(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    return [rate, optimizer.epsilon]


def _lion(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    beta_1, beta_2 = keras.ops.cast(optimizer.beta_1, dtype), keras.ops.cast(optimizer.beta_2, dtype)
    return [rate, beta_1, 1.0 - beta_1, beta_2, 1.0 - beta_2]


def _sgd_formula(optimizer: Any) -> UpdateFormula:
    if not optimizer.momentum:
        return UpdateFormula("sgd", (), _sgd)
    return UpdateFormula("sgd_nesterov" if optimizer.nesterov else "sgd_momentum", ("momentums",), _sgd, sparse=True)


def _adam_formula(optimizer: Any) -> UpdateFormula:
    slots = ("_momentums", "_velocities")
    if optimizer.amsgrad:
        return UpdateFormula("adam_amsgrad", (*slots, "_velocity_hats"), _adam, sparse=True)
    return UpdateFormula("adam", slots, _adam, sparse=True)


def _rmsprop_formula(optimizer: Any) -> UpdateFormula:
    name, slots = "rmsprop", ["_velocities"]
    if optimizer.momentum > 0:
        name, slots = name + "_momentum", [*slots, "_momentums"]
    if optimizer.centered:
        name, slots = name + "_centered", [*slots, "_average_gradients"]
    return UpdateFormula(name, tuple(slots), _rmsprop)


FORMULAS: dict[str, Callable[[Any], UpdateFormula]] = {
    "SGD": _sgd_formula,
    "Adam": _adam_formula,
    "AdamW": _adam_formula,
    # Not slices: Keras divides each by a bias correction before it sums those of a row.
    "Nadam": lambda optimizer: UpdateFormula("nadam", ("_momentums", "_velocities"), _nadam),
    "RMSprop": _rmsprop_formula,
    "Adagrad": lambda optimizer: UpdateFormula("adagrad", ("_accumulators",), _adagrad),
    "Lion": lambda optimizer: UpdateFormula("lion", ("_momentums",), _lion),
}
"""By the name of the class in `keras.optimizers`: the formula of an optimizer of just that class."""
