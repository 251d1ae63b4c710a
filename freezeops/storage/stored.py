"""Masks as every store holds them: a Keras file, a checkpoint, a config.

Each mask is stored with its variable's path and shape, its layout, the polarity and a checksum, so that nothing is read
by position or by byte count, and nothing depends on how a mask lies in memory. Beside it stand the entries that wait to
be seeded, and the variables that the optimizer's slots belong to.

A store holds a `Stored`: a Keras file has one entry for each mask and an index (`to_entries`), a checkpoint one string
(`to_bytes`). Files written before version 1 of this format have bare bits under the variable's path (`RawMask`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from freezeops.storage import checkedfile
from freezeops.storage.entry_keys import EntryKey, entry_key, parse_entry_key
from freezeops.storage.saved_names import Named
from freezeops.storage.stored_mask import RawMask, StoredMask, masks_from

_KIND = checkedfile.Kind(b"freezeops state\n", 1, "stored mask", "MaskedOptimizer")
_INDEX = entry_key(EntryKey("index"))


@dataclass
class Stored:
    """The state of a `MaskedOptimizer` in a store, but for the slots, which the inner optimizer saves.

    Attributes:
        masks: Masks of the variables that have one.
        variables: All variables that the optimizer was built with: unique paths and shapes.
        slots: For each optimizer inside, from the outermost: its class and, for each of its own variables, the name of
            the variable that it is a slot of (`None`: of none) and its name.
        rules: Calls that waited for the optimizer to be built, as `rules_config` writes them.
    """

    masks: list[StoredMask | RawMask] = field(default_factory=list)
    variables: list[Named] = field(default_factory=list)
    slots: list[tuple[str, list[tuple[str | None, str]]]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)

    @property
    def without_layouts(self) -> bool:
        """True if a mask was written before layouts were stored."""
        return any(isinstance(mask, RawMask) for mask in self.masks)

    # As bytes.

    def to_bytes(self) -> bytes:
        """Returns all of it as one string."""
        masks = self._masks()
        header = self._index() | {"masks": [mask.header() for mask in masks]}
        return checkedfile.encode(_KIND, header, b"".join(mask.content() for mask in masks))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Stored:
        """Reads a string that `to_bytes` wrote.

        Args:
            data: The string.
            source: The file that it comes from, for messages.

        Raises:
            ValueError: If it is truncated or altered, or of another version.
        """
        header, content = checkedfile.decode(_KIND, data, source)
        stored = cls._from_index(header, source)
        stored.masks = list(_masks_of(header, content, source))
        return stored

    # As entries of a Keras file.

    def to_entries(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields keys and `uint8` vectors: an index, and a record for each mask, little larger than its variable."""
        if self.masks or self.rules or self.variables:
            yield _INDEX, _vector(checkedfile.encode(_KIND, self._index(), b""))
        for number, mask in enumerate(self._masks()):
            key = entry_key(EntryKey("record", number, mask.name))
            yield key, _vector(checkedfile.encode(_KIND, {"masks": [mask.header()]}, mask.content()))

    @classmethod
    def from_entries(cls, entries: Mapping[str, np.ndarray]) -> Stored:
        """Reads entries that `to_entries` or an older version wrote.

        Raises:
            ValueError: If an entry is altered, or none of ours.
        """
        keys: dict[str, EntryKey] = {}
        for text in sorted(entries):
            if (key := parse_entry_key(text)) is None:
                raise ValueError(
                    f"The state in a file must be that of a MaskedOptimizer. Received: {text!r}, which is no mask"
                )
            keys[text] = key
        stored = cls()
        if _INDEX in entries:
            header, _ = checkedfile.decode(_KIND, _checked(entries[_INDEX], _INDEX).tobytes(), _INDEX)
            stored = cls._from_index(header, _INDEX)
        waiting = {key.name: entries[text] for text, key in keys.items() if key.kind == "unseeded"}
        for text, key in keys.items():
            if key.kind == "record":
                header, content = checkedfile.decode(_KIND, _checked(entries[text], text).tobytes(), text)
                stored.masks += _masks_of(header, content, text)
            elif key.kind == "mask":
                stored.masks.append(RawMask(key.name, _checked(entries[text], text), waiting.get(key.name)))
        return stored

    def _masks(self) -> list[StoredMask]:
        return [mask for mask in self.masks if isinstance(mask, StoredMask)]

    def _index(self) -> dict[str, Any]:
        """Returns everything but the masks as JSON."""
        return {
            "variables": [[name, list(shape or ())] for name, shape in self.variables],
            "slots": [[kind, [[variable, name] for variable, name in names]] for kind, names in self.slots],
            "rules": self.rules,
        }

    @classmethod
    def _from_index(cls, header: Mapping[str, Any], source: str) -> Stored:
        """Reads the JSON of `_index`."""
        try:
            return cls(
                variables=[(str(name), tuple(int(size) for size in shape)) for name, shape in header["variables"]],
                slots=[(str(kind), [(v, str(n)) for v, n in names]) for kind, names in header["slots"]],
                rules=[dict(rule) for rule in header["rules"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise checkedfile.refusal(source, _KIND, f"its header does not describe masks: {error!r}") from None


def _masks_of(header: Mapping[str, Any], content: bytes, source: str) -> Iterator[StoredMask]:
    """Yields the masks of a header, with errors that name the file."""
    try:
        yield from masks_from(checkedfile.field(header, "masks", list), content)
    except ValueError as error:
        raise checkedfile.refusal(source, _KIND, f"its header does not describe masks: {error}") from None


def _vector(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _checked(value: Any, key: str) -> np.ndarray:
    """Returns an entry as an array. Raises unless it is a vector of bytes."""
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(
            f"A stored mask must be a vector of bytes. Received: {key!r} of dtype={array.dtype}, shape={array.shape}"
        )
    return array
