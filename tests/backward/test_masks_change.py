"""Masks that change in mid-training, without a new trace, and `repack` with one."""

import keras
import numpy as np
import pytest
from agreement import PART, trained, untrained
from common import assert_same_bits
from network import Network, in_a_row, layers, mask_of


class Counting(keras.Model):
    """Counts how often its step is traced."""

    traces = 0

    def train_step(self, data):
        self.traces += 1
        return super().train_step(data)


def new_mask(shape, kind, seed, share=0.25):
    """A mask of a kind, or of no entry at all."""
    if kind == "none":
        return np.zeros(shape, bool)
    return np.broadcast_to(mask_of(shape, kind, np.random.default_rng(seed), share), shape)


NETWORKS = {
    "Dense, entries": lambda: Network((6, 12), in_a_row(layers.Dense(16, "tanh"), layers.Dense(8))),
    "Dense, rows": lambda: Network((6, 12), in_a_row(layers.Dense(16, "tanh"), layers.Dense(8)), "rows"),
    "Dense, columns": lambda: Network((6, 12), in_a_row(layers.Dense(16, "tanh"), layers.Dense(8)), "columns"),
    "Dense, bias": lambda: Network((6, 12), in_a_row(layers.Dense(16)), masked=("bias",)),
    "Embedding": lambda: Network((7,), in_a_row(layers.Embedding(16, 12)), "rows", ("embeddings",), 16),
    "Conv2D": lambda: Network((7, 7, 8), in_a_row(layers.Conv2D(8, 3)), "columns"),
    "Conv2D, inputs": lambda: Network((7, 7, 8), in_a_row(layers.Conv2D(8, 3)), "inputs"),
    "Conv1D 1x1": lambda: Network((7, 8), in_a_row(layers.Conv1D(8, 1)), "columns"),
    "DepthwiseConv2D": lambda: Network((7, 7, 8), in_a_row(layers.DepthwiseConv2D(3)), "inputs"),
}

CHANGES = {
    "Dense, entries": "entries entries:0.1 none rows columns entries",
    "Dense, rows": "rows rows:0.1 none rows",
    "Dense, columns": "columns columns:0.13 entries none rows columns",
    "Dense, bias": "entries entries:0.13 none entries",
    "Embedding": "rows rows:0.1 none rows",
    "Conv2D": "columns columns:0.13 entries inputs none columns",
    "Conv2D, inputs": "inputs inputs:0.13 entries:0.1 columns inputs",
    "Conv1D 1x1": "columns entries columns:0.13 columns",
    "DepthwiseConv2D": "inputs entries inputs:0.13 inputs",
}
"""Masks that fit into the room of the first one: their kinds, and their shares where they are not 0.25."""


def train(of, change=None):
    """Two steps; returns the values after them, having checked that frozen entries kept their bits."""
    before = of.values()
    if change:
        for path in of.masks:
            of.masks[path] = change(path, before[path].shape)
            of.optimizer.register_mask(path, of.masks[path])
    of.fit(2)
    return checked(of, before)


def checked(of, before):
    after = of.values()
    for path, mask in of.masks.items():
        mask = np.broadcast_to(mask, after[path].shape)
        assert_same_bits(after[path][~mask], before[path][~mask], path)
        # Inputs of an embedding do not name all rows.
        assert not mask.any() or (after[path][mask] != before[path][mask]).any(), path
    return after


def assert_close(part, whole, message):
    for path, values in part.items():
        np.testing.assert_allclose(values, whole[path], rtol=1e-4, atol=1e-5, err_msg=f"{message} {path}")


@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, False) for name in NETWORKS), ("Dense, entries", True), ("Dense, columns", True), ("Conv2D", True)],
)
def test_without_a_new_trace(name, jit):
    results = []
    for skips in (True, False):
        of = untrained(NETWORKS[name], skips, jit and skips, model_class=Counting)
        values = [train(of)]
        traces = of.model.traces
        for seed, change in enumerate(CHANGES[name].split()):
            kind, _, share = change.partition(":")
            share = float(share or 0.25)
            values.append(train(of, lambda path, shape, s=seed, k=kind, p=share: new_mask(shape, k, s, p)))
        assert of.model.traces == traces
        assert not skips or of.outcomes() == dict.fromkeys(of.masks, PART)
        results.append(values)
    for i, (part, whole) in enumerate(zip(*results, strict=True)):
        assert_close(part, whole, f"{name}, {['first', *CHANGES[name].split()][i]}")


