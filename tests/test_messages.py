"""Errors that say what to do, and that stay short whatever they were given."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits, mask_variables

import freezeops as fz
from freezeops.messages import short
from freezeops.partitions.compact import CompactPartition
from freezeops.partitions.full import FullPartition
from freezeops.registry import methods


def make_model(names=("a", "b"), rows=6):
    return keras.Sequential([keras.Input((rows,)), *(keras.layers.Dense(4, name=name) for name in names)])


def optimizer_for(model, built=True):
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    if built:
        optimizer.build(model.trainable_variables)
    return optimizer


def freeze_and_build(optimizer, variables, *arguments):
    optimizer.freeze(*arguments)
    optimizer.build(variables)


def step(optimizer, variables):
    optimizer.apply([tf.ones(v.shape) for v in variables], variables)


# Variables that the optimizer does not know.

UNKNOWN = "must be one of those that the optimizer was built with"


def test_a_reused_optimizer():
    optimizer = optimizer_for(make_model())
    another = make_model()
    other_names = make_model(("c", "d"))
    same_paths = make_model()
    for variable, path in zip(same_paths.trainable_variables, optimizer.masks_by_path(), strict=True):
        variable._path = path
    for model, why in ((another, "which is another model's"), (other_names, "which is another model's")):
        for call in (
            lambda model=model: step(optimizer, model.trainable_variables),
            lambda model=model: optimizer.freeze(model.layers[0].kernel),
            lambda model=model: optimizer.mask_for(model.layers[0].kernel),
        ):
            with pytest.raises(ValueError, match=f"{UNKNOWN}.*{why}.*a new optimizer, one for each model.*save_masks"):
                call()
    with pytest.raises(ValueError, match=f"{UNKNOWN}.*not the variable of that path.*built with another model"):
        step(optimizer, same_paths.trainable_variables)


def test_a_grown_model():
    model = make_model()
    optimizer = optimizer_for(model)
    model.add(keras.layers.Dense(2, name="c"))
    message = f"{UNKNOWN}.*added to this one .or made trainable. after.*Compile with a new optimizer"
    with pytest.raises(ValueError, match=message):
        optimizer.freeze(model.get_layer("c"))
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match=message):
        model.fit(np.ones((4, 6)), np.ones((4, 2)), verbose=0)


def test_a_variable_that_is_not_trainable():
    model = make_model()
    layer = model.get_layer("a")
    layer.trainable = False
    optimizer = optimizer_for(model)
    with pytest.raises(ValueError, match=f"{UNKNOWN}.*'.*a/kernel'.*which is not trainable.*layer.trainable = True"):
        optimizer.unfreeze(layer.kernel)
    with pytest.raises(ValueError, match="matches nothing"):
        optimizer.unfreeze("a/kernel")
    layer.trainable = True
    with pytest.raises(ValueError, match=f"{UNKNOWN}.*or made trainable"):
        optimizer.unfreeze(layer)


def test_building_with_no_variables_builds_nothing():
    """As Keras does when it loads a `.h5` file: the variables come later."""
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), masks={"a/kernel": False})
    optimizer.build([])
    assert not optimizer.built
    model = make_model()
    before = model.get_layer("a").kernel.numpy()
    step(optimizer, model.trainable_variables)
    assert_same_bits(model.get_layer("a").kernel.numpy(), before)


def test_legacy_says_the_same():
    tf_keras = pytest.importorskip("tf_keras")
    legacy = pytest.importorskip("freezeops.legacy")
    kernel, other = tf.Variable(tf.ones([3]), name="kernel"), tf.Variable(tf.ones([3]), name="other")
    optimizer = legacy.MaskedOptimizer(tf_keras.optimizers.SGD(), masks=[(kernel, [True, False, True])])
    optimizer.build([kernel])
    assert optimizer.mask_for(kernel).count() == 2
    with pytest.raises(ValueError, match=f"{UNKNOWN}.*which is another model's"):
        optimizer.apply_gradients([(tf.ones([3]), other)])
    with pytest.raises(TypeError, match="`masks` must map targets to masks, or be a list of pairs"):
        legacy.MaskedOptimizer(tf_keras.optimizers.SGD(), masks=[kernel])
    with pytest.raises(ValueError, match="clearly booleans or clearly indices"):
        optimizer.freeze(kernel, [0, 1, 1])
    with pytest.raises(ValueError, match=r"write 'kern\.\*'"):
        optimizer.freeze("kern*")


# Patterns.


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("enc", "enc/.*"),
        ("enc/", "enc/.*"),
        ("enc/*", "enc/.*"),
        ("enc/**", "enc/.*"),
        ("enc/dense/*", "enc/dense/.*"),
        ("en*/dense/kernel", "en.*/dense/kernel"),
        ("*/kernel", ".*/kernel"),
        ("*", ".*"),
        ("**/kernel", ".*/kernel"),
    ],
)
def test_names_of_layers_and_globs_get_a_hint(pattern, meant, built):
    with keras.name_scope("enc"), keras.name_scope("dense"):
        variables = [keras.Variable(np.zeros((2, 2), "float32"), name=name) for name in ("kernel", "bias")]
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    if built:
        optimizer.build(variables)
    with pytest.raises(ValueError, match="path pattern") as caught:
        freeze_and_build(optimizer, variables, pattern)
    assert f"rite {meant!r}." in str(caught.value)
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.freeze(meant)
    optimizer.build(variables)
    assert optimizer.density < 1


def test_no_hint_where_there_is_none():
    optimizer = optimizer_for(make_model())
    for pattern in ("zzz", "zzz/*", "a/[k]*", "a/kernel.+", "[", r"a/\d*"):
        with pytest.raises(ValueError, match="path pattern") as caught:
            optimizer.freeze(pattern)
        assert "rite '" not in str(caught.value)


# `where`.


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ({1, 2}, "set"),
        (frozenset([1]), "frozenset"),
        ({"x": 1}.values(), "dict_values"),
        ({1: 2}.keys(), "dict_keys"),
        ({1: 2}, "dict"),
        ((i for i in [1, 2]), "generator"),
        (map(int, "12"), "map"),
    ],
)
def test_what_numpy_makes_no_array_of(where, kind, built):
    model = make_model()
    optimizer = optimizer_for(model, built)
    kernel = model.get_layer("a").kernel
    message = f"must be an array or a list, .* of type {kind}. Write `list"
    for call in (optimizer.freeze, optimizer.unfreeze, optimizer.train_only, optimizer.register_mask):
        for target in (kernel, "a/kernel"):
            with pytest.raises(TypeError, match=message):
                call(target, where)
    with pytest.raises(TypeError, match=message):
        optimizer.freeze(kernel, (slice(None), where))
    with pytest.raises(TypeError, match=message):
        fz.Mask.rows((6, 4), where)
    with pytest.raises(TypeError, match=message):
        fz.Mask.from_array(where)
    optimizer.build(model.trainable_variables)
    assert optimizer.density == 1


def test_ragged_lists():
    with pytest.raises(ValueError, match="`where` must be an array, or a list of lists of one length"):
        optimizer_for(make_model()).freeze("a/kernel", [[True, False], [True]])


def test_ranges_and_tensors_are_arrays():
    optimizer = optimizer_for(model := make_model())
    optimizer.freeze("a/kernel", range(2))
    optimizer.freeze("b/kernel", tf.range(3))
    assert [optimizer.mask_for(model.get_layer(name).kernel).count() for name in "ab"] == [16, 4]


FLAGS = [[0, 1, 1, 0, 0, 1], np.array([1, 0, 0, 0, 0, 0], np.uint8), [0] * 6, np.ones(6, np.int64)]


@pytest.mark.parametrize("flags", FLAGS)
def test_zeros_and_ones_as_long_as_the_axis(flags):
    optimizer = optimizer_for(model := make_model())
    kernel = model.get_layer("a").kernel
    message = "clearly booleans or clearly indices.*`np.array\\(where, bool\\)`.*`np.unique\\(where\\)`"
    for call in (optimizer.freeze, optimizer.train_only, optimizer.unfreeze):
        for where in (flags, (flags,), (flags, slice(2)), (flags, 3), (Ellipsis, flags, slice(None))):
            with pytest.raises(ValueError, match=message):
                call(kernel, where)
    for each in (kernel, "a/kernel"):
        before = fz.MaskedOptimizer(keras.optimizers.SGD())
        with pytest.raises(ValueError, match=message):
            freeze_and_build(before, model.trainable_variables, each, flags)
    for make, shape in ((fz.Mask.rows, (6, 4)), (fz.Mask.columns, (4, 6))):
        with pytest.raises(ValueError, match="clearly booleans or clearly indices"):
            make(shape, flags)
    assert optimizer.density == 1
    # What the error says to write.
    optimizer.freeze(kernel, np.array(flags, bool)[:, None])
    assert optimizer.mask_for(kernel) == fz.Mask.from_array(~np.array(flags, bool)[:, None], (6, 4))
    optimizer.unfreeze(kernel)
    optimizer.freeze(kernel, np.unique(flags))
    assert optimizer.mask_for(kernel).count() == 24 - 4 * len(np.unique(flags))


def test_zeros_and_ones_that_can_only_be_indices():
    two, six = keras.Variable(np.zeros((2, 3), "float32")), keras.Variable(np.zeros((6, 6), "float32"))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.build([two, six])
    for where in ([0, 1], [1, 0], np.array([0, 1])):
        optimizer.train_only(two, [])
        optimizer.unfreeze(two, where)
        assert optimizer.mask_for(two).count() == 6
    with pytest.raises(ValueError, match="clearly booleans or clearly indices"):
        optimizer.freeze(two, [1, 1])
    for where in ([0, 1], [1], [0, 1, 0, 1], [1, 1, 0, 0, 1, 2], [-1, 0, 0, 1, 1, 1], [0] * 7, []):
        optimizer.train_only(six, where)
        assert optimizer.mask_for(six).count() == 6 * len(np.unique(where))
    # Coordinates of entries repeat.
    corner = np.zeros((6, 6), bool)
    corner[:2, :3] = True
    optimizer.train_only(six, np.nonzero(corner))
    assert np.array_equal(optimizer.mask_for(six).to_numpy(), corner)


# Pairs.


@pytest.mark.parametrize("state", ["full", "compact"])
def test_masks_may_be_pairs(state):
    model = make_model()
    kernel, mask = model.get_layer("a").kernel, np.arange(24).reshape(6, 4) % 3 == 0
    pairs = [(kernel, mask), ("b/bias", [True, False, True, False])]
    for masks in (pairs, tuple(pairs)):
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), masks=masks, state=state)
        optimizer.build(model.trainable_variables)
        assert np.array_equal(optimizer.mask_for(kernel).to_numpy(), mask)
        assert optimizer.mask_for(model.get_layer("b").bias).count() == 2
    optimizer.register_masks([(kernel, np.roll(mask, 1))])
    assert np.array_equal(optimizer.mask_for(kernel).to_numpy(), np.roll(mask, 1))
    optimizer.register_masks([])
    optimizer.register_masks({})


@pytest.mark.parametrize(
    "masks",
    [[1], [("a/kernel", True, False)], [["a/kernel", True]], ("a/kernel", True), np.eye(3) > 0, "ab", 3, {1}, iter([])],
)
def test_masks_that_are_neither(masks):
    message = "`masks` must map targets to masks, or be a list of pairs of those.*Received: masks="
    with pytest.raises(TypeError, match=message):
        fz.MaskedOptimizer(keras.optimizers.SGD(), masks=masks)
    for built in (True, False):
        optimizer = optimizer_for(model := make_model(), built)
        with pytest.raises(TypeError, match=message):
            optimizer.register_masks(masks)
    compact = fz.MaskedOptimizer(keras.optimizers.SGD(), state="compact")
    compact.build(model.trainable_variables)
    with pytest.raises(TypeError, match=message):
        compact.repack(masks)


@pytest.mark.parametrize("state", ["full", "compact"])
def test_masks_that_fail_half_way_change_nothing(state, monkeypatch):
    capacity = 1.0 if state == "compact" else None
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), state=state, capacity=capacity)
    model = make_model(rows=4)
    optimizer.freeze(".*", 0)
    optimizer.freeze(".*/kernel", (2, 2))  # or rows would do
    optimizer.build(model.trainable_variables)
    step(optimizer, model.trainable_variables)
    optimizer.unfreeze(".*/kernel", (0, [1, 2]))  # which wait for their first gradient
    paths = [report.path for report in optimizer.describe()]
    unseeded = [v for key, v in mask_variables(optimizer).items() if key.startswith("unseeded")]
    every_slot = unseeded + optimizer.inner_optimizer.variables
    before, values = optimizer.masks_by_path(), [slot.numpy() for slot in every_slot]
    assert any(value.any() for value in values[: len(unseeded)])
    for interrupted in range(4):
        for after in (True, False):
            calls = []

            def fail(mask, assign, number, calls=calls, interrupted=interrupted, after=after):
                now = number == interrupted and not calls
                if after or not now:
                    assign(mask)
                if now:
                    calls.append(number)
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                for cls in (FullPartition, CompactPartition):

                    def assign(part, mask, original=cls.assign, fail=fail):
                        fail(mask, functools.partial(original, part), paths.index(part.path))

                    patch.setattr(cls, "assign", assign)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.register_masks({".*/kernel": np.eye(4) > 0, ".*/bias": [True, False, True, False]})
            assert calls and optimizer.masks_by_path() == before
            for slot, value in zip(every_slot, values, strict=True):
                assert_same_bits(slot.numpy(), value, slot.name)
    step(optimizer, model.trainable_variables)


# The optimizer that Keras put around.


def test_loss_scalers_that_keras_put_around(tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = make_model()
        for built in (True, False):
            model.compile(fz.MaskedOptimizer(keras.optimizers.SGD()), "mse", jit_compile=False)
            assert type(model.optimizer) is keras.optimizers.LossScaleOptimizer
            if built:
                model.optimizer.inner_optimizer.freeze("a/kernel", [2])
                model.fit(np.ones((4, 6)), np.ones((4, 4)), verbose=0)
                fz.save_masks(model.optimizer, tmp_path / "masks")
            else:
                fz.load_masks(model.optimizer, tmp_path / "masks")
                model.fit(np.ones((4, 6)), np.ones((4, 4)), verbose=0)
            assert model.optimizer.inner_optimizer.mask_for(model.get_layer("a").kernel).count() == 20
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_legacy_loss_scalers(tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    legacy = pytest.importorskip("freezeops.legacy")
    kernel = tf.Variable(tf.ones([3]), name="kernel")
    for wrap in (tf_keras.mixed_precision.LossScaleOptimizer, lambda optimizer: optimizer):
        optimizer = legacy.MaskedOptimizer(tf_keras.optimizers.SGD())
        outer = wrap(optimizer)
        optimizer.build([kernel])
        optimizer.freeze(kernel, [1])
        fz.save_masks(outer, tmp_path / "masks")
        optimizer.unfreeze(kernel)
        fz.load_masks(outer, tmp_path / "masks")
        assert optimizer.mask_for(kernel).count() == 2


def test_optimizers_without_masks(tmp_path):
    model = make_model()
    model.compile(fz.MaskedOptimizer(keras.optimizers.SGD()), "mse")
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    for optimizer, name in ((keras.optimizers.SGD(), "SGD"), (scaled, "LossScaleOptimizer"), (None, "NoneType")):
        for call in (fz.save_masks, fz.load_masks):
            with pytest.raises(TypeError, match=f"`optimizer` must be a MaskedOptimizer.* of type {name}"):
                call(optimizer, tmp_path / "masks")
    with pytest.raises(TypeError, match="Pass `model.optimizer`.*of type Sequential"):
        fz.save_masks(model, tmp_path / "masks")
    assert methods.masked_optimizer(model.optimizer) is model.optimizer


# `.h5`.


@pytest.mark.filterwarnings("ignore")
def test_h5_files_and_the_recipe_for_them(tmp_path):
    x, y = np.ones((8, 6)), np.ones((8, 4))
    model = make_model()
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam()), keras.losses.MeanSquaredError())
    model.optimizer.freeze("a/kernel", np.s_[:, :3])
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.h5")
    fz.save_masks(model.optimizer, tmp_path / "model.masks")
    # Keras cannot read the optimizer's slots back; masks come by the config.
    by_config = keras.models.load_model(tmp_path / "model.h5")
    by_config.fit(x, y, verbose=0)
    kernel, frozen = by_config.get_layer("a").kernel.numpy(), model.get_layer("a").kernel.numpy()
    assert_same_bits(kernel[:, :3], frozen[:, :3])
    assert not np.array_equal(kernel[:, 3], frozen[:, 3])

    loaded = keras.models.load_model(tmp_path / "model.h5", compile=False)
    loaded.compile(fz.MaskedOptimizer(keras.optimizers.Adam()), loss="mse")
    fz.load_masks(loaded.optimizer, tmp_path / "model.masks")
    loaded.fit(x, y, verbose=0)
    kernel, frozen = loaded.get_layer("a").kernel.numpy(), model.get_layer("a").kernel.numpy()
    assert np.array_equal(kernel[:, :3].view(np.uint32), frozen[:, :3].view(np.uint32))
    assert not np.array_equal(kernel[:, 3], frozen[:, 3])


# Short messages.


class Strange:
    def __repr__(self):
        raise RuntimeError("no")


BIG = np.arange(10**6)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1, 2], "[1, 2]"),
        ("a/kernel", "'a/kernel'"),
        ((1,), "(1,)"),
        (np.s_[:10, 3], "(slice(None, 10, None), 3)"),
        (None, "None"),
        ({"a": True}, "{'a': True}"),
        (np.array([True, False]), "array of dtype=bool, shape=(2,): [True, False]"),
        (BIG, "array of dtype=int64, shape=(1000000,): [0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        (np.zeros((0, 3), "float32"), "array of dtype=float32, shape=(0, 3): []"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6, 7, ...] (a list of 1000)"),
        pytest.param(10**5000, "an int of 16610 bits", id="an int"),
        (tf.zeros([3, 4]), "EagerTensor of dtype=float32, shape=(3, 4)"),
        (np.float32(2), "np.float32(2.0)"),
        (Strange(), "<Strange>"),
        ({"x": 1}.values(), "dict_values([1])"),
    ],
)
def test_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    "value", [[[list(range(99))] * 99] * 99, {str(i): BIG for i in range(99)}, "x" * 10**6, [BIG] * 99, {BIG.size: BIG}]
)
def test_short_is_short(value):
    assert len(short(value)) < 1000


def test_short_of_variables_and_symbolic_tensors():
    variable = keras.Variable(np.zeros((1000, 1000), "float32"), name="v")
    assert short(variable) == "Variable 'v' of dtype=float32, shape=(1000, 1000)"
    seen = []
    tf.function(lambda x: seen.append(short(x)), input_signature=[tf.TensorSpec(None)])(1.0)
    assert seen == ["SymbolicTensor of dtype=float32, shape=<unknown>"]


def test_no_error_prints_whole_arrays():
    optimizer = optimizer_for(model := make_model())
    kernel, many = model.get_layer("a").kernel, list(range(10**5))
    scalar = keras.Variable(0.0)
    with_scalar = fz.MaskedOptimizer(keras.optimizers.SGD())
    with_scalar.build([scalar])
    SGD = keras.optimizers.SGD
    calls = [
        lambda: optimizer.freeze(kernel, many),
        lambda: optimizer.freeze(kernel, (many, many)),
        lambda: optimizer.freeze(kernel, (slice(None), set(many))),
        lambda: optimizer.freeze(kernel, set(many)),
        lambda: optimizer.freeze(kernel, [*map(str, many)]),
        lambda: optimizer.freeze(kernel, [[1], many]),
        lambda: optimizer.freeze(BIG, 0),
        lambda: optimizer.freeze([many], 0),
        lambda: optimizer.freeze("x" * 10**5),
        lambda: optimizer.freeze("(" * 10**5),
        lambda: optimizer.freeze("a{99999999999}"),
        lambda: optimizer.freeze("a/kernel", many, permanent=True),
        lambda: with_scalar.freeze(scalar, many),
        lambda: optimizer.mask_for(BIG),
        lambda: optimizer.register_masks(many),
        lambda: optimizer.register_masks(BIG),
        lambda: optimizer.register_mask(kernel, BIG),
        lambda: fz.Mask.rows(many, 0),
        lambda: fz.Mask.rows([*map(str, many)], 0),
        lambda: fz.Mask((2,), many, BIG),
        lambda: fz.MaskedOptimizer(SGD(), masks=many),
        lambda: fz.MaskedOptimizer(SGD(), maskable=many),
        lambda: fz.MaskedOptimizer(SGD(), maskable={"a": many}),
        lambda: fz.MaskedOptimizer(SGD(), state=many),
        lambda: fz.MaskedOptimizer(SGD(), fused=many),
        lambda: fz.MaskedOptimizer(SGD(), state="compact", capacity=many),
        lambda: fz.MaskedOptimizer(SGD(), state="compact", capacity={str(i): -1 for i in many}),
        lambda: fz.MaskedOptimizer(SGD(), capacity={str(i): 1 for i in many}),
        lambda: fz.MaskedOptimizer(SGD(), unfreeze_policy=many),
        lambda: fz.MaskedOptimizer(SGD(), learning_rate=many),
        lambda: fz.MaskedOptimizer(SGD(), unknown=many),
        lambda: fz.MaskedOptimizer(many),
        lambda: fz.declare_slots(many, {}),
        lambda: fz.declare_elementwise(many),
        lambda: fz.save_masks(many, "masks"),
        lambda: fz.mask_gradient(tf.ones([4]), many),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError, IndexError)) as caught:
            call()
        assert len(str(caught.value)) < 1500, str(caught.value)[:3000]
