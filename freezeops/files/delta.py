"""Delta files: the entries of a model that training changed, to be applied to the base model.

In sparse fine-tuning few entries differ from the base (LT-SFT, Ansell et al. 2022; SHiRA, Bhardwaj et al. 2024), so
that one base and many small files stand for many models.

A `checkedfile` whose header has `variables`, a list of `path`, `shape`, `dtype`, `base` (SHA-256 of the base's bytes),
`changed` (number of entries) and `positions` (`"indices"` or `"bits"`: the form of their positions); behind it, for
each variable, the positions and the new values.
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
    """Writes the entries of a model that differ from its base in any bit to a file.

    All weights of the model are compared, also those that no optimizer trains, such as
    moving statistics. A crash leaves the old file or the new one.

    Args:
        model: The trained model.
        base: The model that it was trained from, or a mapping of variable paths to arrays:
            `{v.path: v.numpy() for v in model.weights}` before training.
        path: The file. An existing one is replaced and its mode kept; of a symbolic link, the target is replaced.

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
    """Turns the weights of a base model into those of the trained model, bit for bit.

    Args:
        model: A model with the weights of the base.
        path: A file that `export_delta` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, altered, not a delta file or contradicts
            itself, or if the model is not the file's base. Nothing has changed then.

    Example:

    >>> import os, tempfile
    >>> import keras
    >>> import numpy as np
    >>> import freezeops as fz
    >>> head = keras.layers.Dense(2)
    >>> model = keras.Sequential([keras.Input((4,)), head])
    >>> base = model.get_weights()
    >>> arrays = {variable.path: variable.numpy() for variable in model.weights}
    >>> head.set_weights([head.kernel.numpy(), np.array([0.5, 0.0])])  # in place of training
    >>> path = os.path.join(tempfile.mkdtemp(), "head.delta")
    >>> fz.export_delta(model, arrays, path)
    >>> model.set_weights(base)
    >>> fz.apply_delta(model, path)
    >>> head.bias.numpy()
    array([0.5, 0. ], dtype=float32)
    """
    _assign(_read_changes(Path(path), model))


def _read_changes(path: Path, model: keras.Model) -> list["_Change"]:
    """Returns the changes that a delta makes to a model, after all checks of `apply_delta`."""
    header, content = checkedfile.read(path, _KIND)
    try:
        entries = _parse(header)
    except ValueError as error:
        raise _refusal(path, f"its header does not describe weights: {error}") from None
    weights = _weights(model)
    names = {entry.path: name for name, entry in _matched(weights, entries, "file").items()}
    changes: list[_Change] = []
    offset = 0
    for entry in entries.values():  # in the order of the file
        variable = weights[names[entry.path]]
        array = np.asarray(variable.numpy())
        if _checksum(array) != entry.base:
            raise ValueError(
                "A delta must be applied to the weights that it was made against. Received: other values in "
                f"{names[entry.path]!r} than the base of {str(path)!r} has"
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
    return changes


class _Entry(NamedTuple):
    """The header of one variable."""

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
        """Length of the positions of the changed entries in bytes."""
        if self.positions == "bits":
            return (self.size + 7) // 8
        return self.changed * _index_type(self.size).itemsize


class _Change(NamedTuple):
    """Changes to one variable: positions in the flattened variable, and the old and the new values there."""

    variable: keras.Variable
    positions: np.ndarray
    old: np.ndarray
    new: np.ndarray

    def assign(self, values: np.ndarray) -> None:
        array = np.array(self.variable.numpy(), order="C")
        array.reshape(-1)[self.positions] = values
        self.variable.assign(array)


def _assign(changes: list[_Change]) -> None:
    """Writes changes into their variables: all of them or, on an error, none."""
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
    """Returns the headers of all variables, by the path in the file.

    Raises:
        ValueError: If one is incomplete or contradicts itself.
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
    """Returns the positions of the changed entries in the flattened variable.

    Raises:
        ValueError: If their number is not that of the header, or they do not ascend, or lie outside of the variable.
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


def _refusal(path: Path, problem: str) -> ValueError:
    return checkedfile.refusal(path, _KIND, problem)


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


def _matched(weights: Mapping[str, keras.Variable], other: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns the element of `other` for each weight, by the path of the weight.

    Raises:
        ValueError: Unless paths (but for Keras's counters), shapes and dtypes agree.
    """
    positions = saved_names.match(list(other), list(weights))
    if positions is None:
        raise ValueError(
            f"The {source} must have the weights of the model. Received: "
            f"{short(sorted(other.keys() - weights.keys()))} that the model has not, and not "
            f"{short(sorted(weights.keys() - other.keys()))} that it has"
        )
    values = list(other.values())
    matched = {name: values[position] for name, position in zip(weights, positions, strict=True)}
    for name, variable in weights.items():
        expected = tuple(variable.shape), variable.numpy().dtype.name
        received = tuple(matched[name].shape), str(matched[name].dtype)
        if expected != received:
            raise ValueError(
                f"The {source} must have the shapes and dtypes of the model's weights. Received: {received} "
                f"for {name!r}, which is {expected}"
            )
    return matched


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the entries of a flattened array as unsigned integers."""
    array = np.ascontiguousarray(array).reshape(-1)
    return array.view(f"u{array.dtype.itemsize}")


def _checksum(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
