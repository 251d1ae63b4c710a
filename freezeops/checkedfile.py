"""Files that are read only when they are whole: a JSON header and bytes behind it, under a checksum.

Format:

- the kind of file, a line of text of 16 bytes;
- 32 bytes: SHA-256 of all that follows;
- 8 bytes: length of the header, little-endian;
- the header: JSON, with `version`;
- bytes that the header describes.
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        magic: What it begins with, 16 bytes.
        version: The version that is written and read.
        name: For messages, such as `"mask file"`.
        writer: The function that writes it, for messages.
    """

    magic: bytes
    version: int
    name: str
    writer: str


def write(path: Path, kind: Kind, header: dict[str, Any], content: bytes) -> None:
    """Writes a file; a crash leaves the old one or the new one, never a part of one."""
    _replace(path, encode(kind, header, content))


def encode(kind: Kind, header: dict[str, Any], content: bytes) -> bytes:
    """What a file of this kind consists of."""
    text = json.dumps({"version": kind.version, **header}).encode()
    body = len(text).to_bytes(8, "little") + text + content
    return kind.magic + hashlib.sha256(body).digest() + body


def read(path: Path, kind: Kind) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, altered, of another kind or another version.
    """
    return decode(kind, path.read_bytes(), path)


def decode(kind: Kind, data: bytes, path: Path | str) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it of what `encode` returned.

    Args:
        kind: The kind of file.
        data: All of its bytes.
        path: Where they come from, for messages.

    Raises:
        ValueError: As `read`.
    """
    start = len(kind.magic) + 32
    if not data.startswith(kind.magic):
        raise refusal(path, kind, f"it does not begin as a {kind.name} does")
    if len(data) < start + 8 or hashlib.sha256(data[start:]).digest() != data[len(kind.magic) : start]:
        raise refusal(path, kind, "its checksum is wrong; it is truncated or was altered")
    length = int.from_bytes(data[start : start + 8], "little")
    try:
        header = dict(json.loads(data[start + 8 : start + 8 + length]))
    except (ValueError, TypeError) as error:
        raise refusal(path, kind, f"its header cannot be read: {error}") from None
    if header.get("version") != kind.version:
        raise refusal(
            path, kind, f"it is of version {header.get('version')!r}, and this freezeops reads {kind.version}"
        )
    return header, data[start + 8 + length :]


def refusal(path: Path | str, kind: Kind, what: str) -> ValueError:
    """The error for a file that is not read."""
    return ValueError(f"A {kind.name} must be one that `{kind.writer}` wrote, whole. Received: {str(path)!r}: {what}")


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
