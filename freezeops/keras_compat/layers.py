"""Layers that change variables in their forward pass."""

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from freezeops.keras_compat import contract
from freezeops.keras_compat.variables import Variable, is_variable


def moving_state(target: Any) -> list[Variable]:
    """Returns the float state that a layer updates by itself while it is trainable; of anything else, none.

    Args:
        target: A layer of Keras or of tf_keras, or something else.
    """
    found = []
    for part in _layers_of(target):
        if part.trainable:
            state = part._non_trainable_variables if isinstance(part, keras.Layer) else part._non_trainable_weights
            found += [variable for variable in state if tf.as_dtype(variable.dtype).is_floating]
    return found


def rewritten_weights(target: Any) -> list[Variable]:
    """Returns the weights that layers of known classes assign in their forward pass; of anything else, none.

    Args:
        target: A layer of Keras or of tf_keras, or something else.
    """
    found = []
    for part in _layers_of(target):
        names = {cls.__name__ for cls in type(part).__mro__}
        if "SpectralNormalization" in names:
            found += [getattr(part.layer, name, None) for name in ("kernel", "embeddings")]
        elif "PruneLowMagnitude" in names:  # of TensorFlow Model Optimization
            found += [variable for variable, *_ in getattr(part, "pruning_vars", [])]
    return [variable for variable in found if is_variable(variable)]


def _layers_of(target: Any) -> Iterator[Any]:
    known = contract.is_on(contract.WRITES) and hasattr(target, "_flatten_layers")
    return iter(target._flatten_layers() if known else ())
