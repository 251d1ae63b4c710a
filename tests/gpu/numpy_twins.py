"""What the kernels must do, in NumPy, on arrays of unsigned integers."""

import numpy as np


def expand(packed: np.ndarray, layout: tuple[int, int, int]) -> np.ndarray:
    """Which of the `outer * kept * inner` entries are trainable."""
    outer, kept, inner = layout
    bits = np.unpackbits(packed, count=kept, bitorder="little").astype(bool)
    return np.broadcast_to(bits[None, :, None], (outer, kept, inner)).reshape(-1)


def zero_frozen(values: np.ndarray, trainable: np.ndarray) -> np.ndarray:
    return np.where(trainable, values, 0).astype(values.dtype)


def mask_slices(values: np.ndarray, indices: np.ndarray, trainable: np.ndarray, rows: int) -> np.ndarray:
    """Rows out of range are zero."""
    width = values.shape[1]
    by_row = np.concatenate([trainable.reshape(rows, width), np.zeros((1, width), bool)])
    exists = (indices >= 0) & (indices < rows)
    return zero_frozen(values, by_row[np.where(exists, indices, rows)])


def rank_offsets(packed: np.ndarray, kept: int, block: int = 2048) -> np.ndarray:
    """The number of ones before each block of bits, and their total."""
    bits = np.unpackbits(packed, count=kept, bitorder="little")
    padded = np.pad(bits, (0, -kept % block)).reshape(-1, block)
    return np.concatenate([[0], np.cumsum(padded.sum(axis=1, dtype=np.int64))])


def indices_of(packed: np.ndarray, kept: int, room: int, dtype: type) -> np.ndarray:
    """Positions of the ones, and numbers from `kept` on for what there is room for beside them."""
    ones = np.flatnonzero(np.unpackbits(packed, count=kept, bitorder="little"))
    return np.concatenate([ones, kept + np.arange(room)]).astype(dtype)


def gather(values: np.ndarray, trainable: np.ndarray, length: int) -> np.ndarray:
    found = values[trainable]
    return np.concatenate([found, np.zeros(length - found.size, values.dtype)])


def scatter(values: np.ndarray, trainable: np.ndarray, compact: np.ndarray) -> np.ndarray:
    result = values.copy()
    result[trainable] = compact[: int(trainable.sum())]
    return result


def ranks(bits: np.ndarray, packed: np.ndarray, kept: int, last: int) -> np.ndarray:
    ones = np.unpackbits(packed, count=kept, bitorder="little").astype(np.int64)
    before = np.concatenate([[0], np.cumsum(ones)])[np.clip(bits, 0, kept - 1)]
    return np.maximum(np.minimum(before, last), 0)


def seed(waiting, slots, powers, scales, sums, squares, wide):
    """Slots and what still waits, of entries that wait (booleans)."""
    due = waiting & (slots[0].astype(wide) == 0)
    seeded = [
        np.where(due, (wide(scale) * (squares if power == 2 else sums)).astype(slot.dtype), slot)
        for slot, power, scale in zip(slots, powers, scales, strict=True)
    ]
    return seeded, waiting & (seeded[0].astype(wide) == 0)
