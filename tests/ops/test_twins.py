"""Native ops against their reference twins, bit for bit, over generated inputs."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from common import MODES, assert_same_bits, in_mode
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from freezeops import ops
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.masks.visits import visits as make_visits
from freezeops.ops import native, reference

pytestmark = pytest.mark.skipif(native.op_library() is None, reason="no native library for this TensorFlow")

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}

# Lengths around multiples of 8 (bytes of the mask) and 64 (words of it).
LENGTHS = st.sampled_from([0, 1, 2, 7, 8, 9, 15, 31, 63, 64, 65, 127, 128, 129, 200, 513, 1000])
REPEATS = st.sampled_from([1, 1, 1, 2, 3, 5, 8, 63, 64, 65, 130])
LAYOUTS = st.one_of(
    st.builds(Layout, st.just(1), LENGTHS, st.just(1)),
    st.builds(Layout, st.just(1), LENGTHS, REPEATS),
    st.builds(Layout, REPEATS, LENGTHS, st.just(1)),
    st.builds(Layout, st.integers(0, 5), st.integers(0, 70), st.integers(0, 70)),
)
DENSITIES = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 0.99, 1.0])
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def any_bits(rng, dtype, size):
    """Values of every kind: NaN payloads, infinities, subnormals, both zeros."""
    real = DTYPES[dtype]
    return rng.integers(0, 256, size * real.itemsize, dtype=np.uint8).view(real)


def any_mask(rng, layout, density):
    return np.packbits(rng.random(layout.kept) < density, bitorder="little")


cases = given(
    layout=LAYOUTS,
    dtype=st.sampled_from(list(DTYPES)),
    density=DENSITIES,
    seed=st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("mode", ["eager", "function"])
@SETTINGS
@cases
@example(Layout(1, 0, 1), "float32", 0.5, 0)
@example(Layout(1, 1, 1), "bfloat16", 0.0, 0)
def test_mask_gradient(mode, layout, dtype, density, seed):
    rng = np.random.default_rng(seed)
    gradient = tf.constant(any_bits(rng, dtype, layout.size))
    mask = tf.constant(any_mask(rng, layout, density))
    before = gradient.numpy().copy()

    def masked(gradient, mask):
        # A fresh buffer with one consumer, so that the op may work in place.
        own = tf.bitcast(tf.bitcast(gradient, tf.uint8) + 0, gradient.dtype)
        return ops.mask_gradient(own if mode == "function" else gradient, mask, layout)

    native = in_mode(masked, mode)(gradient, mask)
    assert_same_bits(native, reference.mask_gradient(gradient, mask, layout), str(layout))
    assert_same_bits(gradient, before, "the input changed")


@SETTINGS
@cases
def test_mask_gradient_equals_numpy(layout, dtype, density, seed):
    """The specification itself, against NumPy."""
    rng = np.random.default_rng(seed)
    gradient, mask = any_bits(rng, dtype, layout.size), any_mask(rng, layout, density)
    passing = np.unpackbits(mask, count=layout.kept, bitorder="little").astype(bool)
    passing = np.broadcast_to(passing[None, :, None], layout).reshape(-1)
    expected = np.where(passing, gradient, np.zeros_like(gradient))
    assert_same_bits(reference.mask_gradient(tf.constant(gradient), mask, layout), expected)


@SETTINGS
@given(
    rows=st.sampled_from([1, 2, 7, 8, 64, 65, 300]),
    width=st.sampled_from([0, 1, 3, 8, 63, 64, 65, 200]),
    kind=st.sampled_from(["elements", "rows", "columns", "middle"]),
    count=st.sampled_from([0, 1, 5, 64, 100]),
    dtype=st.sampled_from(list(DTYPES)),
    index_dtype=st.sampled_from(["int32", "int64"]),
    density=DENSITIES,
    seed=st.integers(0, 2**32 - 1),
)
def test_mask_slices(rows, width, kind, count, dtype, index_dtype, density, seed):
    layout = {
        "elements": Layout(1, rows * width, 1),
        "rows": Layout(1, rows, width),
        "columns": Layout(rows, width, 1),
        "middle": Layout(rows, 1, width),
    }[kind]
    rng = np.random.default_rng(seed)
    values = tf.constant(any_bits(rng, dtype, count * width).reshape(count, width))
    indices = tf.constant(rng.integers(0, rows, count).astype(index_dtype))
    mask = tf.constant(any_mask(rng, layout, density))
    native = ops.mask_slices(values, indices, mask, layout, rows)
    assert_same_bits(native, reference.mask_slices(values, indices, mask, layout, rows))


@pytest.mark.parametrize("mode", ["eager", "function"])
@SETTINGS
@cases
def test_remember_and_restore(mode, layout, dtype, density, seed):
    rng = np.random.default_rng(seed)
    old, new = any_bits(rng, dtype, layout.size), any_bits(rng, dtype, layout.size)
    mask = tf.constant(any_mask(rng, layout, density))
    results = []
    for library in (ops, reference):
        variable = tf.Variable(tf.constant(old))

        def step(value, variable=variable, library=library):
            snapshot = library.remember_frozen(variable, mask, layout)
            variable.assign(value)
            library.restore_frozen(variable, mask, snapshot, layout)

        in_mode(step, mode)(tf.constant(new))
        results.append(variable.numpy())
    assert_same_bits(*results, message=f"{layout} density {density}")


@pytest.mark.parametrize("density", [1.0, 0.99, 0.5, 0.05, 0.0])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("update", ["assign", "assign_sub", "scatter_add", "kept_read"])
def test_restore_after_every_kind_of_write(update, dtype, density):
    """The variable's buffer may be shared, copied or replaced between the two ops."""
    layout = Layout(1, 100_003, 1)
    rng = np.random.default_rng(3)
    old = rng.normal(size=layout.size).astype(DTYPES[dtype])
    change = np.abs(rng.normal(size=layout.size)).astype(DTYPES[dtype]) + DTYPES[dtype].type(1)
    packed = any_mask(rng, layout, density)
    mask = tf.constant(packed)
    variable = tf.Variable(tf.constant(old))

    @tf.function
    def step(change):
        snapshot = ops.remember_frozen(variable, mask, layout)
        kept = variable.read_value() if update == "kept_read" else change
        if update == "assign":
            variable.assign(variable - change)
        elif update == "scatter_add":
            variable.scatter_sub(tf.IndexedSlices(change, tf.range(layout.size)))
        else:
            variable.assign_sub(change)
        ops.restore_frozen(variable, mask, snapshot, layout)
        return kept

    passing = np.unpackbits(packed, count=layout.size, bitorder="little").astype(bool)
    expected = old.copy()
    for _ in range(3):
        before = expected.copy()
        expected[passing] = (expected - change)[passing]
        kept = step(tf.constant(change))
        if update == "kept_read":
            assert_same_bits(kept, before, "a value that was read before changed")
    assert_same_bits(variable.numpy(), expected, update)


