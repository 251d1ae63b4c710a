"""Training on GPUs, through TensorFlow: skipped where it sees none. `tests/gpu` tests the kernels by themselves.

All frozen entries keep their bits, and masks add no copy from the device to the host.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import FUSED, MODES, SETUPS, assert_same_bits, in_mode, mask_variables
from fused_variables import RULES, assert_same_state, variables_of, with_compact_gradient

import freezeops as fz
from freezeops import ops
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.ops import reference_updates

GPUS = tf.config.list_physical_devices("GPU")
pytestmark = [
    pytest.mark.skipif(not GPUS, reason="TensorFlow sees no GPU"),
    pytest.mark.skipif(bool(GPUS) and ops.paths()["mask_gradient"] != "native", reason="no CUDA kernels in use"),
]

SPECIAL = np.array([0x7FC12345, 0x80000000, 0x00000001, 0x7F800000, 0x7F800001], np.uint32).view(np.float32)
DTYPES = ["float16", "bfloat16", "float32", "float64"]
LAYOUTS = [Layout(1, 4099, 1), Layout(1, 70, 33), Layout(1, 40, 300), Layout(37, 64, 1), Layout(3, 11, 5)]


def random_bits(rng, shape, dtype):
    """Values of any bits: NaNs, infinities and subnormals among them."""
    dtype = tf.as_dtype(dtype)
    integers = {2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.size]
    return rng.integers(0, np.iinfo(integers).max, shape, integers, endpoint=True).view(dtype.as_numpy_dtype)


def packed(rng, layout, density=0.5):
    return np.packbits(rng.random(layout.kept) < density, bitorder="little")


def trainable(bits, layout):
    kept = packing.unpack_bits(bits, layout.kept)
    return np.broadcast_to(kept[None, :, None], tuple(layout)).reshape(-1)


def on_gpu(value):
    with tf.device("/GPU:0"):
        return tf.Variable(value, trainable=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_masking_remembering_and_restoring(layout, dtype, mode):
    rng = np.random.default_rng(0)
    bits = packed(rng, layout)
    passing = trainable(bits, layout)
    old, new = (random_bits(rng, layout.size, dtype) for _ in range(2))
    mask, variable = on_gpu(bits), on_gpu(old)

    def step(gradient):
        snapshot = ops.remember_frozen(variable, mask.read_value(), layout)
        variable.assign(gradient)
        ops.restore_frozen(variable, mask.read_value(), snapshot, layout)
        return ops.mask_gradient(gradient, mask.read_value(), layout)

    masked = in_mode(step, mode)(tf.constant(new))
    assert_same_bits(masked.numpy(), np.where(passing, new, np.zeros_like(new)), "masked")
    assert_same_bits(variable.numpy(), np.where(passing, new, old), "restored")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [Layout(1, 4099, 1), Layout(1, 90, 33), Layout(1, 40, 300)], ids=str)
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_compact_ops(layout, dtype, density):
    rng = np.random.default_rng(1)
    bits = packed(rng, layout, density)
    passing = trainable(bits, layout)
    ones = packing.bit_indices(bits, layout.kept)
    indices = np.concatenate([ones, layout.kept + np.arange(2)]).astype(np.uint32)
    index = [on_gpu(each) for each in (bits, packing.rank_offsets(bits, layout.kept), indices)]
    old, new = (random_bits(rng, layout.size, dtype) for _ in range(2))
    variable = on_gpu(old)

    @tf.function(autograph=False)
    def step(gradient):
        tensors = [each.read_value() for each in index]
        compact, value = ops.take_trainable(variable, gradient, *tensors, layout)
        ops.scatter_trainable(variable, compact, *tensors, layout)
        return compact, value, ops.rank_trainable(tf.constant(ones), *tensors, layout.kept)

    compact, value, ranks = step(tf.constant(new))
    rest = np.zeros(2 * layout.inner, old.dtype)
    assert_same_bits(compact.numpy(), np.concatenate([new[passing], rest]))
    assert_same_bits(value.numpy(), np.concatenate([old[passing], rest]))
    assert_same_bits(variable.numpy(), np.where(passing, new, old))
    np.testing.assert_array_equal(ranks.numpy(), np.arange(ones.size))


def test_slices_out_of_range_are_zero():
    values = tf.ones((3, 200))
    masked = ops.mask_slices(values, tf.constant([1, 7, -1]), tf.constant([0xFF], tf.uint8), Layout(1, 4, 200), 4)
    assert masked.numpy().sum(axis=1).tolist() == [200, 0, 0]


def test_snapshot_of_the_frozen_entries_alone_is_refused():
    layout = Layout(1, 12, 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"vector of all 12 entries.*on a GPU.*Received.*\[4\]"):
        ops.restore_frozen(on_gpu(np.ones(12, np.float32)), on_gpu(np.zeros(2, np.uint8)), tf.zeros(4), layout)


def make_model():
    layers = [keras.layers.Dense(64, "relu", name="body"), keras.layers.Dense(8, name="head")]
    return keras.Sequential([keras.Input((32,)), *layers])


def mask_and_freeze(model, **options):
    """A wrapped Adam and, by path, what its frozen entries are; special values among them."""
    rng = np.random.default_rng(0)
    masks, expected = {}, {}
    for variable in model.trainable_variables:
        value = variable.numpy()
        passing = rng.random(value.shape) < 0.5
        frozen = np.flatnonzero(~passing)[: SPECIAL.size]
        # In one bias only, and no NaN: that would make all of the loss NaN.
        if variable.path.endswith("head/bias"):
            value.reshape(-1)[frozen] = [-0.0, 1e-42, 0.5, 0.25, -0.0][: frozen.size]
            variable.assign(value)
        masks[variable.path] = passing
        expected[variable.path] = (passing, variable.numpy())
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01), masks=masks, **options)
    return optimizer, expected


def check_frozen(model, expected):
    moved = 0
    for variable in model.trainable_variables:
        passing, old = expected[variable.path]
        now = variable.numpy()
        assert_same_bits(now[~passing], old[~passing], variable.path)
        moved += int((now[passing] != old[passing]).sum())
    assert moved


def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(256, 32)).astype("float32"), rng.integers(0, 8, 256)


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("jit", ["auto", False, True])
def test_fit(state, jit, fused):
    model = make_model()
    optimizer, expected = mask_and_freeze(model, state=state, fused=fused)
    model.compile(optimizer, LOSS, jit_compile=jit)
    model.fit(*data(), batch_size=64, epochs=2, verbose=0)
    check_frozen(model, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, fused", [(name, False) for name in SETUPS] + [(name, True) for name in FUSED], ids=str)
def test_promise_for_every_optimizer(name, fused, mode):
    rng = np.random.default_rng(0)
    value = rng.normal(size=(40, 33)).astype("float32")
    value[0, : SPECIAL.size] = SPECIAL
    passing = rng.random(value.shape) < 0.5
    passing[0, : SPECIAL.size] = False
    variable = keras.Variable(value, name="w")
    optimizer = fz.MaskedOptimizer(SETUPS[name](weight_decay=0.1), fused=fused)
    optimizer.register_mask(variable, passing)
    optimizer.build([variable])
    gradient = tf.constant(rng.normal(size=value.shape).astype("float32"))
    step = in_mode(lambda: optimizer.apply([gradient], [variable]), mode)
    for _ in range(3):
        step()
    assert_same_bits(variable.numpy()[~passing], value[~passing])


@pytest.mark.parametrize("state", ["full", "compact", "compact gradients"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_fused_update_as_its_twin_on_the_host(rule, dtype, state):
    layouts = [Layout(1, 5003, 1), Layout(1, 77, 9), Layout(1, 3, 1000)]

    def made_on(device, density):
        rng = np.random.default_rng(1)
        with tf.device(device):
            *both, told = variables_of(rng, rule, dtype, layouts, density, state != "full", RULES[rule][0])
            if state == "compact gradients":
                both = [[with_compact_gradient(one, np.nan) for one in each] for each in both]
            return *both, told

    for density in (0.01, 0.5, 1.0):
        ours, _, told = made_on("/GPU:0", density)
        ops.fused_update(rule, ours, *told)
        with tf.device("/CPU:0"):
            _, twins, told = made_on("/CPU:0", density)
            reference_updates.fused_update(rule, twins, *told)
        assert_same_state(ours, twins, f"{rule} {dtype} {density}")


@pytest.mark.parametrize("state", ["full", "compact"])
@pytest.mark.parametrize("rule", ["sgd_nesterov", "adam_amsgrad", "nadam"])
def test_fused_update_of_slices_as_its_twin_on_the_host(rule, state):
    layout, width = Layout(1, 300, 70), 70

    def made_on(device):
        rng = np.random.default_rng(2)
        with tf.device(device):
            *both, told = variables_of(rng, rule, "float32", [layout], 0.5, state == "compact", True)
            rows = tf.constant(rng.integers(0, 300, 400), tf.int64)
            values = tf.constant(rng.normal(size=(400, width)).astype("float32"))
            slices = tf.IndexedSlices(values, rows, tf.constant([300, width], tf.int64))
        return *([variables[0]._replace(gradient=slices)] for variables in both), told

    ours, _, told = made_on("/GPU:0")
    ops.fused_update(rule, ours, *told)
    with tf.device("/CPU:0"):
        _, twins, told = made_on("/CPU:0")
        reference_updates.fused_update(rule, twins, *told)
    assert_same_state(ours, twins, rule)


def test_fused_update_passes_over_slices_out_of_range():
    value = np.ones((4, 50), np.float32)
    variable, momentum = on_gpu(value), on_gpu(np.zeros_like(value))
    rows, values = tf.constant([1, 4, -1, 1], tf.int64), tf.ones((4, 50))
    gradient = tf.IndexedSlices(values, rows, tf.constant([4, 50], tf.int64))
    one = ops.FusedOperand(variable, gradient, [momentum], Layout(1, 1, 200), None, None, None, False)
    ops.fused_update("sgd_momentum", [one], tf.constant([0.25, 0, 0, 0.5]), [], [], [])
    value[1] = 0.5
    assert_same_bits(variable.numpy(), value)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_unfrozen_entries_are_seeded(fused):
    variable = keras.Variable(np.ones((8, 64), "float32"), name="w")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01), fused=fused)
    optimizer.freeze(variable, np.s_[:4])
    optimizer.build([variable])
    gradient = tf.fill((8, 64), 0.5)
    step = tf.function(lambda: optimizer.apply([gradient], [variable]), autograph=False)
    for _ in range(20):
        step()
    optimizer.unfreeze(variable, np.s_[:4])
    before = variable.numpy()
    step()
    moved = np.abs(variable.numpy() - before)
    np.testing.assert_allclose(moved[:4], moved[4:], rtol=1e-3)  # not 3.16 times as far


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_mirrored_over_the_gpus_there_are(state, fused):
    strategy = tf.distribute.MirroredStrategy()
    with strategy.scope():
        model = make_model()
        optimizer, expected = mask_and_freeze(model, state=state, fused=fused)
        model.compile(optimizer, LOSS, jit_compile=False)
    model.fit(*data(), batch_size=64, epochs=2, verbose=0)
    check_frozen(model, expected)
    for variable in model.trainable_variables:
        copies = getattr(variable.value, "values", [variable.value])
        for copy in copies[1:]:
            assert_same_bits(copy.numpy(), copies[0].numpy(), "replicas differ")


def make_step(masked, **options):
    """A training step of one variable, compiled, and its variable and optimizer to keep alive."""
    variable = keras.Variable(np.ones((512, 64), "float32"), name="w")
    optimizer = keras.optimizers.Adam(0.01)
    if masked:
        optimizer = fz.MaskedOptimizer(optimizer, **options)
        optimizer.register_mask(variable, np.random.default_rng(0).random((512, 64)) < 0.5)
    optimizer.build([variable])
    gradient = on_gpu(np.ones((512, 64), np.float32))
    return tf.function(lambda: optimizer.apply([gradient.read_value()], [variable]), autograph=False)


def copies_to_host(step, folder):
    """How many copies from device to host TensorFlow's profiler saw in ten steps."""
    xplane_pb2 = pytest.importorskip("tensorflow.tsl.profiler.protobuf.xplane_pb2")
    for _ in range(3):
        step()
    tf.test.experimental.sync_devices()
    tf.profiler.experimental.start(str(folder))
    for _ in range(10):
        step()
    tf.test.experimental.sync_devices()
    tf.profiler.experimental.stop()
    (trace,) = folder.glob("**/*.xplane.pb")
    planes = xplane_pb2.XSpace.FromString(trace.read_bytes()).planes
    planes = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    if not any(line.events for plane in planes for line in plane.lines):
        pytest.skip("TensorFlow's profiler sees nothing of the GPU here")
    return sum(
        "MemcpyD2H" in plane.event_metadata[event.metadata_id].name
        for plane in planes
        for line in plane.lines
        for event in line.events
    )


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("state", ["full", "compact"])
def test_masks_add_no_copy_to_the_host(state, fused, tmp_path):
    steps = {masked: make_step(masked, state=state, fused=fused) for masked in (False, True)}
    bare, masked = (copies_to_host(step, tmp_path / str(each)) for each, step in steps.items())
    assert masked <= bare


@pytest.mark.parametrize("state", ["full", "compact"])
def test_state_of_a_step_lives_on_the_gpu(state):
    variable = keras.Variable(np.ones((512, 64), "float32"), name="w")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.01), state=state)
    optimizer.register_mask(variable, np.random.default_rng(0).random((512, 64)) < 0.5)
    optimizer.build([variable])
    held = mask_variables(optimizer)
    assert len(held) == (4 if state == "compact" else 2)  # bits (offsets, indices), and those that wait to be seeded
    for each in held.values():
        assert "GPU" in each.device
