"""Unfreezing: the slots of entries that become trainable in the middle of training.

The slots of an entry that was frozen stood still or decayed. Adam, late in training,
no longer corrects their bias: from zero its first step would be 3.16 learning rates.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import keras
import numpy as np
import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat import contract
from freezeops.keras_compat.hooks import StepHook, before_updates
from freezeops.keras_compat.variables import Variable, component_beside, components, numpy_of, variable_key
from freezeops.keras_compat.wrapped import step_count
from freezeops.masks import layout, packing
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.slots.catalogue import Slot

Policy = Literal["seed", "zero", "keep"]

POLICIES = get_args(Policy)


class _Change(NamedTuple):
    """The changes of a mask since the last step, which count as one.

    Attributes:
        steps: The number of steps there were.
        old: The mask in the last of them.
        waiting: The entries that waited to be seeded then.
        new: The mask after the last change.
    """

    steps: int
    old: Mask
    waiting: Mask
    new: Mask


class VariableSlots:
    """The slots of one variable, and what becomes of them when its entries are unfrozen.

    Under the policy `"seed"` a variable with a second moment has a bit for each entry: 1 while the
    entry waits for its moments to be seeded with its first gradient that is not zero.

    Args:
        variable: The variable that the optimizer owns.
        optimizer: The optimizer that owns the slots, built.
        slots: The variable's slots of known role.
        policy: One of `POLICIES`.

    Attributes:
        materialized: `True` if gradients are in memory before the optimizer's loops.
        unseeded: The packed bits; `None` where nothing is seeded.
        resettable: The slots that do not stand for weights.
    """

    materialized = False

    def __init__(
        self,
        variable: Variable,
        optimizer: keras.optimizers.Optimizer,
        slots: Sequence[tuple[Slot, Variable]],
        policy: Policy,
    ):
        self.variable = variable
        self._optimizer = optimizer
        if policy == "seed" and not contract.is_on(contract.SEEDING):
            policy = "keep"
        self._policy = policy
        self.resettable = [(slot, state) for slot, state in slots if slot.role != "weight"]
        # A second moment comes first: by it `ops.seed_slots` sees what has been seeded.
        second = [(slot, state) for slot, state in slots if slot.role == "second_moment"]
        first = [(slot, state) for slot, state in slots if slot.role == "first_moment" and slot.scale]
        self._seeded = second + first if policy == "seed" and second else []
        self._size = int(tf.TensorShape(variable.shape).num_elements())
        self._last: _Change | None = None
        self.unseeded: keras.Variable | None = None

    @property
    def unseeded_bytes(self) -> int:
        """Length of `unseeded`."""
        return Layout(1, self._size, 1).packed_bytes

    @property
    def steps(self) -> int:
        """The number of steps that the optimizer has made."""
        return step_count(self._optimizer)

    def change(self, old: Mask, new: Mask, mask_layout: Layout) -> None:
        """Carries the policy out for the entries that a change of the mask makes trainable.

        Several changes between two steps count as one.

        Args:
            old: The mask until now.
            new: The mask from now on.
            mask_layout: A layout that holds both.
        """
        steps, elements = self.steps, layout.elementwise(new.shape)
        if self._last is None or self._last.steps != steps or self._last.new != old:
            # The first change since a step, or since a mask was loaded.
            waiting = Mask.frozen(new.shape)
            if self.unseeded is not None:
                waiting = Mask(new.shape, elements, self.unseeded.numpy())
            self._last = _Change(steps, old, waiting, new)
        self._last = self._last._replace(new=new)
        newly = new & ~self._last.old
        if self.unseeded is not None:
            waiting = self._last.waiting & new
            if steps:
                waiting = waiting | newly
            self.unseeded.assign(waiting.with_layout(elements).packed)
        # Before the first step every slot is as in a new optimizer.
        if steps and newly.count() and self._policy != "keep":
            self._reset(newly, mask_layout)

    def _reset(self, entries: Mask, mask_layout: Layout) -> None:
        """Sets the slots of some entries to what a new optimizer would start with."""
        others = tf.constant((~entries).with_layout(mask_layout).packed)
        for slot, state in self.resettable:
            for component in components(state):
                if slot.initial is None:
                    values = component_beside(self.variable, state, component).read_value()
                    initial = tf.reshape(values, [self._size])
                else:
                    initial = tf.fill([self._size], tf.cast(slot.initial(self._optimizer), state.dtype))
                ops.restore_frozen(component, others, initial, mask_layout)

    def forget(self) -> None:
        """Forgets pending mask changes; call after slots were loaded."""
        self._last = None

    def waiting(self) -> np.ndarray:
        """Returns booleans of the variable's shape: `True` for entries that wait to be seeded. Only where some can."""
        assert self.unseeded is not None
        flags = packing.unpack_bits(numpy_of(self.unseeded), self._size)
        return flags.reshape(tuple(self.variable.shape))

    def set_waiting(self, flags: np.ndarray) -> None:
        """Sets the entries that wait to be seeded. Only where some can.

        Args:
            flags: As from `waiting`.
        """
        assert self.unseeded is not None
        self.unseeded.assign(packing.pack_bits(flags))

    @property
    def seeded(self) -> list[Slot]:
        """The slots that are seeded; none where nothing is."""
        return [slot for slot, _ in self._seeded]

    def seeded_among(self, states: Sequence[Variable]) -> list[tuple[int, Slot]]:
        """Returns the slots that are seeded, in their order, each with its index in `states`.

        Args:
            states: Slot variables of the variable, these among them.
        """
        indices = {id(state): index for index, state in enumerate(states)}
        return [(indices[id(state)], slot) for slot, state in self._seeded]

    def seed(self, gradient: Any, component: tf.Variable, scales: Sequence[tf.Tensor]) -> None:
        """Seeds the entries that wait for it; called where the optimizer updates the variable.

        Args:
            gradient: The gradient that the optimizer uses in the end: summed, unscaled, clipped.
            component: The copy of the variable that is updated.
            scales: The factor of each slot in `seeded`, float64 scalars.
        """
        assert self.unseeded is not None

        def local_copy(variable: Variable) -> tf.Variable:
            return component_beside(variable, self.variable, component)

        ops.seed_slots(
            local_copy(self.unseeded),
            tf.cast(gradient, component.dtype),
            scales,
            [local_copy(state) for _, state in self._seeded],
            [slot.power for slot, _ in self._seeded],
            self.materialized,
        )


