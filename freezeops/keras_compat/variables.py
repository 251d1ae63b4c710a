"""TensorFlow's variables behind Keras's: replicas, identities, shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from freezeops.keras_compat import contract

Variable = Any
"""A `keras.Variable` or a `tf.Variable`."""


def tf_variable(variable: Variable) -> tf.Variable:
    """Returns the TensorFlow variable behind a Keras variable, or the variable itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def check_strategy(strategy: tf.distribute.Strategy) -> None:
    """Raises for a strategy under which frozen entries cannot be kept.

    Their workers update them without waiting for each other: what one remembers another
    may write before it is put back.

    Raises:
        NotImplementedError: For such a strategy.
        RuntimeError: For one with several replicas, if this version of TensorFlow has them otherwise.
    """
    names = {cls.__name__ for cls in type(strategy).__mro__}
    if names & {"ParameterServerStrategyV2", "ParameterServerStrategyV1", "CentralStorageStrategy"}:
        raise NotImplementedError(
            "The strategy must be one without parameter servers: tf.distribute.MirroredStrategy or "
            f"MultiWorkerMirroredStrategy, for example. Received: {type(strategy).__name__}"
        )
    if strategy.num_replicas_in_sync > 1:
        contract.check(contract.REPLICAS, f"{type(strategy).__name__} with {strategy.num_replicas_in_sync} replicas")


def components(variable: Variable) -> list[tf.Variable]:
    """Returns the TensorFlow variables that hold a variable where this is called.

    Under a `tf.distribute.Strategy` with replicas: in a replica its own copy, outside
    of them all copies of this process. Otherwise the variable itself.
    """
    variable = tf_variable(variable)
    if not isinstance(variable, tf.distribute.DistributedValues):
        return [variable]
    context = tf.distribute.get_replica_context()
    if context is None or context.strategy is not variable.distribute_strategy:
        # Outside of the strategy's scope, in a callback of `fit` for example, TensorFlow gives the default strategy's.
        return list(variable.values)
    replica = replica_number()
    assert replica is not None
    return [variable.values[replica % len(variable.values)]]


def replicas_step_by_themselves() -> bool:
    """Returns whether no replica of this context waits for others to update variables together."""
    return bool(tf.__internal__.distribute.strategy_supports_no_merge_call())


def replica_number() -> int | None:
    """Returns the number of the replica that this is called in, 0 if there is one alone; `None` outside of all."""
    context = tf.distribute.get_replica_context()
    return None if context is None else int(tf.get_static_value(context.replica_id_in_sync_group))


def component_beside(other: Variable, variable: Variable, component: tf.Variable) -> tf.Variable:
    """Returns the copy of another variable on the replica whose copy of `variable` is `component`."""
    other = tf_variable(other)
    if not isinstance(other, tf.distribute.DistributedValues):
        return other
    copies = tf_variable(variable).values
    return other.values[next(i for i, copy in enumerate(copies) if copy is component)]


def state_variable(values: np.ndarray, name: str) -> keras.Variable:
    """Returns a non-trainable variable of integers, mirrored under a `tf.distribute.Strategy`.

    Where there are several workers, it begins with the chief's values in all of them, as
    other variables do. TensorFlow 2.21 cannot broadcast unsigned integers, so they travel as
    signed ones and the variable itself is created as if there were one worker.
    """
    extended = tf.distribute.get_strategy().extended
    workers = getattr(extended, "_num_workers", 1) if values.dtype.kind == "u" else 1
    if workers > 1:
        content = values.view(np.uint8)
        padded = np.pad(content, (0, -len(content) % 4)).view(np.int32)
        sent = tf.Variable(padded, trainable=False).values[0].numpy()
        values = sent.view(np.uint8)[: len(content)].view(values.dtype)
        extended._num_workers = 1
    try:
        return keras.Variable(
            lambda shape, dtype: tf.constant(values, dtype=dtype),
            shape=values.shape,
            dtype=values.dtype.name,
            trainable=False,
            aggregation="only_first_replica",
            name=name,
        )
    finally:
        if workers > 1:
            extended._num_workers = workers


