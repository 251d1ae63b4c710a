"""Fused updates: for Keras's own optimizers one native pass over gradient, variable, slots and mask bits.

Which optimizers these are, what a step of theirs multiplies with, and how a step is handed to `ops.fused_update`. The
arithmetic of an entry is in `csrc/kernels/fused_rules.h` and in its twin, `reference_updates.py`.

Read in Keras 3.15.1, `optimizers/*.py`.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.hooks import UpdateHook, can_update_together, updating_together
from freezeops.keras_compat.known import replaced_methods, unknown_wrappers
from freezeops.keras_compat.variables import Variable, component_beside, device_of, dtype_name, variable_key
from freezeops.keras_compat.wrapped import decays_weight, momentum_product, wrapped_optimizers
from freezeops.masks.layout import Layout
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.partition import MaskedPartition, Partition, UnmaskedPartition
from freezeops.slots.catalogue import Slot
from freezeops.slots.unfreezing import Seeding, VariableSlots
from freezeops.transforms import Gradient


@dataclass(frozen=True)
class Rule:
    """How one kind of optimizer updates an entry.

    Attributes:
        name: Its name in `csrc/kernels/fused_rules.h`.
        slots: Attributes of the optimizer that hold the slots, in the order given there.
        scalars: From an optimizer, its learning rate and the variables' dtype: what an update is
            multiplied by, then the numbers that are the rule's own, in the order given there.
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


def rule_of(optimizer: keras.optimizers.Optimizer, outermost: keras.optimizers.Optimizer) -> Rule | str:
    """The rule of a built optimizer that wraps no other; or why there is none, in words for people.

    Args:
        optimizer: The optimizer.
        outermost: What `MaskedOptimizer` wraps: this one, or what wraps it.
    """
    cls = type(optimizer)
    if not any(cls is getattr(keras.optimizers, name) for name in _RULES):
        return f"not one of {', '.join(_RULES)} itself"
    if unknown := unknown_wrappers(outermost):
        return f"{type(unknown[0]).__name__} around it may write variables"
    for part in wrapped_optimizers(outermost):
        if replaced := replaced_methods(part):
            return f"its `{replaced[0]}` was replaced"
    if not can_update_together(optimizer):
        return "this version of Keras updates variables in a way that freezeops does not know"
    if optimizer.use_ema:
        return "a moving average looks at what each step wrote"
    rule = _RULES[cls.__name__](optimizer)
    if any(not isinstance(getattr(optimizer, name, None), list | tuple) for name in rule.slots):
        return "its slots are not where this version of freezeops knows them"
    return rule


def _rule_of_sgd(optimizer: Any) -> Rule:
    if not optimizer.momentum:
        return Rule("sgd", (), _sgd)
    return Rule("sgd_nesterov" if optimizer.nesterov else "sgd_momentum", ("momentums",), _sgd, sparse=True)


def _rule_of_adam(optimizer: Any) -> Rule:
    slots = ("_momentums", "_velocities")
    if optimizer.amsgrad:
        return Rule("adam_amsgrad", (*slots, "_velocity_hats"), _adam, sparse=True)
    return Rule("adam", slots, _adam, sparse=True)


def _rule_of_rmsprop(optimizer: Any) -> Rule:
    name, slots = "rmsprop", ["_velocities"]
    if optimizer.momentum > 0:
        name, slots = name + "_momentum", [*slots, "_momentums"]
    if optimizer.centered:
        name, slots = name + "_centered", [*slots, "_average_gradients"]
    return Rule(name, tuple(slots), _rmsprop)


_RULES: dict[str, Callable[[Any], Rule]] = {
    "SGD": _rule_of_sgd,
    "Adam": _rule_of_adam,
    "AdamW": _rule_of_adam,
    # Not slices: Keras divides each by a bias correction before it sums those of a row.
    "Nadam": lambda optimizer: Rule("nadam", ("_momentums", "_velocities"), _nadam),
    "RMSprop": _rule_of_rmsprop,
    "Adagrad": lambda optimizer: Rule("adagrad", ("_accumulators",), _adagrad),
    "Lion": lambda optimizer: Rule("lion", ("_momentums",), _lion),
}
"""By the name of the class in `keras.optimizers`: the rule of an optimizer of just that class."""


def _looks_at_gradients(outermost: keras.optimizers.Optimizer, optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether anything looks at a gradient before the update that it is for.

    Norms, accumulators and checks for NaN must see zeros for frozen entries; a fused update sees
    nothing of them.

    Args:
        outermost: What `MaskedOptimizer` wraps.
        optimizer: The one that updates variables, behind any wrappers.
    """
    return bool(
        optimizer.clipnorm
        or optimizer.global_clipnorm
        or optimizer.gradient_accumulation_steps
        or any(hasattr(part, "inner_optimizer") for part in wrapped_optimizers(outermost))
    )


def reason_against(part: Partition) -> str:
    """Why a variable can't be fused whatever the optimizer; "" where it can."""
    if not isinstance(part, MaskedPartition | UnmaskedPartition):
        return "never updated"
    if dtype_name(part.variable) not in ops.FLOAT_DTYPES:
        return "its dtype"
    if getattr(part.variable, "constraint", None) is not None:
        return "a constraint writes it after the update"
    if getattr(part.variable, "overwrite_with_gradient", False):
        return "its gradient overwrites it"
    return ""


@dataclass
class _Group:
    """Variables that one call of the op updates."""

    parts: list[Partition] = field(default_factory=list)
    variables: list[tf.Variable] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)