def test_a_mask_in_the_middle_of_fit():
    """From a callback, between two steps of one `fit`."""

    class Change(keras.callbacks.Callback):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.before = self.of.values()
                for path in self.of.masks:
                    self.of.masks[path] = new_mask(self.before[path].shape, "entries", 5)
                    self.of.optimizer.register_mask(path, self.of.masks[path])

    results = []
    for skips in (True, False):
        of = untrained(NETWORKS["Dense, columns"], skips, model_class=Counting)
        change = Change(of)
        of.fit(4, callbacks=[change])
        results.append(checked(of, change.before))
    assert_close(*results, "")


REPACKED = [
    ("Dense, entries", "rows", 0.25, PART),
    ("Dense, entries", "columns", 0.5, PART),
    ("Dense, entries", "entries", 0.4, PART),
    ("Dense, columns", "entries", 0.4, PART),
    ("Dense, columns", "columns", 0.5, PART),
    ("Dense, entries", "entries", 0.8, ("whole", "80% of it may be trainable")),
    ("Conv2D", "inputs", 0.5, PART),
    ("Conv2D", "entries", 0.4, ("whole", "its mask is not of whole channels of a convolution")),
]


@pytest.mark.filterwarnings("ignore:With `skip_frozen_gradients=True`")
@pytest.mark.parametrize(
    ("name", "kind", "share", "outcome", "jit"),
    [*((*case, False) for case in REPACKED), (*REPACKED[1], True), (*REPACKED[3], True)],
)
def test_repack(name, kind, share, outcome, jit):
    """The way is chosen anew."""
    results = []
    for skips in (True, False):
        of = untrained(NETWORKS[name], skips, jit and skips, model_class=Counting)
        first = train(of)
        traces = of.model.traces
        of.masks = {path: new_mask(first[path].shape, kind, 3, share) for path in of.masks}
        of.optimizer.repack(of.masks)
        if skips and (kind, share) != ("rows", 0.25):  # which fits as it is: nothing is made anew
            assert {reason for _, reason in of.outcomes().values()} == {"no step was traced yet"}
        of.model.make_train_function(force=True)
        second = train(of)
        assert of.model.traces > traces
        third = train(of, lambda path, shape: new_mask(shape, kind, 4, share))
        assert not skips or of.outcomes() == dict.fromkeys(of.masks, outcome)
        results.append((first, second, third))
    for i, (part, whole) in enumerate(zip(*results, strict=True)):
        assert_close(part, whole, f"{i}")


def test_repack_for_more_room():
    """The mask stays; there is room for others, which is filled."""
    results = []
    for skips in (True, False):
        of = untrained(NETWORKS["Dense, columns"], skips, model_class=Counting)
        train(of)
        of.optimizer.repack(capacity=0.4)
        of.model.make_train_function(force=True)
        second = train(of)
        traces = of.model.traces
        third = train(of, lambda path, shape: new_mask(shape, "entries", 4, 0.4))
        assert of.model.traces == traces
        assert not skips or of.outcomes() == dict.fromkeys(of.masks, PART)
        results.append((second, third))
    for part, whole in zip(*results, strict=True):
        assert_close(part, whole, "")


def test_unfreezing_and_freezing():
    """By `freeze` and `unfreeze`, with moments that are seeded."""

    def adam():
        return keras.optimizers.Adam(0.01, epsilon=1e-3)

    results = []
    for skips in (True, False):
        of = untrained(NETWORKS["Dense, entries"], skips, inner=adam, capacity=0.4)
        train(of)
        path = next(iter(of.masks))
        before = of.values()
        frozen, freed = [np.argwhere(of.masks[path] == side)[:10] for side in (True, False)]
        mask = of.masks[path].copy()
        mask[tuple(frozen.T)] = False
        mask[tuple(freed.T)] = True
        of.masks[path] = mask
        of.optimizer.register_mask(path, mask)
        of.fit(2)
        results.append(checked(of, before))
    assert_close(*results, "")


def test_indices_are_counted():
    """`describe()` counts what the ways need beside compact state."""
    for name in ("Dense, entries", "Dense, columns", "Conv2D"):
        part, whole = (trained(NETWORKS[name], False, skips) for skips in (True, False))
        sizes = [{r.path: r.bytes for r in of.optimizer.describe() if r.path in of.masks} for of in (part, whole)]
        assert all(sizes[0][path] > sizes[1][path] for path in sizes[0])
