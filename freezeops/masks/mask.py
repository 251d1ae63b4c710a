"""The `Mask` value type: an immutable, bit-packed boolean mask. True = trainable."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from freezeops.masks import layout as layouts
from freezeops.masks import packing
from freezeops.masks.layout import Layout, Shape
from freezeops.messages import short


class Mask:
    """Which entries of a tensor are trainable (True) and which are frozen (False).

    A mask is immutable and takes one bit per entry, or one bit per row, column or
    channel where it is the same along the other axes. Make one with
    `Mask.from_array`, `Mask.trainable`, `Mask.frozen`, `Mask.rows` or
    `Mask.columns`, and combine masks of one shape with `&`, `|`, `^` and `~`.

    Example:

    >>> mask = fz.Mask.rows((50_000, 64), [7, 12])   # rows 7 and 12 are trainable
    >>> mask.count()
    128
    >>> (~mask).density
    0.99996
    """

    __module__ = "freezeops.mask"  # as pickles have it
    __slots__ = ("_layout", "_packed", "_shape")

    def __init__(self, shape: Sequence[int], layout: Layout, packed: np.ndarray):
        """Wraps packed bits; most users want `Mask.from_array`.

        Args:
            shape: Shape of the tensor.
            layout: `(outer, kept, inner)` with `outer * kept * inner` equal to the
                number of entries.
            packed: `uint8` vector of `ceil(kept / 8)` bytes, little bit order,
                1 = trainable. Bits beyond `kept` are ignored.

        Raises:
            ValueError: If layout, shape and length do not belong together.
        """
        shape = _check_shape(shape)
        layout = _check_layout(layout)
        if layout.size != math.prod(shape):
            raise ValueError(
                "`layout` must be (outer, kept, inner) with a product equal to the number of "
                f"entries of `shape`. Received: layout={tuple(layout)}, shape={shape}"
            )
        packed = np.array(packed, copy=True)
        if packed.dtype != np.uint8 or packed.shape != (layout.packed_bytes,):
            raise ValueError(
                f"`packed` must be a uint8 vector of ceil(kept / 8) = {layout.packed_bytes} bytes. "
                f"Received: packed of dtype={packed.dtype} and shape={packed.shape}"
            )
        if layout.kept % 8:
            packed[-1] &= (1 << (layout.kept % 8)) - 1
        packed.flags.writeable = False
        self._shape = shape
        self._layout = layout
        self._packed = packed

    # Ways to make one.

    @classmethod
    def from_array(cls, array: Any, shape: Sequence[int] | None = None) -> "Mask":
        """A mask from booleans.

        Args:
            array: Array-like of booleans, True = trainable. Axes of length 1
                broadcast; a scalar stands for every entry.
            shape: Shape of the tensor. Defaults to the array's own.

        Returns:
            A `Mask` that keeps one bit per entry of `array` where a layout holds
            that, and one bit per entry of the tensor otherwise.

        Raises:
            TypeError: If `array` is not boolean.
            ValueError: If its rank or its axes do not fit `shape`.
        """
        if isinstance(array, Mask):
            if shape is not None and array.shape != _check_shape(shape):
                raise ValueError(
                    "`mask` must have the shape of its variable. "
                    f"Received: mask.shape={array.shape}, shape={_check_shape(shape)}"
                )
            return array
        array = as_array(array, "mask")
        if array.dtype != np.bool_:
            raise TypeError(
                "`mask` must be boolean (True = trainable, False = frozen). Received: an array "
                f"of dtype={array.dtype}. Write for example `mask.astype(bool)` or `mask != 0`."
            )
        shape = array.shape if shape is None else _check_shape(shape)
        check_broadcast(array.shape, shape, "mask")
        if array.ndim == 0:
            array = array.reshape((1,) * len(shape))
        layout = layouts.of_broadcast(array.shape, shape)
        if layout.kept != array.size:
            array = np.broadcast_to(array, shape)
        return cls(shape, layout, packing.pack_bits(array))

    @classmethod
    def trainable(cls, shape: Sequence[int]) -> "Mask":
        """Every entry trainable."""
        return cls.from_array(True, _check_shape(shape))

    @classmethod
    def frozen(cls, shape: Sequence[int]) -> "Mask":
        """Every entry frozen."""
        return cls.from_array(False, _check_shape(shape))

    @classmethod
    def rows(cls, shape: Sequence[int], rows: Any) -> "Mask":
        """Trainable at the named indices of the first axis, frozen elsewhere.

        Args:
            shape: Shape of the tensor, of rank 1 or more.
            rows: Integer indices or a boolean vector along the first axis.

        Returns:
            A `Mask` of one bit per row.
        """
        return cls._along(shape, rows, "rows", 0)

    @classmethod
    def columns(cls, shape: Sequence[int], columns: Any) -> "Mask":
        """Trainable at the named indices of the last axis, frozen elsewhere.

        Args:
            shape: Shape of the tensor, of rank 1 or more.
            columns: Integer indices or a boolean vector along the last axis.

        Returns:
            A `Mask` of one bit per column.
        """
        return cls._along(shape, columns, "columns", -1)

    @classmethod
    def _along(cls, shape: Sequence[int], entries: Any, name: str, axis: int) -> "Mask":
        shape = _check_shape(shape)
        if not shape:
            raise ValueError(f"`shape` must have at least one axis to name {name} of. Received: ()")
        flags = _flags(entries, shape[axis], name)
        return cls(shape, layouts.named(name, shape), packing.pack_bits(flags))

    # What it holds.

    @property
    def shape(self) -> Shape:
        """Shape of the tensor that it masks."""
        return self._shape

    @property
    def layout(self) -> Layout:
        """`(outer, kept, inner)`; see `freezeops.layout`."""
        return self._layout

    @property
    def packed(self) -> np.ndarray:
        """The bits: a read-only `uint8` vector of `ceil(kept / 8)` bytes."""
        return self._packed

    @property
    def nbytes(self) -> int:
        """Bytes that the bits take."""
        return self._packed.nbytes

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return self._layout.size

    def count(self) -> int:
        """Number of trainable entries."""
        outer, kept, inner = self._layout
        return outer * inner * packing.count_bits(self._packed, kept)

    @property
    def density(self) -> float:
        """Trainable entries / all entries; 1.0 for an empty tensor."""
        return self.count() / self.size if self.size else 1.0

    def indices(self) -> np.ndarray:
        """Positions of the trainable entries in the flattened tensor, ascending, `int64`."""
        mask = self.with_layout(layouts.elementwise(self._shape))
        return packing.bit_indices(mask._packed, mask.size)

    def to_numpy(self) -> np.ndarray:
        """A boolean array of the tensor's shape."""
        outer, kept, inner = self._layout
        bits = packing.unpack_bits(self._packed, kept).reshape(1, kept, 1)
        return np.broadcast_to(bits, (outer, kept, inner)).reshape(self._shape)

    def with_layout(self, layout: Layout) -> "Mask":
        """The same mask in another layout.

        Args:
            layout: `(outer, kept, inner)` of the same number of entries.

        Returns:
            A `Mask` equal to this one.

        Raises:
            ValueError: If the layout has too few bits for this mask.
        """
        layout = Layout(*layout)
        if layout == self._layout:
            return self
        bits = self.to_numpy().reshape(layout)
        # Empty axes have no representative to compare with.
        kept = bits[0, :, 0] if layout.outer and layout.inner else np.ones(layout.kept, bool)
        if not np.array_equal(np.broadcast_to(kept[None, :, None], layout), bits):
            raise ValueError(
                "`layout` must have a bit for every entry that differs. Received: "
                f"layout={tuple(layout)} for a mask of layout={tuple(self._layout)}"
            )
        return Mask(self._shape, layout, packing.pack_bits(kept))

    # Algebra.

    def __invert__(self) -> "Mask":
        return Mask(self._shape, self._layout, ~self._packed)

    def __and__(self, other: "Mask") -> "Mask":
        return self._combine(other, np.bitwise_and, "&")

    def __or__(self, other: "Mask") -> "Mask":
        return self._combine(other, np.bitwise_or, "|")

    def __xor__(self, other: "Mask") -> "Mask":
        return self._combine(other, np.bitwise_xor, "^")

    def _combine(self, other: "Mask", operation: np.ufunc, sign: str) -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        if self._shape != other._shape:
            raise ValueError(f"Both sides of `{sign}` must have one shape. Received: {self._shape} and {other._shape}")
        layout = layouts.common(self._layout, other._layout)
        a, b = self.with_layout(layout), other.with_layout(layout)
        return Mask(self._shape, layout, operation(a._packed, b._packed))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        if self._shape != other._shape:
            return False
        if self._layout == other._layout and self.size:  # in an empty tensor no bit counts
            return np.array_equal(self._packed, other._packed)
        return np.array_equal(self.to_numpy(), other.to_numpy())

    def __hash__(self) -> int:
        # Equal masks may differ in layout, so only what no layout changes counts here.
        return hash((self._shape, self.count()))

    def __bool__(self) -> bool:
        raise TypeError("The truth value of a Mask is ambiguous. Use `mask.count() > 0`, or `mask.density == 1.0`.")

    def __reduce__(self) -> tuple:
        return Mask, (self._shape, tuple(self._layout), self._packed)

    def __repr__(self) -> str:
        return (
            f"<Mask shape={self._shape}, trainable={self.count()} of {self.size} "
            f"(density {self.density:.4g}), layout={tuple(self._layout)}, {self.nbytes} bytes>"
        )