class _Included(NamedTuple):
    """A variable, as `FusedUpdates.add` was told of it.

    Attributes:
        part: Its partition.
        number: Its number among the optimizer's variables.
        states: Its slots, those of the rule.
        seeded: What is known of its slots, if entries of it may wait to be seeded.
    """

    part: Partition
    number: int
    states: list[Variable]
    seeded: VariableSlots | None


class FusedUpdates:
    """The fused updates of one optimizer.

    Args:
        outermost: What `MaskedOptimizer` wraps.
        optimizer: The one of it that wraps no other, built.
        rule: Its rule.
        seeding: What seeds its slots.
    """

    def __init__(
        self,
        outermost: keras.optimizers.Optimizer,
        optimizer: keras.optimizers.Optimizer,
        rule: Rule,
        seeding: Seeding,
    ):
        self.rule = rule
        self.optimizer = optimizer
        self.seeding = seeding
        self.included: dict[str, _Included] = {}
        self._outermost = outermost

    def add(self, part: Partition, number: int, slots: VariableSlots | None) -> None:
        """Includes a variable.

        Args:
            part: Its partition.
            number: Its number among the optimizer's variables.
            slots: What is known of its slots, if entries of it can be unfrozen.
        """
        seeded = slots if slots is not None and slots.unseeded is not None else None
        key = variable_key(part.variable)
        self.included[key] = _Included(part, number, self._states(number), seeded)

    def _states(self, number: int) -> list[Variable]:
        return [getattr(self.optimizer, name)[number] for name in self.rule.slots]

    def has_slots_of(self, part: Partition) -> bool:
        """Whether the slots of a variable are still those that it was included with."""
        included = self.included[variable_key(part.variable)]
        return all(now is old for now, old in zip(self._states(included.number), included.states, strict=True))

    @property
    def reason_against(self) -> str:
        """Why nothing can be fused in the step that begins; "" where it can: options can be set at any time."""
        rule = rule_of(self.optimizer, self._outermost)
        if isinstance(rule, str):
            return rule
        return "" if rule == self.rule else "its options are not those that it was built with"

    def step(self) -> "FusedStep":
        """A step that begins."""
        return FusedStep(self, direct=not _looks_at_gradients(self._outermost, self.optimizer))


