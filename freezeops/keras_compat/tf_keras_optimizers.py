"""Private parts of tf_keras (Keras 2): those that freezeops uses, and those that tf_keras expects of an optimizer.

Read in tf_keras 2.21.0: `optimizers/optimizer.py` and `mixed_precision/loss_scale_optimizer.py`.
"""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from freezeops.keras_compat.variables import Variable


class TfKerasWrapper:
    """Mix-in with the private methods that tf_keras calls of an optimizer, for one that wraps another.

    It comes before tf_keras's class.
    """

    inner_optimizer: Any
    iterations: Any

    def _create_iteration_variable(self) -> None:
        """Creates nothing: the inner optimizer counts."""

    @property
    def _learning_rate(self) -> Any:
        """The inner optimizer's schedule, for tf_keras's `TensorBoard` callback."""
        return base_optimizer(self.inner_optimizer)._learning_rate

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        # Not the base class's, which keeps its first answer: the masks may be created after it.
        children = tf.__internal__.tracking.AutoTrackable._trackable_children(self, save_type, **kwargs)
        # What tf_keras makes of an optimizer when it loads a SavedModel has a count of its own and wants it loaded.
        return children if save_type == "checkpoint" else children | {"_iterations": self.iterations}


class TfKerasScaler:
    """A mix-in for an optimizer that scales the loss, so that tf_keras's `LossScaleOptimizer` refuses to wrap it."""

    _is_wrapped_by_loss_scale_optimizer = True


def wrapped_tf_keras_optimizers(optimizer: Any) -> Iterator[Any]:
    """Yields an optimizer of tf_keras and all that it wraps, outermost first."""
    yield optimizer
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
        yield optimizer


def base_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer of tf_keras that updates variables, behind any wrappers."""
    return list(wrapped_tf_keras_optimizers(optimizer))[-1]


def is_built(optimizer: Any) -> bool:
    """Returns `True` if an optimizer of tf_keras that wraps no other is built."""
    return getattr(optimizer, "_built", False)


def knows(optimizer: Any, variable: Variable) -> bool:
    """Returns `True` if an optimizer of tf_keras was built with a variable."""
    return optimizer._var_key(variable) in optimizer._index_dict


def average_of(optimizer: Any, variable: Variable) -> Any:
    """Returns the slot of a variable's moving average, for an optimizer of tf_keras with `use_ema=True`."""
    return optimizer._model_variables_moving_average[optimizer._index_dict[optimizer._var_key(variable)]]


def is_for_dtensor(optimizer: Any) -> bool:
    """Returns `True` if an optimizer of tf_keras is one for DTensor."""
    return optimizer._mesh is not None or optimizer._run_with_dtensor


def count_step(optimizer: Any) -> Any:
    """Adds one to an optimizer's `iterations`, once for all replicas."""
    return tf.__internal__.distribute.interim.maybe_merge_call(
        lambda strategy: optimizer.iterations.assign_add(1), tf.distribute.get_strategy()
    )
