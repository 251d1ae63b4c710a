"""The catalogue of optimizers: for each class, if its update is elementwise, its slots, and its fused formula.

`_KERAS` describes the classes of `keras.optimizers`. `declare_slots` and `declare_elementwise` add user-written ones.
Read in Keras 3.15.1 and 3.12.4, `optimizers/*.py`.

A subclass inherits what is known of slots, as it inherits the attributes that hold them, until its own are declared.
Everything else is known of a class alone: a subclass may override the update.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import keras
import tensorflow as tf

from freezeops.keras_compat.wrapped import momentum_product
from freezeops.messages import short

Role = Literal["first_moment", "second_moment", "history", "weight"]

Scale = Callable[[Any, tf.Tensor], Any]
"""Function of an optimizer and the number of steps that it has made (a scalar float64 tensor), returning a factor."""

_ROLES = get_args(Role)

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Slot:
    """A slot of an optimizer's class: what it holds, and how it is seeded for entries that are unfrozen late.

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

    @property
    def power(self) -> int:
        """The power of the gradient that a moment is seeded with."""
        return 2 if self.role == "second_moment" else 1


@dataclass(frozen=True)
class UpdateFormula:
    """The formula by which an optimizer updates one entry, for the native kernels.

    Attributes:
        name: Its name in `csrc/kernels/common/update_rules.h` and in `ops/reference_updates.py`.
        slots: Attributes of the optimizer that hold the slots, in the order given there.
        scalars: Function of an optimizer, its learning rate and the variables' dtype. It returns the
            factor of an update, then the further numbers of the formula, in the order given there.
            Each is calculated by Keras's own operations, so that no rounding differs.
        sparse: `True` if it takes `tf.IndexedSlices`.
    """

    name: str
    slots: tuple[str, ...]
    scalars: Callable[[Any, tf.Tensor, str], list[Any]]
    sparse: bool = False


@dataclass(frozen=True)
class Known:
    """An entry of the catalogue: the facts that are known of an optimizer's class.

    Attributes:
        elementwise: `True`: its update of an entry looks at that entry, its gradient and its slots alone. A text: it
            does not, for this reason. `None`: not known.
        slots: By the name of the attribute that holds the slot variables. `None`: not known.
        made_if: For slots that only some options make, by attribute: a function of an optimizer, returning `True` if it
            has the slot. `None`: not known which of the slots an optimizer has.
        formula: Function of a built optimizer, returning its fused formula. `None`: it has none.
        keeps_rows: Function of an optimizer, returning `True` if an update with `tf.IndexedSlices` writes no rows but
            those that they name. `None`: it never does.
    """

    elementwise: Literal[True] | str | None = None
    slots: Mapping[str, Slot] | None = None
    made_if: Mapping[str, Callable[[Any], bool]] | None = field(default_factory=dict)
    formula: Callable[[Any], UpdateFormula] | None = None
    keeps_rows: Callable[[Any], bool] | None = None


# Scales.


def _corrected(beta: str) -> Scale:
    """Returns the weight that an average with bias correction has given to its gradients so far."""
    return lambda optimizer, steps: 1.0 - tf.pow(tf.cast(getattr(optimizer, beta), tf.float64), steps)


def _rmsprop_scale(optimizer: Any, steps: tf.Tensor) -> float:
    """Makes the first step one learning rate, also where the mean, begun at zero, is subtracted."""
    return 1.0 + (1.0 - optimizer.rho) ** 2 / optimizer.rho if optimizer.centered else 1.0


# Fused formulas. Their numbers are calculated as Keras does it, operation by operation.


