"""Compact state: what it gives is what full state gives, and it costs what the trainable entries cost."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MIXING, OPTIONS, SETUPS, assert_same_bits, in_mode
from rich.console import Console
from training import Training, random_mask

import freezeops as fz
from freezeops.keras_compat.variables import FunctionConstraint
from freezeops.registry import rules_config

ELEMENTWISE = [name for name in SETUPS if name not in MIXING]
STEPS = 6

CASES = [
    *((setup, option, "function") for setup in ELEMENTWISE for option in OPTIONS),
    *((setup, "plain", "eager") for setup in ELEMENTWISE),
    *((setup, option, "jit") for setup in ELEMENTWISE for option in ("plain", "ema_overwrite")),
]
"""Each set-up with every option in a `tf.function`, and with some in the other modes."""

ULPS = {"clipnorm": 16, "global_clipnorm": 16}
"""Clipping by a norm: the order of a sum."""
INEXACT = {"Ftrl": 200, "RMSprop": 8, "Adagrad": 8}
"""TensorFlow's own `pow` and `rsqrt` give an entry at the end of a vector another last bit than one within."""
JIT_ULPS = 8
COMPILED_EACH_STEP = ("Adadelta", "RMSprop momentum centered")
"""They add `tf.IndexedSlices` up, which XLA compiles anew in every step, with a bare optimizer too."""


SHAPES = {"elements": (9, 14), "rows": (12, 2, 5), "columns": (7, 6), "table": (20, 3), "bare": (4, 5)}


def started(inner, state, mode="function", dtype="float32", odd=True, **options):
    """Five variables, one per kind of mask and gradient, under an optimizer."""
    rng = np.random.default_rng(0)
    kinds = {"elements": "elements", "rows": "rows", "columns": "columns", "table": "rows"}
    masks = {name: random_mask(rng, SHAPES[name], kind, 0.45) for name, kind in kinds.items()}
    odd = masks if odd else []
    # Of the table, repeated rows, of which Keras squares each by itself.
    training = Training(SHAPES, masks, dtype=dtype, seed=1, odd=odd, nan=SHAPES, slices=["table"], mean=0.5)
    training.start(fz.MaskedOptimizer(inner, state=state, **options), mode)
    return training


def ways(model):
    return [report.mode for report in model.optimizer.describe()]


def assert_equal(actual, expected, ulps=0, message=""):
    for name, value in expected.items():
        if not ulps:
            assert_same_bits(actual[name], value, f"{message} {name}")
            continue
        good = np.isfinite(value)
        assert_same_bits(actual[name][~good], value[~good])
        # Entries near zero came there by cancellation, from values of about 1.
        unit = np.spacing(np.maximum(np.abs(value[good]), value.dtype.type(1)))
        assert (np.abs(actual[name][good] - value[good]) <= ulps * unit).all(), f"{message} {name}"


@pytest.mark.parametrize(("setup", "option", "mode"), CASES)
def test_equals_full_state(setup, option, mode):
    results = []
    for state in ("full", "compact"):
        model = started(SETUPS[setup](**OPTIONS[option]), state, mode)
        first = model.values()
        model.step(3 if mode == "jit" and setup in COMPILED_EACH_STEP else STEPS)
        model.optimizer.finalize_variable_values(list(model.variables.values()))
        last = model.values()
        for name in model.masks:
            frozen = model.frozen(name)
            assert_same_bits(last[name][frozen], first[name][frozen], f"{state} {name}: frozen entries moved")
            assert (last[name][~frozen] != first[name][~frozen]).mean() > 0.5, name
        results.append(last)
        assert mode == "eager" or model.traces == 1
    assert ways(model) == ["compact"] * 4 + ["full"]
    ulps = max(ULPS.get(option, 0), INEXACT.get(setup.split()[0], 0), JIT_ULPS if mode == "jit" else 0)
    if mode == "jit" and setup == "Ftrl":
        ulps *= 10
    assert_equal(results[1], results[0], ulps)


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("setup", [name for name in ("SGD momentum", "AdamW", "ScheduleFreeAdamW") if name in SETUPS])
def test_on_the_reference_twins(setup, mode, monkeypatch):
    results = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("FREEZEOPS_BACKEND", backend)
        model = started(SETUPS[setup](), "compact", mode)
        model.step(STEPS)
        results.append(model.values())
    assert_equal(results[1], results[0], JIT_ULPS if mode == "jit" else 0)


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes(dtype, mode):
    results = []
    for state in ("full", "compact"):
        model = started(keras.optimizers.SGD(0.1, momentum=0.9), state, mode, dtype)
        first = model.values()
        model.step(3)
        for name in model.masks:
            assert_same_bits(model.values()[name][model.frozen(name)], first[name][model.frozen(name)])
        results.append(model.values())
    if mode != "jit":
        assert_equal(results[1], results[0])
    else:
        for name, value in results[0].items():
            np.testing.assert_allclose(results[1][name], value, rtol=1e-2 if dtype == "float16" else 1e-12)


