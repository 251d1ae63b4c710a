"""Masks in `tf.train.Checkpoint`: one string with paths, layouts and checksums, restored before any variable is.

Checkpoints written before there was such a string hold a variable for each mask, by its position; its path is in the
name that the checkpoint keeps of it. They are read as far as they leave one reading.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from freezeops.keras_compat.tracking import Ignored, Tracked, checkpoint_being_restored
from freezeops.keras_compat.variables import Variable, tf_variable
from freezeops.storage.stored import RawMask, Stored

_OLD = re.compile(r"(?:unseeded )?\d+(?: offsets| indices)?")
_KEY = "stored"


class _Text(tf.train.experimental.PythonState):
    """The string.

    Args:
        save: Gives it.
        restore: Takes what a checkpoint holds.
    """

    def __init__(self, save: Callable[[], bytes], restore: Callable[[Stored], Any]):
        self._save = save
        self._restore = restore

    def serialize(self) -> bytes:
        return self._save()

    def deserialize(self, string_value: bytes) -> None:
        self._restore(Stored.from_bytes(bytes(string_value), "a checkpoint"))


class MaskStore(Tracked):
    """What TensorFlow tracks of an optimizer's masks.

    A checkpoint holds them as one string. A SavedModel holds the variables, which its functions use.

    Args:
        save: Gives the string.
        restore: Takes what a checkpoint holds.
    """

    def __init__(self, save: Callable[[], bytes], restore: Callable[[Stored], Any]):
        super().__init__()
        self._text = _Text(save, restore)
        self._hidden: dict[str, tf.Variable] = {}
        self._restore = restore
        self._old_checkpoint: Any = None

    def add(self, key: str, variable: Variable) -> None:
        """Includes a variable that functions use."""
        self._hidden[key] = tf_variable(variable)

    def clear(self) -> None:
        """Forgets all variables."""
        self._hidden = {}

    def children(self, save_type: str) -> dict[str, Any]:  # noqa: D102
        return {_KEY: self._text} if save_type == "checkpoint" else dict(self._hidden)

    def child_to_restore(self, name: str) -> Any:  # noqa: D102
        if name == _KEY:
            return self._text
        return self._old(name) if _OLD.fullmatch(name) else None

    def _old(self, name: str) -> Any:
        """Restores an old checkpoint, at the first of its variables, and consumes the others."""
        position = checkpoint_being_restored()
        if position is None:
            raise ValueError(
                "A checkpoint of an older version of freezeops must be read through tf.train.Checkpoint. Load it with "
                "the version that wrote it, call `fz.save_masks(optimizer, path)` there, and `fz.load_masks` here. "
                f"Received: {name!r}"
            )
        checkpoint = position.checkpoint
        variables = {
            child.local_name: checkpoint.object_graph_proto.nodes[child.node_id].attributes[0]
            for child in position.object_proto.children
            if checkpoint.object_graph_proto.nodes[child.node_id].attributes
        }
        reader = tf.train.load_checkpoint(checkpoint.save_path_string)
        if self._old_checkpoint is not checkpoint:
            self._restore(Stored(list(old_masks(variables, reader))))
            self._old_checkpoint = checkpoint
        return Ignored(reader.get_variable_to_dtype_map()[variables[name].checkpoint_key])


def old_masks(variables: Mapping[str, Any], reader: Any) -> Iterator[RawMask]:
    """The masks of a checkpoint that was written before layouts were stored.

    Args:
        variables: By the name under the optimizer's masks: attributes `full_name` and `checkpoint_key`.
        reader: Of the checkpoint.
    """

    def bits(name: str) -> np.ndarray:
        return np.asarray(reader.get_tensor(variables[name].checkpoint_key))

    for name in sorted((name for name in variables if name.isdigit()), key=int):
        # `masked_optimizer/head_kernel_mask`: slashes of the path have become lines.
        path = variables[name].full_name.rpartition("/")[2].removesuffix("_mask")
        waiting = f"unseeded {name}"
        yield RawMask(path, bits(name), bits(waiting) if waiting in variables else None, slashes=False)
