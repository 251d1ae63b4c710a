"""Reads masks alone from files that Keras and TensorFlow saved.

Some ways of loading drop the optimizer or make a plain one. The masks are in the file all the same.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

from freezeops.files.checkpoints import child_variables, old_masks
from freezeops.keras_compat.tracking import object_graph_nodes
from freezeops.masks.layout import Layout
from freezeops.registry import rules_config
from freezeops.registry.rules import Loaded
from freezeops.storage.entry_keys import parse_entry_key
from freezeops.storage.stored import Stored
from freezeops.storage.stored_mask import RawMask, StoredMask

_WEIGHTS = "model.weights.h5"
_CONFIG = "config.json"
_CHECKPOINT_KEY = "_masks/stored/.ATTRIBUTES/py_state"


def is_source(path: Path) -> bool:
    """Returns True for a file, or a prefix, that Keras or TensorFlow saved."""
    if _checkpoint_prefix(path) is not None or path.name.endswith(".weights.json"):
        return True
    return path.is_file() and (zipfile.is_zipfile(path) or bool(h5py.is_hdf5(path)))


def read(path: Path) -> tuple[Stored, dict[str, Layout]]:
    """Reads the masks in a file.

    Args:
        path: A `.keras`, `.weights.h5`, sharded `.weights.json` or `.h5` file, a checkpoint's prefix, or a folder of
            checkpoints, of which the last counts.

    Returns:
        The masks, and layouts of those that were stored without, by path.

    Raises:
        ValueError: If it holds no masks.
    """
    layouts: dict[str, Layout] = {}
    prefix = _checkpoint_prefix(path)
    if prefix is not None:
        stored = _read_checkpoint(prefix)
    elif zipfile.is_zipfile(path):
        stored, layouts = _read_keras(path)
    elif path.name.endswith(".weights.json"):
        stored = _read_shards(path)
    else:
        with h5py.File(path, "r") as file:
            stored = _read_h5(file)
    if not stored.masks and not stored.rules:
        raise ValueError(f"`path` must hold masks of a MaskedOptimizer. Received: path={str(path)!r}, which has none")
    return stored, layouts


def _read_keras(path: Path) -> tuple[Stored, dict[str, Layout]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        config = json.loads(archive.read(_CONFIG)) if _CONFIG in names else {}
        stored = Stored()
        if _WEIGHTS in names:
            with h5py.File(io.BytesIO(archive.read(_WEIGHTS)), "r") as file:
                stored = _read_h5(file)
    layouts: dict[str, Layout] = {}
    for optimizer in _masked_optimizers(config):
        for name, partition in optimizer["partitions"].items():
            if isinstance(partition, dict) and "layout" in partition:
                layouts[name] = Layout(*partition["layout"])
    return stored, layouts


def _read_shards(path: Path) -> Stored:
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    names = {name for shard in shards for name in ([shard] if isinstance(shard, str) else shard)}
    found = []
    for name in sorted(names):
        with h5py.File(path.with_name(name), "r") as file:
            found.append(_read_h5(file))
    return _joined(found)


def _read_h5(file: Any) -> Stored:
    """Returns the masks of all optimizers in an HDF5 file."""
    groups: dict[str, dict[str, np.ndarray]] = {}

    def note(name: str, item: Any) -> None:
        group, _, text = name.rpartition("/")
        if parse_entry_key(text) is not None:
            groups.setdefault(group, {})[text] = np.array(item)

    file.visititems(note)
    found = [Stored.from_entries(entries) for entries in groups.values()]
    config = file.attrs.get("training_config")
    if not found and config is not None:
        for optimizer in _masked_optimizers(json.loads(config)):
            if isinstance(optimizer.get("rules"), list):
                rules = rules_config.from_config(optimizer["rules"])
                found += [rule.stored for rule in rules if isinstance(rule, Loaded)]
    return _joined(found)


def _joined(parts: Sequence[Stored]) -> Stored:
    """Returns the masks of several optimizers as those of one."""
    result = Stored()
    for part in parts:
        result.masks += part.masks
        result.variables += part.variables
        result.rules += part.rules
    named = {name for name, _ in result.variables}
    # A list of variables that does not name all would hide the others.
    return result if all(mask.name in named for mask in result.masks) else replace(result, variables=[])


def _masked_optimizers(config: Any) -> Iterator[dict[str, Any]]:
    """Yields the configs of all masked optimizers in a config."""
    if isinstance(config, dict):
        if isinstance(config.get("partitions"), dict):
            yield config
        for value in config.values():
            yield from _masked_optimizers(value)
    elif isinstance(config, list):
        for value in config:
            yield from _masked_optimizers(value)


def _checkpoint_prefix(path: Path) -> str | None:
    """Returns the prefix of a checkpoint, or None if there is none."""
    if path.is_dir():
        return tf.train.latest_checkpoint(str(path))
    prefix = str(path).removesuffix(".index")
    return prefix if Path(f"{prefix}.index").exists() else None


def _read_checkpoint(prefix: str) -> Stored:
    reader = tf.train.load_checkpoint(prefix)
    keys = [key for key in reader.get_variable_to_shape_map() if key.endswith(_CHECKPOINT_KEY)]
    if keys:
        return _joined([Stored.from_bytes(bytes(reader.get_tensor(key)), prefix) for key in keys])
    # Before layouts were stored.
    nodes = object_graph_nodes(reader)
    masks: list[StoredMask | RawMask] = []
    for node in nodes:
        for child in node.children:
            if child.local_name == "_masks":
                masks += old_masks(child_variables(nodes[child.node_id], nodes), reader)
    return Stored(masks)
