"""The sampled matrix product against NumPy, and with plans that are none of its mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan
from test_kernels import FLOATS, OFFSETS, SEEDS, SETTINGS, dtype_of, int64

DTYPES = st.sampled_from(["float16", "bfloat16", "float32"])
EPSILON = float(np.finfo(np.float32).eps)
JUNK = -77


class Product:
    """A call; `run` returns its result."""

    def __init__(self, kernels, x, dy, plan, capacity, offset=0, threads=3):
        self._kernels, self._capacity = kernels, capacity
        self._type = x.dtype.name
        self._shape = (*x.shape, dy.shape[1])
        self._inputs = [kernels.put(x, offset), kernels.put(dy, offset), kernels.put(plan)]
        self._size, self._threads = plan.size, threads
        self.result = kernels.put(np.full(capacity, JUNK, x.dtype), offset)

    def returned(self):
        x, dy, plan = (each.pointer for each in self._inputs)
        return self._kernels.functions.fz_sampled_matmul(
            FLOATS[self._type][0], self.result.pointer, int64(self._capacity), x, dy, *map(int64, self._shape), plan,
            int64(self._size), int64(self._threads),
        )  # fmt: skip

    def run(self):
        assert self.returned() == 0
        return self.result.get()


def check(actual, x, dy, trainable, room):
    """By float64; sums of float32 that are rounded once more."""
    wide = [each.astype(np.float64) for each in (x, dy)]
    expected = (wide[0].T @ wide[1])[trainable]
    magnitude = (np.abs(wide[0]).T @ np.abs(wide[1]))[trainable]
    tolerance = 4 * EPSILON * max(len(x), 1) ** 0.5 * magnitude
    values = actual[: expected.size]
    if x.dtype.itemsize == 2:
        # What float32 sums within the tolerance may be rounded to.
        low, high = ((expected + sign * tolerance).astype(np.float32).astype(x.dtype) for sign in (-1, 1))
        assert ((low <= values) & (values <= high)).all()
    else:
        assert (np.abs(values - expected) <= tolerance).all()
    rest = actual[expected.size :]
    assert rest.size == room and not rest.view(np.uint8).any()


@SETTINGS
@given(
    shape=st.tuples(
        st.sampled_from([0, 1, 15, 16, 17, 31, 33, 64, 100, 129, 256, 257, 300]),
        st.sampled_from([1, 3, 15, 16, 17, 50, 129, 200]),
        st.sampled_from([1, 2, 16, 19, 47, 64, 130]),
    ),
    blocks=st.tuples(
        st.sampled_from([16, 32, 64, 128, 256]), st.sampled_from([1, 9, 24, 40, 384]), st.sampled_from([1, 7, 64, 256])
    ),
    dtype=DTYPES,
    density=st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.7, 1.0]),
    room=st.sampled_from([0, 5]),
    offset=OFFSETS,
    seed=SEEDS,
)
def test_sampled_matmul(kernels, shape, blocks, dtype, density, room, offset, seed):
    rng = np.random.default_rng(seed)
    tokens, rows, columns = shape
    x, dy = (rng.normal(size=(tokens, width)).astype(dtype_of(dtype)) for width in (rows, columns))
    trainable = rng.random((rows, columns)) < density
    plan = make_plan(trainable, *blocks, room=room)
    product = Product(kernels, x, dy, plan, int(trainable.sum()) + room, offset * x.dtype.itemsize)
    check(product.run(), x, dy, trainable, room)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_and_columns_that_are_not_visited_are_not_needed(kernels, dtype):
    """Whatever they hold: there may be scratch that was never written for them."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(size=(70, 700)).astype(dtype_of(dtype)) for _ in range(2))
    trainable = np.zeros((700, 700), bool)
    trainable[300:310, 450:600] = rng.random((10, 150)) < 0.5
    plan = make_plan(trainable, 64, 24, 128)
    check(Product(kernels, x, dy, plan, int(trainable.sum())).run(), x, dy, trainable, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nan_and_infinity_come_through_and_spread_to_no_other_entry(kernels, dtype):
    rng = np.random.default_rng(1)
    x, dy = (rng.normal(size=(77, width)).astype(dtype_of(dtype)) for width in (20, 60))
    x[76, 3] = np.nan
    x[5, 7], dy[5, 11] = np.inf, 0
    dy[60, 2], x[60, 9] = -np.inf, 1
    trainable = rng.random((20, 60)) < 0.8
    trainable[[7, 9], [11, 2]] = True
    with np.errstate(invalid="ignore"):
        expected = (x.astype(np.float64).T @ dy.astype(np.float64))[trainable]
    actual = Product(kernels, x, dy, make_plan(trainable, 128, 24, 256), expected.size).run().astype(np.float64)
    for same in (np.isnan, np.isposinf, np.isneginf):
        assert same(expected).any()
        np.testing.assert_array_equal(same(actual), same(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_bits_do_not_depend_on_the_number_of_threads(kernels, dtype):
    rng = np.random.default_rng(2)
    x, dy = (rng.normal(size=(600, 300)).astype(dtype_of(dtype)) for _ in range(2))
    trainable = rng.random((300, 300)) < 0.2
    plan = make_plan(trainable, 128, 40, 64)
    results = [
        Product(kernels, x, dy, plan, int(trainable.sum()), threads=threads).run().tobytes() for threads in (1, 2, 3, 7)
    ]
    assert len(set(results)) == 1


TRAINABLE = np.random.default_rng(3).random((90, 70)) < 0.2
ENTRIES = int(TRAINABLE.sum())
PLAN = make_plan(TRAINABLE, 32, 24, 40, room=3)
BLOCKS = 3 * 3
STARTS = 8
GROUPS = STARTS + 3 * (BLOCKS + 1)
ROWS = GROUPS + 2 * PLAN[7]
RANKS = ROWS + PLAN[6]
COLUMNS = RANKS + PLAN[6]
EXTREMES = [-(2**31), -1, 0, 1, 24, 25, 89, 90, 65535, 65536, 2**30, 2**31 - 1]


def refused(kernels, plan, rows=90, columns=70, capacity=ENTRIES):
    """Whether a call is; whatever it is, nothing beside its arrays is written."""
    x, dy = np.ones((40, rows), np.float32), np.ones((40, columns), np.float32)
    product = Product(kernels, x, dy, np.asarray(plan, np.int32), capacity)
    returned = product.returned()
    assert returned in (0, 1)
    product.result.get()
    return returned == 1


def test_plans_of_other_shapes_are_refused(kernels):
    assert not refused(kernels, PLAN)
    assert refused(kernels, PLAN, rows=91) and refused(kernels, PLAN, columns=69)
    assert refused(kernels, PLAN, capacity=ENTRIES - 1)
    for size in (0, 7, 8, 9, GROUPS - 1, ROWS, COLUMNS, PLAN.size - 4):
        assert refused(kernels, PLAN[:size]), size
    assert not refused(kernels, PLAN[:-3])


@pytest.mark.parametrize(
    ("place", "numbers"),
    [
        *((place, EXTREMES[:3] + EXTREMES[-3:]) for place in range(8)),  # the head
        *((place, [-1, PLAN[place] + 1, 2**31 - 1]) for place in range(STARTS, GROUPS)),
        *((place, [-1, 0, 25, PLAN[place] + 1, 2**31 - 1]) for place in (GROUPS, GROUPS + 1, ROWS - 2, ROWS - 1)),
        *((ROWS, [-1, 40, 90, 2**31 - 1]), (RANKS - 1, [-1, 79, 90, 2**31 - 1])),
        *((place, [-1, ENTRIES, 2**31 - 1]) for place in (RANKS, COLUMNS - 1)),
        *((place, [24, 24 << 16, 65535, -1]) for place in (COLUMNS, COLUMNS + 100)),
        (PLAN.size - 4, [22, 65535, -1]),  # a column of the last panel, which is narrower
    ],
)
def test_a_number_that_cannot_be_is_refused(kernels, place, numbers):
    for number in numbers:
        plan = PLAN.copy()
        plan[place] = number
        if plan[place] != PLAN[place]:
            assert refused(kernels, plan), (place, number)


@settings(SETTINGS, max_examples=400)
@given(places=st.lists(st.tuples(st.integers(0, PLAN.size - 1), st.sampled_from(EXTREMES)), min_size=1, max_size=4))
def test_nothing_is_read_or_written_outside_whatever_the_plan_says(kernels, places):
    """The arrays have guards, or end where AddressSanitizer sees it."""
    plan = PLAN.copy()
    for place, number in places:
        plan[place] = number
    refused(kernels, plan)


def test_a_plan_that_names_a_rank_twice_is_refused(kernels):
    """Two threads would write one entry, and nobody another."""
    plan = PLAN.copy()
    plan[RANKS + 1] = plan[RANKS]
    assert refused(kernels, plan)
    plan = PLAN.copy()
    plan[[RANKS, RANKS + 1]] = plan[[RANKS + 1, RANKS]]
    assert refused(kernels, plan)


def test_columns_are_not_looked_at_where_there_is_no_token(kernels):
    plan = PLAN.copy()
    plan[COLUMNS] = -1
    x, dy = np.ones((0, 90), np.float32), np.ones((0, 70), np.float32)
    assert not Product(kernels, x, dy, plan, ENTRIES).run().any()
