"""Checks of the arrays and indices that users give, with errors that name the argument."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from freezeops.masks.layout import Shape
from freezeops.messages import short


def as_array(value: Any, name: str) -> np.ndarray:
    """Returns an argument as an array.

    Args:
        value: An array, a list or a number.
        name: Name of the argument, for the message.

    Raises:
        TypeError: If NumPy makes no array of it: a set, a `dict.values()`, a generator.
        ValueError: If it is a list of lists that differ in length.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be an array, or a list of lists of one length. Received: {name}={short(value)}: {error}"
        ) from None
    if array.dtype == object:
        unpacked = not array.ndim and isinstance(value, Iterable)
        hint = f" Write `list({name})`." if unpacked else ""
        raise TypeError(
            f"`{name}` must be an array or a list, of booleans or of integers. Received: {name}={short(value)} of "
            f"type {type(value).__name__}.{hint}"
        )
    return array


def check_not_flags(array: np.ndarray, size: int, name: str) -> None:
    """Raises if integers could be meant as booleans: a vector of zeros and ones as long as the axis.

    `[0, 1]` on an axis of length 2 is not refused: as indices it names both entries. Indices are hardly ever repeated
    so often that there are exactly as many as the axis is long.

    Args:
        array: Integer indices.
        size: Length of the axis.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If both meanings are possible.
    """
    if array.shape != (size,) or not np.issubdtype(array.dtype, np.integer) or not size:
        return
    if array.min() >= 0 and array.max() <= 1 and len(np.unique(array)) < size:
        raise ValueError(
            f"`{name}` must be clearly booleans or clearly indices: zeros and ones, as many as the axis is long, could "
            f"be either. Received: {name}={short(array)}. Write `np.array({name}, bool)` to name the entries where it "
            f"is 1, or `np.unique({name})` to name the entries 0 and 1."
        )


def check_indices(array: np.ndarray, size: int, name: str) -> np.ndarray:
    """Returns integer indices along an axis, after checking them.

    Args:
        array: The indices; an empty array of any dtype holds none.
        size: Length of the axis. Negative indices count from its end.
        name: Name of the argument, for the message.

    Raises:
        TypeError: If `array` is not of an integer type.
        ValueError: If it has more than one axis, or could be meant as booleans (`check_not_flags`).
        IndexError: If an index is outside the axis.
    """
    if not array.size:
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"`{name}` must be booleans, integer indices or an index expression such as "
            f"`np.s_[:10]`. Received: {name} of dtype={array.dtype}"
        )
    if array.ndim > 1:
        raise ValueError(
            f"`{name}` must be a vector where it holds integer indices along one axis. Received: {name} of "
            f"shape={array.shape}. For a mask of zeros and ones write `{name}.astype(bool)`; for coordinates of "
            f"entries, a tuple of one index array per axis, such as `np.nonzero(...)` gives."
        )
    if array.min() < -size or array.max() >= size:
        raise IndexError(
            f"`{name}` must hold indices from {-size} to {size - 1}. "
            f"Received: indices from {array.min()} to {array.max()}"
        )
    check_not_flags(array, size, name)
    return array


def check_broadcast(array_shape: Shape, shape: Shape, name: str) -> None:
    """Raises unless an array broadcasts to `shape` by axes of length 1 or as a scalar.

    Args:
        array_shape: Shape of the array.
        shape: Shape of the tensor.
        name: Name of the argument, for the message.

    Raises:
        ValueError: If the rank differs, or an axis is neither 1 nor the tensor's.
    """
    if not array_shape:
        return
    if len(array_shape) != len(shape):
        raise ValueError(
            f"`{name}` must be a scalar or have the rank of its variable, {len(shape)}. Received: "
            f"{name}.shape={array_shape}, shape={shape}.{_rank_hint(array_shape, shape, name)}"
        )
    if any(size not in (1, full) for size, full in zip(array_shape, shape, strict=True)):
        raise ValueError(
            f"`{name}` must have the shape of its variable, or 1 along axes to broadcast. "
            f"Received: {name}.shape={array_shape}, shape={shape}"
        )


def _rank_hint(array_shape: Shape, shape: Shape, name: str) -> str:
    """Returns the indexing that makes an array of smaller rank fit, or "" if its axes do not tell."""
    missing = len(shape) - len(array_shape)
    if missing < 0:
        return ""
    hints = []
    for first in range(missing + 1):
        if shape[first : first + len(array_shape)] == array_shape:
            parts = ["None"] * first + [":"] * len(array_shape) + ["None"] * (missing - first)
            hints.append(f"`{name}[{', '.join(parts)}]`")
    return f" Write {' or '.join(hints)}." if hints else ""


def flags(entries: Any, size: int, name: str) -> np.ndarray:
    """Returns a boolean vector of `size` entries from booleans or integer indices; errors as for `check_indices`."""
    array = as_array(entries, name)
    if array.dtype == np.bool_:
        if array.shape != (size,):
            raise ValueError(
                f"`{name}` must be a boolean vector of length {size} or integer indices. "
                f"Received: {name}.shape={array.shape}"
            )
        return array
    named = np.zeros(size, bool)
    named[check_indices(array, size, name)] = True
    return named
