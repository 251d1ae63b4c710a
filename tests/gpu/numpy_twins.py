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


# Fused updates, as in Keras: every operation rounded to the dtype of the arrays, which are floats here.


def _larger(a, b):
    return np.where(a < b, b, a)


def _sign(x):
    return np.where(x > 0, x.dtype.type(1), np.where(x < 0, x.dtype.type(-1), np.where(x == 0, x.dtype.type(0), x)))


def _sgd(w, g, square, slots, rate, others):
    step = g * rate
    return w - step, []


def _sgd_momentum(w, g, square, slots, rate, others):
    velocity = slots[0] * others[0] - g * rate
    return w + velocity, [velocity]


def _sgd_nesterov(w, g, square, slots, rate, others):
    velocity = slots[0] * others[0] - g * rate
    return w + (velocity * others[0] - g * rate), [velocity]


def _adam(w, g, square, slots, rate, others):
    rest_1, rest_2, epsilon = others
    m = slots[0] + (g - slots[0]) * rest_1
    v = slots[1] + (square - slots[1]) * rest_2
    if len(slots) == 2:
        return w - m * rate / (np.sqrt(v) + epsilon), [m, v]
    largest = _larger(slots[2], v)
    return w - m * rate / (np.sqrt(largest) + epsilon), [m, v, largest]


def _nadam(w, g, square, slots, rate, others):
    rest_1, rest_2, epsilon, next_u, next_product, of_gradient, product, correction = others
    m = slots[0] + (g - slots[0]) * rest_1
    v = slots[1] + (square - slots[1]) * rest_2
    mean = next_u * m / next_product + of_gradient * g / product
    return w - mean * rate / (np.sqrt(v / correction) + epsilon), [m, v]


def _rmsprop(momentum, centered):
    def update(w, g, square, slots, rate, others):
        rho, rest, epsilon = others[:3]
        new = [rho * slots[0] + rest * square]
        denominator = new[0]
        if centered:
            mean = rho * slots[-1] + rest * g
            denominator = denominator - mean * mean
        step = rate * g / np.sqrt(denominator + epsilon)
        if momentum:
            step = others[3] * slots[1] + step
            new.append(step)
        return w - step, [*new, mean] if centered else new

    return update


def _adagrad(w, g, square, slots, rate, others):
    total = slots[0] + square
    return w - rate * g / np.sqrt(total + others[0]), [total]


def _lion(w, g, square, slots, rate, others):
    beta_1, rest_1, beta_2, rest_2 = others
    return w - rate * _sign(slots[0] * beta_1 + g * rest_1), [slots[0] * beta_2 + g * rest_2]


# Each with its slots and the number of its own scalars.
RULES = {
    "sgd": (_sgd, 0, 0),
    "sgd_momentum": (_sgd_momentum, 1, 1),
    "sgd_nesterov": (_sgd_nesterov, 1, 1),
    "adam": (_adam, 2, 3),
    "adam_amsgrad": (_adam, 3, 3),
    "nadam": (_nadam, 2, 8),
    "rmsprop": (_rmsprop(False, False), 1, 3),
    "rmsprop_momentum": (_rmsprop(True, False), 2, 4),
    "rmsprop_centered": (_rmsprop(False, True), 2, 3),
    "rmsprop_momentum_centered": (_rmsprop(True, True), 3, 4),
    "adagrad": (_adagrad, 1, 1),
    "lion": (_lion, 1, 4),
}


def sum_slices(values, indices, rows, scale):
    """Sums of the slices of each row, in their order, and of their squares; those out of range are passed over."""
    sums = np.zeros((rows, values.shape[1]), values.dtype)
    squares = np.zeros_like(sums)
    for row, value in zip(indices, values, strict=True):
        if 0 <= row < rows:
            scaled = value if scale is None else value * scale
            sums[row] += scaled
            squares[row] += scaled * scaled
    return sums.reshape(-1), squares.reshape(-1)


def fused_update(rule, w, g, square, slots, scalars, decays):
    """One step of what is trainable: the variable and its slots."""
    update = RULES[rule][0]
    rate, decay, decay_rate, *others = scalars
    if decays:
        w = w - w * decay * decay_rate
    return update(w, g, square, slots, rate, others)
