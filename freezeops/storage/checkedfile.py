"""Files under a checksum: a JSON header and bytes behind it. A file that is not whole is refused.

Format:

- the kind of file, a line of text of 16 bytes;
- 32 bytes: SHA-256 of all that follows;
- 8 bytes: length of the header, little-endian;
- the header: JSON, with `version`;
- bytes that the header describes.

A checksum says that a file is whole, and not who wrote it: the content of a header is checked as well (`field`,
`sizes`).
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from freezeops.messages import short


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        magic: The first 16 bytes of each file.
        version: Version of the format that is written and read.
        name: Name for messages, such as `"mask file"`.
        writer: The function that writes it, for messages.
    """

    magic: bytes
    version: int
    name: str
    writer: str


def write(path: Path, kind: Kind, header: dict[str, Any], content: bytes) -> None:
    """Writes a file; a crash leaves the old one or the new one, never a part of one.

    The mode of an existing file is kept, and a symbolic link stays one: its target is replaced. Temporary files that
    killed writers of the same file left behind are removed.

    Raises:
        ValueError: If the path is that of a folder, a device or the like.
    """
    _replace(path, kind, encode(kind, header, content))


def encode(kind: Kind, header: dict[str, Any], content: bytes) -> bytes:
    """Returns the bytes of a file."""
    text = json.dumps({"version": kind.version, **header}).encode()
    body = len(text).to_bytes(8, "little") + text + content
    return kind.magic + hashlib.sha256(body).digest() + body


def read(path: Path, kind: Kind) -> tuple[dict[str, Any], bytes]:
    """Returns the header of a file and the bytes behind it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, altered, of another kind or another version, or no regular file.
    """
    return decode(kind, _read_bytes(path, kind), path)


def decode(kind: Kind, data: bytes, path: Path | str) -> tuple[dict[str, Any], bytes]:
    """Returns the header and the bytes behind it, from the bytes of a file.

    Args:
        kind: The kind of file.
        data: All bytes of the file.
        path: Path of the file, for messages.

    Raises:
        ValueError: If they are truncated, altered, of another kind or another version.
    """
    start = len(kind.magic) + 32
    if not data.startswith(kind.magic):
        raise refusal(path, kind, f"it does not begin as a {kind.name} does")
    if len(data) < start + 8 or hashlib.sha256(memoryview(data)[start:]).digest() != data[len(kind.magic) : start]:
        raise refusal(path, kind, "its checksum is wrong; it is truncated or was altered")
    length = int.from_bytes(data[start : start + 8], "little")
    if length > len(data) - start - 8:
        raise refusal(path, kind, "its header is longer than the file")
    try:
        header = _parse(data[start + 8 : start + 8 + length])
    except (ValueError, RecursionError) as error:
        raise refusal(path, kind, f"its header cannot be read: {short(str(error))}") from None
    version = header.get("version")
    if type(version) is not int or version != kind.version:
        raise refusal(path, kind, f"it is of version {short(version)}, and this freezeops reads {kind.version}")
    return header, data[start + 8 + length :]


def refusal(path: Path | str, kind: Kind, problem: str) -> ValueError:
    """Returns the error for a file that is not read, for example because it `is a directory`."""
    return ValueError(
        f"A {kind.name} must be one that `{kind.writer}` wrote, whole. Received: {str(path)!r}: {problem}"
    )


def field(entry: Any, name: str, kind: type) -> Any:
    """Returns a value of a header, which must be of exactly one type: `true` is no integer, and neither is `1.0`.

    Raises:
        ValueError: If it is missing or of another type.
    """
    value = entry.get(name) if isinstance(entry, dict) else None
    if type(value) is not kind:
        raise ValueError(f"`{name}` must be of type {kind.__name__}. Received: {short(entry)}")
    return value


