"""Files of what training changed in a model, for the model that it was trained from.

Of a sparse fine-tuning few entries differ from the base (LT-SFT, Ansell et al. 2022; SHiRA, Bhardwaj et al. 2024), so
that one base and many small files stand for many models.

A `checkedfile` whose header has `variables`, a list of `path`, `shape`, `dtype`, `base` (SHA-256 of the base's bytes),
`changed` (how many entries) and `positions` (`"indices"` or `"bits"`: how their positions are written); behind it, for
each, the positions and the new values.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from freezeops import checkedfile, naming, ops

_KIND = checkedfile.Kind(b"freezeops delta\n", 1, "delta file", "export_delta")


def export_delta(model: keras.Model, base: keras.Model | Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes the entries in which a model differs from its base, by bits.

    All weights of the model are compared, also those that no optimizer trains, such as
    moving statistics. A crash leaves the old file or the new one.

    Args:
        model: The trained model.
        base: The model that it was trained from, or a mapping of variable paths to arrays:
            `{v.path: v.numpy() for v in model.weights}` before training.
        path: The file; an existing one is replaced.

    Raises:
        ValueError: If two weights have one path, or the two differ in paths, shapes or dtypes.
    """
    weights = _weights(model)
    old = _matched(weights, _arrays(base), "base")
    entries, content = [], []
    for name, variable in weights.items():
        new = np.ascontiguousarray(variable.numpy())
        changed = np.flatnonzero(_bits(new) != _bits(old[name]))
        index_type = np.uint32 if new.size <= 2**32 else np.uint64
        as_indices = changed.astype(index_type).tobytes()
        as_bits = b""
        if len(as_indices) > (new.size + 7) // 8:
            flags = np.zeros(new.size, bool)
            flags[changed] = True
            as_bits = ops.pack_bits(flags).tobytes()
        entries.append(
            {
                "path": name,
                "shape": list(new.shape),
                "dtype": new.dtype.name,
                "base": _checksum(old[name]),
                "changed": len(changed),
                "positions": "bits" if as_bits else "indices",
            }
        )
        content += [as_bits or as_indices, new.reshape(-1)[changed].tobytes()]
    checkedfile.write(Path(path), _KIND, {"variables": entries}, b"".join(content))


def apply_delta(model: keras.Model, path: str | os.PathLike) -> None:
    """Gives a model that has the base's weights those of the trained model, bit for bit.

    Args:
        model: A model with the weights of the base.
        path: A file that `export_delta` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, altered or none of ours, or if the model is
            not the file's base. Nothing has changed then.
    """
    header, content = checkedfile.read(Path(path), _KIND)
    weights = _weights(model)
    entries = [_Entry(tuple(entry.pop("shape")), **entry) for entry in header["variables"]]
    own_names = {entry: name for name, entry in _matched(weights, {e.path: e for e in entries}, "file").items()}
    values: list[tuple[keras.Variable, np.ndarray]] = []
    offset = 0
    for entry in entries:  # in the order of the file
        name = own_names[entry]
        array = np.array(weights[name].numpy())
        if _checksum(array) != entry.base:
            raise ValueError(
                "A delta must be applied to the weights that it was made against. Received: other values in "
                f"{name!r} than the base of {str(path)!r} has"
            )
        count, size = entry.changed, array.size
        if entry.positions == "bits":
            packed = np.frombuffer(content, np.uint8, (size + 7) // 8, offset)
            changed, length = ops.bit_indices(packed, size), packed.nbytes
        else:
            changed = np.frombuffer(content, np.uint32 if size <= 2**32 else np.uint64, count, offset)
            length = changed.nbytes
        new = np.frombuffer(content, array.dtype, count, offset + length)
        offset += length + new.nbytes
        if count:
            array.reshape(-1)[changed] = new
            values.append((weights[name], array))
    for variable, array in values:
        variable.assign(array)


class _Entry(NamedTuple):
    """What a file says of one variable."""

    shape: tuple[int, ...]
    path: str
    dtype: str
    base: str
    changed: int
    positions: str


def _weights(model: keras.Model) -> dict[str, keras.Variable]:
    weights = {variable.path: variable for variable in model.weights}
    if len(weights) < len(model.weights):
        paths = [variable.path for variable in model.weights]
        twice = sorted({name for name in paths if paths.count(name) > 1})
        raise ValueError(f"Every weight must have a path of its own. Received: {twice} more than once")
    return weights


def _arrays(base: Any) -> dict[str, np.ndarray]:
    if isinstance(base, keras.Model):
        return {name: variable.numpy() for name, variable in _weights(base).items()}
    if isinstance(base, Mapping):
        return {name: np.asarray(value) for name, value in base.items()}
    raise TypeError(f"`base` must be a model, or map paths of variables to arrays. Received: base={base!r}")


def _matched(weights: Mapping[str, keras.Variable], other: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What stands for each weight, by the weight's path.

    Raises:
        ValueError: Unless paths (but for Keras's counters), shapes and dtypes agree.
    """
    positions = naming.match(list(other), list(weights))
    if positions is None:
        raise ValueError(
            f"The {what} must have the weights of the model. Received: {sorted(other.keys() - weights.keys())} "
            f"that the model has not, and not {sorted(weights.keys() - other.keys())} that it has"
        )
    values = list(other.values())
    matched = {name: values[position] for name, position in zip(weights, positions, strict=True)}
    for name, variable in weights.items():
        expected = tuple(variable.shape), variable.numpy().dtype.name
        received = tuple(matched[name].shape), str(matched[name].dtype)
        if expected != received:
            raise ValueError(
                f"The {what} must have the shapes and dtypes of the model's weights. Received: {received} "
                f"for {name!r}, which is {expected}"
            )
    return matched


def _bits(array: np.ndarray) -> np.ndarray:
    """The entries of a flattened array as integers."""
    array = np.ascontiguousarray(array).reshape(-1)
    return array.view(f"u{array.dtype.itemsize}")


def _checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
