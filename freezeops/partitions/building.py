"""Plans become partitions: their variables are made on the device of the model's variable."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import keras
import numpy as np
import tensorflow as tf

from freezeops.keras_compat.variables import Variable, numpy_of, stand_in, state_variable, tf_variable, variable_path
from freezeops.masks import packing
from freezeops.partitions.compact import CompactPartition, TrainableIndex, inner_shape, pending_index
from freezeops.partitions.fixed import PermanentPartition, UnmaskedPartition
from freezeops.partitions.full import FullPartition
from freezeops.partitions.partition import Partition
from freezeops.partitions.plan import CompactPlan, PermanentPlan, Plan, UnmaskedPlan


class PartitionBuilder:
    """Makes partitions, and variables of an optimizer's masks.

    Args:
        name: The optimizer's name.
        track: Called with a key and each variable that is made, for TensorFlow's tracking.
        strategy: The strategy in whose scope the optimizer was made.
    """

    def __init__(
        self, name: str, track: Callable[[str, keras.Variable], None], strategy: tf.distribute.Strategy
    ) -> None:
        self._name = name
        self._track = track
        self._strategy = strategy

    def partition(self, variable: Variable, plan: Plan, position: int) -> Partition:
        """Returns the partition that a plan asks for.

        Args:
            variable: The model's variable.
            plan: The plan.
            position: The variable's position among those of the optimizer.
        """
        if isinstance(plan, PermanentPlan):
            return PermanentPartition(variable)
        if isinstance(plan, UnmaskedPlan):
            return UnmaskedPartition(variable, plan.reason)
        bits = self.state(variable, plan.mask.packed, "mask", str(position))
        if isinstance(plan, CompactPlan):
            return self._compact(variable, plan, position, bits)
        return FullPartition(variable, plan.layout, bits, plan.reason)

    def _compact(self, variable: Variable, plan: CompactPlan, position: int, bits: keras.Variable) -> CompactPartition:
        packed = numpy_of(bits)  # where there are several workers: the chief's
        room = max(plan.capacity, packing.count_bits(packed, plan.layout.kept))
        offsets, indices = TrainableIndex.arrays(packed, plan.layout, room)
        if plan.pending:
            indices[:] = pending_index(indices.dtype)
        index = TrainableIndex(
            plan.layout,
            bits,
            self.state(variable, offsets, "offsets", f"{position} offsets"),
            self.state(variable, indices, "indices", f"{position} indices"),
        )
        with self._colocated(variable):
            inner = stand_in(variable, inner_shape(variable, plan.layout, room))
        self._track(f"{position} values", inner)

        def make_variable(values: np.ndarray, purpose: str) -> keras.Variable:
            return self.state(variable, values, purpose, f"{position} {purpose}")

        partition = CompactPartition(variable, index, inner, make_variable, plan.pending)
        if not plan.pending:
            partition.fill()
        return partition

    def state(self, variable: Variable, values: np.ndarray, purpose: str, key: str) -> keras.Variable:
        """Returns a variable of integers on the device of one of the model's.

        Args:
            variable: The model's variable.
            values: The values that it begins with.
            purpose: A word for its name.
            key: A key for its tracking.
        """
        with keras.name_scope(self._name), self._colocated(variable):
            path = variable_path(variable).replace("/", "_")
            state = state_variable(values, f"{path}_{purpose}")
        self._track(key, state)
        return state

    def _colocated(self, variable: Variable) -> AbstractContextManager:
        return self._strategy.extended.colocate_vars_with(tf_variable(variable))