@pytest.mark.parametrize("form", ["frozen entries", "whole value"])
@SETTINGS
@cases
def test_restore_takes_either_form(form, layout, dtype, density, seed):
    rng = np.random.default_rng(seed)
    old, new = any_bits(rng, dtype, layout.size), any_bits(rng, dtype, layout.size)
    packed = any_mask(rng, layout, density)
    passing = reference.expand_mask(tf.constant(packed), layout).numpy()
    snapshot = tf.constant(old if form == "whole value" else old[~passing])
    for library in (ops, reference):
        variable = tf.Variable(tf.constant(new))
        library.restore_frozen(variable, tf.constant(packed), snapshot, layout)
        assert_same_bits(variable.numpy(), np.where(passing, new, old), library.__name__)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 1, 1),
        Layout(1, 0, 1),
        Layout(1, 67, 1),
        Layout(1, 9, 13),
        Layout(7, 10, 1),
        Layout(3, 5, 4),
        Layout(1, 1, 30),
    ],
)
def test_under_xla(layout, dtype):
    """XLA's kernels of all four ops, and the twins compiled by XLA, against the twins outside."""
    rng = np.random.default_rng(5)
    gradient, old, new = (any_bits(rng, dtype, layout.size) for _ in range(3))
    packed = any_mask(rng, layout, 0.5)
    mask = tf.constant(packed)
    indices = tf.constant([4, 0, 0, 2])
    slices = tf.constant(any_bits(rng, dtype, 4 * 6).reshape(4, 6))
    table = Layout(1, 30, 1)
    table_mask = tf.constant(any_mask(rng, table, 0.5))
    results = []
    for library, jit in ((ops, True), (reference, True), (reference, False)):
        variable = tf.Variable(tf.constant(old))

        def step(gradient, new, variable=variable, library=library):
            snapshot = library.remember_frozen(variable, mask, layout)
            variable.assign(new)
            library.restore_frozen(variable, mask, snapshot, layout)
            return (
                library.mask_gradient(gradient, mask, layout),
                library.mask_slices(slices, indices, table_mask, table, 5),
            )

        outputs = in_mode(step, "jit" if jit else "function")(tf.constant(gradient), tf.constant(new))
        results.append([output.numpy() for output in outputs] + [variable.numpy()])
    for compiled, twin, plain in zip(*results, strict=True):
        assert_same_bits(compiled, plain, "native under XLA")
        assert_same_bits(twin, plain, "twin under XLA")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 8), Layout(1, 32, 1)),  # rows of whole bytes
        ((2, 3, 8), Layout(1, 48, 1)),
        ((5, 7), Layout(1, 35, 1)),
        ((1, 8), Layout(1, 8, 1)),
        ((5, 7), Layout(1, 5, 7)),
        ((5, 7), Layout(5, 7, 1)),
        ((2, 3, 4), Layout(2, 3, 4)),
        ((4, 6), Layout(1, 1, 24)),
        ((), Layout(1, 1, 1)),
    ],
)
def test_shapes_under_xla(shape, layout, dtype):
    """XLA unpacks the bits in the tensor's own shape."""
    rng = np.random.default_rng(5)
    gradient, old, new = (tf.reshape(tf.constant(any_bits(rng, dtype, layout.size)), shape) for _ in range(3))
    mask = tf.constant(any_mask(rng, layout, 0.5))
    results = []
    for library, jit in ((ops, True), (reference, False)):
        variable = tf.Variable(old)

        def step(gradient, new, variable=variable, library=library):
            snapshot = library.remember_frozen(variable, mask, layout)
            variable.assign(new)
            library.restore_frozen(variable, mask, snapshot, layout)
            return library.mask_gradient(gradient, mask, layout)

        output = in_mode(step, "jit" if jit else "function")(gradient, new)
        results.append((output.numpy(), variable.numpy()))
    for compiled, twin in zip(*results, strict=True):
        assert_same_bits(compiled, twin)


