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
from freezeops.partitions.compact import CompactPartition, TrainablePart
from freezeops.partitions.partition import MaskOperand, Partition, Taken
from freezeops.slots.catalogue import Slot, UpdateFormula
from freezeops.slots.unfreezing import Seeding, VariableSlots
from freezeops.step.formulas import formula_of


def _looks_at_gradients(outermost: keras.optimizers.Optimizer, optimizer: keras.optimizers.Optimizer) -> bool:
    """Returns whether anything looks at a gradient before the update that it is for.

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


def reason_against(partition: Partition) -> str:
    """Returns why a variable can't be fused whatever the optimizer; an empty string where it can."""
    if partition.inner_variable is None:
        return "never updated"
    if dtype_name(partition.variable) not in ops.FLOAT_DTYPES:
        return "its dtype"
    if getattr(partition.variable, "constraint", None) is not None:
        return "a constraint writes it after the update"
    if getattr(partition.variable, "overwrite_with_gradient", False):
        return "its gradient overwrites it"
    return ""


class NotFused(NamedTuple):
    """Why a variable goes the general way.

    Attributes:
        reason: The reason, for `summary()`.
    """

    reason: str


class _Included(NamedTuple):
    """A variable with a fused update.

    Attributes:
        partition: Its partition.
        number: Its number among the optimizer's variables.
        states: Its slots, those of the formula.
        seeded: Its slots as they are seeded, if entries of it may wait for that.
    """

    partition: Partition
    number: int
    states: list[Variable]
    seeded: VariableSlots | None


class _Operand(NamedTuple):
    """A variable of one step.

    Attributes:
        included: What is known of it.
        mask: Its mask as the update takes it.
        owned: The variable that the update is of: the model's, or the compact one.
        gathered: Whether the gradient holds the trainable entries alone while the variable holds all.
    """

    included: _Included
    mask: MaskOperand
    owned: Variable
    gathered: bool


@dataclass
class _Group:
    """Variables that one call of the op updates."""

    operands: list[_Operand] = field(default_factory=list)
    variables: list[tf.Variable] = field(default_factory=list)
    gradients: list[Gradient] = field(default_factory=list)


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

    def add(self, partition: Partition, number: int, slots: VariableSlots | None) -> None:
        """Includes a variable.

        Args:
            partition: Its partition.
            number: Its number among the optimizer's variables.
            slots: Its slots, if entries of it can be unfrozen.
        """
        seeded = slots if slots is not None and slots.unseeded is not None else None
        key = variable_key(partition.variable)
        self.included[key] = _Included(partition, number, self._states(number), seeded)

    def _states(self, number: int) -> list[Variable]:
        return [getattr(self.optimizer, name)[number] for name in self.formula.slots]

    def has_slots_of(self, partition: Partition) -> bool:
        """Returns whether a variable still has the slots that it was included with."""
        included = self.included[variable_key(partition.variable)]
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
        self._taken: dict[str, _Operand] = {}
        self._updated: set[str] = set()

    @property
    def identity(self) -> Hashable:  # noqa: D102
        return id(self._updates), frozenset(self._taken)

    def takes(self, partition: Partition, gradient: Gradient | TrainablePart) -> bool:
        """Returns whether the update of a variable can be fused for a gradient of this kind."""
        dense = not isinstance(gradient, tf.IndexedSlices)
        return (dense or self._updates.formula.sparse) and self._updates.has_slots_of(partition)

    def take(self, partition: Partition, gradient: Gradient | TrainablePart) -> Taken:
        """Includes a variable; as `Partition.take`."""
        # Where nothing is trainable the gradient is not looked at, and need not be made.
        empty = isinstance(partition, CompactPartition) and not partition.capacity
        gathered = False
        if (self._gathers and partition.gathers) or empty:
            taken = partition.take(gradient)
            # An entry for each trainable one, and room.
            assert taken.variable is not None
            mask = MaskOperand(Layout(1, 1, math.prod(taken.variable.shape)))
        else:
            taken = partition.take_whole(gradient, masked=not self._direct)
            mask = partition.mask_operand()
            gathered = isinstance(gradient, TrainablePart)
        key = variable_key(partition.variable)
        self._taken[key] = _Operand(self._updates.included[key], mask, taken.variable, gathered)
        return taken

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around the optimizer's `apply`."""
        with updating_together(self._updates.optimizer, self):
            yield
        # Where replicas wait for each other, one of them updates for all.
        if self._direct and self._taken.keys() - self._updated and not tf.distribute.has_strategy():
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
            operand = self._taken[variable_key(variable)]
            key = dtype_name(variable), operand.mask.ranks is not None, device_of(variable)
            group = groups.setdefault(key, _Group())
            group.operands.append(operand)
            group.variables.append(variable)
            group.gradients.append(gradient)
        for group in groups.values():
            together = functools.partial(self._update_together, group)
            # In each replica with its own copies of what is no variable.
            args = group.gradients, learning_rate
            strategy.extended.update(group.variables[0], together, args=args, group=False)

    def _update_together(
        self, group: _Group, first: tf.Variable, gradients: Sequence[Gradient], learning_rate: Any
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
        for operand, whole, gradient in zip(group.operands, group.variables, gradients, strict=True):
            variable = component_beside(whole, group.variables[0], first)
            fused.append(self._fused_operand(operand, variable, gradient))
            if (slots := operand.included.seeded) is not None:
                seeded = slots.seeded_among(operand.included.states)  # the same for all
        scalars = tf.stack([_scalar(value, dtype) for value in (step, *decay, *others)])
        scales = self._updates.seeding.scales([slot for _, slot in seeded])
        for together in _calls(fused):
            ops.fused_update(
                self._updates.formula.name,
                together,
                scalars,
                [number for number, _ in seeded],
                [slot.power for _, slot in seeded],
                scales,
            )

    def _fused_operand(self, operand: _Operand, variable: tf.Variable, gradient: Gradient) -> ops.FusedOperand:
        """Returns what the op takes for one copy of a variable."""
        optimizer = self._updates.optimizer
        (_, _, states, slots), mask, owned, gathered = operand

        def local(other: Variable) -> tf.Variable:
            return component_beside(other, owned, variable)

        return ops.FusedOperand(
            variable=variable,
            gradient=tf.cast(gradient, variable.dtype),
            slots=[local(state) for state in states],
            layout=mask.layout,
            bits=None if mask.bits is None else local(mask.bits),
            ranks=None if mask.ranks is None else (local(mask.ranks[0]), local(mask.ranks[1])),
            unseeded=None if slots is None else local(slots.unseeded),
            decays=optimizer.weight_decay is not None and decays_weight(optimizer, variable),
            gathered=gathered,
        )


def _scalar(value: Any, dtype: str) -> tf.Tensor:
    """A number, a tensor or a variable as a tensor."""
    if isinstance(value, keras.Variable | tf.Variable | tf.Tensor):
        return tf.cast(tf.convert_to_tensor(value), dtype)
    return tf.convert_to_tensor(value, dtype)


_LARGE = 1 << 16
"""From how many entries on a variable is worth a call of its own."""


def _calls(operands: list[ops.FusedOperand]) -> list[list[ops.FusedOperand]]:
    """Returns the variables in groups, each for one call.

    In a graph a large one by itself, as soon as its gradient is there: the backward pass goes on meanwhile, and the
    gradient's memory is free for it.
    """
    if tf.executing_eagerly():
        return [operands]
    small = [operand for operand in operands if operand.layout.size < _LARGE]
    large = [[operand] for operand in operands if operand.layout.size >= _LARGE]
    return [small, *large] if small else large
