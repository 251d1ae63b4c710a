"""What the compiled ops refuse, while tracing (shape functions) and while running."""

import resource

import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits
from tensorflow.python.framework.ops import gradient_registry as registered_gradients

from freezeops import ops
from freezeops.masks import packing, visits
from freezeops.ops import native

library = native.op_library()
pytestmark = pytest.mark.skipif(library is None, reason="no native library for this TensorFlow")

LAYOUT = [1, 12, 1]
LONG = [2**58, 12, 1]  # of more entries than could be counted in a day


def mask(count=2):
    return tf.zeros(count, tf.uint8)


def variable(shape=(3, 4), dtype=tf.float32):
    return tf.Variable(tf.ones(shape, dtype))


def test_the_table_names_every_op_and_tensorflow_knows_its_gradient():
    """An op that TensorFlow knows no gradient of, not even none, is an error in the middle of a backward pass."""
    compiled = {name.removeprefix("freezeops_") for name in vars(library) if name.startswith("freezeops_")}
    assert set(ops._OPS) == {name for name in compiled if not name.endswith("_eager_fallback")}
    for name in ops._OPS:
        gradient = registered_gradients.lookup(f"Freezeops>{name.title().replace('_', '')}")
        assert (gradient is not None) == name.startswith("mask_"), name