@pytest.mark.parametrize("mode", ["eager", "function", "jit", "jit, materialized"])
@settings(SETTINGS, max_examples=40)
@given(
    rows=st.sampled_from([0, 1, 7, 8, 64, 65, 300]),
    width=st.sampled_from([1, 3, 8, 13, 130]),
    named=st.sampled_from([None, 1, 5, 40]),
    dtype=st.sampled_from(list(DTYPES)),
    waiting=DENSITIES,
    powers=st.sampled_from([[2], [2, 1], [2, 2, 1]]),
    seed=st.integers(0, 2**32 - 1),
)
def test_seed_slots(mode, rows, width, named, dtype, waiting, powers, seed):
    rng = np.random.default_rng(seed)
    size = rows * width

    def some(shape, zeros):
        values = np.where(rng.random(shape) < zeros, 0.0, rng.normal(size=shape))
        return values.astype(DTYPES[dtype])

    gradient = some((rows, width), 0.4)
    if named is not None and rows:
        # Whole numbers, so that repeated rows add up to the same in any order.
        values = rng.integers(-2, 3, (named, width)).astype(DTYPES[dtype])
        gradient = tf.IndexedSlices(values, rng.integers(0, rows, named), (rows, width))
    bits = np.packbits(rng.random(size) < waiting, bitorder="little")
    empty = rng.random((rows, width)) < 0.7
    slots = [np.where(empty, 0, some((rows, width), 0.0)).astype(DTYPES[dtype]) for _ in powers]
    scales = [tf.constant(value, tf.float64) for value in rng.random(len(powers))]
    results = []
    for library in (ops, reference):
        unseeded, variables = tf.Variable(bits), [tf.Variable(slot) for slot in slots]

        def step(library=library, unseeded=unseeded, variables=variables):
            given = gradient
            if isinstance(given, tf.IndexedSlices):
                given = tf.IndexedSlices(
                    tf.constant(given.values), tf.constant(given.indices), tf.constant(given.dense_shape, tf.int64)
                )
            options = [True] if library is ops and "materialized" in mode else []
            library.seed_slots(unseeded, given, scales, variables, powers, *options)

        in_mode(step, mode.split(",")[0] if library is ops else "eager")()
        results.append([unseeded.numpy(), *(variable.numpy() for variable in variables)])
    native, twin = results
    for actual, expected in zip(native[1:], twin[1:], strict=True):
        if "jit" in mode and not (named is None and "materialized" in mode):  # which may use another order of roundings
            close = np.isclose(
                actual.astype(float), expected.astype(float), rtol=1e-2 if DTYPES[dtype].itemsize == 2 else 1e-6
            )
            assert close.all()
        else:
            assert_same_bits(actual, expected)
    if mode != "jit" and named is None:  # HLO does not clear bits
        assert_same_bits(native[0], twin[0])
    assert not (twin[0] & ~native[0]).any(), "a bit was cleared too early"
    untouched = ~np.unpackbits(bits, count=size, bitorder="little").astype(bool)
    for actual, slot in zip(native[1:], slots, strict=True):
        assert_same_bits(actual.reshape(-1)[untouched], slot.reshape(-1)[untouched])