class Seeding:
    """Seeds the slots of an optimizer's variables, right before the optimizer uses them.

    Args:
        optimizer: One that wraps no other.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer) -> None:
        self.optimizer = optimizer
        self.slots: dict[str, VariableSlots] = {}

    def add(self, variable: Variable, slots: VariableSlots) -> None:
        """Includes a variable, whose `unseeded` must be set."""
        self.slots[variable_key(variable)] = slots

    def step(self) -> AbstractContextManager:
        """Returns a context for a step of the optimizer, or for its trace, in which slots are seeded."""
        return before_updates(self.optimizer, _SeedingStep(self)) if self.slots else nullcontext()

    def scales(self, slots: Sequence[Slot]) -> list[tf.Tensor]:
        """Returns the factors of some slots in the step that is made now, float64 scalars."""
        steps = tf.cast(tf.convert_to_tensor(self.optimizer.iterations), tf.float64)
        return [tf.cast(1.0 if slot.scale is None else slot.scale(self.optimizer, steps), tf.float64) for slot in slots]


class _SeedingStep(StepHook):
    """The seeding of one step, in which most variables share their factors."""

    def __init__(self, seeding: Seeding):
        self.identity = id(seeding)
        self._seeding = seeding
        self._scales: dict[tuple[tf.Graph | None, tuple[Slot, ...]], list[tf.Tensor]] = {}

    def includes(self, variable: Variable) -> bool:
        return variable_key(variable) in self._seeding.slots

    def before_update(self, gradient: Any, variable: tf.Variable) -> None:
        """Seeds the slots of one variable, if it has any that can be."""
        if slots := self._seeding.slots.get(variable_key(variable)):
            key = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph(), tuple(slots.seeded)
            if key not in self._scales:
                self._scales[key] = self._seeding.scales(slots.seeded)
            slots.seed(gradient, variable, self._scales[key])
