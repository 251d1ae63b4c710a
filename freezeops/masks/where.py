"""The `where` of `freeze`, `unfreeze` and `train_only`: entries of one variable, as a mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from freezeops.masks.checks import as_array, check_broadcast, check_indices, check_not_flags
from freezeops.masks.layout import Shape
from freezeops.masks.mask import Mask
from freezeops.messages import short


@dataclass(frozen=True)
class Booleans:
    """A boolean array of the user's, packed once; axes of length 1 broadcast, a scalar stands for all entries.

    Attributes:
        packed: The array as a mask of its own shape.
    """

    packed: Mask

    @property
    def array(self) -> np.ndarray:
        """The array."""
        return np.array(self.packed.to_numpy())

    def as_mask(self, shape: Shape, name: str) -> Mask:
        """Returns the array as a mask of a variable's shape.

        Args:
            shape: The variable's shape.
            name: The argument's name, for the message.

        Raises:
            ValueError: If the array does not fit.
        """
        if self.packed.shape == tuple(shape):
            return self.packed
        check_broadcast(self.packed.shape, shape, name)
        return Mask.from_array(self.array, shape)


def named_entries(where: Any, shape: Shape) -> Mask:
    """Returns a mask that is True at the entries that `where` names.

    Args:
        where: `None` for all; a boolean array (axes of length 1 broadcast, a scalar
            stands for all); an index expression (a slice, or a tuple as `np.s_`
            makes it); or integer indices along the first axis. As many zeros and ones
            as an axis is long could be booleans as well: they are refused, unless each
            occurs once (`[0, 1]` on an axis of length 2 names both entries).
        shape: Shape of the variable.

    Returns:
        A `Mask`, with one bit per row or column if no more are needed.

    Raises:
        TypeError: If `where` is a `Mask`, or neither booleans, integers nor an index.
        ValueError: If a boolean array does not fit the shape, or integers could be meant
            as booleans.
        IndexError: If an index is outside of the variable.
    """
    if isinstance(where, Mask):
        raise TypeError(
            "`where` must name the entries to act on: a boolean array, an index expression or "
            "integer indices. Received: an fz.Mask, whose True means trainable. Use "
            "`register_mask(target, mask)`, or pass `mask.to_numpy()` to act where it is True."
        )
    if where is None:
        return Mask.trainable(shape)
    if isinstance(where, Booleans):
        return where.as_mask(shape, "where")
    if where is Ellipsis or isinstance(where, slice | tuple):
        return _indexed(where if isinstance(where, tuple) else (where,), shape)
    array = as_array(where, "where")
    if array.dtype == np.bool_:
        check_broadcast(array.shape, shape, "where")
        return Mask.from_array(array, shape)
    if not shape:
        raise IndexError(
            "`where` must be booleans for a scalar variable, which has no axis to index. Received: "
            f"where={short(where)}"
        )
    return Mask.rows(shape, check_indices(array, shape[0], "where"))


def _indexed(index: tuple, shape: Shape) -> Mask:
    """Returns a mask of the entries of an index expression, from an array of length 1 along whole axes."""
    small = list(shape)
    if not any(part is None or _is_boolean(part) for part in index):
        # Each part stands for one axis, so whole axes need length 1 only.
        index = _without_ellipsis(index, len(shape))
        arrays = [axis for axis, part in enumerate(index) if np.ndim(part) and axis < len(shape)]
        if len(arrays) == 1:  # Several are coordinates of entries, and their zeros and ones repeat.
            check_not_flags(np.asarray(index[arrays[0]]), shape[arrays[0]], "where")
        for axis, size in enumerate(shape):
            whole = axis >= len(index) or _is_whole(index[axis])
            small[axis] = min(size, 1) if whole else size
    flags = np.zeros(small, bool)
    try:
        flags[index] = True
    except (IndexError, TypeError, ValueError) as error:
        raise IndexError(
            f"`where` must be a valid index of a variable of shape {shape}. Received: where={short(index)}: {error}"
        ) from None
    return Mask.from_array(flags, shape)


def _is_boolean(part: Any) -> bool:
    return not isinstance(part, slice) and np.asarray(part).dtype == np.bool_


def _is_whole(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _without_ellipsis(index: tuple, rank: int) -> tuple:
    """Returns an index with a single `...` written out as slices."""
    positions = [i for i, part in enumerate(index) if part is Ellipsis]
    if len(positions) != 1:
        return index
    at = positions[0]
    missing = max(rank - (len(index) - 1), 0)
    return index[:at] + (slice(None),) * missing + index[at + 1 :]
