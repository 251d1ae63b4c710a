"""Values of users in error messages: short, whatever their size."""

import reprlib
from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any

import numpy as np

_ENTRIES = 8
_LENGTH = 500


class _Repr(reprlib.Repr):
    """As `repr`, with the first few entries of what is long."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = self.maxarray = _ENTRIES
        self.maxstring = self.maxother = 200
        self.maxlong = 40

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, np.ndarray):
            return self._array(x, level)
        if not np.isscalar(x) and getattr(x, "shape", None) is not None and getattr(x, "dtype", None) is not None:
            return self._tensor(x)
        if isinstance(x, KeysView | ValuesView | ItemsView):
            return f"{type(x).__name__}({super().repr1(list(x), level)})"
        return super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to print integers of thousands of digits.
        return repr(x) if abs(x) < 10**30 else f"an int of {x.bit_length()} bits"

    def repr_instance(self, x: Any, level: int) -> str:
        try:
            return self._cut(repr(x))
        except Exception:  # somebody else's `__repr__`: the error to come is of more use than its own
            return f"<{type(x).__name__}>"

    def _array(self, x: np.ndarray, level: int) -> str:
        entries = x.reshape(-1)[:_ENTRIES].tolist() if x.size else []
        shown = "[" + ", ".join(self.repr1(entry, level - 1) for entry in entries)
        shown += ", ...]" if x.size > _ENTRIES else "]"
        return f"array of dtype={x.dtype}, shape={x.shape}: {shown}"

    def _tensor(self, x: Any) -> str:
        """A tensor or variable, without its values."""
        path = getattr(x, "path", None) or ""
        dtype = getattr(x.dtype, "name", x.dtype)
        return f"{type(x).__name__}{f' {path!r}' if path else ''} of dtype={dtype}, shape={x.shape}"

    def _cut(self, text: str) -> str:
        return text if len(text) <= self.maxother else f"{text[: self.maxother - 3]}..."


_REPR = _Repr()


def short(value: Any) -> str:
    """Returns a value for a message: its `repr` if that is short, else its type, its size and its first entries."""
    text = _REPR.repr(value)
    if len(text) > _LENGTH:
        text = f"{text[:_LENGTH]}..."
    if isinstance(value, list | tuple | set | frozenset | dict) and len(value) > _ENTRIES:
        return f"{text} (a {type(value).__name__} of {len(value)})"
    return text
