"""Skipping frozen gradients: a traced step makes the trainable part alone, and the whole gradient has no consumer.

TensorFlow and XLA drop what nothing consumes. No layer is changed: by the time that gradients reach an optimizer, the
function's graph still says what they are made of.
"""

from typing import NamedTuple

import tensorflow as tf

from freezeops.backward.parts import PartMaker
from freezeops.backward.terms import FROM_OUTSIDE, Elementwise, Product, Term, terms_of
from freezeops.backward.ways import choose, ends, leaves
from freezeops.ops.gradients import Gradient
from freezeops.partitions.compact import CompactPartition, TrainablePart
from freezeops.partitions.partition import Partition


class Outcome(NamedTuple):
    """How the gradient of a variable was made when a step was traced last.

    Attributes:
        part: Whether the trainable part alone was made.
        reason: Why the whole was made, or some of its terms were; else empty.
    """

    part: bool
    reason: str = ""


NOT_TRACED = Outcome(False, "no step was traced yet")


def trainable_part(partition: Partition, gradient: Gradient) -> tuple[Gradient | TrainablePart, Outcome]:
    """Returns the trainable part of a gradient where it can be made by itself, otherwise the gradient.

    Args:
        partition: The variable's partition.
        gradient: Its gradient.
    """
    if not isinstance(partition, CompactPartition):
        return _without_compact_state(partition, gradient)
    if isinstance(gradient, tf.IndexedSlices):
        return gradient, Outcome(True)  # of the rows that it names
    if not partition.capacity:
        return gradient, Outcome(True)  # none of it is looked at
    if not tf.is_symbolic_tensor(gradient):
        return gradient, Outcome(False, "steps in eager mode have no graph to look at")
    if gradient.graph is not tf.compat.v1.get_default_graph():
        # In a loop its part would be made again in each turn.
        return gradient, Outcome(False, FROM_OUTSIDE)
    if not gradient.shape.is_compatible_with(tuple(partition.variable.shape)):
        return gradient, Outcome(False, "its shape")  # an error that says more comes next
    term = terms_of(gradient, partition.size)
    found = ends(term)
    if not found:
        return gradient, Outcome(False, next((leaf.reason for leaf in leaves(term) if leaf.reason), "no product"))
    with tf.init_scope():
        choices = {id(end): choose(end, partition) for end in found}
    if reason := next((each.reason for each in choices.values() if each.way is None), ""):
        better = _of_all_tokens(term, gradient)
        return gradient if better is None else better, Outcome(False, reason)
    partition.check_not_pending()
    indices = partition.component_tensors()
    part = PartMaker(partition, indices[0], choices).make(term, gradient.dtype)
    return TrainablePart(part, indices), Outcome(True, next((leaf.reason for leaf in leaves(term) if leaf.reason), ""))


def _without_compact_state(partition: Partition, gradient: Gradient) -> tuple[Gradient, Outcome]:
    """Returns the whole gradient, better made where that can be."""
    if partition.mode == "permanent":
        return gradient, Outcome(True)  # none of it is looked at
    reason = f"its state is {partition.mode}"
    if isinstance(gradient, tf.Tensor) and tf.is_symbolic_tensor(gradient):
        better = _of_all_tokens(terms_of(gradient, partition.size), gradient)
        if better is not None:
            return better, Outcome(False, f"{reason}; one product of all tokens, not one for each example")
    return gradient, Outcome(False, reason)


def _of_all_tokens(term: Term, gradient: tf.Tensor) -> tf.Tensor | None:
    """Returns a gradient as one product over the tokens of all examples, where TensorFlow makes one for each.

    It keeps these at once, and adds them up: for `EinsumDense` and `MultiHeadAttention`.
    """
    product = term.terms[0] if isinstance(term, Elementwise) and term.op.type == "Cast" else term
    if not isinstance(product, Product) or not product.per_example or not gradient.shape.is_fully_defined():
        return None
    whole = tf.matmul(product.x.matrix(), product.dy.matrix(), transpose_a=True)
    return tf.reshape(tf.cast(whole, gradient.dtype), gradient.shape)
