"""The `Mask` value type: an immutable, bit-packed boolean mask. True = trainable."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from freezeops.masks import checks, packing
from freezeops.masks import layout as layouts
from freezeops.masks.layout import Layout, Shape
from freezeops.messages import short


class Mask:
    """A boolean mask over the entries of a tensor: True = trainable, False = frozen.

    A mask is immutable and takes one bit per entry, or one bit per row, column or
    channel where it is the same along the other axes. Make one with
    `Mask.from_array`, `Mask.trainable`, `Mask.frozen`, `Mask.rows` or
    `Mask.columns`, and combine masks of one shape with `&`, `|`, `^` and `~`.

    Example:

    >>> import freezeops as fz
    >>> mask = fz.Mask.rows((50_000, 64), [7, 12])  # rows 7 and 12 are trainable
    >>> mask.count()
    128
    >>> (~mask).density
    0.99996
    >>> mask
    <Mask shape=(50000, 64), trainable=128 of 3200000 (density 4e-05), layout=(1, 50000, 64), 6250 bytes>
    """

    __module__ = "freezeops.mask"  # as pickles have it
    __slots__ = ("_layout", "_packed", "_shape")

    def __init__(self, shape: Sequence[int], layout: Layout, packed: np.ndarray):
        """Makes a mask from packed bits; most users want `Mask.from_array`.

        Args:
            shape: Shape of the tensor.
            layout: `(outer, kept, inner)` with `outer * kept * inner` equal to the
                number of entries.
            packed: `uint8` vector of `ceil(kept / 8)` bytes, little bit order,
                1 = trainable. Bits beyond `kept` are ignored.

        Raises:
            ValueError: If layout, shape and length do not fit together.
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

    # Constructors.

    @classmethod
    def from_array(cls, array: Any, shape: Sequence[int] | None = None) -> "Mask":
        """Makes a mask from booleans.

        Args:
            array: Array-like of booleans, True = trainable. Axes of length 1
                broadcast; a scalar stands for every entry.
            shape: Shape of the tensor. Defaults to that of the array.

        Returns:
            A `Mask` with one bit per entry of `array` where a layout holds
            that, and one bit per entry of the tensor otherwise.

        Raises:
            TypeError: If `array` is not boolean.
            ValueError: If its rank or its axes do not fit `shape`.

        Example:

        >>> import numpy as np
        >>> import freezeops as fz
        >>> fz.Mask.from_array(np.array([[True], [False]]), (2, 3)).to_numpy()
        array([[ True,  True,  True],
               [False, False, False]])
        """
        if isinstance(array, Mask):
            if shape is not None and array.shape != _check_shape(shape):
                raise ValueError(
                    "`mask` must have the shape of its variable. "
                    f"Received: mask.shape={array.shape}, shape={_check_shape(shape)}"
                )
            return array
        array = checks.as_array(array, "mask")
        if array.dtype != np.bool_:
            raise TypeError(
                "`mask` must be boolean (True = trainable, False = frozen). Received: an array "
                f"of dtype={array.dtype}. Write for example `mask.astype(bool)` or `mask != 0`."
            )
        shape = array.shape if shape is None else _check_shape(shape)
        checks.check_broadcast(array.shape, shape, "mask")
        if array.ndim == 0:
            array = array.reshape((1,) * len(shape))
        layout = layouts.of_broadcast(array.shape, shape)
        if layout.kept != array.size:
            array = np.broadcast_to(array, shape)
        return cls(shape, layout, packing.pack_bits(array))

    @classmethod
    def trainable(cls, shape: Sequence[int]) -> "Mask":
        """Makes a mask with every entry trainable."""
        return cls.from_array(True, _check_shape(shape))

    @classmethod
    def frozen(cls, shape: Sequence[int]) -> "Mask":
        """Makes a mask with every entry frozen."""
        return cls.from_array(False, _check_shape(shape))

    @classmethod
    def rows(cls, shape: Sequence[int], rows: Any) -> "Mask":
        """Makes a mask that is trainable at the given indices of the first axis and frozen elsewhere.

        Args:
            shape: Shape of the tensor, of rank 1 or more.
            rows: Integer indices or a boolean vector along the first axis.

        Returns:
            A `Mask` of one bit per row.
        """
        return cls._along(shape, rows, "rows", 0)

    @classmethod
    def columns(cls, shape: Sequence[int], columns: Any) -> "Mask":
        """Makes a mask that is trainable at the given indices of the last axis and frozen elsewhere.

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
        flags = checks.flags(entries, shape[axis], name)
        return cls(shape, layouts.named(name, shape), packing.pack_bits(flags))

    # Properties and conversions.

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        return self._shape

    @property
    def layout(self) -> Layout:
        """Layout of the bits: `(outer, kept, inner)`; see `freezeops.masks.layout`."""
        return self._layout

    @property
    def packed(self) -> np.ndarray:
        """The packed bits: a read-only `uint8` vector of `ceil(kept / 8)` bytes."""
        return self._packed

    @property
    def nbytes(self) -> int:
        """Size of the packed bits in bytes."""
        return self._packed.nbytes

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return self._layout.size

    def count(self) -> int:
        """Returns the number of trainable entries."""
        outer, kept, inner = self._layout
        return outer * inner * packing.count_bits(self._packed, kept)

    @property
    def density(self) -> float:
        """Share of trainable entries, from 0.0 to 1.0; 1.0 for an empty tensor."""
        return self.count() / self.size if self.size else 1.0

    def indices(self) -> np.ndarray:
        """Returns the positions of the trainable entries in the flattened tensor, ascending, as `int64`."""
        mask = self.with_layout(layouts.elementwise(self._shape))
        return packing.bit_indices(mask._packed, mask.size)

    def to_numpy(self) -> np.ndarray:
        """Returns the mask as a boolean array of the tensor's shape."""
        outer, kept, inner = self._layout
        bits = packing.unpack_bits(self._packed, kept).reshape(1, kept, 1)
        return np.broadcast_to(bits, (outer, kept, inner)).reshape(self._shape)

    def with_layout(self, layout: Layout) -> "Mask":
        """Returns the same mask in another layout.

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
        # Empty axes have no first entry to compare with.
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
        # Equal masks may differ in layout, so the layout must not count here.
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
