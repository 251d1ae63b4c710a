"""Files of masks: versioned, keyed by variable path, checked before anything changes.

Format, version 1:

- 16 bytes: `freezeops masks\\n`;
- 32 bytes: SHA-256 of all that follows;
- 8 bytes: length of the header, little-endian;
- the header: JSON with `version`, `polarity`, `bit_order` and `masks`, a list of
  `path`, `shape` and `layout`;
- the packed bits of each mask, in that order, without gaps.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from freezeops.layout import Layout
from freezeops.mask import Mask
from freezeops.optimizer import MaskedOptimizer
from freezeops.rules import ExactPath

_MAGIC = b"freezeops masks\n"
_VERSION = 1
_POLARITY = "1 = trainable"
_BIT_ORDER = "little"


def save_masks(optimizer: MaskedOptimizer, path: str | os.PathLike) -> None:
    """Writes the masks of an optimizer's variables to a file.

    A crash leaves the old file or the new one, never a part of one.

    Args:
        optimizer: A built `MaskedOptimizer`.
        path: The file; an existing one is replaced.

    Raises:
        ValueError: If the optimizer is not built, or two of its variables have one path.
    """
    masks = optimizer.masks_by_path()
    header = {
        "version": _VERSION,
        "polarity": _POLARITY,
        "bit_order": _BIT_ORDER,
        "masks": [
            {"path": name, "shape": list(mask.shape), "layout": list(mask.layout)} for name, mask in masks.items()
        ],
    }
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text
    body += b"".join(mask.packed.tobytes() for mask in masks.values())
    _replace_file(Path(path), _MAGIC + hashlib.sha256(body).digest() + body)


def load_masks(
    optimizer: MaskedOptimizer,
    path: str | os.PathLike,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Registers the masks of a file; variables that it does not name keep theirs.

    Masks find their variables by path, whatever the order of the variables is.

    Args:
        optimizer: A `MaskedOptimizer`, built or not.
        path: A file that `save_masks` wrote.
        rename: Optional mapping from paths in the file to paths of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, altered or none of ours; if `rename`
            names a path that is not in it; or if a path or shape does not fit the
            optimizer's variables. Nothing has changed then.
    """
    masks = _read(Path(path))
    rename = dict(rename or {})
    if unknown := sorted(set(rename) - set(masks)):
        raise ValueError(
            f"`rename` must map paths that are in the file. Received: {unknown}, for a file with {sorted(masks)}"
        )
    renamed = {rename.get(name, name): mask for name, mask in masks.items()}
    if len(renamed) != len(masks):
        raise ValueError(f"`rename` must give every mask a path of its own. Received: rename={rename}")
    optimizer.register_masks({ExactPath(name): mask for name, mask in renamed.items()})


def _read(path: Path) -> dict[str, Mask]:
    """The masks of a file by path, or an error that says what is wrong with it."""
    content = path.read_bytes()

    def refuse(what: str) -> ValueError:
        return ValueError(f"A mask file must be one that `save_masks` wrote, whole. Received: {str(path)!r}: {what}")

    start = len(_MAGIC) + 32
    if not content.startswith(_MAGIC):
        raise refuse("it does not begin as a mask file does")
    if len(content) < start + 8 or hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise refuse("its checksum is wrong; it is truncated or was altered")
    length = int.from_bytes(content[start : start + 8], "little")
    header = json.loads(content[start + 8 : start + 8 + length])
    if header.get("version") != _VERSION:
        raise refuse(f"it is of version {header.get('version')!r}, and this freezeops reads {_VERSION}")
    if header.get("polarity") != _POLARITY or header.get("bit_order") != _BIT_ORDER:
        raise refuse(f"its polarity is {header.get('polarity')!r}, its bit order {header.get('bit_order')!r}")
    masks = {}
    offset = start + 8 + length
    for entry in header["masks"]:
        layout = Layout(*entry["layout"])
        bits = np.frombuffer(content, np.uint8, layout.packed_bytes, offset)
        masks[entry["path"]] = Mask(entry["shape"], layout, bits)
        offset += layout.packed_bytes
    return masks


def _replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
