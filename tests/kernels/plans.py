"""Plans of the sampled matrix product, made in the plainest way: what `freezeops/masks/visits.py` describes."""

import itertools

import numpy as np


def make_plan(trainable: np.ndarray, tokens: int, panel: int, chunk: int, room: int = 0) -> np.ndarray:
    """The plan for a matrix of booleans, and `room` more numbers."""
    rows, columns = trainable.shape
    rank = np.cumsum(trainable.reshape(-1)).reshape(trainable.shape) - 1
    starts, groups, visited, ranks, in_panel = [], [], [], [], []
    for first_row, first_column in itertools.product(range(0, rows, chunk), range(0, columns, panel)):
        starts.append((len(groups), len(visited), len(in_panel)))
        block = trainable[first_row : first_row + chunk, first_column : first_column + panel]
        counts = block.sum(axis=1)
        for count in np.unique(counts[counts > 0]):
            members = np.flatnonzero(counts == count)
            groups.append((count, len(members)))
            for row in members:
                entries = np.flatnonzero(block[row])
                visited.append(first_row + row)
                ranks.append(rank[first_row + row, first_column + entries[0]])
                in_panel += entries.tolist()
    starts.append((len(groups), len(visited), len(in_panel)))
    head = [tokens, panel, chunk, rows, columns, len(in_panel), len(visited), len(groups)]
    numbers = [*head, *itertools.chain(*starts), *itertools.chain(*groups), *visited, *ranks]
    halves = np.array([*in_panel, *[0] * (len(in_panel) % 2)], np.uint16).view(np.int32)
    return np.concatenate([np.array(numbers), halves, np.zeros(room)]).astype(np.int32)