def test_seed_slots_refuses_what_does_not_fit():
    bits, slot = tf.Variable(np.zeros(2, np.uint8)), tf.Variable(np.zeros((3, 4), "float32"))
    one = [tf.constant(1.0, tf.float64)]
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match="12 entries"):
        ops.seed_slots(bits, tf.zeros([11]), one, [slot], [2])
    with pytest.raises(
        (tf.errors.InvalidArgumentError, ValueError), match=r"powers must be 1 or 2.*Received: powers=\[3\]"
    ):
        ops.seed_slots(bits, tf.zeros([3, 4]), one, [slot], [3])
    with pytest.raises(tf.errors.InvalidArgumentError, match="one bit for each of 12 entries"):
        ops.seed_slots(tf.Variable(np.zeros(3, np.uint8)), tf.zeros([3, 4]), one, [slot], [2])
    bits.assign([255, 15])
    with pytest.raises(tf.errors.InvalidArgumentError, match="a slot of dtype double"):
        ops.seed_slots(bits, tf.zeros([3, 4]), one, [tf.Variable(np.zeros((3, 4)))], [2])
    slices = tf.IndexedSlices(tf.ones([1, 4]), tf.constant([3]), tf.constant([3, 4]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[0\] = 3"):
        ops.seed_slots(bits, slices, one, [slot], [2])
    assert not slot.numpy().any()


COMPACT_LAYOUTS = st.one_of(
    st.builds(Layout, st.just(1), LENGTHS, st.just(1)),
    st.builds(Layout, st.just(1), LENGTHS, REPEATS),
    st.builds(Layout, st.just(1), st.sampled_from([2047, 2048, 2049, 5000, 70_001]), st.sampled_from([1, 1, 3, 64])),
)


def index_of(packed, layout, room):
    """Mask, rank offsets and indices as a compact variable keeps them, with room for more entries."""
    ones = packing.bit_indices(packed, layout.kept)
    indices = np.concatenate([ones, layout.kept + np.arange(room)]).astype(np.uint32)
    return (
        tf.constant(packed),
        tf.constant(packing.rank_offsets(packed, layout.kept)),
        tf.constant(indices),
    )


@pytest.mark.parametrize("mode", ["eager", "function"])
@SETTINGS
@given(
    layout=COMPACT_LAYOUTS,
    dtype=st.sampled_from(list(DTYPES)),
    density=DENSITIES,
    room=st.sampled_from([0, 0, 1, 9]),
    seed=st.integers(0, 2**32 - 1),
)
@example(Layout(1, 0, 1), "float32", 0.5, 0, 0)
@example(Layout(1, 0, 3), "bfloat16", 0.5, 2, 0)
def test_gather_and_scatter_trainable(mode, layout, dtype, density, room, seed):
    rng = np.random.default_rng(seed)
    old, new = any_bits(rng, dtype, layout.size), any_bits(rng, dtype, layout.size)
    packed = any_mask(rng, layout, density)
    index = index_of(packed, layout, room)
    passing = np.repeat(packing.unpack_bits(packed, layout.kept), layout.inner)
    for library in (ops, reference):
        variable = tf.Variable(tf.constant(old))

        def step(value, variable=variable, library=library):
            read = library.read_trainable(variable, *index, layout)
            compact = library.gather_trainable(value, *index, layout)
            both = library.take_trainable(variable, value, *index, layout)
            library.scatter_trainable(variable, compact, *index, layout)
            return read, compact, *both

        read, compact, *both = in_mode(step, mode)(tf.constant(new))
        assert_same_bits(both[0], compact, "taken gradient")
        assert_same_bits(both[1], read, "taken value")
        rest = np.zeros(room * layout.inner, DTYPES[dtype])
        assert_same_bits(read, np.concatenate([old[passing], rest]), "read")
        assert_same_bits(compact, np.concatenate([new[passing], rest]), "gathered")
        assert_same_bits(variable.numpy(), np.where(passing, new, old), "scattered")


@SETTINGS
@given(
    kept=st.sampled_from([1, 7, 64, 65, 2047, 2048, 2049, 9000]),
    density=DENSITIES,
    room=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_rank_trainable(kept, density, room, seed):
    rng = np.random.default_rng(seed)
    layout = Layout(1, kept, 1)
    packed = any_mask(rng, layout, density)
    index = index_of(packed, layout, room)
    bits = rng.integers(0, kept, 50)
    flags = packing.unpack_bits(packed, kept)
    capacity = int(flags.sum()) + room
    expected = np.clip(np.cumsum(flags)[bits] - flags[bits], 0, max(capacity - 1, 0))
    for library in (ops, reference):
        ranks = library.rank_trainable(tf.constant(bits), *index, kept)
        np.testing.assert_array_equal(ranks, expected, library.__name__)


def assert_close_sums(actual, expected, x, dy, trainable):
    """Fails where entries of `x^T dy` are further apart than other orders of the sums of float32 explain.

    A result of 16 bits is a float32 that was rounded once: one of those that the float32 numbers within reach round to.
    """
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    magnitude = np.zeros(actual.size)
    magnitude[: trainable.sum()] = (np.abs(x).astype(float).T @ np.abs(dy).astype(float))[trainable]
    reach = 4 * np.finfo(np.float32).eps * max(len(x), 1) ** 0.5 * magnitude
    if actual.dtype.itemsize == 2:
        reach = reach + np.abs(np.spacing(expected).astype(float))
    assert (np.abs(actual.astype(float) - expected.astype(float)) <= reach).all()
    assert_same_bits(actual[trainable.sum() :], np.zeros(actual.size - trainable.sum(), actual.dtype))


def sampled_case(rng, dtype, tokens, trainable, room):
    """Operands of `sampled_matmul` as NumPy arrays, and what it takes besides."""
    x, dy = (rng.normal(size=(tokens, width)).astype(DTYPES[dtype]) for width in trainable.shape)
    packed = packing.pack_bits(trainable)
    plan = make_visits(packed, *trainable.shape, int(trainable.sum()) + room)
    return x, dy, [tf.constant(plan), *index_of(packed, Layout(1, trainable.size, 1), room)]


SAMPLED_SHAPES = {
    "tokens": st.sampled_from([0, 1, 15, 16, 17, 70, 128, 129, 257, 600]),
    "rows": st.sampled_from([0, 1, 5, 16, 33, 300]),
    "columns": st.sampled_from([0, 1, 7, 24, 41, 129, 400]),
}


@pytest.mark.parametrize("mode", ["eager", "function"])
@SETTINGS
@given(
    **SAMPLED_SHAPES,
    dtype=st.sampled_from(ops.SAMPLED_DTYPES),
    density=DENSITIES,
    room=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sampled_matmul(mode, tokens, rows, columns, dtype, density, room, seed):
    rng = np.random.default_rng(seed)
    trainable = rng.random((rows, columns)) < density
    x, dy, index = sampled_case(rng, dtype, tokens, trainable, room)
    native = in_mode(ops.sampled_matmul, mode)(tf.constant(x), tf.constant(dy), *index)
    twin = reference.sampled_matmul(tf.constant(x), tf.constant(dy), *index)
    assert_close_sums(native.numpy(), twin.numpy(), x, dy, trainable)


@pytest.mark.parametrize("dtype", ops.SAMPLED_DTYPES)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(0, 9, 30), (40, 0, 7), (300, 70, 130), (17, 300, 41)])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.1, 0.6])
def test_sampled_matmul_under_xla(tokens, rows, columns, density, dtype):
    rng = np.random.default_rng(4)
    trainable = rng.random((rows, columns)) < density
    x, dy, index = sampled_case(rng, dtype, tokens, trainable, 2)

    def product(x, dy):
        # Operands that XLA makes itself, in the layout that it likes.
        return ops.sampled_matmul(tf.transpose(x), dy * 1, *index)

    compiled = in_mode(product, "jit")(tf.constant(x.T), tf.constant(dy))
    twin = reference.sampled_matmul(tf.constant(x), tf.constant(dy), *index)
    assert_close_sums(compiled.numpy(), twin.numpy(), x, dy, trainable)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ops.SAMPLED_DTYPES)
