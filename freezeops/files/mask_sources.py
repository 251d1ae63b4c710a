"""Reads masks, and nothing else, out of what Keras and TensorFlow save.

For where Keras drops the optimizer at loading, or makes a plain one: the masks are in the file all the same.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensorflow as tf

from freezeops.files.checkpoints import old_masks
from freezeops.keras_compat.tracking import object_graph_nodes
from freezeops.masks.layout import Layout
from freezeops.registry import rules_config
from freezeops.registry.rules import Loaded
from freezeops.storage.stored import RawMask, Stored

_WEIGHTS = "model.weights.h5"
_CONFIG = "config.json"


def is_one(path: Path) -> bool:
    """Whether Keras or TensorFlow saved what is there."""
    if _checkpoint(path) is not None or path.name.endswith(".weights.json"):
        return True
    return path.is_file() and (zipfile.is_zipfile(path) or bool(h5py.is_hdf5(path)))


def read(path: Path) -> tuple[Stored, dict[str, Layout]]:
    """The masks in a file.

    Args:
        path: A `.keras`, `.weights.h5`, sharded `.weights.json` or `.h5` file, a checkpoint's prefix, or a folder of
            checkpoints, of which the last counts.

    Returns:
        The masks, and layouts of those that were stored without, by path.

    Raises:
        ValueError: If it holds no masks.
    """
    layouts: dict[str, Layout] = {}
    prefix = _checkpoint(path)
    if prefix is not None:
        stored = _of_checkpoint(prefix)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            config = json.loads(archive.read(_CONFIG)) if _CONFIG in names else {}
            layouts = _layouts(config)
            stored = Stored()
            if _WEIGHTS in names:
                with h5py.File(io.BytesIO(archive.read(_WEIGHTS)), "r") as file:
                    stored = _of_h5(file)
    elif path.name.endswith(".weights.json"):
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        entries: list[Stored] = []
        for name in sorted({name for shard in shards for name in ([shard] if isinstance(shard, str) else shard)}):
            with h5py.File(path.with_name(name), "r") as file:
                entries.append(_of_h5(file))
        stored = _together(entries)
    else:
        with h5py.File(path, "r") as file:
            stored = _of_h5(file)
    if not stored.masks and not stored.rules:
        raise ValueError(f"`path` must hold masks of a MaskedOptimizer. Received: path={str(path)!r}, which has none")
    return stored, layouts


def _of_h5(file: Any) -> Stored:
    """The masks of all optimizers in an HDF5 file."""
    groups: dict[str, dict[str, np.ndarray]] = {}

    def note(name: str, item: Any) -> None:
        group, _, key = name.rpartition("/")
        if key == "index" or key.startswith(("record ", "mask ", "unseeded ")):
            groups.setdefault(group, {})[key] = np.array(item)

    file.visititems(note)
    found = [Stored.from_entries(entries) for entries in groups.values() if _is_ours(entries)]
    text = file.attrs.get("training_config")
    if not found and text is not None:
        found = list(_of_config(json.loads(text)))
    return _together(found)


def _is_ours(entries: Mapping[str, np.ndarray]) -> bool:
    return any(key == "index" or key.startswith(("record ", "mask ")) for key in entries)


def _together(parts: list[Stored]) -> Stored:
    result = Stored()
    for part in parts:
        result.masks += part.masks
        # An index of variables where all have one.
        result.variables += part.variables
        result.rules += part.rules
    named = {name for name, _ in result.variables}
    return result if all(mask.name in named for mask in result.masks) else replace(result, variables=[])


def _of_config(config: Any) -> Iterator[Stored]:
    """The masks that a config holds, of all optimizers in it."""
    if isinstance(config, dict):
        if isinstance(rules := config.get("rules"), list) and "partitions" in config:
            yield from (rule.stored for rule in rules_config.from_config(rules) if isinstance(rule, Loaded))
        for value in config.values():
            yield from _of_config(value)
    elif isinstance(config, list):
        for value in config:
            yield from _of_config(value)


def _layouts(config: Any) -> dict[str, Layout]:
    """The layouts that a config holds, by path, of all optimizers in it."""
    found: dict[str, Layout] = {}
    if isinstance(config, dict):
        if isinstance(partitions := config.get("partitions"), dict):
            found |= {n: Layout(*p["layout"]) for n, p in partitions.items() if isinstance(p, dict) and "layout" in p}
        for value in config.values():
            found |= _layouts(value)
    elif isinstance(config, list):
        for value in config:
            found |= _layouts(value)
    return found


def _checkpoint(path: Path) -> str | None:
    """The prefix of a checkpoint; `None`: there is none."""
    if path.is_dir():
        return tf.train.latest_checkpoint(str(path))
    prefix = str(path).removesuffix(".index")
    return prefix if Path(f"{prefix}.index").exists() else None


def _of_checkpoint(prefix: str) -> Stored:
    reader = tf.train.load_checkpoint(prefix)
    found = []
    for key in reader.get_variable_to_shape_map():
        if key.endswith("_masks/stored/.ATTRIBUTES/py_state"):
            found.append(Stored.from_bytes(bytes(reader.get_tensor(key)), prefix))
    return _together(found) if found else Stored(list(_old_checkpoint(reader)))


def _old_checkpoint(reader: Any) -> Iterator[RawMask]:
    """The masks of a checkpoint that was written before layouts were stored."""
    nodes = object_graph_nodes(reader)
    for node in nodes:
        for child in node.children:
            if child.local_name != "_masks":
                continue
            variables = {
                each.local_name: nodes[each.node_id].attributes[0]
                for each in nodes[child.node_id].children
                if nodes[each.node_id].attributes
            }
            yield from old_masks(variables, reader)
