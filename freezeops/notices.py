"""Warnings that point at the user's line."""

import inspect
import warnings

_OURS = ("freezeops", "keras", "tf_keras", "tensorflow")


def warn(message: str) -> None:
    """Gives a `UserWarning` at the line of the innermost caller outside of freezeops, Keras and TensorFlow."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level if frame is not None else 2)