CASES = {
    "mask of rank 2": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), tf.zeros((1, 2), tf.uint8), layout=LAYOUT),
        r"rank 1|mask must have shape \[2\].*\[1,2\]",
    ),
    "mask too short": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), mask(1), layout=LAYOUT),
        r"mask must have (2 bytes|shape \[2\]).*12 kept.*Received: mask of shape \[1\]",
    ),
    "gradient of another size": (
        lambda: library.freezeops_mask_gradient(tf.ones((3, 5)), mask(), layout=LAYOUT),
        r"gradient must have the 12 entries.*\[3,5\]",
    ),
    "layout of two": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), mask(), layout=[1, 12]),
        r"layout",
    ),
    "negative layout": (
        lambda: library.freezeops_mask_gradient(tf.ones(12), mask(), layout=[-1, -12, 1]),
        r"layout",
    ),
    "slices and indices": (
        lambda: library.freezeops_mask_slices(tf.ones((2, 4)), tf.constant([0]), mask(), layout=LAYOUT, rows=3),
        r"one row for each index|[Dd]imensions must be equal",
    ),
    "slices of another width": (
        lambda: library.freezeops_mask_slices(tf.ones((1, 5)), tf.constant([0]), mask(), layout=LAYOUT, rows=3),
        r"rows times the size of a row must be the 12 entries",
    ),
    "slices without an axis": (
        lambda: library.freezeops_mask_slices(tf.ones(()), tf.constant([0]), mask(), layout=LAYOUT, rows=3),
        r"rank|one row for each index.*\[\]",
    ),
    "indices of rank 2": (
        lambda: library.freezeops_mask_slices(tf.ones((1, 4)), tf.constant([[0]]), mask(), layout=LAYOUT, rows=3),
        r"rank 1|one row for each index.*\[1,1\]",
    ),
    "variable of another size": (
        lambda: library.freezeops_remember_frozen(
            variable((5,)).handle, mask(), T=tf.float32, layout=LAYOUT
        ),
        r"variable must have the 12 entries.*\[5\]",
    ),
    "variable of another dtype": (
        lambda: library.freezeops_remember_frozen(
            variable(dtype=tf.float64).handle, mask(), T=tf.float32, layout=LAYOUT
        ),
        r"variable must be of dtype float.*double",
    ),
    "snapshot too long": (
        lambda: library.freezeops_restore_frozen(variable().handle, mask(), tf.ones(13), layout=LAYOUT),
        r"snapshot must .*12",
    ),
    "snapshot of rank 2": (
        lambda: library.freezeops_restore_frozen(variable().handle, mask(), tf.ones((3, 4)), layout=LAYOUT),
        r"rank 1|must be a vector.*\[3,4\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "function"])
@pytest.mark.parametrize("case", CASES)
def test_refused(case, mode):
    call, message = CASES[case]
    if mode == "function":
        # Kept alive outside, as a function does not own what it captures.
        call = tf.function(call, autograph=False)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        call()


def test_snapshot_of_neither_length_changes_nothing():
    target = variable()
    half = tf.constant(np.packbits(np.arange(12) < 5, bitorder="little"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"the 7 frozen entries or of all 12 entries.*\[6\]"):
        library.freezeops_restore_frozen(target.handle, half, tf.zeros(6), layout=LAYOUT)
    assert_same_bits(target.numpy(), np.ones((3, 4), np.float32))


def test_shapes_that_functions_infer():
    @tf.function
    def shapes(gradient):
        values = library.freezeops_mask_slices(tf.ones((2, 4)), tf.constant([0, 1]), mask(), layout=LAYOUT, rows=3)
        masked = library.freezeops_mask_gradient(gradient, mask(), layout=LAYOUT)
        assert masked.shape == (3, 4) and values.shape == (2, 4)
        return masked

    shapes(tf.ones((3, 4)))


def test_variable_that_does_not_exist():
    handle = tf.raw_ops.VarHandleOp(dtype=tf.float32, shape=[12], shared_name="never")
    with pytest.raises(tf.errors.NotFoundError, match="does not exist"):
        library.freezeops_remember_frozen(handle, mask(), T=tf.float32, layout=LAYOUT)


def test_gradient_is_masked_in_its_own_buffer():
    """Where it has one consumer: masking touches no fresh page of memory."""
    size = 1 << 24  # 64 MB: allocated afresh at every step, as malloc keeps nothing that large

    @tf.function
    def step(x, bits):
        return library.freezeops_mask_gradient(x * 2, bits, layout=[1, size, 1])

    x, bits = tf.ones(size), tf.zeros(size // 8, tf.uint8)
    step(x, bits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step(x, bits)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 4
    assert faults < 1.5 * size * 4 / resource.getpagesize()


def index(packed, kept, room=0):
    """Mask, offsets and indices that belong together."""
    ones = packing.bit_indices(packed, kept)
    indices = np.concatenate([ones, kept + np.arange(room)]).astype(np.int32)
    return [packed, packing.rank_offsets(packed, kept), indices]


@pytest.mark.parametrize("mode", ["function", "jit"])
@pytest.mark.parametrize("density", [0.005, 0.3])
@pytest.mark.parametrize("wrong", ["mask", "offsets", "indices", "capacity"])
def test_index_that_does_not_belong_to_its_mask(wrong, density, mode):
    """Nothing is read or written out of bounds, and no frozen entry is written: by bits and by indices."""
    rng = np.random.default_rng(0)
    kept = 20_000
    packed = np.packbits(rng.random(kept) < density, bitorder="little")
    values = index(packed, kept)
    if wrong == "mask":
        values[0] = np.roll(packed, 700)
    elif wrong == "offsets":
        values[1] = values[1] + 5
    elif wrong == "capacity":
        values[2] = values[2][:-2]
    else:
        values[2] = values[2].copy()
        values[2][3:6] = [2**31 - 1, -1, 5 * kept]
        if density > 0.1:
            pytest.skip("where many are trainable the indices are not looked at")
    bits, offsets, indices = (tf.Variable(value) for value in values)
    layout = [1, kept, 1]
    variable = tf.Variable(np.zeros(kept, "float32"))
    source = tf.ones(kept)

    def gather():
        return library.freezeops_gather_trainable(source, bits, offsets, indices, layout=layout)

    def take():
        return library.freezeops_take_trainable(variable.handle, source, bits, offsets, indices, layout=layout)

    def scatter():
        compact = tf.ones(tf.shape(indices))
        library.freezeops_scatter_trainable(variable.handle, compact, bits, offsets, indices, layout=layout)

    message = "offsets and indices must be those of the mask"
    by_index = density < 0.1
    for function in (gather, take, scatter):
        if by_index and wrong == "mask" and function is not scatter:
            continue  # to read a frozen entry harms nobody
        if mode == "jit" and wrong == "offsets" and by_index and function is not scatter:
            continue
        with pytest.raises(tf.errors.OpError, match=message):
            tf.function(function, jit_compile=mode == "jit", autograph=False)()
    frozen = ~packing.unpack_bits(values[0], kept)
    assert not variable.numpy()[frozen].any()


def test_compact_ops_refuse_other_shapes():
    packed = np.array([0b101], np.uint8)
    bits, offsets, indices = index(packed, 3)
    variable = tf.Variable(np.ones(3, "float32"))
    good = {"mask": bits, "offsets": offsets, "indices": indices}
    cases = [
        ({"mask": np.zeros(2, np.uint8)}, [1, 3, 1], r"mask must have"),
        ({"offsets": np.zeros(3, np.int64)}, [1, 3, 1], r"offsets must have shape \[2\]"),
        ({"indices": np.zeros((1, 2), np.int32)}, [1, 3, 1], r"rank 1|indices must be a vector"),
        ({}, [1, 4, 1], r"must have the 4 entries"),
        ({}, [3, 1, 1], r"must be one that does not repeat|offsets must have|mask must have"),
    ]
    for wrong, layout, message in cases:
        given = good | wrong
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
            library.freezeops_gather_trainable(tf.ones(3), *given.values(), layout=layout)
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=message):
            library.freezeops_read_trainable(variable.handle, *given.values(), T=tf.float32, layout=layout)
    with pytest.raises(
        (tf.errors.InvalidArgumentError, ValueError), match="compact must have the 2 entries of the indices"
    ):
        library.freezeops_scatter_trainable(variable.handle, tf.ones(3), *good.values(), layout=[1, 3, 1])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"bits must be in \[0, 3\). Received: bits\[1\] = 3"):
        library.freezeops_rank_trainable(np.array([0, 3]), *good.values(), kept=3)
    assert (variable.numpy() == 1).all()


SAMPLED = np.random.default_rng(0).random((20, 30)) < 0.3
ONES = int(SAMPLED.sum())
PLAN = visits.visits(packing.pack_bits(SAMPLED), 20, 30, ONES)


def sampled(x=(8, 20), dy=(8, 30), plan=PLAN, capacity=ONES, dtype="float32", indices=None):
    indices = np.arange(capacity, dtype=np.int32) if indices is None else indices
    return library.freezeops_sampled_matmul(tf.ones(x, dtype), tf.ones(dy, dtype), plan, indices)


PLANS = {
    "of none": (dict(plan=PLAN[:0]), "a function that was traced before `repack` must be traced again"),
    "cut": (dict(plan=PLAN[:30]), r"Received: 20 rows, 30 columns, \d+ indices, visits of shape \[30\]"),
    "of other rows": (dict(x=(8, 21)), "Received: 21 rows, 30 columns"),
    "of other columns": (dict(dy=(8, 29)), "Received: 20 rows, 29 columns"),
    "of more entries": (dict(capacity=ONES - 1), "no more trainable entries than there are indices"),
    "of a row that does not exist": (
        dict(plan=np.where(PLAN == 19, 20, PLAN)),
        "must be those of a mask of as many rows",
    ),
    "of -1 everywhere": (dict(plan=np.full_like(PLAN, -1)), "must be those of a mask of as many rows"),
}


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("case", PLANS)
def test_sampled_matmul_refuses_plans(case, mode):
    changed, message = PLANS[case]
    given = {"plan": tf.Variable(changed.get("plan", PLAN))}

    def call():
        return sampled(**{**changed, "plan": given["plan"]})

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "jit", autograph=False)
    # What XLA is told of an error has no numbers.
    with pytest.raises(tf.errors.InvalidArgumentError, match="visits must be" if mode == "jit" else message):
        call()
    given["plan"] = tf.Variable(PLAN)
    np.testing.assert_array_equal(sampled(), np.full(ONES, 8.0, np.float32))


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=(9, 20)), r"x and dy must be matrices with a row for each token.*\[9,20\].*\[8,30\]"),
        (dict(x=(2, 4, 20)), r"x and dy must be matrices.*\[2,4,20\]"),
        (dict(dy=(240,)), r"x and dy must be matrices.*\[240\]"),
        (dict(plan=PLAN[None]), "visits must be a vector"),
        (dict(indices=np.zeros((2, 9), np.int32)), "indices must be a vector"),
        (dict(x=(0, 2**31)), "fewer than 2\\^31 columns"),
    ],
)
def test_sampled_matmul_refuses_shapes(changed, message, mode):
    if changed.get("x") == (0, 2**31):
        changed = changed | {"dy": (0, 30)}

    def call():
        return sampled(**changed)

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "jit", autograph=False)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match=message):
        call()


