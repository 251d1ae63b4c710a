"""Fused updates: for Keras's own optimizers one native pass over gradient, variable, slots and mask bits.

How a step is handed to `ops.fused_update`. Which optimizers have a formula, and what it is, is in `formulas.py` and in
the catalogue.
"""

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.hooks import UpdateHook, updating_together
from freezeops.keras_compat.variables import Variable, component_beside, device_of, dtype_name, variable_key
from freezeops.keras_compat.wrapped import decays_weight, wrapped_optimizers
from freezeops.masks.layout import Layout
from freezeops.ops.gradients import Gradient
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.partition import MaskedPartition, Partition, UnmaskedPartition
from freezeops.slots.catalogue import Slot, UpdateFormula
from freezeops.slots.unfreezing import Seeding, VariableSlots
from freezeops.step.formulas import formula_of


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
        states: Its slots, those of the formula.
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
        formula: Its formula.
        seeding: What seeds its slots.
    """

    def __init__(
        self,
        outermost: keras.optimizers.Optimizer,
        optimizer: keras.optimizers.Optimizer,
        formula: UpdateFormula,
        seeding: Seeding,
    ):
        self.formula = formula
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
        return [getattr(self.optimizer, name)[number] for name in self.formula.slots]

    def has_slots_of(self, part: Partition) -> bool:
        """Whether the slots of a variable are still those that it was included with."""
        included = self.included[variable_key(part.variable)]
        return all(now is old for now, old in zip(self._states(included.number), included.states, strict=True))

    @property
    def reason_against(self) -> str:
        """Why nothing can be fused in the step that begins; "" where it can: options can be set at any time."""
        formula = formula_of(self.optimizer, self._outermost)
        if isinstance(formula, str):
            return formula
        return "" if formula == self.formula else "its options are not those that it was built with"

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
        return (dense or self._updates.formula.sparse) and self._updates.has_slots_of(part)

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
        step, *others = self._updates.formula.scalars(optimizer, rate, dtype)
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
                self._updates.formula.name,
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
