"""Mask layouts: the bit of a packed mask for each entry of a tensor.

A layout `(outer, kept, inner)` describes a mask that repeats along leading or
trailing axes. The tensor is flattened in row-major order and entry
`(o * kept + k) * inner + j` uses bit `k` of the mask. The same arithmetic is in
`csrc/mask_layout.h`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

MASKABLE = ("elements", "rows", "columns", "none")
"""Values of `maskable`: the bits set aside for a variable; with `"none"` it can't be masked."""


class Layout(NamedTuple):
    """The layout of a packed mask over a flattened tensor.

    Bits `0 1 2` of a layout `(2, 3, 2)` belong to the entries `0 0 1 1 2 2 0 0 1 1 2 2`.

    Attributes:
        outer: Number of times that the bits repeat along the leading axes.
        kept: Number of bits.
        inner: Number of consecutive entries that share one bit.
    """

    outer: int
    kept: int
    inner: int

    @property
    def size(self) -> int:
        """Number of entries of the tensor."""
        return self.outer * self.kept * self.inner

    @property
    def packed_bytes(self) -> int:
        """Length of the packed mask in bytes."""
        return (self.kept + 7) // 8


def elementwise(shape: Sequence[int]) -> Layout:
    """Returns the layout of one bit per entry."""
    return Layout(1, math.prod(shape), 1)


def whole(shape: Sequence[int]) -> Layout:
    """Returns the layout of one bit for the whole tensor."""
    return Layout(1, 1, math.prod(shape))


def rows(shape: Sequence[int]) -> Layout:
    """Returns the layout of one bit per index of the first axis; a scalar has one row."""
    if not shape:
        return Layout(1, 1, 1)
    return Layout(1, shape[0], math.prod(shape[1:]))


def columns(shape: Sequence[int]) -> Layout:
    """Returns the layout of one bit per index of the last axis; a scalar has one column."""
    if not shape:
        return Layout(1, 1, 1)
    return Layout(math.prod(shape[:-1]), shape[-1], 1)


def named(name: str, shape: Sequence[int]) -> Layout:
    """Returns the layout for a value of `maskable` other than `"none"`."""
    return {"elements": elementwise, "rows": rows, "columns": columns}[name](shape)


def of_broadcast(array_shape: Sequence[int], shape: Sequence[int]) -> Layout:
    """Returns the layout for a mask array that broadcasts to `shape` along axes of length 1.

    Args:
        array_shape: Shape of the mask array. Of the same rank as `shape`; each
            axis is either that of `shape` or 1.
        shape: Shape of the tensor.

    Returns:
        A layout whose `kept` bits are the array's entries in order, or the
        elementwise layout where no layout holds the array as it is.
    """
    long_axes = [axis for axis, size in enumerate(array_shape) if size != 1]
    if not long_axes:
        return whole(shape) if math.prod(shape) else elementwise(shape)
    first, last = long_axes[0], long_axes[-1] + 1
    if any(array_shape[axis] != shape[axis] for axis in range(first, last)):
        return elementwise(shape)
    return Layout(math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:]))


def of_shape(shape: Sequence[int]) -> list[Layout]:
    """Returns every layout that a mask of a tensor may have: one bit for each index of some neighbouring axes."""
    rank = len(shape)
    found = [Layout(1, math.prod(shape), 1)]
    for first in range(rank):
        for last in range(first, rank + 1):
            layout = Layout(math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:]))
            if layout not in found:
                found.append(layout)
    return found


def common(a: Layout, b: Layout) -> Layout:
    """Returns a layout that holds every mask of either layout of one tensor.

    That is one of the two, or else the elementwise layout. A layout of one bit fits into any other.
    """
    if a == b or b.kept == 1:
        return a
    if a.kept == 1:
        return b
    return Layout(1, a.size, 1)