@pytest.mark.parametrize(
    ("x", "dy", "message"),
    [
        (tf.ones((8, 20), tf.float64), tf.ones((8, 30), tf.float64), "Received: x of dtype float64"),
        (tf.ones((8, 20)), tf.ones((8, 30), tf.float16), "x of dtype float32, dy of dtype float16"),
        (tf.ones((2, 4, 20)), tf.ones((8, 30)), r"must be matrices.*\(2, 4, 20\)"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sampled_matmul_of_other_operands(x, dy, message, backend, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
    with pytest.raises(ValueError, match=message):
        ops.sampled_matmul(x, dy, PLAN, *index(packing.pack_bits(SAMPLED), 600))


def test_sampled_matmul_needs_a_static_width():
    @tf.function(input_signature=[tf.TensorSpec([8, None]), tf.TensorSpec([8, 30])])
    def call(x, dy):
        return ops.sampled_matmul(x, dy, PLAN, *index(packing.pack_bits(SAMPLED), 600))

    with pytest.raises(ValueError, match="whose last axis is static"):
        call(tf.ones((8, 20)), tf.ones((8, 30)))


def test_sampled_matmul_of_nothing():
    """No capacity: the plan is not looked at. No tokens: zeros."""
    assert sampled(plan=PLAN[:0], capacity=0).shape == (0,)
    np.testing.assert_array_equal(sampled((0, 20), (0, 30)), np.zeros(ONES, np.float32))


HUGE = 2**62
# Made once: functions make no variables.
SLOTS = {shape: [variable(shape) for _ in range(3)] for shape in [(), (0,), (3, 4)]}
ALL_WAIT = {size: tf.Variable(np.full((size + 7) // 8, 255, np.uint8)) for size in (0, 1, 12)}


def seed(slots, values, indices=(), scales=None, powers=None, size=None, sparse=False, **attributes):
    """SeedSlots of entries that all wait."""
    size = slots[0].shape.num_elements() if size is None else size
    bits = ALL_WAIT[max(size, 0)]
    bits.assign(tf.fill(bits.shape, tf.constant(255, tf.uint8)))
    scales = np.ones(len(slots)) if scales is None else scales
    library.freezeops_seed_slots(
        bits.handle,
        values,
        np.array(indices, np.int64),
        np.array(scales, np.float64),
        [slot.handle for slot in slots],
        powers=[1] * len(slots) if powers is None else powers,
        size=size,
        sparse=sparse,
        **attributes,
    )


EMPTY = [np.zeros(0, np.uint8), np.zeros(1, np.int64)]
SIZES_THAT_OVERFLOW = {
    "layout": (lambda: library.freezeops_mask_gradient(tf.ones(0), mask(0), layout=[HUGE, 4, 0]), "layout"),
    "capacity": (
        lambda: library.freezeops_gather_trainable(tf.zeros(0), *EMPTY, np.zeros(2, np.int64), layout=[1, 0, HUGE]),
        "fewer than 2\\^63 entries|overflow",
    ),
    "capacity of what is scattered": (
        lambda: library.freezeops_scatter_trainable(
            SLOTS[0,][0].handle, tf.zeros(0), *EMPTY, np.zeros(4, np.int32), layout=[1, 0, HUGE]
        ),
        "fewer than 2\\^63 entries|overflow",
    ),
    "layout of more entries than could be counted in a day": (
        lambda: library.freezeops_remember_frozen(SLOTS[3, 4][0].handle, mask(2), T=tf.float32, layout=LONG),
        "variable must have the",
    ),
    "layout of more entries than could be counted, to restore": (
        lambda: library.freezeops_restore_frozen(SLOTS[3, 4][0].handle, mask(2), tf.ones(1), layout=LONG),
        "variable must have the",
    ),
    "rows": (
        lambda: library.freezeops_mask_slices(
            tf.ones((1, 4)), tf.constant([5], tf.int64), mask(0), layout=[1, 0, 4], rows=HUGE
        ),
        "rows times the size of a row|overflow|larger than",
    ),
    "negative kept": (
        lambda: library.freezeops_rank_trainable(np.zeros(1, np.int64), *EMPTY, np.zeros(1, np.int32), kept=-8),
        "kept must not be negative",
    ),
    "negative size": (lambda: seed(SLOTS[0,][:1], tf.zeros(0), size=-8), "size not negative|size"),
    "fewer powers than slots": (lambda: seed(SLOTS[3, 4][:2], tf.ones((3, 4)), powers=[1]), "powers must be"),
    "scales too short": (lambda: seed(SLOTS[3, 4], tf.ones((3, 4)), scales=[1.0]), "scales must be|[Dd]imension"),
    "scales too short for a call": (
        lambda: seed(SLOTS[3, 4], tf.ones((3, 4)), scales=[1.0], materialized=True),
        "scales must be|[Dd]imension",
    ),
    "slices of a scalar slot": (
        lambda: seed(SLOTS[()][:1], tf.ones(1), [0], sparse=True),
        "values must be rows of the slots",
    ),
    "values of another shape": (
        lambda: seed(SLOTS[3, 4][:1], tf.ones((4, 3))),
        "values must have the shape of the slots",
    ),
}


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("case", SIZES_THAT_OVERFLOW)
def test_sizes_are_checked_before_memory_is_touched(case, mode):
    call, message = SIZES_THAT_OVERFLOW[case]
    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "jit", autograph=False)
    for slot in (slot for slots in SLOTS.values() for slot in slots):
        slot.assign(tf.zeros_like(slot))
    with pytest.raises((ValueError, tf.errors.OpError), match=message):
        call()
    assert not any(slot.numpy().any() for slots in SLOTS.values() for slot in slots)


def test_rows_of_more_entries_than_can_be_counted():
    with pytest.raises(tf.errors.InvalidArgumentError, match="rows times the size of a row"):
        library.freezeops_mask_slices(
            tf.zeros((0, 2**40, 2**40)), tf.zeros(0, tf.int64), mask(0), layout=[1, 0, 4], rows=1
        )


@pytest.mark.parametrize("row", [3, -1, 2**31, HUGE, 2**63 - 1, -(2**63)])
def test_seeding_a_row_that_does_not_exist_writes_nothing(row):
    slots = [tf.Variable(tf.zeros((3, 4))), tf.Variable(tf.zeros((3, 4)))]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"indices must be in \[0, 3\).*indices\[1\] = "):
        seed(slots, tf.ones((2, 4)), [0, row], sparse=True)
    assert not any(slot.numpy().any() for slot in slots)
