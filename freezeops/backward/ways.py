"""Ways to make the trainable part of a gradient, and which one is taken: decided when a step is traced.

By room (the most entries that may become trainable without `repack`), structure, shape and dtype; never by the mask of
the moment alone, so that another mask needs no new trace.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import tensorflow as tf

from freezeops import ops
from freezeops.backward.terms import BatchSum, Elementwise, FilterGradient, Leaf, Number, Product, Slices, Term
from freezeops.masks.grid import Grid, grid_of
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.gradient_index import GridShape, elementwise_bits

Way: TypeAlias = Literal["rows", "grid", "entries", "sum", "slices"]
"""How the part of one term is made.

`"rows"`: whole rows of the product, from the columns of `x` that the mask's bits stand for. `"grid"`: some rows and
columns of it, or some channels of a filter. `"entries"`: single entries, by `ops.sampled_matmul`. `"sum"`: some entries
of a sum over the batch. `"slices"`: rows that an embedding's gradient names.
"""

MOST = {"rows": 0.75, "grid": 0.5, "entries": 0.45, "sum": 1.0, "slices": 1.0}
"""The largest share of the entries for which each way takes less time than the whole product and a gather.

From benchmarks/bench_backward.py and benchmarks/bench_sampled_matmul.py.
"""


@dataclass(frozen=True)
class Chosen:
    """The way for one term.

    Attributes:
        way: The way; `None`: the whole gradient is made.
        reason: Why it is made whole; else empty.
        grid: With `"grid"`: the mask as it is now.
    """

    way: Way | None
    reason: str = ""
    grid: Grid | None = None


End: TypeAlias = Product | FilterGradient | BatchSum | Slices
"""A term of which a part can be made."""


def choose(term: End, partition: CompactPartition) -> Chosen:
    """Returns the way for one term of a variable's gradient."""
    share = partition.capacity * partition.layout.inner / max(partition.size, 1)
    if isinstance(term, BatchSum):
        return Chosen("sum")
    if isinstance(term, Slices):
        rows_of_it = term.values.shape[1:].num_elements() == partition.size // partition.variable.shape[0]
        return Chosen("slices") if rows_of_it else Chosen(None, "slices of other rows than its own")
    if isinstance(term, FilterGradient):
        return _of_filter(term, partition, share)
    return _of_product(term, partition, share)


def _of_filter(term: FilterGradient, partition: CompactPartition, share: float) -> Chosen:
    if share > MOST["grid"]:
        return Chosen(None, _too_many(share))
    if grid := _grid(GridShape(term.taps, *term.channels), partition):
        return grid
    if partition.mask.count() < partition.capacity * partition.layout.inner:
        return Chosen(None, "its mask leaves room, and it is of a convolution")
    return Chosen(None, "its mask is not of whole channels of a convolution")


def _of_product(product: Product, partition: CompactPartition, share: float) -> Chosen:
    rows, columns = product.x.width, product.dy.width
    if partition.layout.inner % columns == 0 and partition.layout.inner > 1:
        return Chosen("rows") if share <= MOST["rows"] else Chosen(None, _too_many(share))
    # The mask is looked at only where it matters: that takes time where it is large.
    if share <= MOST["grid"] and (grid := _grid(GridShape(1, rows, columns), partition)):
        return grid
    reason = reason_against_entries(product.dtype)
    if not reason and share > MOST["entries"]:
        reason = _too_many(share)
    return Chosen(None, reason) if reason else Chosen("entries")


def _grid(shape: GridShape, partition: CompactPartition) -> Chosen | None:
    """Returns the way `"grid"`, if the mask is one now and fills its room."""
    mask = partition.mask
    grid = grid_of(elementwise_bits(mask.packed, mask.layout), *shape)
    if grid is None or not len(grid.rows):
        return None
    entries = shape.taps * len(grid.rows) * len(grid.columns)
    return Chosen("grid", grid=grid) if entries == partition.capacity * partition.layout.inner else None


def reason_against_entries(dtype: tf.DType) -> str:
    """Returns why single entries of a product are not made by themselves; an empty string where they are."""
    if dtype.name not in ops.SAMPLED_DTYPES:
        return f"single entries of a product of {dtype.name}"
    if tf.config.list_logical_devices("GPU"):
        return "single entries of a product on a GPU"
    return ops.reason_for_reference()


def _too_many(share: float) -> str:
    return f"{share:.0%} of it may be trainable"


def ends(term: Term) -> list[End]:
    """Returns the terms of which a part can be made."""
    if isinstance(term, Elementwise):
        return [end for each in term.terms for end in ends(each)]
    return [] if isinstance(term, Number | Leaf) else [term]


def leaves(term: Term) -> list[Leaf]:
    """Returns the tensors of which all entries are computed."""
    if isinstance(term, Elementwise):
        return [leaf for each in term.terms for leaf in leaves(each)]
    return [term] if isinstance(term, Leaf) else []
