"""The mask of one variable, as stores hold it.

`StoredMask` has a path, a shape, a layout and the bits, so that nothing is read by position or by byte count. `RawMask`
is what files of older versions have: bare bits, whose layout is found where only one fits.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from freezeops.masks import layout as layouts
from freezeops.masks import packing
from freezeops.masks.layout import Layout, Shape
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.storage import checkedfile

POLARITY = "1 = trainable"
BIT_ORDER = "little"


@dataclass(frozen=True)
class StoredMask:
    """The mask of one variable.

    Attributes:
        name: The variable's path, unique in the store.
        shape: The variable's shape.
        mask: The mask; `None` where a config left it out, because it was too large, and nobody has stated it since.
        stated: True if a call or an earlier load named this variable. A mask that nobody stated replaces none.
        mode: Mode of the variable's partition: `"full"`, `"compact"` or `"permanent"`; empty where it is not known.
        capacity: With compact state: how many of the mask's bits there was room for.
        waiting: The entries that wait to be seeded; `None`: none.
    """

    name: str
    shape: Shape
    mask: Mask | None
    stated: bool = True
    mode: str = "full"
    capacity: int = 0
    waiting: Mask | None = None

    @property
    def freezes(self) -> bool:
        """True if a load without this mask would lose something."""
        return self.stated and (self.mask is None or self.mask.count() < self.mask.size)

    def header(self) -> dict[str, Any]:
        """Returns the JSON that describes this mask; `masks_from` reads it."""
        return {
            "path": self.name,
            "shape": list(self.shape),
            "layout": None if self.mask is None else list(self.mask.layout),
            "polarity": POLARITY,
            "bit_order": BIT_ORDER,
            "stated": self.stated,
            "way": self.mode,
            "capacity": self.capacity,
            "waiting": self.waiting is not None,
        }

    def content(self) -> bytes:
        """Returns the bits: those of the mask, then those of the waiting entries, as far as there are any."""
        content = b"" if self.mask is None else self.mask.packed.tobytes()
        if self.waiting is not None:
            content += self.waiting.with_layout(layouts.elementwise(self.shape)).packed.tobytes()
        return content


def masks_from(entries: Sequence[Any], content: bytes) -> Iterator[StoredMask]:
    """Yields the masks that headers describe.

    Args:
        entries: The headers, as `StoredMask.header` writes them.
        content: The bits of all of them, one after the other.

    Raises:
        ValueError: If a header describes no mask, or other bits than there are.
    """
    offset = 0
    for entry in entries:
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
        stated, mode = checkedfile.field(entry, "stated", bool), checkedfile.field(entry, "way", str)
        yield StoredMask(name, shape, mask, stated, mode, checkedfile.field(entry, "capacity", int), waiting)
    if offset != len(content):
        raise ValueError(f"there must be {offset} bytes of masks. Received: {len(content)} bytes")


def take_mask(entry: Mapping[str, Any], content: bytes, offset: int) -> tuple[Mask, int]:
    """Reads the mask that a header describes by `shape` and `layout`.

    Args:
        entry: The header.
        content: Bits of this mask and others.
        offset: Byte at which those of this mask begin.

    Returns:
        The mask, and the byte behind its bits.

    Raises:
        ValueError: If the header describes no mask, or one that is not there.
    """
    shape, sizes = checkedfile.sizes(entry, "shape"), checkedfile.sizes(entry, "layout")
    if len(sizes) != 3:
        raise ValueError(f"`layout` must be (outer, kept, inner). Received: {short(sizes)}")
    layout = Layout(*sizes)
    end = offset + layout.packed_bytes
    return Mask(shape, layout, np.frombuffer(content[offset:end], np.uint8)), end


@dataclass(frozen=True)
class RawMask:
    """The bits of one variable's mask from a file without layouts.

    Attributes:
        name: As in `StoredMask`.
        bits: The packed mask.
        waiting: The packed bits of the entries that wait to be seeded, if any.
        slashes: False if the slashes of the name have become underscores, as in old checkpoints.
    """

    name: str
    bits: np.ndarray
    waiting: np.ndarray | None = None
    slashes: bool = True

    @property
    def freezes(self) -> bool:
        """True if the mask may have a frozen entry."""
        return bool(np.any(self.bits[:-1] != 0xFF)) or (self.bits.size > 0 and not _is_low_ones(int(self.bits[-1])))

    def resolve(self, shape: Shape, layout: Layout | None = None) -> StoredMask:
        """Returns the mask for a variable.

        Args:
            shape: Shape of the variable.
            layout: Layout of the mask, where it is known.

        Raises:
            ValueError: If no layout fits, or two do that differ in which entries they freeze.
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
        """Returns the different masks that the bits may mean."""
        found: list[Mask] = []
        for candidate in [layout] if layout is not None else layouts.of_shape(shape):
            if candidate.packed_bytes != self.bits.size or candidate.size != int(np.prod(shape, dtype=np.int64)):
                continue
            mask = Mask(shape, candidate, self.bits)
            if not np.array_equal(mask.packed, self.bits):
                continue  # bits behind the last one were always zero
            if not any(mask == other for other in found):
                found.append(mask)
        return found

    def _waiting(self, shape: Shape, mask: Mask) -> Mask | None:
        """Returns the entries that wait to be seeded, as a mask of the variable."""
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
    """Returns True for a byte of ones with zeros above them: 1, 3, 7, ..., 255."""
    return byte != 0 and byte & (byte + 1) == 0


def _described(masks: Sequence[Mask]) -> str:
    return " or ".join(f"layout {tuple(mask.layout)} with {mask.count()} trainable entries" for mask in masks)