def check_broadcast(array_shape: Shape, shape: Shape, name: str) -> None:
    """Raises unless an array broadcasts to `shape` by axes of length 1 or as a scalar.

    Args:
        array_shape: Shape of the array.
        shape: Shape of the tensor.
        name: The argument's name, for the message.

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
    """The indexing that makes an array of smaller rank fit, if its axes say which."""
    missing = len(shape) - len(array_shape)
    if missing < 0:
        return ""
    hints = []
    for first in range(missing + 1):
        if shape[first : first + len(array_shape)] == array_shape:
            parts = ["None"] * first + [":"] * len(array_shape) + ["None"] * (missing - first)
            hints.append(f"`{name}[{', '.join(parts)}]`")
    return f" Write {' or '.join(hints)}." if hints else ""


def _check_shape(shape: Any) -> Shape:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = (-1,)
    if min(sizes, default=0) < 0 or math.prod(size or 1 for size in sizes) >= 2**63:
        raise ValueError(f"`shape` must be a sequence of known sizes. Received: shape={short(shape)}")
    return sizes


def _check_layout(layout: Any) -> Layout:
    try:
        outer, kept, inner = _check_shape(layout)
    except ValueError:
        raise ValueError(
            f"`layout` must be (outer, kept, inner), three sizes. Received: layout={short(layout)}"
        ) from None
    return Layout(outer, kept, inner)


def _flags(entries: Any, size: int, name: str) -> np.ndarray:
    """A boolean vector from indices or from booleans."""
    array = as_array(entries, name)
    if array.dtype == np.bool_:
        if array.shape != (size,):
            raise ValueError(
                f"`{name}` must be a boolean vector of length {size} or integer indices. "
                f"Received: {name}.shape={array.shape}"
            )
        return array
    flags = np.zeros(size, bool)
    flags[check_indices(array, size, name)] = True
    return flags


def as_array(value: Any, name: str) -> np.ndarray:
    """What a user gave, as an array.

    Args:
        value: An array, a list or a number.
        name: The argument's name, for the message.

    Raises:
        TypeError: If it is something that NumPy makes no array of: a set, a `dict.values()`, a generator.
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
    """Raises where integers could be meant as booleans: a vector of zeros and ones as long as the axis.

    Not where each occurs once: `[0, 1]` on an axis of length 2 names both entries. Nobody who means indices repeats
    them so that there are exactly as many as the axis is long.

    Args:
        array: Integer indices.
        size: Length of the axis.
        name: The argument's name, for the message.

    Raises:
        ValueError: If it is ambiguous.
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
    """Integer indices along an axis, or an error.

    Args:
        array: What was given; an empty list counts as no index.
        size: Length of the axis. Negative indices count from its end.
        name: The argument's name, for the message.

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
