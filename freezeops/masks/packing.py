"""Packed bits of NumPy arrays: eight booleans a byte, little bit order.

The compiled host module (`freezeops._host`) does the work. Without it, and with `FREEZEOPS_BACKEND=reference` in the
environment, NumPy does, with the same results.
"""

import importlib
import threading
from types import ModuleType

import numpy as np

from freezeops import backend

HOST_OPS = ("pack_bits", "unpack_bits", "count_bits", "bit_indices", "visits")
"""The functions here, and that of `visits.py`, that the host module speeds up, for `python -m freezeops`."""

RANK_BLOCK_BITS = 2048
"""Number of bits in a block of `rank_offsets`; `kRankBlockBits` in `csrc/mask_layout.h`."""

_ONES_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)

_lock = threading.Lock()
_imported: tuple[ModuleType | None, str] | None = None


def _import_host() -> tuple[ModuleType | None, str]:
    """Returns the host module, or None, and the text of `host_status`. Tries to import it once."""
    global _imported
    with _lock:
        if _imported is None:
            try:
                _imported = importlib.import_module("freezeops._host"), "loaded"
            except ImportError as error:
                _imported = None, f"not in use: {error}"
        return _imported


def host_module() -> ModuleType | None:
    """Returns the host module (`pack`, `unpack`, `count`, `indices`, `visits`), or None if NumPy does its work.

    NumPy does, without a warning, if the module was not built, and with `FREEZEOPS_BACKEND=reference`.
    """
    return None if backend.is_reference() else _import_host()[0]


def host_status() -> str:
    """Returns `"loaded"`, or the reason for not using the host module."""
    return "not in use: FREEZEOPS_BACKEND=reference" if backend.is_reference() else _import_host()[1]


def pack_bits(array: np.ndarray) -> np.ndarray:
    """Returns booleans as packed bits, in row-major order."""
    array = np.ascontiguousarray(array, dtype=bool)
    if host := host_module():
        return host.pack(array)
    return np.packbits(array.reshape(-1), bitorder="little")


def unpack_bits(packed: np.ndarray, size: int) -> np.ndarray:
    """Returns the first `size` packed bits as booleans."""
    if host := host_module():
        return host.unpack(packed, size)
    return _unpack(packed, size)


def count_bits(packed: np.ndarray, size: int) -> int:
    """Returns the number of ones among the first `size` packed bits."""
    if host := host_module():
        return host.count(packed, size)
    return int(np.count_nonzero(_unpack(packed, size)))


def bit_indices(packed: np.ndarray, size: int) -> np.ndarray:
    """Returns the positions of the ones among the first `size` packed bits, as `int64`."""
    if host := host_module():
        return host.indices(packed, size)
    return np.flatnonzero(_unpack(packed, size)).astype(np.int64)


def _unpack(packed: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(packed, count=size, bitorder="little").view(bool)


def rank_offsets(packed: np.ndarray, kept: int) -> np.ndarray:
    """Returns the number of ones before each block of `RANK_BLOCK_BITS` bits, and their total, as `int64`."""
    if not kept:
        return np.zeros(1, np.int64)
    ones = _ONES_IN_BYTE[packed]
    if kept % 8:
        ones[-1] = _ONES_IN_BYTE[packed[-1] & ((1 << kept % 8) - 1)]
    blocks = np.add.reduceat(ones, np.arange(0, ones.size, RANK_BLOCK_BITS // 8), dtype=np.int64)
    return np.concatenate([[0], np.cumsum(blocks)])
