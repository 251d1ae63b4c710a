"""One call of `apply`: each gradient is taken, the inner optimizer runs, frozen entries are put back."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import tensorflow as tf

from freezeops.backward.skipping import trainable_part
from freezeops.keras_compat import contract
from freezeops.keras_compat.known import writes_only_given
from freezeops.keras_compat.variables import Variable
from freezeops.keras_compat.wrapped import base_optimizers
from freezeops.ops.gradients import Gradient
from freezeops.partitions.compact import TrainablePart
from freezeops.partitions.guards import Guard, keeping_frozen
from freezeops.partitions.partition import MaskedPartition, Partition
from freezeops.slots.lookup import writes_only_rows_with_gradients
from freezeops.slots.unfreezing import Seeding
from freezeops.step import fused
from freezeops.step.fused import FusedStep, FusedUpdates
from freezeops.step.managed import ManagedVariable
from freezeops.step.scaler import as_part, is_in_step_of_scaler
from freezeops.step.traced_writes import guarded


class Step:
    """One step, or the trace of one.

    A variable goes one of two ways, both by `take`: its fused update where it has one that fits the gradient,
    otherwise its partition.

    Args:
        inner_optimizer: The optimizer that runs, built.
        managed: The records of all its variables.
        given: Those of the variables that the step is given, in order.
        fused: Whether variables may be updated in one pass.
        several_replicas: Whether replicas also write the rows of each other's gradients.
        skips: Whether the trainable part of a gradient is made by itself where that can be.
    """

    def __init__(
        self,
        inner_optimizer: Any,
        managed: Sequence[ManagedVariable],
        given: Sequence[ManagedVariable],
        fused: bool,
        several_replicas: bool,
        skips: bool = False,
    ):
        self._inner_optimizer = inner_optimizer
        self._managed = managed
        self._fused = _fused_steps(managed, given) if fused else {}
        self._several_replicas = several_replicas
        self._skips = skips
        self._guards: list[Guard] = []
        self._taken: set[int] = set()
        self.gradients: list[Gradient | None] = []
        self.variables: list[Variable] = []

    def take(self, managed: ManagedVariable, gradient: Gradient | None) -> None:
        """Includes a variable.

        Args:
            managed: Its record.
            gradient: Its gradient; `None` where there is none.

        Raises:
            ValueError: If the gradient has not the variable's shape.
        """
        partition = managed.partition
        variable = partition.inner_variable
        if gradient is not None:
            given: Gradient | TrainablePart = gradient
            if is_in_step_of_scaler():
                given = as_part(managed, gradient)
            elif self._skips:
                given, managed.gradient = trainable_part(partition, gradient)
            fused_step = self._fused.get(id(managed))
            if fused_step is not None and fused_step.takes(partition, given):
                gradient, variable, guard = fused_step.take(partition, given)
            else:
                gradient, variable, guard = partition.take(given, self._writes_named_rows_only(given))
            self._guards.append(guard)
            self._taken.add(id(managed))
        if variable is not None:
            self.gradients.append(gradient)
            self.variables.append(variable)

    def _writes_named_rows_only(self, gradient: Gradient | TrainablePart) -> bool:
        return (
            isinstance(gradient, tf.IndexedSlices)
            and not self._several_replicas
            and writes_only_rows_with_gradients(self._inner_optimizer)
        )

    def run(
        self,
        update: Callable[[], None],
        seedings: Iterable[Seeding],
        averages: Iterable[tuple[Partition, Variable]],
    ) -> None:
        """Runs the inner optimizer.

        Args:
            update: Calls it with `gradients` and `variables`.
            seedings: What seeds slots while it runs.
            averages: The slots of moving averages, each with its variable's partition.
        """
        with ExitStack() as around:
            around.enter_context(keeping_frozen([*self._guards, *self._other_guards()], averages))
            for seeding in seedings:
                around.enter_context(seeding.step())
            for fused_step in {id(each): each for each in self._fused.values()}.values():
                around.enter_context(fused_step.running())
            update()

    def _other_guards(self) -> list[Guard]:
        """Returns guards for the variables without a gradient that the inner optimizer may write.

        Others have none: another thread may be in the middle of a step of theirs.
        """
        writes_others = not writes_only_given(self._inner_optimizer)
        averages = any(base.use_ema for base in base_optimizers(self._inner_optimizer))
        return [
            managed.partition.guard()
            for managed in self._managed
            if id(managed) not in self._taken
            and id(managed) not in self._fused
            # Averages are made of inner variables, which a guard fills.
            and (writes_others or (averages and managed.partition.gathers))
        ]


def _fused_steps(managed: Sequence[ManagedVariable], given: Sequence[ManagedVariable]) -> dict[int, FusedStep]:
    """Returns the step that can update a variable in one pass, by the `id` of the variable's record."""
    # A variable that is named twice is updated twice, one after the other.
    counts = Counter(map(id, given))
    updates = {id(each.fused): each.fused for each in managed if isinstance(each.fused, FusedUpdates)}
    steps = {key: each.step() for key, each in updates.items() if not each.reason_against}
    return {
        id(each): steps[id(each.fused)]
        for each in managed
        # The settings of a variable may change late, too.
        if id(each.fused) in steps and counts[id(each)] < 2 and not fused.reason_against(each.partition)
    }


def masks_in_use(partitions: Sequence[Partition]) -> list[tf.Operation]:
    """Returns operations that fail, as a traced step begins, if `repack` took away a mask that it was traced with."""
    if tf.executing_eagerly() or not contract.is_on(contract.REPACK):
        return []
    message = "the masks must be in use still: a function that was traced before `repack` must be traced again"
    masked = [partition for partition in partitions if isinstance(partition, MaskedPartition)]
    shapes = [partition.bits_shape() for partition in masked if partition.layout.packed_bytes]
    if not shapes:
        return []
    # Of all at once: a handful of operations for each variable adds up. And int32, whose minimum is taken where
    # TensorFlow keeps it, in the host's memory; `assert_equal` waits for a GPU.
    return [tf.debugging.Assert(tf.reduce_min(tf.concat(shapes, 0)) > 0, [message])]


class FrozenBlock(AbstractContextManager):
    """Keeps frozen entries around writes of the model's variables; see `MaskMethods.frozen_entries`.

    Args:
        partitions: Of all variables that may be written.
        averages: Gives the slots of moving averages, each with the partition of its variable.
    """

    def __init__(self, partitions: Sequence[Partition], averages: Callable[[], Iterable[tuple[Partition, Variable]]]):
        self._partitions = list(partitions)
        self._averages = averages
        self._blocks: list[tuple[AbstractContextManager, list[Guard]]] = []  # a block may lie in another

    def __enter__(self) -> None:
        guards = [partition.variable_guard() for partition in self._partitions]
        writes = guarded()
        writes.__enter__()
        self._blocks.append((writes, guards))

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        writes, guards = self._blocks.pop()
        if error is None or tf.executing_eagerly():
            for guard in guards:
                guard.put_back()
            for partition, average in self._averages():
                partition.fill_frozen(average)
        writes.__exit__(None, None, None)
