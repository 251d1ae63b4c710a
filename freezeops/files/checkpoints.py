"""Masks in `tf.train.Checkpoint`: one string with paths, layouts and checksums, restored before any variable is.

Older checkpoints hold a variable for each mask, by its position; the path is in the full name of that variable. They
are read if only one layout fits.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from freezeops.keras_compat.tracking import Ignored, Tracked, checkpoint_being_restored
from freezeops.keras_compat.variables import Variable, tf_variable
from freezeops.registry.registry import MaskRegistry
from freezeops.registry.rules import Loaded
from freezeops.storage.stored import Stored
from freezeops.storage.stored_mask import RawMask

_OLD = re.compile(r"(?:unseeded )?\d+(?: offsets| indices)?")
_KEY = "stored"


class _StoredText(tf.train.experimental.PythonState):
    """The one string that a checkpoint holds.

    Args:
        save: Returns the string.
        restore: Called with the content of a checkpoint that is restored.
    """

    def __init__(self, save: Callable[[], bytes], restore: Callable[[Stored], Any]):
        self._save = save
        self._restore = restore

    def serialize(self) -> bytes:
        return self._save()

    def deserialize(self, string_value: bytes) -> None:
        self._restore(Stored.from_bytes(bytes(string_value), "a checkpoint"))


class MaskStore(Tracked):
    """The masks of an optimizer, as TensorFlow tracks them.

    A checkpoint holds them as one string. A SavedModel holds the variables, which its functions use.

    Args:
        save: Returns the string.
        restore: Called with the content of a checkpoint that is restored.
    """

    def __init__(self, save: Callable[[], bytes], restore: Callable[[Stored], Any]):
        super().__init__()
        self._text = _StoredText(save, restore)
        self._variables: dict[str, tf.Variable] = {}
        self._restore = restore
        self._old_checkpoint: Any = None

    def add(self, key: str, variable: Variable) -> None:
        """Adds a variable that functions use."""
        self._variables[key] = tf_variable(variable)

    def clear(self) -> None:
        """Removes all variables."""
        self._variables = {}

    def children(self, save_type: str) -> dict[str, Any]:  # noqa: D102
        return {_KEY: self._text} if save_type == "checkpoint" else dict(self._variables)

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
        variables = child_variables(position.object_proto, checkpoint.object_graph_proto.nodes)
        reader = tf.train.load_checkpoint(checkpoint.save_path_string)
        if self._old_checkpoint is not checkpoint:
            self._restore(Stored(list(old_masks(variables, reader))))
            self._old_checkpoint = checkpoint
        return Ignored(reader.get_variable_to_dtype_map()[variables[name].checkpoint_key])


def child_variables(node: Any, nodes: Sequence[Any]) -> dict[str, Any]:
    """Returns the variables among the children of a node of a checkpoint's object graph, by the child's name.

    Args:
        node: The node.
        nodes: All nodes of the graph.

    Returns:
        Attributes of variables: each has a `full_name` and a `checkpoint_key`.
    """
    children = {child.local_name: nodes[child.node_id].attributes for child in node.children}
    return {name: attributes[0] for name, attributes in children.items() if attributes}


def old_masks(variables: Mapping[str, Any], reader: Any) -> Iterator[RawMask]:
    """Yields the masks of a checkpoint that was written before layouts were stored.

    Args:
        variables: The variables under an optimizer's masks, as `child_variables` returns them.
        reader: The checkpoint, from `tf.train.load_checkpoint`.
    """

    def bits(name: str) -> np.ndarray:
        return np.asarray(reader.get_tensor(variables[name].checkpoint_key))

    for name in sorted((name for name in variables if name.isdigit()), key=int):
        # `masked_optimizer/head_kernel_mask`: slashes of the path have become underscores.
        path = variables[name].full_name.rpartition("/")[2].removesuffix("_mask")
        waiting = f"unseeded {name}"
        yield RawMask(path, bits(name), bits(waiting) if waiting in variables else None, slashes=False)


def restore(registry: MaskRegistry, stored: Stored) -> None:
    """Takes masks from a checkpoint, before TensorFlow restores the slots.

    Args:
        registry: The masks of the optimizer.
        stored: What the checkpoint holds.

    Raises:
        ValueError: If they do not fit. Nothing has changed then.
    """
    if registry.built:
        found = registry.find_stored(Loaded(stored), registry.index).masks
        for position, mask in found.items():
            partition = registry.managed[position].partition
            config = partition.describe().config
            here = config if partition.mode == "compact" else {}
            if mask.mask is not None and mask.mode and (mask.mode == "compact" or here):
                there: dict[str, Any] = {"way": mask.mode, "layout": list(mask.mask.layout)}
                if mask.mode == "compact":
                    there["capacity"] = mask.capacity
                if there != here:
                    raise ValueError(
                        "A checkpoint of compact state must be restored into an optimizer with the same layout "
                        f"and room for each variable. Received: {there} for {partition.path!r}, which is "
                        f"{config}. Restore it before the optimizer is built, which then takes "
                        "both from the checkpoint, or load a `.weights.h5` file, whose slots are converted"
                    )
    registry.take_stored(stored)
