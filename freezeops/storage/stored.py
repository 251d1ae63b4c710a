"""Masks as every store holds them: a Keras file, a checkpoint, a config.

Each mask is stored with its variable's path and shape, its layout, the polarity and a checksum, so that nothing is read
by position or by byte count, and nothing depends on how a mask lies in memory. Beside it stand the entries that wait to
be seeded, and what the optimizer's slots are slots of.

A store holds `Stored`: in a Keras file one entry for each variable and one for the rest (`to_entries`), in a checkpoint
one string (`to_bytes`). Files written before version 1 of this format have bare bits under the variable's path
(`RawMask`): they hold no layout, which is found where only one fits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from freezeops.masks import layout as layouts
from freezeops.masks import packing
from freezeops.masks.layout import Layout, Shape
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.storage import checkedfile, saved_names
from freezeops.storage.saved_names import Named

POLARITY = "1 = trainable"
BIT_ORDER = "little"

_KIND = checkedfile.Kind(b"freezeops state\n", 1, "stored mask", "MaskedOptimizer")
_INDEX = "index"


@dataclass(frozen=True)
class StoredMask:
    """The mask of one variable.

    Attributes:
        name: The variable's path, unique in the store.
        shape: The variable's shape.
        mask: The mask; `None` where a config left it out, because it was too large, and nobody has stated it since.
        stated: Whether a call or an earlier load named this variable. What nobody stated states nothing.
        way: How the variable was split: `"full"`, `"compact"` or `"permanent"`; empty where it is not known.
        capacity: With compact state: how many of the mask's bits there was room for.
        waiting: The entries that wait to be seeded; `None`: none.
    """

    name: str
    shape: Shape
    mask: Mask | None
    stated: bool = True
    way: str = "full"
    capacity: int = 0
    waiting: Mask | None = None

    @property
    def freezes(self) -> bool:
        """Whether something would be lost without it."""
        return self.stated and (self.mask is None or self.mask.count() < self.mask.size)


@dataclass(frozen=True)
class RawMask:
    """The bits of one variable's mask from a file without layouts.

    Attributes:
        name: As in `StoredMask`.
        bits: The packed mask.
        waiting: The packed bits of what waits to be seeded, if any.
        slashes: Whether the name is a path as it is. In old checkpoints its slashes have become underscores.
    """

    name: str
    bits: np.ndarray
    waiting: np.ndarray | None = None
    slashes: bool = True

    @property
    def freezes(self) -> bool:
        """Whether it may have a frozen entry."""
        return bool(np.any(self.bits[:-1] != 0xFF)) or (self.bits.size > 0 and not _is_low_ones(int(self.bits[-1])))

    def resolve(self, shape: Shape, layout: Layout | None = None) -> StoredMask:
        """The mask for a variable.

        Args:
            shape: The variable's.
            layout: Of the mask, where it is known.

        Raises:
            ValueError: If no layout fits, or two do that differ in what they freeze.
        """
        readings = self._readings(shape, layout)
        if len(readings) != 1:
            why = "with no layout of that shape" if not readings else f"which may be {_described(readings)}"
            raise ValueError(
                "A mask that was stored without its layout must leave one reading. Received: "
                f"{self.bits.size} bytes for {self.name!r} of shape {shape}, {why}. Load the file with the version of "
                "freezeops that wrote it, call `fz.save_masks(optimizer, path)` there, and `fz.load_masks` here"
            )
        mask = readings[0]
        return StoredMask(self.name, shape, mask, mask.count() < mask.size, "", waiting=self._waiting(shape, mask))

    def _readings(self, shape: Shape, layout: Layout | None) -> list[Mask]:
        found: list[Mask] = []
        for each in [layout] if layout is not None else layouts.of_shape(shape):
            if each.packed_bytes != self.bits.size or each.size != int(np.prod(shape, dtype=np.int64)):
                continue
            mask = Mask(shape, each, self.bits)
            if not np.array_equal(mask.packed, self.bits):
                continue  # bits behind the last one were always zero
            if not any(mask == other for other in found):
                found.append(mask)
        return found

    def _waiting(self, shape: Shape, mask: Mask) -> Mask | None:
        if self.waiting is None or not self.waiting.any():
            return None
        elements = layouts.elementwise(shape)
        if self.waiting.size == elements.packed_bytes:
            return Mask(shape, elements, self.waiting)
        # Compact state: a bit for each trainable entry, in order.
        flags = np.zeros(elements.kept, bool)
        trainable = mask.indices()
        if self.waiting.size * 8 < trainable.size:
            return None
        flags[trainable] = packing.unpack_bits(self.waiting, self.waiting.size * 8)[: trainable.size]
        return Mask.from_array(flags.reshape(shape))


def _is_low_ones(byte: int) -> bool:
    """Whether a byte is some ones with zeros above them: 1, 3, 7, ..., 255."""
    return byte != 0 and byte & (byte + 1) == 0


def _described(masks: Sequence[Mask]) -> str:
    return " or ".join(f"layout {tuple(mask.layout)} with {mask.count()} trainable entries" for mask in masks)


@dataclass
class Stored:
    """What a store holds of a `MaskedOptimizer`.

    Attributes:
        masks: Of the variables that have one.
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
        """Whether it was written before layouts were stored."""
        return any(isinstance(mask, RawMask) for mask in self.masks)

    # As bytes.

    def to_bytes(self) -> bytes:
        """All of it as one string."""
        header = self._index() | {"masks": [_mask_header(mask) for mask in self._masks()]}
        return checkedfile.encode(_KIND, header, b"".join(map(_mask_content, self._masks())))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Stored:
        """The reverse.

        Args:
            data: What `to_bytes` returned.
            source: Where it comes from, for messages.

        Raises:
            ValueError: If it is truncated or altered, or of another version.
        """
        header, content = checkedfile.decode(_KIND, data, source)
        stored = cls._from_index(header, source)
        stored.masks = list(_masks_from(header, content, source))
        return stored

    # As entries of a Keras file.

    def to_entries(self) -> Iterator[tuple[str, np.ndarray]]:
        """Keys and `uint8` vectors: one for each mask, none larger than its variable and some bytes, and an index."""
        if self.masks or self.rules or self.variables:
            yield _INDEX, _vector(checkedfile.encode(_KIND, self._index(), b""))
        for number, mask in enumerate(self._masks()):
            header = {"masks": [_mask_header(mask)]}
            key = f"record {number:06d} {quote(mask.name, safe='')}"
            yield key, _vector(checkedfile.encode(_KIND, header, _mask_content(mask)))

    @classmethod
    def from_entries(cls, entries: Mapping[str, np.ndarray]) -> Stored:
        """The reverse; also reads entries of older versions.

        Raises:
            ValueError: If an entry is altered, or none of ours.
        """
        stored = cls()
        if _INDEX in entries:
            header, _ = checkedfile.decode(_KIND, _data(entries[_INDEX], _INDEX), _INDEX)
            stored = cls._from_index(header, _INDEX)
        waiting = {key.split(" ", 2)[2]: value for key, value in entries.items() if key.startswith("unseeded ")}
        for key in sorted(entries):
            if key.startswith("record "):
                header, content = checkedfile.decode(_KIND, _data(entries[key], key), key)
                stored.masks += _masks_from(header, content, key)
            elif key.startswith("mask "):
                name = key.split(" ", 2)[2]
                stored.masks.append(RawMask(unquote(name), _checked(entries[key], key), waiting.get(name)))
            elif key != _INDEX and not key.startswith("unseeded "):
                raise ValueError(
                    f"The state in a file must be that of a MaskedOptimizer. Received: {key!r}, which is no mask"
                )
        return stored

    def _masks(self) -> list[StoredMask]:
        return [mask for mask in self.masks if isinstance(mask, StoredMask)]

    def _index(self) -> dict[str, Any]:
        return {
            "variables": [[name, list(shape or ())] for name, shape in self.variables],
            "slots": [[kind, [[variable, name] for variable, name in names]] for kind, names in self.slots],
            "rules": self.rules,
        }

    @classmethod
    def _from_index(cls, header: Mapping[str, Any], source: str) -> Stored:
        try:
            return cls(
                variables=[(str(name), tuple(int(size) for size in shape)) for name, shape in header["variables"]],
                slots=[(str(kind), [(v, str(n)) for v, n in names]) for kind, names in header["slots"]],
                rules=[dict(rule) for rule in header["rules"]],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise checkedfile.refusal(source, _KIND, f"its header does not describe masks: {error!r}") from None


def _mask_header(stored: StoredMask) -> dict[str, Any]:
    return {
        "path": stored.name,
        "shape": list(stored.shape),
        "layout": None if stored.mask is None else list(stored.mask.layout),
        "polarity": POLARITY,
        "bit_order": BIT_ORDER,
        "stated": stored.stated,
        "way": stored.way,
        "capacity": stored.capacity,
        "waiting": stored.waiting is not None,
    }


def _mask_content(stored: StoredMask) -> bytes:
    content = b"" if stored.mask is None else stored.mask.packed.tobytes()
    if stored.waiting is not None:
        content += stored.waiting.with_layout(layouts.elementwise(stored.shape)).packed.tobytes()
    return content


def take_mask(entry: Mapping[str, Any], content: bytes, offset: int) -> tuple[Mask, int]:
    """The mask that a header's entry describes by `shape` and `layout`.

    Args:
        entry: The entry.
        content: The bytes behind the header.
        offset: Where its bits begin.

    Returns:
        The mask, and where its bits end.

    Raises:
        ValueError: If it describes none, or one that is not there.
    """
    shape, sizes = checkedfile.sizes(entry, "shape"), checkedfile.sizes(entry, "layout")
    if len(sizes) != 3:
        raise ValueError(f"`layout` must be (outer, kept, inner). Received: {short(sizes)}")
    layout = Layout(*sizes)
    end = offset + layout.packed_bytes
    return Mask(shape, layout, np.frombuffer(content[offset:end], np.uint8)), end


def _masks_from(header: Mapping[str, Any], content: bytes, source: str) -> Iterator[StoredMask]:
    offset = 0
    try:
        for entry in checkedfile.field(header, "masks", list):
            name, shape = checkedfile.field(entry, "path", str), checkedfile.sizes(entry, "shape")
            polarity, order = checkedfile.field(entry, "polarity", str), checkedfile.field(entry, "bit_order", str)
            if (polarity, order) != (POLARITY, BIT_ORDER):
                raise ValueError(f"`polarity` and `bit_order` must be known. Received: {short((polarity, order))}")
            mask = waiting = None
            if entry.get("layout") is not None:
                mask, offset = take_mask(entry, content, offset)
            if checkedfile.field(entry, "waiting", bool):
                elements = entry | {"layout": list(layouts.elementwise(shape))}
                waiting, offset = take_mask(elements, content, offset)
            stated, way = checkedfile.field(entry, "stated", bool), checkedfile.field(entry, "way", str)
            yield StoredMask(name, shape, mask, stated, way, checkedfile.field(entry, "capacity", int), waiting)
        if offset != len(content):
            raise ValueError(f"there must be {offset} bytes of masks. Received: {len(content)} bytes")
    except ValueError as error:
        raise checkedfile.refusal(source, _KIND, f"its header does not describe masks: {error}") from None


def _vector(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _checked(value: Any, key: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(
            f"A stored mask must be a vector of bytes. Received: {key!r} of dtype={array.dtype}, shape={array.shape}"
        )
    return array


def _data(value: Any, key: str) -> bytes:
    return _checked(value, key).tobytes()


class Problem(ValueError):
    """Stored masks that do not fit the variables of an optimizer."""


def find(
    stored: Stored,
    own: Sequence[Named],
    known_layouts: Mapping[str, Layout] | None = None,
    strict: bool = False,
    others: Collection[str] = (),
    passed: list[str] | None = None,
) -> tuple[dict[int, StoredMask], list[str]]:
    """Which variable each stored mask is for.

    Args:
        stored: What a store holds.
        own: The optimizer's variables: unique paths and shapes.
        known_layouts: Layouts of masks that were stored without, by the stored name.
        strict: Whether every mask must fit, also one that freezes nothing.
        others: Paths of the model's variables that the optimizer does not have. Masks of these are passed over.
        passed: Gets the names of masks that were passed over so.

    Returns:
        The masks by the variable's position, and what is wrong with others, in words. A mask that freezes nothing is
        passed over where it has no variable.
    """
    named: list[Named] = list(stored.variables) or [
        (mask.name, mask.shape if isinstance(mask, StoredMask) else None) for mask in stored.masks
    ]
    numbers = {name: i for i, (name, _) in enumerate(named)}
    paths: Sequence[Named] = named
    own_paths: Sequence[Named] = [*own, *((path, None) for path in others)]
    if any(isinstance(mask, RawMask) and not mask.slashes for mask in stored.masks):
        paths, own_paths = _without_slashes(named), _without_slashes(own_paths)
    pairs = saved_names.pair(paths, own_paths)
    found: dict[int, StoredMask] = {}
    problems = []
    for mask in stored.masks:
        number = numbers.get(mask.name)
        position = None if number is None else pairs.found.get(number)
        needed = mask.freezes or strict
        if position is None and number is not None and needed and not pairs.candidates.get(number):
            # The same name and another shape?
            position = saved_names.pair([(name, None) for name, _ in paths], own_paths).found.get(number)
        if position is not None and position >= len(own):
            if passed is not None and mask.freezes:
                passed.append(mask.name)
            continue
        if position is None:
            if needed:
                candidates = [own_paths[j][0] for j in pairs.candidates.get(-1 if number is None else number, [])]
                may_be = f"which may be for any of {candidates}" if candidates else "which matches nothing"
                problems.append(f"a mask of {mask.name!r}, {may_be}")
            continue
        name, shape = own[position]
        assert shape is not None
        if isinstance(mask, RawMask):
            try:
                mask = mask.resolve(shape, (known_layouts or {}).get(mask.name))
            except ValueError as error:
                problems.append(str(error))
                continue
        if mask.shape != shape:
            if needed:
                problems.append(
                    f"`mask` must have the shape of its variable, mask.shape={mask.shape}, shape={shape} for {name!r}"
                )
            continue
        found[position] = mask
    return _told_apart(found, own, problems), problems


def _told_apart(found: dict[int, StoredMask], own: Sequence[Named], problems: list[str]) -> dict[int, StoredMask]:
    """Leaves out masks of variables that share a path and a shape, and differ: nothing says which is which."""
    groups: dict[Named, list[int]] = {}
    for position, (name, shape) in enumerate(own):
        groups.setdefault((saved_names.path_of(name), shape), []).append(position)
    result = dict(found)
    for (path, _), positions in groups.items():
        stored = [found[position] for position in positions if position in found]
        differ = len(stored) < len(positions) or any(each.mask != stored[0].mask for each in stored)
        if len(positions) > 1 and any(each.freezes for each in stored) and differ:
            problems.append(f"masks of {len(positions)} variables with the path {path!r}, which only order tells apart")
            for position in positions:
                result.pop(position, None)
    return result


def _without_slashes(named: Sequence[Named]) -> list[Named]:
    """Paths whose every underscore may have been a slash, but for those in front of Keras's counts."""
    return [(re.sub(r"_(?!\d+(?:_|/|$))", "/", name), shape) for name, shape in named]


def refusal(problems: Iterable[str], own: Sequence[Named]) -> Problem:
    """The error where stored masks do not fit."""
    problems = list(problems)
    return Problem(
        "Stored masks must be those of the optimizer's variables, found by path. Received: "
        f"{'; '.join(problems[:5])}{' and more' if len(problems) > 5 else ''}. The optimizer has "
        f"{[name for name, _ in own[:20]]}{'...' if len(own) > 20 else ''}. Load with "
        "`fz.load_masks(optimizer, path, rename={...})` to say which variable is meant, or with `skip_mismatch=True` "
        "(`load_weights`) to do without what does not fit"
    )
