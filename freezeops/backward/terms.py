"""The terms that a symbolic gradient is made of: products, sums over a batch, and elementwise operations on these.

The op that made a tensor says what it is made of. `Dense` under `mixed_float16`, with an l2 regularizer:

    AddN ── Cast ── MatMul(x, dy, transpose_a=True)
         └─ Mul ── a number
                └─ ReadVariableOp

becomes `Elementwise(AddN, [Elementwise(Cast, [Product(x, dy)]), Elementwise(Mul, [Number, Leaf])])`. No operation is
added; `parts.py` does that. What is not known here is a `Leaf`, which is correct whatever made it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import tensorflow as tf


@dataclass(frozen=True)
class Factor:
    """One factor of a product, as a matrix with a row for each token.

    Attributes:
        tensor: The tensor.
        order: The order of its axes in which the tokens come first; `None`: as they are.
        width: Number of columns of the matrix.
    """

    tensor: tf.Tensor
    order: tuple[int, ...] | None
    width: int

    def matrix(self) -> tf.Tensor:
        """Returns the matrix, of shape `[tokens, width]`."""
        tensor = self.tensor if self.order is None else tf.transpose(self.tensor, self.order)
        static = tensor.shape
        if static.rank == 2 and static[1] == self.width:
            return tensor
        return tf.reshape(tensor, [-1, self.width])


@dataclass(frozen=True)
class Product:
    """The product `x^T dy`: an entry for each column of `x` and each of `dy`, in row-major order.

    Attributes:
        x: The layer's input, most often.
        dy: The gradient of its output, most often.
        per_example: Whether TensorFlow makes a product for each example, keeps all of them, and adds them up.
    """

    x: Factor
    dy: Factor
    per_example: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.x.width * self.dy.width

    @property
    def dtype(self) -> tf.DType:
        """The dtype of both factors."""
        return self.x.tensor.dtype


@dataclass(frozen=True)
class FilterGradient:
    """The gradient of a convolution's filter `[..., in, out]`.

    Attributes:
        op: The operation that makes it.
        taps: Number of positions of the filter.
        channels: Number of channels `(in, out)`; of a depthwise filter `(in, multiplier)`.
        depthwise: Whether each channel has a filter of its own.
    """

    op: tf.Operation
    taps: int
    channels: tuple[int, int]
    depthwise: bool

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.taps * math.prod(self.channels)


@dataclass(frozen=True)
class BatchSum:
    """A sum over all axes but the last few: the gradient of a bias or a scale.

    Attributes:
        factors: The tensor that is summed, with `size` entries for each token, or two that it is the product of.
        size: Number of entries.
    """

    factors: tuple[tf.Tensor, ...]
    size: int


@dataclass(frozen=True)
class Slices:
    """Rows `values[i]` added up in row `indices[i]` of a tensor."""

    values: tf.Tensor
    indices: tf.Tensor


@dataclass(frozen=True)
class Number:
    """A tensor of one entry, by which all others are multiplied, for example."""

    tensor: tf.Tensor


@dataclass(frozen=True)
class Elementwise:
    """An operation that makes each entry from those in the same place.

    Attributes:
        op: The operation.
        terms: What it is applied to.
    """

    op: tf.Operation
    terms: "tuple[Term, ...]"


@dataclass(frozen=True)
class Leaf:
    """A tensor of which all entries are computed.

    Attributes:
        tensor: The tensor.
        reason: Why it is not taken apart; empty where that costs nothing, as for a variable.
    """

    tensor: tf.Tensor
    reason: str = ""


Term: TypeAlias = Product | FilterGradient | BatchSum | Slices | Number | Elementwise | Leaf

_SAME = ("Identity", "StopGradient", "PreventGradient", "Reshape", "Squeeze", "ExpandDims", "EnsureShape")
"""Operations that keep all entries in their order; their first input has them."""

UNARY = ("Cast", "Neg", "Abs", "Sign", "Square")
BINARY = ("Mul", "AddV2", "Add", "Sub", "RealDiv", "DivNoNan", "Maximum", "Minimum", "MulNoNan")
"""Elementwise operations of two tensors of one shape, or of one and a number."""

FROM_OUTSIDE = "it comes from outside of the function that calls `apply`"
"""The reason of a gradient that another function made."""

_MOST_OPERATIONS = 400
"""How many operations of one gradient are looked at: an unrolled network has one summand for each step."""


def terms_of(gradient: tf.Tensor, size: int) -> Term:
    """Returns the terms of a symbolic gradient; no operation is added.

    Args:
        gradient: A tensor of a function that is being traced.
        size: Number of its entries, that of its variable.
    """
    return _Reader(size).read(gradient, consumers=0)


class _Reader:
    """Reads one gradient.

    Args:
        size: Number of entries of the gradient.
    """

    def __init__(self, size: int):
        self._size = size
        self._left = _MOST_OPERATIONS

    def read(self, tensor: tf.Tensor, consumers: int = 1) -> Term:
        """Returns the terms of a tensor.

        Args:
            tensor: The tensor, which has `size` entries or one.
            consumers: How many operations that are looked through take it.
        """
        op = tensor.op
        self._left -= 1
        if _is_number(tensor) and self._size != 1:
            return Number(tensor)
        if op.type == "ReadVariableOp":
            return Leaf(tensor)
        if reason := self._reason_against(tensor, consumers):
            return Leaf(tensor, reason)
        if op.type in _SAME:
            return self.read(op.inputs[0])
        if op.type in UNARY or op.type == "AddN" or (op.type in BINARY and self._of_one_shape(op)):
            # An operation may take a tensor twice.
            return Elementwise(
                op, tuple(self.read(each, sum(each is other for other in op.inputs)) for each in op.inputs)
            )
        if op.type == "Transpose":
            return self._transposed(op)
        if op.type in ("BroadcastTo", "Tile", "Fill"):
            return self._spread(op)
        made_by = _READERS.get(op.type)
        found = None if made_by is None else made_by(op, self._size)
        return Leaf(tensor, f"it is made by {op.type}") if found is None else found

    def _reason_against(self, tensor: tf.Tensor, consumers: int) -> str:
        """Returns why a tensor is not taken apart, whatever made it; an empty string where it may be."""
        if tensor.op.type in ("Placeholder", "Arg"):
            return FROM_OUTSIDE
        if self._left < 0:
            return "it is made of too many operations"
        # What something else uses is computed anyway.
        return "something else uses it, too" if len(tensor.consumers()) > consumers else ""

    def _of_one_shape(self, op: tf.Operation) -> bool:
        """Returns whether each input has all entries, or one: none is repeated along an axis."""
        return all(_is_number(each) or each.shape.num_elements() == self._size for each in op.inputs)

    def _spread(self, op: tf.Operation) -> Term:
        value = op.inputs[1] if op.type == "Fill" else op.inputs[0]
        return Number(value) if _is_number(value) else Leaf(op.outputs[0], f"it is made by {op.type}")

    def _transposed(self, op: tf.Operation) -> Term:
        """The transpose of a product is that of its factors in the other order."""
        permutation = op.inputs[1]
        if permutation.op.type == "InvertPermutation":
            permutation = permutation.op.inputs[0]
        order = tf.get_static_value(permutation)  # of two axes, which is its own inverse
        found = self.read(op.inputs[0]) if order is not None and list(order) == [1, 0] else None
        if isinstance(found, Product):
            return Product(found.dy, found.x, found.per_example)
        return Leaf(op.outputs[0], "it is made by Transpose")


def _is_number(tensor: tf.Tensor) -> bool:
    return tensor.shape.num_elements() == 1


def _factor(tensor: tf.Tensor, tokens: Sequence[int], kept: Sequence[int], width: int) -> Factor:
    order = (*tokens, *kept)
    return Factor(tensor, None if order == tuple(range(len(order))) else order, width)


def _widths(first: int | None, second: int | None, size: int) -> tuple[int, int] | None:
    """Returns the numbers of columns of two factors, of which one may be unknown."""
    if first is None and second:
        first = size // second
    if second is None and first:
        second = size // first
    if not first or not second or first * second != size:
        return None
    return first, second


def _matmul(op: tf.Operation, size: int) -> Term | None:
    """`MatMul`: two matrices."""
    a, b = op.inputs
    a_columns, b_columns = bool(op.get_attr("transpose_a")), not op.get_attr("transpose_b")
    widths = _widths(a.shape[1 if a_columns else 0], b.shape[1 if b_columns else 0], size)
    if widths is None:
        return None
    x = _factor(a, [0] if a_columns else [1], [1] if a_columns else [0], widths[0])
    dy = _factor(b, [0] if b_columns else [1], [1] if b_columns else [0], widths[1])
    return Product(x, dy)


def _sum(op: tf.Operation, size: int) -> Term | None:
    """`Sum`: of products, one for each example, or over a batch."""
    summed = op.inputs[0]
    if summed.op.type in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3") and len(summed.consumers()) == 1:
        return _sum_of_products(summed.op, size)
    return _batch_sum(op, size)


def _sum_of_products(op: tf.Operation, size: int) -> Term | None:
    """The products of `op`, added up over all examples: its matrices are of `size` entries, so none is left apart."""
    a, b = op.inputs
    rank = a.shape.rank
    if rank is None or rank < 2 or b.shape.rank != rank:
        return None
    if any(one != other for one, other in zip(a.shape[:-2], b.shape[:-2], strict=True)):
        return None  # one of the two is repeated
    batch = tuple(range(rank - 2))
    a_columns, b_columns = bool(op.get_attr("adj_x")), not op.get_attr("adj_y")
    widths = _widths(a.shape[-1 if a_columns else -2], b.shape[-1 if b_columns else -2], size)
    if widths is None:
        return None
    last, before = rank - 1, rank - 2
    x = _factor(a, (*batch, before if a_columns else last), [last if a_columns else before], widths[0])
    dy = _factor(b, (*batch, before if b_columns else last), [last if b_columns else before], widths[1])
    return Product(x, dy, per_example=rank > 2)


def _batch_sum(op: tf.Operation, size: int) -> Term | None:
    """A sum over the first axes."""
    summed, axes = op.inputs[0], tf.get_static_value(op.inputs[1])
    rank = summed.shape.rank
    if axes is None or rank is None:
        return None
    axes = sorted({int(axis) % rank for axis in axes.reshape(-1)})
    # Axes of length 1 may be left, or be summed as well.
    first = len(axes)
    if not axes or axes != list(range(first)) or summed.shape[first:].num_elements() != size:
        return None
    factors: tuple[tf.Tensor, ...] = (summed,)
    if summed.op.type == "Mul" and len(summed.consumers()) == 1 and rank - first == 1:
        a, b = summed.op.inputs
        if a.shape.rank == b.shape.rank == rank and a.shape.as_list() == b.shape.as_list():
            factors = (a, b)
    return BatchSum(factors, size)


def _bias(op: tf.Operation, size: int) -> Term | None:
    """`BiasAddGrad`."""
    channels_last = op.get_attr("data_format") == b"NHWC"
    summed = op.inputs[0]
    return BatchSum((summed,), size) if channels_last and summed.shape[-1] in (size, None) else None


def _einsum(op: tf.Operation, size: int) -> Term | None:
    """`Einsum` of two tensors without an index that both and the result have."""
    left, result = op.get_attr("equation").decode().split("->")
    labels = left.split(",")
    if len(labels) != 2 or "." in left or any(len(set(each)) != len(each) for each in labels):
        return None
    shared = set(labels[0]) & set(labels[1])
    if shared & set(result) or any(label not in shared and label not in result for label in "".join(labels)):
        return None
    first = 0 if result and result[0] in labels[0] else 1
    counts = [len([label for label in each if label in result]) for each in labels]
    kept = result[: counts[first]], result[counts[first] :]
    if any(label not in labels[first] for label in kept[0]):
        return None
    summed = sorted(shared, key=labels[first].index)

    def widths_of(number: int, which: str) -> int | None:
        return tf.TensorShape([op.inputs[number].shape[labels[number].index(label)] for label in which]).num_elements()

    widths = _widths(widths_of(first, kept[0]), widths_of(1 - first, kept[1]), size)
    if widths is None:
        return None

    def factor(number: int, which: str, width: int) -> Factor:
        own = labels[number]
        return _factor(op.inputs[number], [own.index(each) for each in summed], [own.index(e) for e in which], width)

    return Product(factor(first, kept[0], widths[0]), factor(1 - first, kept[1], widths[1]))


def _filter(op: tf.Operation, size: int) -> Term | None:
    """The gradients of convolutions' filters: `(input, filter_sizes, out_backprop)`."""
    depthwise = op.type.startswith("Depthwise")
    shape = op.outputs[0].shape
    if shape.num_elements() != size or not op.get_attr("data_format").endswith(b"C"):
        return None
    channels = shape[-2], shape[-1]
    inputs = op.inputs[0].shape[-1], op.inputs[2].shape[-1]
    outputs = channels[0] * channels[1] if depthwise else channels[1]
    if inputs != (channels[0], outputs):
        return None  # groups
    taps = size // math.prod(channels)
    if taps == 1 and not depthwise and set(op.get_attr("strides")) == {1} and op.get_attr("padding") != b"EXPLICIT":
        return Product(Factor(op.inputs[0], None, channels[0]), Factor(op.inputs[2], None, channels[1]))
    return FilterGradient(op, taps, channels, depthwise)


def _slices(op: tf.Operation, size: int) -> Term | None:
    """`UnsortedSegmentSum`: what TensorFlow makes of `tf.IndexedSlices` where it adds them to something dense."""
    del size
    values, indices, _ = op.inputs
    return Slices(values, indices) if indices.shape.rank == 1 else None


_READERS: dict[str, Callable[[tf.Operation, int], Term | None]] = {
    "MatMul": _matmul,
    "Sum": _sum,
    "BiasAddGrad": _bias,
    "Einsum": _einsum,
    "Conv2DBackpropFilter": _filter,
    "Conv3DBackpropFilterV2": _filter,
    "DepthwiseConv2dNativeBackpropFilter": _filter,
    "UnsortedSegmentSum": _slices,
}
"""What reads each type of operation; `None` from it: not of the kind that is known."""