@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
def test_values_that_someone_else_writes_count(mode):
    """`load_weights`, a callback's `assign`: the compact values must not bring old ones back."""
    results = []
    for state in ("full", "compact"):
        model = started(keras.optimizers.AdamW(0.1, weight_decay=0.3, use_ema=True), state, mode)
        model.step(2)
        for variable in model.variables.values():
            variable.assign(np.arange(variable.numpy().size, dtype="float32").reshape(variable.shape) / 7)
        before = model.values()
        model.step(2)
        for name in model.masks:
            assert_same_bits(model.values()[name][model.frozen(name)], before[name][model.frozen(name)])
        model.variables["elements"].assign_add(np.ones((9, 14), "float32"))
        model.optimizer.finalize_variable_values(list(model.variables.values()))
        results.append(model.values())
    assert_equal(results[1], results[0], JIT_ULPS if mode == "jit" else 0)


# What is refused.


class Unknown(keras.optimizers.Adam):
    """One of the user's own, which may do anything."""


@fz.declare_elementwise
class Sign(keras.optimizers.Optimizer):
    """A user's own that says so."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._last = self.add_optimizer_variables(variables, "last", initializer="ones")

    def update_step(self, gradient, variable, learning_rate):
        last = self._last[self._get_variable_index(variable)]
        self.assign_sub(variable, learning_rate * tf.sign(gradient) * last)
        self.assign(last, 0.5 * last + 0.1)


@pytest.mark.parametrize("name", [name for name in ("Adafactor", "Lamb", "Muon") if hasattr(keras.optimizers, name)])
def test_optimizers_that_mix_entries_are_refused(name):
    inner = getattr(keras.optimizers, name)(0.1)
    with pytest.raises(ValueError, match=rf"of type {name}, which mixes the entries .*Use state='full'"):
        fz.MaskedOptimizer(inner, state="compact")
    with pytest.raises(ValueError, match=rf"of type {name}"):
        fz.MaskedOptimizer(keras.optimizers.LossScaleOptimizer(inner), state="compact")


def test_optimizers_that_are_not_known_are_refused():
    with pytest.raises(
        ValueError, match=r"of type Unknown, of which that is not known.*declare_elementwise\(Unknown\)"
    ):
        fz.MaskedOptimizer(Unknown(), state="compact")
    with pytest.raises(TypeError, match="must be a subclass"):
        fz.declare_elementwise(Unknown())


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_multi_optimizer():
    multi = keras.optimizers.MultiOptimizer
    with pytest.raises(ValueError, match="OptimizerMap"):
        fz.MaskedOptimizer(multi(lambda variable: keras.optimizers.SGD()), state="compact")
    results = []
    for state in ("full", "compact"):
        maps = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1, momentum=0.9))
        maps["elements|table"] = keras.optimizers.Adam(0.1)
        model = started(multi(maps), state)
        model.step(STEPS)
        results.append(model.values())
    assert_equal(results[1], results[0])


def test_own_optimizer_that_says_it_is_elementwise():
    results = []
    for state in ("full", "compact"):
        model = started(Sign(0.1), state)
        model.step(STEPS)
        results.append(model.values())
    assert_equal(results[1], results[0])


def test_new_entries_of_an_own_optimizer_start_as_in_a_new_one():
    model = started(Sign(0.1), "compact", capacity=1.0)
    model.step(1)
    model.optimizer.unfreeze("elements")
    slot = model.optimizer.inner_optimizer._last[0].numpy()
    np.testing.assert_array_equal(slot, np.where(model.masks["elements"].reshape(-1), np.float32(0.6), np.float32(1)))


def test_an_inner_optimizer_that_is_built_is_refused():
    variable = keras.Variable(np.ones(5, "float32"), name="v")
    inner = keras.optimizers.Adam()
    inner.build([variable])
    optimizer = fz.MaskedOptimizer(inner, masks={"v": np.arange(5) < 2}, state="compact")
    with pytest.raises(ValueError, match="must not be built before it is wrapped"):
        optimizer.build([variable])
    assert not optimizer.built


@fz.declare_elementwise
class Careless(keras.optimizers.Optimizer):
    """Makes its slots by hand."""

    def build(self, variables):
        super().build(variables)
        self._slots = [self.add_variable(v.shape, name="slot") for v in variables]


def test_slots_of_which_nothing_is_known_are_refused():
    variable = keras.Variable(np.ones(5, "float32"), name="v")
    optimizer = fz.MaskedOptimizer(Careless(0.1), masks={"v": np.arange(5) < 2}, state="compact")
    with pytest.raises(ValueError, match="Slots must be made by `add_optimizer_variables`.*Careless"):
        optimizer.build([variable])


@pytest.mark.parametrize(
    ("capacity", "error"),
    [(True, TypeError), ("1", TypeError), (-1, ValueError), (1.5, ValueError), ({"v": None}, TypeError)],
)
def test_bad_capacity(capacity, error):
    with pytest.raises(error, match="`capacity` must be .*Received: capacity="):
        fz.MaskedOptimizer(keras.optimizers.SGD(), state="compact", capacity=capacity)


def test_capacity_with_full_state_is_refused():
    with pytest.raises(ValueError, match="`capacity` must be None with state='full'"):
        fz.MaskedOptimizer(keras.optimizers.SGD(), capacity=5)


def test_variables_that_stay_full():
    class Half(keras.constraints.Constraint):
        def __call__(self, w):
            return w * 0.5

    variable = keras.Variable(np.ones((4, 3), "float32"), name="v")
    variable.constraint = Half()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), masks={"v": np.eye(4, 3, dtype=bool)}, state="compact")
    bare = keras.Variable(np.ones(3, "float32"), name="bare")
    optimizer.build([variable, bare])
    assert [report.mode for report in optimizer.describe()] == ["full", "full"]
    text = summary(optimizer)
    assert "Half" in text and "nothing was frozen when built" in text
    optimizer.freeze("bare", [1])  # a mask may still come
    optimizer.apply([tf.ones((4, 3)), tf.ones(3)])
    np.testing.assert_array_equal(bare.numpy() == 1, [False, True, False])
    assert (variable.numpy()[~np.eye(4, 3, dtype=bool)] == 1).all()


def summary(optimizer):
    text = io.StringIO()
    optimizer.summary(Console(file=text, width=200))
    return text.getvalue()


# Masks that change.

SCHEDULE_SETUPS = ["SGD momentum", "Adam amsgrad", "AdamW", "RMSprop momentum centered", "Adagrad", "Adadelta", "Lion"]


def change_masks(model, steps=2):
    """Freezes, unfreezes and exchanges entries, between steps and several times between two."""
    optimizer, variables = model.optimizer, model.variables
    model.step(steps)
    optimizer.freeze("elements", np.s_[:3])
    optimizer.freeze("rows", [2, 5])
    model.step(steps)
    optimizer.unfreeze("elements", np.s_[1:5, 3:])
    optimizer.unfreeze("rows", [5, 6, 7])
    optimizer.train_only("columns", np.s_[:, 1])
    model.step(steps)
    # Frozen and unfrozen again before a step: nothing was lost.
    mask = optimizer.mask_for(variables["elements"])
    optimizer.freeze("elements")
    optimizer.register_mask("elements", mask)
    optimizer.unfreeze("table", [0, 1, 2])
    optimizer.freeze("table", [1])
    model.step(steps)


@pytest.mark.parametrize("policy", ["seed", "zero"])
@pytest.mark.parametrize("setup", SCHEDULE_SETUPS)
def test_masks_change_as_in_full_state(setup, policy):
    results = []
    for state in ("full", "compact"):
        options = {"capacity": 1.0} if state == "compact" else {}
        inner = SETUPS[setup](weight_decay=0.01, use_ema=True, ema_overwrite_frequency=3)
        model = started(inner, state, unfreeze_policy=policy, **options)
        change_masks(model)
        assert model.traces == 1
        results.append(model.values())
    assert_equal(results[1], results[0], INEXACT.get(setup.split()[0], 0))


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_masks_change_in_other_modes(mode):
    results = []
    for state in ("full", "compact"):
        options = {"capacity": 1.0} if state == "compact" else {}
        model = started(keras.optimizers.Adam(0.01), state, mode, **options)
        change_masks(model)
        assert mode == "eager" or model.traces == 1
        results.append(model.values())
    assert_equal(results[1], results[0], JIT_ULPS if mode == "jit" else 0)


def test_accumulated_gradients_move_with_their_entries():
    results = []
    for state in ("full", "compact"):
        options = {"capacity": 1.0} if state == "compact" else {}
        model = started(keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3), state, **options)
        change_masks(model, steps=2)  # so that masks change with gradients waiting
        results.append(model.values())
    assert_equal(results[1], results[0])


def capacities(optimizer):
    """How many mask bits there is room for, by path."""
    reports = [report for report in optimizer.describe() if report.mode == "compact"]
    return {report.path: report.capacity // report.layout.inner for report in reports}


def test_capacity_by_default_and_as_set():
    inner = lambda: keras.optimizers.Adam(0.1)  # noqa: E731
    model = started(inner(), "compact")
    counts = {name: int(mask.sum()) for name, mask in model.masks.items()}
    assert capacities(model.optimizer) == {  # rows are counted as rows, columns as entries
        "elements": counts["elements"],
        "rows": counts["rows"],
        "columns": 7 * counts["columns"],
        "table": counts["table"],
    }
    model = started(inner(), "compact", capacity=0.75)
    assert capacities(model.optimizer) == {"elements": 95, "rows": 9, "columns": 32, "table": 15}
    model = started(inner(), "compact", capacity={"elements": 100, "r.*": 101})
    assert capacities(model.optimizer)["elements"] == 100 and capacities(model.optimizer)["rows"] == 11
    with pytest.raises(ValueError, match=r"must not have more trainable entries.*for 'elements', which has room for 3"):
        started(inner(), "compact", capacity={"elements": 3})


def test_beyond_capacity():
    model = started(keras.optimizers.Adam(0.1), "compact", capacity={"elements": 60})
    model.step()
    state = [v.numpy() for v in model.optimizer.variables]
    wanted = np.ones((9, 14), bool)
    with pytest.raises(ValueError, match=r"126 trainable entries for 'elements', which has room for 60.*repack"):
        model.optimizer.register_masks({"rows": False, "elements": wanted})
    for variable, value in zip(model.optimizer.variables, state, strict=True):
        assert_same_bits(variable.numpy(), value, "half applied")
    assert model.optimizer.mask_for(model.variables["rows"]).density > 0


@pytest.mark.parametrize("mode", ["function", "jit"])
def test_repack(mode):
    """More room, less room, another layout, from full state and back to it: as if it had always been so."""
    changes = [
        {"elements": np.random.default_rng(5).random((9, 14)) < 0.8, "bare": np.eye(4, 5, dtype=bool)},
        {"rows": np.random.default_rng(6).random((12, 2, 5)) < 0.3, "elements": np.eye(9, 14, dtype=bool)},
        {"bare": True},
    ]
    results = []
    for state in ("full", "compact"):
        options = {"maskable": {"elements|rows|table": "elements"}} if state == "full" else {}
        model = started(keras.optimizers.Adam(0.01, amsgrad=True), state, mode, **options)
        for number, masks in enumerate(changes):
            model.rng = np.random.default_rng(number)
            model.step(2)
            if state == "full":
                model.optimizer.register_masks(masks)
                continue
            before = model.values() | {"steps": model.optimizer.iterations.numpy()}
            model.optimizer.repack(masks)
            with pytest.raises(tf.errors.InvalidArgumentError, match="traced before `repack` must be traced again"):
                model.step()
            for name, value in (model.values() | {"steps": model.optimizer.iterations.numpy()}).items():
                assert_same_bits(value, before[name], name)
            model.compile()
        model.rng = np.random.default_rng(99)
        model.step(2)
        results.append(model.values())
    assert_equal(results[1], results[0], JIT_ULPS if mode == "jit" else 0)
    assert ways(model) == ["compact"] * 4 + ["full"]
    assert capacities(model.optimizer)["elements"] == 9
    assert capacities(model.optimizer)["rows"] == model.optimizer.mask_for(model.variables["rows"]).count()


@pytest.mark.parametrize("mode", ["function", "jit"])
def test_repack_on_the_reference_twins(mode, monkeypatch):
    monkeypatch.setenv("FREEZEOPS_BACKEND", "reference")
    model = started(keras.optimizers.Adam(0.01), "compact", mode, odd=False)
    model.step(2)
    model.optimizer.repack({"elements": np.eye(9, 14, dtype=bool)})
    before = model.values()
    if mode == "function":
        with pytest.raises(tf.errors.InvalidArgumentError, match="traced before `repack` must be traced again"):
            model.step()
        assert_equal(model.values(), before)
    else:  # XLA has no errors at run time: what was traced before writes nothing
        model.step()
        assert_same_bits(model.values()["elements"], before["elements"])
    model.compile()
    before = model.values()
    model.step()
    np.testing.assert_array_equal(model.values()["elements"] != before["elements"], np.eye(9, 14, dtype=bool))


def test_repack_refuses():
    model = started(keras.optimizers.Adam(0.01), "full")
    with pytest.raises(ValueError, match="must be called with state='compact'"):
        model.optimizer.repack()
    with pytest.raises(ValueError, match="must be built"):
        fz.MaskedOptimizer(keras.optimizers.Adam(), state="compact").repack()
    model = started(keras.optimizers.Adam(0.01), "compact")
    state = [v.numpy() for v in model.optimizer.variables]
    with pytest.raises(RuntimeError, match=r"outside of `tf\.function`"):
        tf.function(model.optimizer.repack, autograph=False)()
    with pytest.raises(TypeError, match="`masks` must map targets to masks, or be a list of pairs"):
        model.optimizer.repack([1])
    with pytest.raises(ValueError, match="matches nothing"):
        model.optimizer.repack({"elements": True, "nowhere": True})
    with pytest.raises(ValueError, match="room for 2"):
        model.optimizer.repack(capacity={"elements": 2})
    for variable, value in zip(model.optimizer.variables, state, strict=True):
        assert_same_bits(variable.numpy(), value)
    model.step()


def test_repack_gives_room_and_takes_it():
    model = started(keras.optimizers.Adam(0.01), "compact")
    model.step()
    model.optimizer.repack(capacity={"elements": 0.9})
    assert capacities(model.optimizer)["elements"] == 114
    model.compile()
    model.optimizer.unfreeze("elements", np.s_[:4])
    model.step()
    model.optimizer.freeze("elements", np.s_[3:])
    model.optimizer.repack()
    assert capacities(model.optimizer)["elements"] == 114  # it was asked for
    model.optimizer.repack(capacity={})
    assert capacities(model.optimizer)["elements"] == model.optimizer.mask_for(model.variables["elements"]).count()


def test_repack_in_the_middle_of_fit():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(2)])
    mask = np.random.default_rng(0).random((6, 8)) < 0.3
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"body/kernel": mask}, state="compact"), "mse")
    kernel = model.get_layer("body").kernel
    more = mask | (np.random.default_rng(1).random((6, 8)) < 0.5)
    seen = {}

    class Grow(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                model.optimizer.repack(masks={"body/kernel": more})
                model.make_train_function(force=True)
                seen["then"] = kernel.numpy()

    x, y = np.random.default_rng(2).normal(size=(32, 6)), np.ones((32, 2))
    first = kernel.numpy()
    model.fit(x, y, epochs=4, batch_size=8, verbose=0, callbacks=[Grow()])
    assert_same_bits(kernel.numpy()[~more], first[~more])
    assert_same_bits(seen["then"][~mask], first[~mask])
    assert (kernel.numpy() != seen["then"])[more].all()


@pytest.mark.parametrize("setup", ["Ftrl", "ScheduleFreeAdamW"])
def test_new_entries_of_weight_like_slots_start_as_in_a_new_optimizer(setup):
    if setup not in SETUPS:
        pytest.skip("this Keras has no such optimizer")
    model = started(SETUPS[setup](), "compact", odd=False, capacity=1.0)
    model.step(2)
    model.optimizer.unfreeze("elements")
    values = model.values()["elements"].reshape(-1)
    slots = [v for v in model.optimizer.inner_optimizer.variables if "elements" in v.path]
    new = ~model.masks["elements"].reshape(-1)
    fresh = SETUPS[setup]()
    twin = keras.Variable(values, name="twin")
    fresh.build([twin])
    of_fresh = fresh.variables[-len(slots) :]
    for slot, expected in zip(slots, of_fresh, strict=True):
        assert_same_bits(slot.numpy()[new], expected.numpy()[new], slot.path)


def test_late_entries_are_seeded():
    """The first step of an entry that is unfrozen late is one learning rate at most."""
    variable = keras.Variable(np.zeros(40, "float32"), name="v")
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.Adam(0.1), masks={"v": np.arange(40) < 20}, state="compact", capacity=1.0
    )
    gradient = tf.constant(np.random.default_rng(0).normal(size=40).astype("float32"))
    step = tf.function(lambda: optimizer.apply([gradient], [variable]), autograph=False)
    for _ in range(300):
        step()
    before = variable.numpy()
    optimizer.unfreeze("v")
    step()
    moved = np.abs(variable.numpy() - before)[20:]
    assert (moved > 0.099).all() and (moved < 0.1001).all()


# The surface.


def test_summary_shows_what_is_saved():
    variable = keras.Variable(np.zeros((100, 50), "float32"), name="v")
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.Adam(), masks={"v": np.arange(5000).reshape(100, 50) < 500}, state="compact"
    )
    optimizer.build([variable])
    text = " ".join(summary(optimizer).split())
    assert "slots: 4 kB, 36 kB less than in full state" in text  # two slots of 500 entries, of 5,000
    for part in ("compact values 2 kB", "mask bits 625 B", "rank offsets 32 B", "indices 2 kB"):
        assert part in text


def test_density_masks_and_gradients():
    model = started(keras.optimizers.SGD(0.1), "compact")
    for name, mask in model.masks.items():
        assert model.optimizer.mask_for(model.variables[name]) == fz.Mask.from_array(
            np.broadcast_to(mask, model.variables[name].shape)
        )
    gradients = [tf.ones(v.shape) for v in model.variables.values()]
    masked = model.optimizer.mask_gradients(gradients, list(model.variables.values()))
    for gradient, (name, variable) in zip(masked, model.variables.items(), strict=True):
        assert tuple(gradient.shape) == tuple(variable.shape)
        expected = np.broadcast_to(model.masks.get(name, True), variable.shape)
        np.testing.assert_array_equal(gradient.numpy(), expected.astype("float32"))


@fz.declare_elementwise
class Recorder(keras.optimizers.SGD):
    """Tells what its variables are called."""

    def build(self, variables):
        self.names = [(v.path, v.name) for v in variables]
        super().build(variables)


def test_weight_decay_exclusions_and_names():
    results = []
    for state in ("full", "compact"):
        rng = np.random.default_rng(0)
        layers = [keras.layers.Dense(6, name="a"), keras.layers.Dense(5, name="b")]
        model = keras.Sequential([keras.Input((4,)), *layers])
        for variable in model.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        inner = Recorder(0.1, weight_decay=0.5)
        optimizer = fz.MaskedOptimizer(inner, state=state)
        optimizer.train_only(model, np.s_[1:])
        optimizer.exclude_from_weight_decay(var_list=[layers[0].kernel], var_names=["bias"])
        optimizer.build(model.trainable_variables)
        before = layers[0].kernel.numpy()
        optimizer.apply([tf.zeros(v.shape) for v in model.trainable_variables], model.trainable_variables)
        results.append([v.numpy() for v in model.trainable_variables])
        assert_same_bits(layers[0].kernel.numpy(), before)
        assert inner.names == [(v.path, v.name) for v in model.trainable_variables]
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_with_averages_that_are_swapped(jit_compile):
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    y = np.random.default_rng(1).normal(size=(64, 2)).astype("float32")
    mask = np.random.default_rng(2).random((5, 8)) < 0.5
    results = []
    for state in ("full", "compact"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(2)])
        kernel = model.get_layer("body").kernel
        kernel.assign(np.where(mask, kernel.numpy(), np.float32(-0.0)))
        first = kernel.numpy()
        inner = keras.optimizers.AdamW(0.1, use_ema=True, ema_momentum=0.5)
        model.compile(
            fz.MaskedOptimizer(inner, masks={"body/kernel": mask}, state=state), "mse", jit_compile=jit_compile
        )
        callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)]
        model.fit(x, y, epochs=3, batch_size=16, shuffle=False, verbose=0, callbacks=callbacks, validation_data=(x, y))
        assert_same_bits(kernel.numpy()[~mask], first[~mask])
        results.append(kernel.numpy())
    if jit_compile:
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    else:
        assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_mixed_float16(where):
    x = np.random.default_rng(0).normal(size=(64, 5)).astype("float32")
    y = np.random.default_rng(1).normal(size=(64, 2)).astype("float32")
    mask = np.random.default_rng(2).random((5, 8)) < 0.5
    results = []
    keras.config.set_dtype_policy("mixed_float16")
    try:
        for state in ("full", "compact"):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(2)])
            inner = keras.optimizers.AdamW(0.01)
            if where == "inside":
                inner = keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0)
            model.compile(fz.MaskedOptimizer(inner, masks={"body/kernel": mask}, state=state), "mse", jit_compile=False)
            kernel = model.get_layer("body").kernel
            first = kernel.numpy()
            model.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0)
            assert_same_bits(kernel.numpy()[~mask], first[~mask])
            results.append(kernel.numpy())
    finally:
        keras.config.set_dtype_policy("float32")
    assert_same_bits(*results)
    assert (results[0] != first)[mask].all()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_nan_under_a_frozen_entry_does_not_touch_the_scale(where):
    variable = keras.Variable(np.ones((4, 3), "float32"), name="v")
    mask = np.eye(4, 3, dtype=bool)
    scaler = keras.optimizers.LossScaleOptimizer
    if where == "inside":
        outer = masked = fz.MaskedOptimizer(
            scale := scaler(keras.optimizers.SGD(0.5), initial_scale=2.0), masks={"v": mask}, state="compact"
        )
    else:
        masked = fz.MaskedOptimizer(keras.optimizers.SGD(0.5), masks={"v": mask}, state="compact")
        outer = scale = scaler(masked, initial_scale=2.0)
    outer.apply([tf.constant(np.where(mask, np.float32(1), np.float32(np.nan)))], [variable])
    assert float(scale.dynamic_scale) == 2.0 and int(masked.iterations) == 1
    np.testing.assert_array_equal(variable.numpy() != 1, mask)


def test_an_error_in_the_middle_of_a_step_writes_nothing():
    @fz.declare_elementwise
    class Fails(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)
            raise RuntimeError("on purpose")

    variable = keras.Variable(np.ones(6, "float32"), name="v")
    optimizer = fz.MaskedOptimizer(Fails(0.5), masks={"v": np.arange(6) < 3}, state="compact")
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.apply([tf.ones(6)], [variable])
    np.testing.assert_array_equal(variable.numpy(), np.ones(6))


def test_gradients_of_another_shape_are_refused():
    model = started(keras.optimizers.SGD(0.1), "compact")
    with pytest.raises(ValueError, match="A gradient must have the shape of its variable"):
        model.optimizer.apply([tf.ones((14, 9))], [model.variables["elements"]])


def test_no_gradient_and_some_variables():
    model = started(keras.optimizers.Adam(0.1), "compact", odd=False)
    before = model.values()
    variables = [model.variables[name] for name in ("elements", "rows")]
    model.optimizer.apply([None, tf.ones((12, 2, 5))], variables)
    after = model.values()
    for name in ("elements", "columns", "table", "bare"):
        assert_same_bits(after[name], before[name])
    np.testing.assert_array_equal(after["rows"] != before["rows"], ~model.frozen("rows"))


@pytest.mark.parametrize("mask", [False, np.zeros((6, 4), bool), np.zeros((6, 1), bool)])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["eager", "function", "jit"])
def test_everything_is_frozen(mask, sparse, mode):
    variable = keras.Variable(np.ones((6, 4), "float32"), name="v")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.5), masks={"v": mask}, state="compact")
    optimizer.build([variable])

    def step():
        gradient = tf.ones((6, 4))
        if sparse:
            gradient = tf.IndexedSlices(gradient[:2], tf.constant([1, 3]), tf.constant([6, 4]))
        optimizer.apply([gradient], [variable])

    in_mode(step, mode)()
    np.testing.assert_array_equal(variable.numpy(), np.ones((6, 4)))
    assert int(optimizer.iterations) == 1


def test_tf_variables():
    variable = tf.Variable(np.ones((6, 4), "float32"), name="plain/v")
    mask = np.eye(6, 4, dtype=bool)
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.5), masks={"plain/v": mask}, state="compact")
    optimizer.apply([tf.ones((6, 4))], [variable])
    np.testing.assert_array_equal(variable.numpy() != 1, mask)


def test_slots_move_by_position():
    """The bookkeeping itself, against a dictionary."""
    rng = np.random.default_rng(0)
    model = started(keras.optimizers.SGD(0.1, momentum=0.9), "compact", odd=False, capacity=1.0)
    known = {}
    for _ in range(12):
        mask = rng.random((9, 14)) < rng.random()
        model.optimizer.register_mask("elements", mask)
        model.step()
        positions = fz.Mask.from_array(mask).indices()
        slot = model.optimizer.inner_optimizer.momentums[0]
        values = rng.normal(size=126).astype("float32")
        slot.assign(values)
        known = {p: v for p, v in zip(positions, values, strict=False)}
        other = rng.random((9, 14)) < rng.random()
        model.optimizer.register_mask("elements", other)
        after = slot.numpy()
        for i, p in enumerate(np.flatnonzero(other)):
            assert after[i] == known.get(p, 0.0)
        assert not after[other.sum() :].any()


# What a reviewer found.


def test_mask_that_changes_in_the_middle_of_a_step():
    """A step is done with the mask that it began with."""
    hook = []

    @fz.declare_elementwise
    class Interrupted(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            hook.pop()()
            super().update_step(gradient, variable, learning_rate)

    for state in ("full", "compact"):
        variable = keras.Variable(np.arange(8, dtype="float32"), name="v")
        optimizer = fz.MaskedOptimizer(Interrupted(0.0), masks={"v": np.arange(8) % 2 == 0}, state=state)
        optimizer.build([variable])
        hook.append(lambda optimizer=optimizer: optimizer.register_mask("v", np.arange(8) > 3))
        optimizer.apply([tf.ones(8)], [variable])
        np.testing.assert_array_equal(variable.numpy(), np.arange(8))


def test_clone_with_another_kind_of_mask():
    """Room is counted in rows or in entries, and a saved number in what it was saved in."""
    variable = keras.Variable(np.zeros((10, 64), "float32"), name="v")
    elements, rows = np.arange(640).reshape(10, 64) < 505, np.arange(10)[:, None] < 3
    for first, second, room in ((elements, rows, 8), (rows, elements, 505)):
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v": first}, state="compact")
        optimizer.build([variable])
        clone = fz.MaskedOptimizer.from_config(optimizer.get_config())
        clone.register_mask("v", second)
        clone.build([variable])
        assert capacities(clone) == {"v": room}


def test_clone_that_is_frozen_on_purpose(monkeypatch):
    monkeypatch.setattr(rules_config, "LIMIT", 4)  # a config that leaves the mask out
    variable = keras.Variable(np.zeros(6, "float32"), name="v")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v": np.arange(6) < 3}, state="compact")
    optimizer.build([variable])
    clone = fz.MaskedOptimizer.from_config(optimizer.get_config())
    clone.build([variable])
    with pytest.raises(ValueError, match="must be given its masks"):
        clone.repack()
    clone.freeze("v")
    clone.apply([tf.ones(6)], [variable])
    assert not variable.numpy().any()


def test_repack_between_two_steps_brings_slots_back():
    results = []
    for state in ("full", "compact"):
        model = started(keras.optimizers.Adam(0.1), state, "eager", odd=False)
        model.step(3)
        mask = model.masks["elements"].copy()
        less = mask.copy()
        less[:4] = False
        model.optimizer.register_mask("elements", less)
        if state == "full":
            model.optimizer.register_mask("elements", mask)
        else:
            model.optimizer.repack([(model.variables["elements"], mask)])
        model.step(2)
        results.append(model.values())
    assert_equal(results[1], results[0])


def test_accumulated_gradient_of_a_frozen_entry_is_dropped():
    for state in ("full", "compact"):
        variable = keras.Variable(np.zeros(4, "float32"), name="v")
        inner = keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
        optimizer = fz.MaskedOptimizer(inner, masks={"v": np.arange(4) < 3}, state=state)
        optimizer.apply([tf.ones(4)], [variable])
        optimizer.freeze("v", [0])
        optimizer.unfreeze("v", [0])
        optimizer.apply([tf.ones(4)], [variable])
        np.testing.assert_array_equal(variable.numpy(), [-0.5, -1, -1, 0], state)


def test_capacity_of_numpy_types():
    variable = keras.Variable(np.zeros(6, "float32"), name="v")
    mask = np.arange(6) < 3
    for capacity, room in ((mask.sum() + 1, 4), (np.float32(0.5), 3), (np.float64(1.0), 6)):
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), masks={"v": mask}, state="compact", capacity=capacity)
        optimizer.build([variable])
        assert capacities(optimizer) == {"v": room}
    with pytest.raises(ValueError, match="`capacity` must be"):
        fz.MaskedOptimizer(keras.optimizers.SGD(), state="compact", capacity=float("nan"))


def _train_with(late, state, mode, make, mask, sparse):
    """A variable that is told something after the first step, and trained on; its values after each step."""
    start = np.linspace(-2.0, 2.0, 24, dtype=np.float32).reshape(6, 4)
    start[0, 0], start[1, 1] = -0.0, np.float32(1e-42)
    variable = keras.Variable(start, name="w")
    other = keras.Variable(np.ones(3, np.float32), name="other")
    inner = make()
    scaler = isinstance(inner, str)
    base = keras.optimizers.Adam(0.1) if scaler else inner
    if inner == "inside":
        base = keras.optimizers.LossScaleOptimizer(base, initial_scale=4.0)
    optimizer = fz.MaskedOptimizer(base, masks={"w": mask}, state=state)
    stepper = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0) if inner == "outside" else optimizer
    stepper.build([variable, other])
    factor = 4.0 if scaler else 1.0
    gradient = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32) * factor
    if sparse:
        gradient = tf.IndexedSlices(tf.constant(gradient[[1, 4, 1]]), tf.constant([1, 4, 1]), tf.constant([6, 4]))
    seen = []
    for step in range(4):
        if step == 1:
            late(variable)
        if step == 3:
            variable.constraint, variable.overwrite_with_gradient = None, False
        gradients = [gradient, None if step == 2 else tf.ones(3) * factor]
        in_mode(lambda: stepper.apply(gradients, [variable, other]), mode)()  # noqa: B023
        seen.append(variable.numpy())
    frozen = ~np.broadcast_to(mask, start.shape)
    for values in seen:
        assert_same_bits(values[frozen], start[frozen])
    return seen


def _constrain(constraint):
    def late(variable):
        variable.constraint = constraint

    return late


def _overwrite(variable):
    variable.overwrite_with_gradient = True


LATE = {
    "NonNeg": _constrain(keras.constraints.NonNeg()),
    "MaxNorm": _constrain(keras.constraints.MaxNorm(1.0)),
    "another dtype": _constrain(FunctionConstraint(lambda w: tf.cast(w, "float64") * 0.5)),
    "overwrite": _overwrite,
}
TOLD = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "average": lambda: keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2),
    "scaler inside": lambda: "inside",
    "scaler outside": lambda: "outside",
}


@pytest.mark.parametrize(
    "late, make, mode",
    [
        *((late, make, "eager") for late in LATE for make in TOLD),
        *(("MaxNorm", make, "function") for make in ("SGD", "average", "scaler inside", "scaler outside")),
        *((late, "SGD", "jit") for late in ("MaxNorm", "overwrite")),
    ],
)
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_what_a_variable_is_told_late_counts_as_in_full_state(late, make, mode):
    mask = np.arange(24).reshape(6, 4) % 3 > 0
    full, own = (_train_with(LATE[late], state, mode, TOLD[make], mask, False) for state in ("full", "compact"))
    for one, other in zip(full, own, strict=True):
        if mode == "jit":
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(other, one)


@pytest.mark.parametrize("kind", ["rows", "entries"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_late_constraints_of_rows_and_slices(kind, sparse, backend):
    mask = np.arange(6)[:, None] % 2 > 0 if kind == "rows" else np.arange(24).reshape(6, 4) % 3 > 0
    late = _constrain(keras.constraints.UnitNorm())
    full, own = (_train_with(late, state, "eager", TOLD["Adam"], mask, sparse) for state in ("full", "compact"))
    for one, other in zip(full, own, strict=True):
        assert_same_bits(other, one)


def test_late_constraint_of_another_shape_is_refused():
    variable = keras.Variable(np.ones((2, 3), np.float32), name="w")
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.SGD(0.1), masks={"w": np.array([[True, True, False]] * 2)}, state="compact"
    )
    optimizer.build([variable])
    variable.constraint = FunctionConstraint(tf.transpose)
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError), match="(?i)shape"):
        optimizer.apply([np.ones((2, 3), np.float32)], [variable])


def test_late_constraint_in_replicas():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    results = []
    for state in ("full", "compact"):
        with strategy.scope():
            variable = keras.Variable(np.linspace(-1.0, 1.0, 6, dtype=np.float32), name="w")
            mask = np.arange(6) % 2 > 0
            optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"w": mask}, state=state)
            optimizer.build([variable])
            variable.constraint = keras.constraints.NonNeg()
            step = tf.function(lambda: strategy.run(lambda: optimizer.apply([tf.ones(6)], [variable])))  # noqa: B023
        step()
        results.append(variable.numpy())
    assert results[0][1] == 0.0 and results[0][0] == -1.0
    assert_same_bits(results[1], results[0])