def _sgd_scalars(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    return [rate, keras.ops.cast(optimizer.momentum, dtype)] if optimizer.momentum else [rate]


def _sgd_formula(optimizer: Any) -> UpdateFormula:
    if not optimizer.momentum:
        return UpdateFormula("sgd", (), _sgd_scalars)
    return UpdateFormula(
        "sgd_nesterov" if optimizer.nesterov else "sgd_momentum", ("momentums",), _sgd_scalars, sparse=True
    )


def _adam_scalars(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    step = keras.ops.cast(optimizer.iterations + 1, dtype)
    power_1 = keras.ops.power(keras.ops.cast(optimizer.beta_1, dtype), step)
    power_2 = keras.ops.power(keras.ops.cast(optimizer.beta_2, dtype), step)
    alpha = rate * keras.ops.sqrt(1 - power_2) / (1 - power_1)
    return [alpha, 1 - optimizer.beta_1, 1 - optimizer.beta_2, optimizer.epsilon]


def _adam_formula(optimizer: Any) -> UpdateFormula:
    slots = ("_momentums", "_velocities")
    if optimizer.amsgrad:
        return UpdateFormula("adam_amsgrad", (*slots, "_velocity_hats"), _adam_scalars, sparse=True)
    return UpdateFormula("adam", slots, _adam_scalars, sparse=True)


def _nadam_scalars(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    step, next_step = (keras.ops.cast(optimizer.iterations + ahead, dtype) for ahead in (1, 2))
    decay, beta_1, beta_2 = (keras.ops.cast(value, dtype) for value in (0.96, optimizer.beta_1, optimizer.beta_2))
    u = beta_1 * (1.0 - 0.5 * keras.ops.power(decay, step))
    next_u = beta_1 * (1.0 - 0.5 * keras.ops.power(decay, next_step))
    product = keras.ops.cast(momentum_product(optimizer), dtype)
    averaging = [1 - product * next_u, 1 - u, 1 - product, 1 - keras.ops.power(beta_2, step)]
    return [rate, 1 - beta_1, 1 - beta_2, optimizer.epsilon, next_u, *averaging]


def _nadam_formula(optimizer: Any) -> UpdateFormula:
    # Not slices: Keras divides each by a bias correction before it sums those of a row.
    return UpdateFormula("nadam", ("_momentums", "_velocities"), _nadam_scalars)


def _rmsprop_scalars(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    momentum = [optimizer.momentum] if optimizer.momentum > 0 else []
    return [rate, optimizer.rho, 1 - optimizer.rho, optimizer.epsilon, *momentum]


def _rmsprop_formula(optimizer: Any) -> UpdateFormula:
    name, slots = "rmsprop", ["_velocities"]
    if optimizer.momentum > 0:
        name, slots = name + "_momentum", [*slots, "_momentums"]
    if optimizer.centered:
        name, slots = name + "_centered", [*slots, "_average_gradients"]
    return UpdateFormula(name, tuple(slots), _rmsprop_scalars)


def _adagrad_scalars(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    return [rate, optimizer.epsilon]


def _adagrad_formula(optimizer: Any) -> UpdateFormula:
    return UpdateFormula("adagrad", ("_accumulators",), _adagrad_scalars)


def _lion_scalars(optimizer: Any, rate: tf.Tensor, dtype: str) -> list[Any]:
    beta_1, beta_2 = keras.ops.cast(optimizer.beta_1, dtype), keras.ops.cast(optimizer.beta_2, dtype)
    return [rate, beta_1, 1.0 - beta_1, beta_2, 1.0 - beta_2]


def _lion_formula(optimizer: Any) -> UpdateFormula:
    return UpdateFormula("lion", ("_momentums",), _lion_scalars)


# The catalogue.

_MOMENTS = {
    "_momentums": Slot("first_moment", _corrected("beta_1")),
    "_velocities": Slot("second_moment", _corrected("beta_2")),
}

_KERAS: dict[str, Known] = {
    "SGD": Known(
        elementwise=True,
        slots={"momentums": Slot("history")},
        made_if={"momentums": lambda optimizer: optimizer.momentum != 0},
        formula=_sgd_formula,
        keeps_rows=lambda optimizer: not optimizer.momentum,
    ),
    "Adam": Known(
        elementwise=True,
        slots={**_MOMENTS, "_velocity_hats": Slot("second_moment", _corrected("beta_2"))},
        made_if={"_velocity_hats": lambda optimizer: optimizer.amsgrad},
        formula=_adam_formula,
    ),
    "AdamW": Known(elementwise=True, formula=_adam_formula),  # a subclass of Adam, with its slots
    "Nadam": Known(elementwise=True, slots=_MOMENTS, formula=_nadam_formula),
    "RMSprop": Known(
        elementwise=True,
        slots={
            "_velocities": Slot("second_moment", _rmsprop_scale),
            "_momentums": Slot("history"),
            "_average_gradients": Slot("first_moment"),
        },
        made_if={
            "_momentums": lambda optimizer: optimizer.momentum > 0,
            "_average_gradients": lambda optimizer: optimizer.centered,
        },
        formula=_rmsprop_formula,
    ),
    "Adagrad": Known(
        elementwise=True,
        slots={"_accumulators": Slot("history", initial=lambda optimizer: optimizer.initial_accumulator_value)},
        formula=_adagrad_formula,
    ),
    "Lion": Known(elementwise=True, slots={"_momentums": Slot("first_moment")}, formula=_lion_formula),
    "Adamax": Known(
        elementwise=True,
        slots={"_m": Slot("first_moment", _corrected("beta_1")), "_u": Slot("history")},
    ),
    "Adadelta": Known(
        elementwise=True,
        slots={"_accumulated_grads": Slot("second_moment"), "_accumulated_delta_vars": Slot("history")},
    ),
    "Ftrl": Known(elementwise=True, slots={"_accumulators": Slot("weight"), "_linears": Slot("weight")}),
    "ScheduleFreeAdamW": Known(
        elementwise=True,
        slots={
            "_momentums": Slot("weight", initial=None),
            "_velocities": Slot("second_moment", _corrected("beta_2")),
        },
    ),
    "Adafactor": Known(
        elementwise="it keeps one second moment per row and column, and scales by the variable's norm",
        slots={"_v": Slot("second_moment")},
    ),
    "Lamb": Known(elementwise="it scales by the norms of the variable and of its update", slots=_MOMENTS),
    "Muon": Known(
        elementwise="it makes the update of a matrix orthogonal",
        slots={
            "momentums": Slot("first_moment", _corrected("adam_beta_1")),
            "adam_momentums": Slot("first_moment", _corrected("adam_beta_1")),  # so called until Keras 3.12
            "adam_velocities": Slot("second_moment", _corrected("adam_beta_2")),
        },
        made_if={
            "momentums": lambda optimizer: not hasattr(optimizer, "adam_momentums"),
            "adam_momentums": lambda optimizer: not hasattr(optimizer, "momentums"),
        },
    ),
}
"""By the name of a class in `keras.optimizers`, those with a fused formula first."""

FUSED = tuple(name for name, known in _KERAS.items() if known.formula is not None)
"""The names of the classes that have a fused formula."""

_KNOWN: dict[type, Known] = {
    getattr(keras.optimizers, name): known for name, known in _KERAS.items() if hasattr(keras.optimizers, name)
}


def known_of(optimizer_class: type) -> Known:
    """Returns what is known of an optimizer's class itself."""
    return _KNOWN.get(optimizer_class, Known())


def known_slots_of(optimizer_class: type) -> tuple[Mapping[str, Slot], Mapping[str, Callable[[Any], bool]] | None]:
    """Returns `Known.slots` and `Known.made_if` of an optimizer's class, or of the class that it inherits them from."""
    for cls in optimizer_class.__mro__:
        if (known := known_of(cls)).slots is not None:
            return known.slots, known.made_if
    return {}, None


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
    _check_class(optimizer_class)
    for name, slot in slots.items():
        if not isinstance(slot, Slot):
            raise TypeError(f"`slots` must map attributes to fz.Slot. Received: slots={short({name: slot})}")
    _KNOWN[optimizer_class] = dataclasses.replace(known_of(optimizer_class), slots=dict(slots), made_if=None)


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
    _check_class(optimizer_class)
    _KNOWN[optimizer_class] = dataclasses.replace(known_of(optimizer_class), elementwise=True)
    return optimizer_class


def _check_class(optimizer_class: Any) -> None:
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, keras.optimizers.Optimizer)):
        raise TypeError(
            "`optimizer_class` must be a subclass of keras.optimizers.Optimizer. "
            f"Received: optimizer_class={short(optimizer_class)}"
        )
