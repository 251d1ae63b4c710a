"""`Mask`: making, reading and combining packed masks."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import freezeops as fz
from freezeops.masks.layout import Layout

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)


@st.composite
def broadcast_masks(draw):
    """A shape and a boolean array that broadcasts to it along axes of length 1."""
    shape = draw(SHAPES)
    small = tuple(draw(st.sampled_from([1, size])) for size in shape)
    return shape, draw(hnp.arrays(bool, small))


@given(broadcast_masks())
def test_any_broadcast_reads_back(case):
    shape, array = case
    mask = fz.Mask.from_array(array, shape)
    full = np.broadcast_to(array, shape)
    assert mask.shape == shape
    assert np.array_equal(mask.to_numpy(), full)
    assert mask.count() == full.sum()
    assert np.array_equal(mask.indices(), np.flatnonzero(full))
    assert mask.layout.size == full.size
    assert mask.nbytes == (mask.layout.kept + 7) // 8
    assert mask.density == (full.mean() if full.size else 1.0)


@given(broadcast_masks())
def test_same_without_the_host_module(case):
    shape, array = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FREEZEOPS_BACKEND", "reference")
        twin = fz.Mask.from_array(array, shape)
        read = twin.count(), twin.indices().tolist(), twin.to_numpy().tolist()
    mask = fz.Mask.from_array(array, shape)
    assert mask.packed.tobytes() == twin.packed.tobytes()
    assert (mask.count(), mask.indices().tolist(), mask.to_numpy().tolist()) == read


@given(st.data())
def test_algebra_across_layouts(data):
    shape, a = data.draw(broadcast_masks())
    small = tuple(data.draw(st.sampled_from([1, size])) for size in shape)
    b = data.draw(hnp.arrays(bool, small))
    x, y = fz.Mask.from_array(a, shape), fz.Mask.from_array(b, shape)
    assert np.array_equal((x & y).to_numpy(), np.broadcast_to(a & b, shape))
    assert np.array_equal((x | y).to_numpy(), np.broadcast_to(a | b, shape))
    assert np.array_equal((x ^ y).to_numpy(), np.broadcast_to(a ^ b, shape))
    assert np.array_equal((~x).to_numpy(), np.broadcast_to(~a, shape))
    equal = np.array_equal(np.broadcast_to(a, shape), np.broadcast_to(b, shape))
    assert (x == y) is equal
    if equal:
        assert hash(x) == hash(y)


def test_masks_of_an_empty_tensor_are_equal():
    a, b = np.array([True, False]).reshape(1, 2, 1), np.zeros((1, 2, 1), bool)
    assert fz.Mask.from_array(a, (0, 2, 3)) == fz.Mask.from_array(b, (0, 2, 3))


def test_layouts_are_as_small_as_the_broadcast():
    assert fz.Mask.from_array(np.ones((5, 1), bool), (5, 8)).layout == Layout(1, 5, 8)
    assert fz.Mask.from_array(np.ones((1, 8), bool), (5, 8)).layout == Layout(5, 8, 1)
    assert fz.Mask.from_array(np.ones((1, 6, 1), bool), (5, 6, 7)).layout == Layout(5, 6, 7)
    assert fz.Mask.from_array(np.ones((5, 1, 7), bool), (5, 6, 7)).layout == Layout(1, 210, 1)
    assert fz.Mask.from_array(False, (5, 6)).layout == Layout(1, 1, 30)
    assert fz.Mask.from_array(np.ones((5, 8), bool)).layout == Layout(1, 40, 1)


def test_rows_and_columns():
    rows = fz.Mask.rows((6, 3), [1, -1])
    assert rows.to_numpy().all(axis=1).tolist() == [False, True, False, False, False, True]
    assert rows.nbytes == 1 and rows.count() == 6
    columns = fz.Mask.columns((2, 2, 3), np.array([True, False, True]))
    assert np.array_equal(columns.to_numpy(), np.broadcast_to([True, False, True], (2, 2, 3)))
    assert columns.nbytes == 1
    assert fz.Mask.rows((3, 2), []).count() == 0


def test_bit_order_is_little():
    mask = fz.Mask.from_array(np.arange(12) % 5 == 1)  # entries 1, 6 and 11
    assert mask.packed.tolist() == [0b0100_0010, 0b0000_1000]


def test_padding_bits_are_zero_whatever_was_given():
    mask = fz.Mask((3,), Layout(1, 3, 1), np.array([0xFF], np.uint8))
    assert mask.packed.tolist() == [0b111] and mask.count() == 3
    assert mask == fz.Mask.trainable((3,))


def test_immutable():
    array = np.ones((2, 9), bool)
    mask = fz.Mask.from_array(array)
    array[:] = False
    assert mask.count() == 18
    with pytest.raises(ValueError, match="read-only"):
        mask.packed[0] = 0
    with pytest.raises(AttributeError):
        mask.shape = (1,)


def test_copies_and_pickles():
    mask = fz.Mask.rows((5, 4), [2])
    for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask and twin.layout == mask.layout


def test_repr_says_what_matters():
    assert repr(fz.Mask.rows((4, 5), [0])) == (
        "<Mask shape=(4, 5), trainable=5 of 20 (density 0.25), layout=(1, 4, 5), 1 bytes>"
    )


def test_with_layout_refuses_what_it_cannot_hold():
    mask = fz.Mask.from_array(np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match=r"must have a bit for every entry that differs"):
        mask.with_layout(Layout(1, 3, 3))
    assert fz.Mask.rows((3, 3), [1]).with_layout(Layout(1, 9, 1)).count() == 3
    full = fz.Mask.from_array(np.repeat([[True], [False]], 4, axis=1))
    assert full.with_layout(Layout(1, 2, 4)).nbytes == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fz.Mask.from_array([0, 1]), TypeError, r"must be boolean .* dtype=int64"),
        (lambda: fz.Mask.from_array([0.5]), TypeError, r"Received: an array of dtype=float64"),
        (
            lambda: fz.Mask.from_array(np.ones(5, bool), (5, 8)),
            ValueError,
            r"rank of its variable, 2\. .*`mask\[:, None\]`",
        ),
        (
            lambda: fz.Mask.from_array(np.ones(8, bool), (5, 8)),
            ValueError,
            r"`mask\[None, :\]`",
        ),
        (lambda: fz.Mask.from_array(np.ones((2, 8), bool), (5, 8)), ValueError, r"\(2, 8\)"),
        (lambda: fz.Mask.rows((5, 2), [5]), IndexError, r"indices from -5 to 4"),
        (lambda: fz.Mask.rows((5, 2), [0.0]), TypeError, r"dtype=float64"),
        (lambda: fz.Mask.rows((5, 2), [True]), ValueError, r"vector of length 5"),
        (lambda: fz.Mask.rows((), [0]), ValueError, r"at least one axis"),
        (lambda: fz.Mask.trainable(7), ValueError, r"sequence of known sizes"),
        (
            lambda: fz.Mask((4,), Layout(1, 3, 1), np.zeros(1, np.uint8)),
            ValueError,
            r"product equal to the number of entries",
        ),
        (
            lambda: fz.Mask((4,), Layout(1, 4, 1), np.zeros(2, np.uint8)),
            ValueError,
            r"uint8 vector of ceil\(kept / 8\) = 1 bytes",
        ),
        (
            lambda: fz.Mask.trainable((2,)) & fz.Mask.trainable((3,)),
            ValueError,
            r"one shape\. Received: \(2,\) and \(3,\)",
        ),
        (lambda: fz.Mask.trainable((2,)) & True, TypeError, r"unsupported operand"),
        (lambda: bool(fz.Mask.trainable((2,))), TypeError, r"ambiguous"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("shape", [(2.5, 3), ("2", 3), (None, 3), (-2, -3), (2**62, 4), (2**40, 0, 2**40), 3])
def test_shapes_that_are_none(shape):
    with pytest.raises(ValueError, match="`shape` must be a sequence of known sizes. Received: shape="):
        fz.Mask.frozen(shape)
    with pytest.raises(ValueError, match="`shape` must be a sequence of known sizes. Received: shape="):
        fz.Mask(shape, (1, 6, 1), np.zeros(1, np.uint8))


@pytest.mark.parametrize("layout", [(1, 6), (1, 6, 1, 1), (-1, -6, 1), (1, 6.0, 1), (2**62, 4, 0), "abc", None])
def test_layouts_that_are_none(layout):
    with pytest.raises(ValueError, match="`layout` must be \\(outer, kept, inner\\), three sizes. Received: layout="):
        fz.Mask((2, 3), layout, np.zeros(1, np.uint8))