class FusedStep(UpdateHook):
    """One step of an optimizer, or the trace of one: what it updates in one pass.

    Args:
        updates: Of the optimizer.
        direct: Whether gradients come as the model gives them. Otherwise something looks at them before the update.
    """

    def __init__(self, updates: FusedUpdates, direct: bool):
        self._updates = updates
        self._direct = direct
        # Compact variables: whether the trainable entries are gathered before, so that no others are looked at, or
        # sent to other replicas.
        self._gathers = not direct or tf.distribute.get_strategy().num_replicas_in_sync > 1
        self._taken: set[str] = set()
        self._updated: set[str] = set()

    @property
    def identity(self) -> Hashable:  # noqa: D102
        return id(self._updates), frozenset(self._taken)

    def takes(self, part: Partition, gradient: Gradient) -> bool:
        """Whether a gradient of such a kind can be fused, for a variable."""
        dense = not isinstance(gradient, tf.IndexedSlices)
        return (dense or self._updates.rule.sparse) and self._updates.has_slots_of(part)

    def take(self, part: Partition, gradient: Gradient) -> tuple[Gradient, Variable, Any]:
        """Includes a variable.

        Returns:
            A gradient for the optimizer, the variable that it is of, and a snapshot for `put_back`; `None`: nothing is
            to be put back.
        """
        self._taken.add(variable_key(part.variable))
        if isinstance(part, CompactPartition):
            if self._gathers:
                gradient, snapshot = part.take_and_remember(gradient)
                return gradient, part.inner_variable, snapshot
            part.check_not_pending()
        gradient = part.checked(gradient) if self._direct else part.masked(gradient)
        return gradient, part.variable, None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the optimizer's `apply`."""
        with updating_together(self._updates.optimizer, self):
            yield
        # Where replicas wait for each other, one of them updates for all.
        if self._direct and self._taken - self._updated and not tf.distribute.has_strategy():
            raise RuntimeError(
                "The inner optimizer must update variables by Keras's own `apply` with `fused=True`: one that was "
                f"changed may have moved frozen entries. Received: {self._updates.optimizer.name!r}, which did "
                "not update all variables in one pass. Pass fused=False"
            )

    def includes(self, variable: Variable) -> bool:  # noqa: D102
        return variable_key(variable) in self._taken

    def update(  # noqa: D102
        self,
        strategy: tf.distribute.Strategy,
        grads_and_vars: Sequence[tuple[Gradient, tf.Variable]],
        learning_rate: Any,
    ) -> None:
        self._updated |= {variable_key(variable) for _, variable in grads_and_vars}
        groups: dict[tuple[str, bool, str], _Group] = {}
        for gradient, variable in grads_and_vars:
            part = self._updates.included[variable_key(variable)].part
            compact = isinstance(part, CompactPartition) and not self._gathers
            key = dtype_name(variable), compact, device_of(variable)
            group = groups.setdefault(key, _Group())
            group.parts.append(part)
            group.variables.append(variable)
            group.gradients.append(gradient)
        for (_, compact, _), group in groups.items():
            together = functools.partial(self._update_together, group, compact)
            # In each replica with its own copies of what is no variable.
            args = group.gradients, learning_rate
            strategy.extended.update(group.variables[0], together, args=args, group=False)

    def _update_together(
        self,
        group: _Group,
        compact: bool,
        first: tf.Variable,
        gradients: Sequence[Gradient],
        learning_rate: Any,
    ) -> None:
        optimizer, dtype = self._updates.optimizer, dtype_name(first)
        rate = keras.ops.cast(learning_rate, dtype)
        decay: list[Any] = [0.0, 0.0]
        if optimizer.weight_decay is not None:
            decay = [tf.cast(value, dtype) for value in (optimizer.weight_decay, optimizer.learning_rate)]
            if not tf.executing_eagerly():
                # As Grappler reorders Keras's `variable * decay * rate`.
                decay = [decay[0] * decay[1], 1.0]
        step, *others = self._updates.rule.scalars(optimizer, rate, dtype)
        fused = []
        seeded: list[tuple[int, Slot]] = []
        for part, whole, gradient in zip(group.parts, group.variables, gradients, strict=True):
            variable = component_beside(whole, group.variables[0], first)
            included = self._updates.included[variable_key(part.variable)]
            states, slots = included.states, included.seeded
            fused.append(self._fused_variable(part, variable, gradient, compact, states, slots))
            if slots is not None:
                seeded = slots.seeded_among(states)  # the same for all
        scalars = tf.stack([_scalar(value, dtype) for value in (step, *decay, *others)])
        scales = self._updates.seeding.scales([slot for _, slot in seeded])
        for together in _calls(fused):
            ops.fused_update(
                self._updates.rule.name,
                together,
                scalars,
                [number for number, _ in seeded],
                [2 if slot.role == "second_moment" else 1 for _, slot in seeded],
                scales,
            )

    def _fused_variable(
        self,
        part: Partition,
        variable: tf.Variable,
        gradient: Gradient,
        compact: bool,
        states: Sequence[Variable],
        slots: VariableSlots | None,
    ) -> ops.FusedVariable:
        optimizer = self._updates.optimizer
        # What the optimizer was built with, of which `variable` is a copy (or of whose model's variable it is).
        own = part.inner_variable if self._gathers else part.variable

        def beside(other: Variable) -> tf.Variable:
            return component_beside(other, own, variable)

        # A compact variable by itself has an entry for each trainable one, and room.
        masked = part if isinstance(part, MaskedPartition) and compact == isinstance(part, CompactPartition) else None
        index = part.index if isinstance(part, CompactPartition) and compact else None
        return ops.FusedVariable(
            variable=variable,
            gradient=tf.cast(gradient, variable.dtype),
            slots=[beside(state) for state in states],
            layout=Layout(1, 1, math.prod(variable.shape)) if masked is None else masked.layout,
            bits=None if masked is None else beside(masked.bits),
            ranks=None if index is None else (beside(index.offsets), beside(index.indices)),
            unseeded=None if slots is None else beside(slots.unseeded),
            decays=optimizer.weight_decay is not None and decays_weight(optimizer, variable),
        )


def _scalar(value: Any, dtype: str) -> tf.Tensor:
    """A number, a tensor or a variable as a tensor."""
    if isinstance(value, keras.Variable | tf.Variable | tf.Tensor):
        return tf.cast(tf.convert_to_tensor(value), dtype)
    return tf.convert_to_tensor(value, dtype)


_LARGE = 1 << 16
"""From how many entries on a variable is worth a call of its own."""


def _calls(variables: list[ops.FusedVariable]) -> list[list[ops.FusedVariable]]:
    """Which variables are updated in one call.

    In a graph a large one by itself, as soon as its gradient is there: the backward pass goes on meanwhile, and the
    gradient's memory is free for it.
    """
    if tf.executing_eagerly():
        return [variables]
    small = [one for one in variables if one.layout.size < _LARGE]
    large = [[one] for one in variables if one.layout.size >= _LARGE]
    return [small, *large] if small else large
