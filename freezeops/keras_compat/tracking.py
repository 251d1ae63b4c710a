"""Objects that say themselves what checkpoints and SavedModels hold of them."""

import inspect
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from freezeops.keras_compat import contract
from freezeops.keras_compat.inspection import find

try:
    _AutoTrackable: Any = tf.__internal__.tracking.AutoTrackable
except AttributeError:
    _AutoTrackable = object  # what is wrong is said as an optimizer is made, by the contract


class Tracked(_AutoTrackable):
    """Base class of objects whose `children` are saved, and whose attributes are not."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Past the tracking of attributes.
        object.__setattr__(self, name, value)

    def children(self, save_type: str) -> dict[str, Any]:
        """Returns the objects that are saved, by name.

        Args:
            save_type: `"checkpoint"` or `"savedmodel"`.
        """
        raise NotImplementedError

    def child_to_restore(self, name: str) -> Any:
        """Returns the object that a checkpoint's child of this name is restored into; `None` for none."""
        raise NotImplementedError

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        return self.children(save_type)

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        del cached_dependencies
        return self.child_to_restore(name)


class Ignored(_AutoTrackable):
    """Stands for a variable that only the checkpoint has, so that it counts as consumed.

    Args:
        dtype: The variable's.
    """

    def __init__(self, dtype: tf.DType):
        super().__init__()
        self._ignored_dtype = dtype

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"VARIABLE_VALUE": tf.zeros([0], self._ignored_dtype)}

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        """Drops the values."""


def checkpoint_being_restored() -> Any:
    """Returns the checkpoint that TensorFlow is restoring an object from; `None` where that is not on the call stack.

    Returns:
        TensorFlow's object: its `checkpoint`, and the node of the object in `object_proto`.
    """
    frame = inspect.currentframe() if contract.is_on(contract.OLD_CHECKPOINTS) else None
    while frame is not None:
        if (position := frame.f_locals.get("checkpoint_position")) is not None:
            return position
        frame = frame.f_back
    return None


def object_graph_nodes(reader: Any) -> Any:
    """Returns the nodes of a checkpoint's object graph.

    Args:
        reader: Of the checkpoint, from `tf.train.load_checkpoint`.

    Raises:
        RuntimeError: If this version of TensorFlow has another kind of them.
    """
    contract.check(contract.OLD_CHECKPOINTS, "a checkpoint without layouts of masks")
    graph = find("tensorflow.core.protobuf.trackable_object_graph_pb2.TrackableObjectGraph")
    return graph.FromString(bytes(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))).nodes