def test_sampled_matmul_of_nan_and_infinity(dtype, mode):
    """An entry gets what the dense product gives, and no other does."""
    rng = np.random.default_rng(6)
    trainable = rng.random((30, 50)) < 0.5
    trainable[:4, :4] = True
    x, dy, index = sampled_case(rng, dtype, 131, trainable, 1)
    x[130, 0], x[3, 1], dy[3, 2], dy[50, 3] = np.nan, np.inf, 0, -np.inf
    native = in_mode(ops.sampled_matmul, mode)(tf.constant(x), tf.constant(dy), *index).numpy().astype(float)
    twin = reference.sampled_matmul(tf.constant(x), tf.constant(dy), *index).numpy().astype(float)
    for same in (np.isnan, np.isposinf, np.isneginf):
        assert same(twin).any()
        np.testing.assert_array_equal(same(native), same(twin))


def test_sampled_matmul_of_a_batch_whose_size_is_not_static():
    rng = np.random.default_rng(7)
    trainable = rng.random((20, 40)) < 0.3
    traces = []

    @tf.function
    def product(x, dy, *index):
        traces.append(1)
        found = ops.sampled_matmul(x, dy, *index)
        assert found.shape == index[-1].shape
        return found

    product = product.get_concrete_function(
        tf.TensorSpec([None, 20]), tf.TensorSpec([None, 40]), *(
            tf.TensorSpec(each.shape, each.dtype) for each in sampled_case(rng, "float32", 1, trainable, 0)[2]
        )
    )  # fmt: skip
    for tokens in (3, 0, 300):
        x, dy, index = sampled_case(rng, "float32", tokens, trainable, 0)
        twin = reference.sampled_matmul(tf.constant(x), tf.constant(dy), *index)
        assert_close_sums(product(tf.constant(x), tf.constant(dy), *index).numpy(), twin.numpy(), x, dy, trainable)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("density", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize(
    ("shape", "inner"), [((1,), 1), ((0,), 1), ((67,), 1), ((9, 13), 1), ((9, 13), 13), ((5, 2, 3), 6), ((5000,), 1)]
)
def test_compact_under_xla(shape, inner, density, dtype):
    """XLA's kernels, and the twins compiled by XLA, against the twins outside."""
    rng = np.random.default_rng(3)
    size = int(np.prod(shape))
    layout = Layout(1, size // inner, inner)
    old, new = (tf.reshape(tf.constant(any_bits(rng, dtype, size)), shape) for _ in range(2))
    index = index_of(any_mask(rng, layout, density), layout, room=2)
    bits = tf.constant(rng.integers(0, max(layout.kept, 1), 20))
    results = []
    for library, jit in ((ops, True), (reference, True), (reference, False)):
        variable = tf.Variable(old)

        def step(new, variable=variable, library=library):
            read = library.read_trainable(variable, *index, layout)
            compact = library.gather_trainable(new, *index, layout)
            both = library.take_trainable(variable, new, *index, layout)
            library.scatter_trainable(variable, compact, *index, layout)
            return read, compact, *both, library.rank_trainable(bits, *index, layout.kept)

        outputs = in_mode(step, "jit" if jit else "function")(new)
        results.append([output.numpy() for output in outputs] + [variable.numpy()])
    for compiled, twin, plain in zip(*results, strict=True):
        for actual, message in ((compiled, "native under XLA"), (twin, "twin under XLA")):
            if plain.dtype == np.int64:
                np.testing.assert_array_equal(actual, plain, message)
            else:
                assert_same_bits(actual, plain, message)


@pytest.mark.parametrize("kept", [0, 1, 2047, 2048, 2049, 10_000])
def test_rank_offsets(kept):
    flags = np.random.default_rng(1).random(kept) < 0.3
    padding = np.ones(-kept % 8, bool)  # counts for nothing
    packed = np.packbits(np.concatenate([flags, padding]), bitorder="little")
    offsets = packing.rank_offsets(packed, kept)
    assert offsets.dtype == np.int64
    blocks = -(-kept // packing.RANK_BLOCK_BITS)
    expected = [flags[: i * packing.RANK_BLOCK_BITS].sum() for i in range(blocks)] + [flags.sum()]
    np.testing.assert_array_equal(offsets, expected)
