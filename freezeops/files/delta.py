"""Files of what training changed in a model, for the model that it was trained from.

Of a sparse fine-tuning few entries differ from the base (LT-SFT, Ansell et al. 2022; SHiRA, Bhardwaj et al. 2024), so
that one base and many small files stand for many models.

A `checkedfile` whose header has `variables`, a list of `path`, `shape`, `dtype`, `base` (SHA-256 of the base's bytes),
`changed` (how many entries) and `positions` (`"indices"` or `"bits"`: how their positions are written); behind it, for
each, the positions and the new values.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from freezeops.masks import packing
from freezeops.messages import short
from freezeops.storage import checkedfile, saved_names

_KIND = checkedfile.Kind(b"freezeops delta\n", 1, "delta file", "export_delta")


def export_delta(model: keras.Model, base: keras.Model | Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes the entries in which a model differs from its base, by bits.

    All weights of the model are compared, also those that no optimizer trains, such as
    moving statistics. A crash leaves the old file or the new one.

    Args:
        model: The trained model.
        base: The model that it was trained from, or a mapping of variable paths to arrays:
            `{v.path: v.numpy() for v in model.weights}` before training.
        path: The file; an existing one is replaced, with its mode kept; of a symbolic link its target is.

    Raises:
        ValueError: If two weights have one path, the two differ in paths, shapes or dtypes, or `path` is that of a
            folder, a device or the like.
    """
    weights = _weights(model)
    old = _matched(weights, _arrays(base), "base")
    entries, content = [], []
    for name, variable in weights.items():
        new = np.ascontiguousarray(variable.numpy())
        changed = np.flatnonzero(_bits(new) != _bits(old[name]))
        as_indices = changed.astype(_index_type(new.size)).tobytes()
        as_bits = b""
        if len(as_indices) > (new.size + 7) // 8:
            flags = np.zeros(new.size, bool)
            flags[changed] = True
            as_bits = packing.pack_bits(flags).tobytes()
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
        ValueError: If the file is truncated, altered or none of ours, if what it says
            does not fit together, or if the model is not the file's base. Nothing has
            changed then.
    """
    path = Path(path)
    header, content = checkedfile.read(path, _KIND)
    try:
        entries = _parse(header)
    except ValueError as error:
        raise _refusal(path, f"its header does not describe weights: {error}") from None
    weights = _weights(model)
    own_names = {entry.path: name for name, entry in _matched(weights, entries, "file").items()}
    changes: list[_Change] = []
    offset = 0
    for entry in entries.values():  # in the order of the file
        variable = weights[own_names[entry.path]]
        array = np.asarray(variable.numpy())
        if _checksum(array) != entry.base:
            raise ValueError(
                "A delta must be applied to the weights that it was made against. Received: other values in "
                f"{own_names[entry.path]!r} than the base of {str(path)!r} has"
            )
        length = entry.position_bytes + entry.changed * array.itemsize
        if length > len(content) - offset:
            raise _refusal(path, f"the changes of {short(entry.path)} are missing")
        try:
            positions = _positions(entry, content, offset)
        except ValueError as error:
            raise _refusal(path, f"the positions of {short(entry.path)} are wrong: {error}") from None
        new = np.frombuffer(content, array.dtype, entry.changed, offset + entry.position_bytes)
        offset += length
        if entry.changed:
            changes.append(_Change(variable, positions, array.reshape(-1)[positions], new))
    if offset != len(content):
        raise _refusal(path, f"there are {len(content) - offset} bytes that belong to no weight")
    _assign(changes)


class _Entry(NamedTuple):
    """What a file says of one variable."""

    shape: tuple[int, ...]
    path: str
    dtype: str
    base: str
    changed: int
    positions: str

    @property
    def size(self) -> int:
        """Number of entries of the variable."""
        return math.prod(self.shape)

    @property
    def position_bytes(self) -> int:
        """Bytes of the positions of the changed entries."""
        if self.positions == "bits":
            return (self.size + 7) // 8
        return self.changed * _index_type(self.size).itemsize


class _Change(NamedTuple):
    """What becomes of one variable: positions in the flattened variable, values there before and from then on."""

    variable: keras.Variable
    positions: np.ndarray
    old: np.ndarray
    new: np.ndarray

    def assign(self, values: np.ndarray) -> None:
        array = np.array(self.variable.numpy(), order="C")
        array.reshape(-1)[self.positions] = values
        self.variable.assign(array)


def _assign(changes: list[_Change]) -> None:
    """Carries changes out, all of them or, should it fail half-way, none."""
    begun: list[_Change] = []
    try:
        for change in changes:
            begun.append(change)
            change.assign(change.new)
    except BaseException:
        for change in begun:
            change.assign(change.old)
        raise


def _parse(header: Any) -> dict[str, _Entry]:
    """What a header says of each variable, by the path in the file.

    Raises:
        ValueError: If it cannot be so.
    """
    entries: dict[str, _Entry] = {}
    for given in checkedfile.field(header, "variables", list):
        texts = {name: checkedfile.field(given, name, str) for name in ("path", "dtype", "base", "positions")}
        shape, changed = checkedfile.sizes(given, "shape"), checkedfile.field(given, "changed", int)
        entry = _Entry(shape=shape, changed=changed, **texts)
        if not 0 <= changed <= entry.size:
            raise ValueError(f"`changed` must be from 0 to {entry.size}. Received: {short(changed)}")
        if entry.positions not in ("indices", "bits"):
            raise ValueError(f"`positions` must be 'indices' or 'bits'. Received: {short(entry.positions)}")
        if entry.path in entries:
            raise ValueError(f"every variable must have a path of its own. Received: {short(entry.path)} twice")
        entries[entry.path] = entry
    return entries


def _positions(entry: _Entry, content: bytes, offset: int) -> np.ndarray:
    """The positions of the changed entries in the flattened variable.

    Raises:
        ValueError: If these are not as many as the header says, in ascending order and inside of the variable.
    """
    if entry.positions == "bits":
        packed = np.frombuffer(content, np.uint8, entry.position_bytes, offset)
        positions = packing.bit_indices(packed, entry.size)
        if len(positions) != entry.changed:
            raise ValueError(f"{len(positions)} bits are set. Received: changed={entry.changed}")
        return positions
    positions = np.frombuffer(content, _index_type(entry.size), entry.changed, offset)
    if len(positions) and (positions[-1] >= entry.size or (positions[1:] <= positions[:-1]).any()):
        raise ValueError(f"they must ascend, up to {entry.size - 1}. Received: {short(positions)}")
    return positions


def _index_type(size: int) -> np.dtype:
    return np.dtype(np.uint32 if size <= 2**32 else np.uint64)


def _refusal(path: Path, what: str) -> ValueError:
    return checkedfile.refusal(path, _KIND, what)


def _weights(model: keras.Model) -> dict[str, keras.Variable]:
    weights = {variable.path: variable for variable in model.weights}
    if len(weights) < len(model.weights):
        paths = [variable.path for variable in model.weights]
        twice = sorted({name for name in paths if paths.count(name) > 1})
        raise ValueError(f"Every weight must have a path of its own. Received: {short(twice)} more than once")
    return weights


def _arrays(base: Any) -> dict[str, np.ndarray]:
    if isinstance(base, keras.Model):
        return {name: variable.numpy() for name, variable in _weights(base).items()}
    if isinstance(base, Mapping):
        return {name: np.asarray(value) for name, value in base.items()}
    raise TypeError(f"`base` must be a model, or map paths of variables to arrays. Received: base={short(base)}")


def _matched(weights: Mapping[str, keras.Variable], other: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What stands for each weight, by the weight's path.

    Raises:
        ValueError: Unless paths (but for Keras's counters), shapes and dtypes agree.
    """
    positions = saved_names.match(list(other), list(weights))
    if positions is None:
        raise ValueError(
            f"The {what} must have the weights of the model. Received: {short(sorted(other.keys() - weights.keys()))} "
            f"that the model has not, and not {short(sorted(weights.keys() - other.keys()))} that it has"
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
