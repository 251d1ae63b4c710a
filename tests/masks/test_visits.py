"""The plan of the sampled matrix product: every trainable entry once, in a vector of a length for any mask."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freezeops.masks import packing, visits

SHAPES = st.tuples(
    st.sampled_from([0, 1, 2, 7, 64, 300, 511, 512, 513]), st.sampled_from([0, 1, 3, 63, 64, 65, 130, 800])
)
SETTINGS = settings(deadline=None, max_examples=60)
DENSITIES = st.sampled_from([0.0, 0.003, 0.05, 0.4, 1.0])


def entries_of(plan):
    """Rank, row and column of each entry, by reading the plan as `visits.py` describes it."""
    _, panel, chunk, rows, columns, entries, visited, groups = plan[: visits.HEAD]
    panels, chunks = -(-columns // panel), -(-rows // chunk)
    parts = np.split(plan, visits.HEAD + np.cumsum([0, 3 * (panels * chunks + 1), 2 * groups, visited, visited]))
    starts, group, row, rank = parts[1].reshape(-1, 3), parts[2].reshape(-1, 2), parts[3], parts[4]
    in_panel = parts[5].view(np.uint16)
    assert starts[0].tolist() == [0, 0, 0] and starts[-1].tolist() == [groups, visited, entries]
    assert not in_panel[entries:].any(), "zeros up to the length"
    found = []
    visit = entry = 0
    for block, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        assert [start[1], start[2]] == [visit, entry]
        counts = group[start[0] : end[0], 0]
        assert (np.diff(counts) > 0).all(), "counts ascend"
        for count, members in group[start[0] : end[0]]:
            assert (np.diff(row[visit : visit + members]) > 0).all(), "rows ascend"
            for _ in range(members):
                assert row[visit] // chunk == block // panels
                column = block % panels * panel + in_panel[entry : entry + count].astype(int)
                found += [(rank[visit] + i, row[visit], each) for i, each in enumerate(column)]
                visit, entry = visit + 1, entry + count
    assert [visit, entry] == [visited, entries]
    return sorted(found)


@SETTINGS
@given(
    shape=SHAPES,
    density=DENSITIES,
    room=st.sampled_from([0, 9]),
    seed=st.integers(0, 99),
)
def test_every_trainable_entry_is_visited_once(shape, density, room, seed):
    trainable = np.random.default_rng(seed).random(shape) < density
    packed, capacity = packing.pack_bits(trainable), int(trainable.sum()) + room
    plan = visits.visits(packed, *shape, capacity)
    assert plan.dtype == np.int32 and plan.shape == (visits.visits_size(*shape, capacity),)
    assert tuple(plan[:3]) == visits.block_shape(*shape, capacity) and tuple(plan[3:5]) == shape
    assert entries_of(plan) == [(rank, *place) for rank, place in enumerate(np.argwhere(trainable).tolist())]


@SETTINGS
@given(shape=SHAPES, density=DENSITIES, seed=st.integers(0, 99))
def test_same_without_the_host_module(shape, density, seed):
    assert packing.host_module() is not None
    packed = packing.pack_bits(np.random.default_rng(seed).random(shape) < density)
    capacity = packing.count_bits(packed, shape[0] * shape[1]) + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEZEOPS_BACKEND", "reference")
        twin = visits.visits(packed, *shape, capacity)
    np.testing.assert_array_equal(visits.visits(packed, *shape, capacity), twin)


@pytest.mark.parametrize("shape", [(300, 500), (1, 2000), (2000, 1), (513, 41)])
@pytest.mark.parametrize("capacity", [1, 60, 1000])
def test_there_is_room_for_the_masks_that_need_the_most(shape, capacity):
    """Spread as thin as can be, and every count there can be: the length is for any mask of that capacity."""
    size = shape[0] * shape[1]
    capacity = min(capacity, size)
    tokens, panel, chunk = visits.block_shape(*shape, capacity)
    thin = np.zeros(size, bool)
    thin[np.linspace(0, size - 1, capacity).astype(int)] = True
    stairs = np.zeros(shape, bool)
    for row in range(shape[0]):
        room = capacity - int(stairs.sum())
        stairs[row, : min(row % panel + 1, max(room, 0))] = True
    for trainable in (thin, stairs):
        plan = visits.visits(packing.pack_bits(trainable), *shape, capacity)
        assert plan.size == visits.visits_size(*shape, capacity)
    assert plan[0] == tokens and plan[2] == chunk


def test_the_length_is_little_beside_what_is_trained():
    """Of 4 bytes for a value, and as many for each of two slots of Adam."""
    for density in (0.001, 0.01, 0.1, 0.3, 0.5):
        capacity = int(density * 4096 * 4096)
        assert visits.visits_size(4096, 4096, capacity) < 3.2 * capacity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 5, 3), "`rows` must be from 0 to 2**31 - 1. Received: rows=-1"),
        ((5, 2**31, 3), "`columns` must be from 0 to 2**31 - 1. Received: columns=2147483648"),
        ((5, 5, -3), "`capacity` must be from 0 to 2**31 - 1. Received: capacity=-3"),
    ],
)
def test_sizes_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        visits.visits_size(*arguments)


def test_more_entries_than_there_is_room_for():
    with pytest.raises(ValueError, match=re.escape("`capacity` must be at least the 12 trainable entries")):
        visits.visits(np.array([0xFF, 0x0F], np.uint8), 3, 4, 11)


def test_bits_of_another_size():
    with pytest.raises(ValueError, match=re.escape("each of the 3 x 4 entries. Received: 3 bytes")):
        visits.visits(np.zeros(3, np.uint8), 3, 4, 12)


@pytest.mark.parametrize(
    "arguments",
    [(3, 4, 0, 24, 256, 99), (3, 4, 128, 0, 256, 99), (3, 4, 128, 65537, 256, 99), (3, 4, 128, 24, 0, 99),
     (-3, 4, 128, 24, 256, 99), (3, 2**32, 128, 24, 256, 99), (30, 4, 128, 24, 256, 99), (3, 4, 128, 24, 256, 17)],
)  # fmt: skip
def test_the_host_module_refuses_what_would_not_fit(arguments):
    with pytest.raises(ValueError, match="must"):
        packing.host_module().visits(np.array([0xFF, 0x0F], np.uint8), *arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_junk_behind_the_last_bit_is_no_entry(backend, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
    assert entries_of(visits.visits(np.array([0b11111001], np.uint8), 1, 3, 3)) == [(0, 0, 0)]
