"""Operations of functions that are being traced, done again."""

from collections.abc import Sequence

import tensorflow as tf


def again(op: tf.Operation, inputs: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns what an operation of one output makes of other inputs, with its own attributes.

    Args:
        op: The operation; it takes no lists of tensors.
        inputs: The inputs, in its order.
    """
    arguments = op.op_def.input_arg
    named = {argument.name: tensor for argument, tensor in zip(arguments, inputs, strict=True)}
    of_inputs = {argument.type_attr for argument in arguments}
    for attribute in op.op_def.attr:
        if attribute.name not in of_inputs:
            value = op.get_attr(attribute.name)
            named[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return getattr(tf.raw_ops, op.type)(**named)
