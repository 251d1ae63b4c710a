"""Keys of the entries that a `MaskedOptimizer` has in a Keras file.

Today there are `"index"` and, for each mask, `"record 000012 head%2Fkernel"`. Files written before layouts were stored
have `"mask 000012 head%2Fkernel"` and `"unseeded 000012 head%2Fkernel"`.
"""

import re
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

Kind = Literal["index", "record", "mask", "unseeded"]

_INDEX = "index"
_PATTERN = re.compile(r"(record|mask|unseeded) (\d+) (.*)", re.DOTALL)


class EntryKey(NamedTuple):
    """A key, taken apart.

    Attributes:
        kind: `"index"`: variables, slots and rules. `"record"`: one mask. `"mask"` and `"unseeded"`: bare bits of a
            mask and of the entries that wait to be seeded.
        number: Position of the mask among the others.
        name: Unique path of the mask's variable.
    """

    kind: Kind
    number: int = 0
    name: str = ""


def entry_key(key: EntryKey) -> str:
    """Returns the text of a key. Its name has no slash, which HDF5 takes for a group."""
    return _INDEX if key.kind == _INDEX else f"{key.kind} {key.number:06d} {quote(key.name, safe='')}"


def parse_entry_key(text: str) -> EntryKey | None:
    """Returns a key taken apart, or None if it is none of ours."""
    if text == _INDEX:
        return EntryKey("index")
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    kind: Kind = match[1]  # type: ignore[assignment]
    return EntryKey(kind, int(match[2]), unquote(match[3]))
