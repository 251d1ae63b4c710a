"""The file that Keras is loading just now, and the model that it is loaded into."""

import inspect
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from freezeops.keras_compat import contract
from freezeops.keras_compat.variables import is_variable, variable_path
from freezeops.keras_compat.wrapped import wrapped_optimizers


class WeightsFile(NamedTuple):
    """The weights file that Keras is loading.

    Attributes:
        model: The model; `None` where nothing is loaded, or that cannot be told.
        skip_mismatch: `True` if what does not fit is to be skipped.
        token: The same during one load; `None` where nothing is loaded.
    """

    model: Any = None
    skip_mismatch: bool = False
    token: Any = None


def weights_being_loaded() -> WeightsFile:
    """Returns the file that `load_weights` or `load_model` is loading, if this is called by it.

    Keras hands it to nobody; but it is on the call stack while optimizers load their state.
    """
    if not contract.is_on(contract.FILES):
        return WeightsFile()
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        loads = frame.f_code.co_name in ("load_weights_only", "_load_model_from_fileobj")
        if loads and module.endswith(".saving.saving_lib"):
            skip = bool(frame.f_locals.get("skip_mismatch", False))
            return WeightsFile(frame.f_locals.get("model"), skip, id(frame))
        frame = frame.f_back
    return WeightsFile()


def paths_of_model(optimizer: Any) -> set[str]:
    """Returns the paths of all variables, trained or not, of the model that an optimizer is for, if it is at hand.

    That is, where the model builds the optimizer or loads a file, or a checkpoint is restored: it is on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        candidate: Any
        for candidate in (frame.f_locals.get("self"), frame.f_locals.get("model")):
            inner = getattr(candidate, "optimizer", None) if hasattr(candidate, "trainable_variables") else None
            if inner is not None and any(part is optimizer for part in wrapped_optimizers(inner)):
                return {variable_path(variable) for variable in candidate.variables if is_variable(variable)}
        if (found := getattr(frame.f_locals.get("self"), "all_python_objects", None)) is not None:
            layers = [each for each in found if isinstance(each, keras.Layer | tf.Module)]
            return {variable_path(each) for layer in layers for each in layer.variables if is_variable(each)}
        frame = frame.f_back
    return set()