def stand_in(variable: Variable, shape: Sequence[int]) -> keras.Variable:
    """Returns a variable of another shape that an optimizer takes for the given one.

    It has its name, its path and its identity, by which optimizers find their slots and
    which variables are excluded from weight decay. It begins with zeros.

    Args:
        variable: One of the model's.
        shape: Shape of the new variable.
    """
    own = tf_variable(variable)
    scope, _, name = own.name.removesuffix(":0").rpartition("/")
    with tf.name_scope(f"{scope}/" if scope else ""):
        other = keras.Variable(
            lambda shape, dtype: tf.zeros(shape, dtype),
            shape=tuple(shape),
            dtype=dtype_name(variable),
            trainable=False,
            name=name,
        )
    other._path = variable_path(variable)
    value = other.value
    for copy in value.values if isinstance(value, tf.distribute.DistributedValues) else [value]:
        copy._unique_id = variable_key(variable)
    return other


def reshape_variable(variable: keras.Variable, values: np.ndarray, beside: Variable) -> None:
    """Gives a Keras variable values of another shape; functions that were traced before keep the old ones.

    Args:
        variable: One of an optimizer's, which keeps its place in all lists.
        values: The new values.
        beside: A variable on the same device.
    """
    # Before the values: Keras 3.16 makes them in this shape.
    variable._shape = tuple(values.shape)
    variable._ndim = values.ndim
    with tf.distribute.get_strategy().extended.colocate_vars_with(tf_variable(beside)):
        variable._initialize(lambda: tf.constant(values, variable.dtype))


def empty_variable(variable: Variable) -> None:
    """Empties a variable, so that every function that was traced with it fails."""
    value = tf_variable(variable)
    for copy in value.values if isinstance(value, tf.distribute.DistributedValues) else [value]:
        tf.raw_ops.AssignVariableOp(resource=copy.handle, value=tf.zeros([0], copy.dtype), validate_shape=False)


def shape_now(variable: Variable) -> tf.Tensor:
    """Returns the shape of a variable as it is when a function runs, not as it was traced: an int32 tensor."""
    return tf.raw_ops.VariableShape(input=components(variable)[0].handle)


def is_variable(x: Any) -> bool:
    """Returns `True` for a Keras or TensorFlow variable."""
    return isinstance(x, keras.Variable | tf.Variable)


def variable_key(variable: Variable) -> str:
    """Returns one key for a Keras variable, its `tf.Variable` and every replica copy."""
    return _whole(variable)._unique_id


def _whole(variable: Variable) -> tf.Variable:
    """Returns the TensorFlow variable; for the copy of one replica, the variable of all replicas."""
    variable = tf_variable(variable)
    if not isinstance(variable, tf.distribute.DistributedValues):
        # A copy knows its container; it is attached to the copy or to its handle.
        for part in (variable, getattr(variable, "handle", None)):
            container = getattr(part, "_distributed_container", None)
            if container is not None:
                return container()
    return variable


def variable_path(variable: Variable) -> str:
    """Returns a Keras variable's `path`, or a TensorFlow variable's name without `:0`."""
    if isinstance(variable, keras.Variable):
        return variable.path
    return variable.name.removesuffix(":0")


def numpy_of(variable: Variable) -> np.ndarray:
    """Returns a variable's values, of the first copy that this process holds; also outside of a strategy's scope."""
    return components(variable)[0].numpy()


def device_of(variable: Variable) -> str:
    """Returns the device of a variable, or of its first copy."""
    variable = tf_variable(variable)
    return variable.values[0].device if isinstance(variable, tf.distribute.DistributedValues) else variable.device


def dtype_name(variable: Variable) -> str:
    """Returns the dtype as text, such as `"float32"`."""
    return tf.as_dtype(variable.dtype).name


class FunctionConstraint(keras.constraints.Constraint):
    """A constraint that calls a function; Keras takes functions themselves from 3.15 on.

    Args:
        function: From a variable to the values that it is assigned.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, w: Any) -> Any:
        """Returns the function's values."""
        return self.function(w)


class Untracked:
    """Hides a value from the tracking of Keras and TensorFlow."""

    def __init__(self, value: Any):
        self.value = value
