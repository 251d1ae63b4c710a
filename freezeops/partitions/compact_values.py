"""Values of a compact variable and of the whole one, each made from the other (NumPy)."""

import numpy as np


def scatter_values(values: np.ndarray, entries: np.ndarray, initial: np.ndarray) -> np.ndarray:
    """Returns a copy of a vector with the values of a compact array at some of its entries.

    Args:
        values: Compact array: the entries' values in order, and room behind them.
        entries: Positions in the flattened variable.
        initial: The vector, of all entries.
    """
    result = np.array(initial)
    result[entries] = values.reshape(-1)[: entries.size]
    return result


def gather_values(values: np.ndarray, entries: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """Returns some entries of a vector as a compact array, with zeros in the room behind them.

    Args:
        values: The vector, of all entries.
        entries: Positions in it; `None` for all, which fill the shape.
        shape: Shape of the result.
    """
    if entries is None:
        return values.reshape(shape)
    result = np.zeros(int(np.prod(shape, dtype=np.int64)), values.dtype)
    result[: entries.size] = values[entries]
    return result.reshape(shape)
