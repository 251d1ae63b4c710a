"""The environment variable `FREEZEOPS_BACKEND`: compiled code, or its reference twins alone.

Read at every use, so at trace time inside `tf.function`.
"""

import os


def name() -> str:
    """Returns `"auto"` or `"reference"`.

    Raises:
        ValueError: If `FREEZEOPS_BACKEND` holds anything else.
    """
    value = os.environ.get("FREEZEOPS_BACKEND", "auto") or "auto"
    if value not in ("auto", "reference"):
        raise ValueError(f"FREEZEOPS_BACKEND must be 'auto' or 'reference'. Received: FREEZEOPS_BACKEND={value!r}")
    return value


def is_reference() -> bool:
    """Returns True if the environment asks for the reference twins. Raises as `name` does."""
    return name() == "reference"