def sizes(entry: Any, name: str) -> tuple[int, ...]:
    """Returns a list of sizes of a header.

    Raises:
        ValueError: If it is anything else, or TensorFlow could not have a tensor of that shape.
    """
    values = field(entry, name, list)
    # Zeros do not make up for other sizes that are too large.
    if any(type(value) is not int or value < 0 for value in values) or math.prod(v or 1 for v in values) >= 2**63:
        raise ValueError(f"`{name}` must be a list of sizes. Received: {short(values)}")
    return tuple(values)


def _parse(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(parsed := dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice in one object")
        return parsed

    header = json.loads(text.decode(), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    return header


def _kind_of(mode: int) -> str:
    """Returns the name of a kind of file, such as "directory", from its mode; "" for a regular file."""
    if stat.S_ISREG(mode):
        return ""
    tests = {"directory": stat.S_ISDIR, "FIFO": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((name for name, test in tests.items() if test(mode)), "device")


def _read_bytes(path: Path, kind: Kind) -> bytes:
    if name := _kind_of(os.stat(path).st_mode):
        raise refusal(path, kind, f"it is a {name}")
    with path.open("rb") as file:
        magic = file.read(len(kind.magic))
        if magic != kind.magic:
            raise refusal(path, kind, f"it does not begin as a {kind.name} does")
        return magic + file.read()


# Writing.
#
# The new file is written under a name of its own in the same folder, `NAME.PID.HEX.tmp`, and then renamed. While it
# is written, its process has it locked (`flock`), which a killed process has not: so the next writer of the same file
# knows that it may remove it, also where the numbers of processes begin anew (in containers) or several hosts write.


def _replace(path: Path, kind: Kind, content: bytes) -> None:
    try:
        existing = os.stat(path)
    except FileNotFoundError:
        existing = None
    if existing and (name := _kind_of(existing.st_mode)):
        raise ValueError(
            f"`path` must be that of a file, or of none yet, to write a {kind.name} to. Received: path={str(path)!r}, "
            f"which is a {name}"
        )
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    with _temporary(path, existing) as (temporary, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        if existing:
            _keep_owner_and_mode(descriptor, existing)
        os.fsync(descriptor)
        os.replace(temporary, path)
    # The file is in place. It is no failure that its folder cannot be opened (no read permission) or synced.
    with contextlib.suppress(OSError):
        _fsync_folder(path.parent)


@contextlib.contextmanager
def _temporary(path: Path, existing: os.stat_result | None) -> Iterator[tuple[Path, int]]:
    """Yields a new file in the folder of `path`, open and locked; removes it in the end if it is still there."""
    # Nobody may read it who may not read the existing one.
    mode = (existing.st_mode & 0o777) | 0o200 if existing else 0o666
    while True:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with contextlib.suppress(OSError):  # of a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                yield temporary, descriptor
                return
            # Before it was locked, another writer took it for a leftover.
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


def _keep_owner_and_mode(descriptor: int, existing: os.stat_result) -> None:
    for owner in (existing.st_uid, -1):
        with contextlib.suppress(OSError):  # not allowed to this process
            os.fchown(descriptor, owner, existing.st_gid)
            break
    os.fchmod(descriptor, existing.st_mode & 0o777)


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of killed writers, as far as it can."""
    name = re.compile(re.escape(path.name) + r"\.([1-9]\d*)\.[0-9a-f]{8}\.tmp")
    try:
        found = [(path.with_name(other), name.fullmatch(other)) for other in os.listdir(path.parent)]
    except OSError:
        return  # a folder that cannot be listed
    for leftover, match in found:
        if match and not _runs(int(match[1])):
            with contextlib.suppress(OSError):
                _remove_unlocked(leftover)


def _runs(process: int) -> bool:
    """Returns True if another process of this number runs on this host. For other hosts, locks decide."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return True


def _remove_unlocked(leftover: Path) -> None:
    """Removes a file unless a process has it locked.

    Raises:
        OSError: If a process has, or may have, or the file cannot be removed.
    """
    # For writing: on NFS nothing else can be locked.
    descriptor = os.open(leftover, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
