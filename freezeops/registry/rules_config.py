"""Rules as a config holds them: plain lists, numbers and text, with masks packed and compressed.

A rule becomes `{"action": "freeze", "target": ["head/.*"], "where": ..., "permanent": False}`, masks that were loaded,
or that a built optimizer has, `{"action": "load", "masks": {path: ...}, "variables": ...}`. Masks above the limit are
left out, with `"left_out": True` in their place.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.messages import short
from freezeops.registry.rules import LEFT_OUT, Booleans, Loaded, MaskRule
from freezeops.registry.targets import ExactPath
from freezeops.storage.saved_names import Named
from freezeops.storage.stored import Stored
from freezeops.storage.stored_mask import RawMask, StoredMask

LIMIT = 1 << 20
"""How many bytes of compressed masks a config holds."""


class _Room:
    """The rest of the limit."""

    def __init__(self, limit: int | None):
        self._left = limit

    def compressed(self, data: bytes) -> str | None:
        """The data as text; `None` where there is no room for it."""
        # At most 1 : 1032, so that much need not be tried.
        if self._left is not None and len(data) > 1032 * max(self._left, 0) + 64:
            return None
        compressor, parts, size = zlib.compressobj(1), [], 0
        for start in range(0, max(len(data), 1), 1 << 18):
            parts.append(compressor.compress(data[start : start + (1 << 18)]))
            size += len(parts[-1])
            if self._left is not None and size > self._left:
                return None
        parts.append(compressor.flush())
        size += len(parts[-1])
        if self._left is not None:
            if size > self._left:
                return None
            self._left -= size
        return base64.b64encode(b"".join(parts)).decode("ascii")


def _decompressed(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def to_config(rules: Sequence[MaskRule | Loaded], limit: int | None) -> list[dict[str, Any]]:
    """Rules as a config holds them.

    Args:
        rules: The rules, in order.
        limit: How many bytes of compressed masks there may be; `None`: any.

    Raises:
        ValueError: If a rule names a variable or a layer by the object.
    """
    room = _Room(limit)
    return [_loaded_to_config(rule, room) if isinstance(rule, Loaded) else _to_config(rule, room) for rule in rules]


def from_config(config: Sequence[Mapping[str, Any]]) -> list[MaskRule | Loaded]:
    """Returns the rules of a config; the reverse of `to_config`."""
    return [_loaded_from_config(each) if each["action"] == "load" else _from_config(each) for each in config]


def _to_config(rule: MaskRule, room: _Room) -> dict[str, Any]:
    target: list[Any] = []
    for part in rule.target:
        if isinstance(part, ExactPath):
            target.append({"path": part.path})
        elif isinstance(part, str):
            target.append(part)
        else:
            name = getattr(part, "path", None) or getattr(part, "name", repr(part))
            raise ValueError(
                "A rule must name its variables by path to be copied or saved before the optimizer is built: call "
                f"{rule.action}({name!r}, ...) with the path or a pattern, or build the optimizer first with "
                f"`optimizer.build(model.trainable_variables)`. Received: {rule.action}() of the "
                f"{type(part).__name__} {name!r} itself"
            )
    config: dict[str, Any] = {"action": rule.action, "target": target, "permanent": rule.permanent}
    where = _where_to_config(rule.entries, room)
    return config | ({"left_out": True} if where is LEFT_OUT else {"where": where})


def _from_config(config: Mapping[str, Any]) -> MaskRule:
    target = [ExactPath(part["path"]) if isinstance(part, Mapping) else part for part in config["target"]]
    entries = LEFT_OUT if config.get("left_out") else _where_from_config(config["where"])
    return MaskRule(config["action"], target, entries, bool(config["permanent"]))


def _where_to_config(where: Any, room: _Room) -> Any:
    """Returns a rule's entries as a config holds them; `LEFT_OUT` where there is no room."""
    if where is None or where is LEFT_OUT:
        return where
    if where is Ellipsis:
        return {"kind": "ellipsis"}
    if isinstance(where, slice):
        return {"kind": "slice", "of": [None if x is None else int(x) for x in (where.start, where.stop, where.step)]}
    if isinstance(where, tuple):
        parts = [_where_to_config(part, room) for part in where]
        return LEFT_OUT if any(part is LEFT_OUT for part in parts) else {"kind": "index", "of": parts}
    if isinstance(where, Mask):
        mask = _mask_to_config(where, room)
        return LEFT_OUT if mask.get("left_out") else {"kind": "mask", "of": mask}
    booleans = where if isinstance(where, Booleans) else None
    if booleans is None and (array := np.asarray(where)).dtype == np.bool_:
        booleans = Booleans(Mask.from_array(array))  # a part of an index expression
    if booleans is not None:
        mask = _mask_to_config(booleans.packed, room)
        return LEFT_OUT if mask.get("left_out") else {"kind": "booleans", "of": mask}
    text = room.compressed(array.astype("<i8").tobytes())
    return LEFT_OUT if text is None else {"kind": "integers", "shape": list(array.shape), "of": text}


def _where_from_config(config: Any) -> Any:
    if config is None:
        return None
    kind = config["kind"]
    if kind == "ellipsis":
        return Ellipsis
    if kind == "slice":
        return slice(*config["of"])
    if kind == "index":
        return tuple(_where_from_config(part) for part in config["of"])
    if kind in ("mask", "booleans"):
        mask = _mask_from_config(config["of"])
        assert mask is not None
        return mask if kind == "mask" else np.array(mask.to_numpy())
    return np.frombuffer(_decompressed(config["of"]), "<i8").astype(np.int64).reshape(config["shape"])


def _mask_to_config(mask: Mask, room: _Room) -> dict[str, Any]:
    text = room.compressed(mask.packed.tobytes())
    bits = {"left_out": True} if text is None else {"bits": text}
    return {"shape": list(mask.shape), "layout": list(mask.layout)} | bits


def _mask_from_config(config: Mapping[str, Any]) -> Mask | None:
    if config.get("left_out"):
        return None
    bits = np.frombuffer(_decompressed(config["bits"]), np.uint8)
    return Mask(tuple(config["shape"]), Layout(*config["layout"]), bits)


def _loaded_to_config(loaded: Loaded, room: _Room) -> dict[str, Any]:
    if old := [mask.name for mask in loaded.stored.masks if isinstance(mask, RawMask) and mask.freezes]:
        raise ValueError(
            "Masks that an older version of freezeops stored without their layout must find their variables before "
            "they can be copied or saved: build the optimizer first with `optimizer.build(model.trainable_variables)`. "
            f"Received: masks of {short(old)}"
        )
    masks = {}
    # Small ones first, so that as few as possible are left out.
    stated = [mask for mask in loaded.stored.masks if not isinstance(mask, RawMask) and mask.stated]
    for stored in sorted(stated, key=lambda each: 0 if each.mask is None else each.mask.nbytes):
        if stored.mask is None:
            masks[stored.name] = {"shape": list(stored.shape), "left_out": True}
        else:
            masks[stored.name] = _mask_to_config(stored.mask, room)
    variables = [[name, list(shape or ())] for name, shape in loaded.stored.variables]
    return {"action": "load", "masks": dict(sorted(masks.items())), "variables": variables}


def _loaded_from_config(config: Mapping[str, Any]) -> Loaded:
    masks = [StoredMask(name, tuple(each["shape"]), _mask_from_config(each)) for name, each in config["masks"].items()]
    variables: list[Named] = [(name, tuple(shape)) for name, shape in config["variables"]]
    return Loaded(Stored(list(masks), variables), by_call=True)
