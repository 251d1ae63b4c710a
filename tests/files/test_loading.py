"""One rule for what a load does to masks: in every store, before and after the build, full and compact."""

import shutil
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import assert_same_bits, waiting_mask

import freezeops as fz
from freezeops.registry import rules_config

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 8)).astype("float32")
MASK = np.random.default_rng(2).random((8, 8)) < 0.5
OLD = Path(__file__).parents[1] / "data" / "before_layouts"

STORES = ("keras weights", "sharded weights", "checkpoint")
STATES = ("full", "compact")


def square(name="a", **options):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name=name)])
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.01), **options), "mse", jit_compile=False)
    return model


def train(model, epochs=1):
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)


def save(model, store, folder):
    folder.mkdir(exist_ok=True)
    if store == "checkpoint":
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(folder / "c"))
    path = folder / ("m.weights.h5" if store == "keras weights" else "m.weights.json")
    model.save_weights(path, **({"max_shard_size": 1e-5} if store == "sharded weights" else {}))
    return path


def load(model, path, store, **options):
    if store == "checkpoint":
        return tf.train.Checkpoint(model=model, optimizer=model.optimizer).read(path)
    return model.load_weights(path, **options)


def load_and_build(model, path, store):
    load(model, path, store)
    model.optimizer.build(model.trainable_variables)


def masked(optimizer):
    """The `MaskedOptimizer` of a model, whatever wraps it."""
    return optimizer if isinstance(optimizer, fz.MaskedOptimizer) else optimizer.inner_optimizer


def mask_of(model, number=0):
    return masked(model.optimizer).mask_for(model.trainable_variables[number])


def assert_kept(model, number=0, epochs=1):
    """Trains; frozen entries keep their bits and others move."""
    variable, trainable = model.trainable_variables[number], mask_of(model, number).to_numpy()
    before = variable.numpy()
    train(model, epochs)
    after = variable.numpy()
    assert_same_bits(after[~trainable], before[~trainable])
    assert (after[trainable] != before[trainable]).all()


# Layouts.


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("built", [False, True])
def test_rows_stay_rows(tmp_path, store, built, state):
    """Where rows and columns take as many bytes, the layout tells them apart."""
    model = square(state=state)
    model.optimizer.freeze("a/kernel", [0, 1, 2])
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square(state=state, maskable={"a/kernel": "elements"} if built else None)
    if built:
        other.optimizer.freeze("a/kernel", [0, 1, 2])
        other.optimizer.build(other.trainable_variables)
    if built and state == "compact" and store == "checkpoint":
        with pytest.raises(ValueError, match=r"same layout and room.*for '.*a/kernel'"):
            load(other, path, store)
        return
    load(other, path, store)
    assert mask_of(other) == fz.Mask.rows((8, 8), [3, 4, 5, 6, 7])
    assert_kept(other)


@pytest.mark.parametrize("store", STORES)
def test_a_mask_that_needs_more_bits_is_refused(tmp_path, store):
    model = square()
    model.optimizer.freeze("a/kernel", [0, 1, 2])
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square(maskable={"a/kernel": "columns"})
    other.optimizer.freeze("a/kernel", np.s_[:, 7])
    other.optimizer.build(other.trainable_variables)
    before = other.optimizer.masks_by_path()
    with pytest.raises(ValueError, match="maskable=") as caught:
        load(other, path, store)
    assert "a/kernel" in str(caught.value)
    assert other.optimizer.masks_by_path() == before


@pytest.mark.parametrize("store", STORES)
def test_columns_into_bits_per_entry_and_back(tmp_path, store):
    model = square(maskable={"a/kernel": "columns"})
    model.optimizer.freeze("a/kernel", np.s_[:, :3])
    train(model)
    path = save(model, store, tmp_path / "s")
    entries = square()
    entries.optimizer.build(entries.trainable_variables)
    load(entries, path, store)
    assert mask_of(entries).layout == (1, 64, 1)
    assert mask_of(entries) == fz.Mask.columns((8, 8), [3, 4, 5, 6, 7])
    path = save(entries, store, tmp_path / "t")
    columns = square(maskable={"a/kernel": "columns"})
    columns.optimizer.build(columns.trainable_variables)
    load(columns, path, store)
    assert mask_of(columns).layout == (8, 8, 1)
    assert mask_of(columns) == mask_of(entries)
    assert_kept(columns)


# Paths.


class Towers(keras.Model):
    """Two layers of one shape, made in the given order."""

    def __init__(self, order, extra=False, **options):
        super().__init__(**options)
        for name in order:
            setattr(self, name, keras.layers.Dense(8, name=name))
        self.extra = keras.layers.Dense(8, name="extra") if extra else None
        self.order = sorted(order)

    def call(self, x):
        x = sum(getattr(self, name)(x) for name in self.order)
        return x if self.extra is None else self.extra(x)


def towers(order, state, extra=False):
    model = Towers(order, extra, name="towers")
    for name in order:
        getattr(model, name).build((None, 8))
    if extra:
        model.extra.build((None, 8))
    model.build((None, 8))
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.01), state=state), "mse", jit_compile=False)
    return model


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("change", ["another order", "one more layer"])
def test_towers(tmp_path, store, built, state, change):
    """Masks, and in Keras's files slots, go by path, whatever the order and the number of variables."""
    model = towers(["left", "right"], state)
    model.optimizer.freeze("left/kernel", ~MASK)
    model.optimizer.freeze("right/kernel", MASK)
    train(model)
    path = save(model, store, tmp_path / "s")
    other = towers(["right", "left"], state) if change == "another order" else towers(["left", "right"], state, True)
    if built:
        other.optimizer.freeze("left/kernel", ~MASK)
        other.optimizer.freeze("right/kernel", MASK)
        other.optimizer.build(other.trainable_variables)
    if store == "checkpoint" and state == "compact" and change == "another order":
        return  # TensorFlow restores slots by position, and refuses those of another shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of the layer that is not in the file
        more = change == "one more layer" and store != "checkpoint"
        load(other, path, store, **({"skip_mismatch": True} if more else {}))
    kernel = {name: getattr(other, name).kernel for name in ("left", "right")}
    assert other.optimizer.mask_for(kernel["left"]) == fz.Mask.from_array(MASK)
    assert other.optimizer.mask_for(kernel["right"]) == fz.Mask.from_array(~MASK)
    other.optimizer.build(other.trainable_variables)
    if store != "checkpoint":
        slots = {v.path.rpartition("/")[2]: v for v in model.optimizer.inner_optimizer.variables}
        for v in other.optimizer.inner_optimizer.variables:
            if "extra" not in v.path:
                assert_same_bits(v.numpy(), slots[v.path.rpartition("/")[2]].numpy(), v.path)
    before = {name: v.numpy() for name, v in kernel.items()}
    train(other)
    assert_same_bits(kernel["left"].numpy()[~MASK], before["left"][~MASK])
    assert_same_bits(kernel["right"].numpy()[MASK], before["right"][MASK])


def counted(names):
    layers = [keras.Input((8,)), *(keras.layers.Dense(8, name=name) for name in names)]
    model = keras.Sequential(layers, name="s")
    model.compile(fz.MaskedOptimizer(keras.optimizers.SGD(0.01)), "mse", jit_compile=False)
    return model


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("built", [False, True])
def test_names_that_keras_counted_up(tmp_path, store, built):
    model = counted(["dense", "dense_1"])
    model.optimizer.freeze("dense_1/kernel", ~MASK)
    train(model)
    path = save(model, store, tmp_path / "s")
    other = counted(["dense_2", "dense_3"])
    if built:
        other.optimizer.build(other.trainable_variables)
    load(other, path, store)
    other.optimizer.build(other.trainable_variables)
    assert [mask_of(other, i).density < 1 for i in range(4)] == [False, False, True, False]
    assert mask_of(other, 2) == fz.Mask.from_array(MASK)
    assert_kept(other, 2)


@pytest.mark.parametrize(
    ("store", "names"),
    [*((store, ["dense_1", "dense_2"]) for store in STORES), ("checkpoint", ["dense_3", "dense_4", "dense_5"])],
)
def test_two_candidates_are_an_error(tmp_path, store, names):
    model = counted(["dense", "dense_1"])
    model.optimizer.freeze("dense_1/kernel", ~MASK)
    train(model)
    path = save(model, store, tmp_path / "s")
    other = counted(names)
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match="dense_1/kernel', which may be for any of"):
        load(other, path, store)
    assert other.optimizer.density == 1.0


@pytest.mark.parametrize("store", STORES)
def test_a_mask_without_a_variable_is_an_error(tmp_path, store):
    model = square("a")
    model.optimizer.freeze("a/kernel", ~MASK)
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square("b")
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match=r"a/kernel', which matches nothing.*rename"):
        load(other, path, store)


# Order of calls.


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("built", [False, True])
def test_a_call_after_a_load_counts(tmp_path, store, built, state):
    model = square(state=state)
    model.optimizer.freeze("a/kernel", [0])
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square(state=state, maskable={"a/kernel": "rows"})
    if built:
        other.optimizer.freeze("a/kernel", [0])
        other.optimizer.build(other.trainable_variables)
    load(other, path, store)
    other.optimizer.freeze("a/kernel", [5])
    assert mask_of(other) == fz.Mask.rows((8, 8), [1, 2, 3, 4, 6, 7])
    assert_kept(other)
    assert mask_of(other) == fz.Mask.rows((8, 8), [1, 2, 3, 4, 6, 7])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("built", [False, True])
def test_a_load_replaces_rules_with_one_warning(tmp_path, store, built):
    model = square()
    model.optimizer.freeze("a/kernel", [0])
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square()
    other.optimizer.freeze("a/kernel", [5])
    if built:
        other.optimizer.build(other.trainable_variables)
    message = r"replaces masks that calls had stated: '.*a/kernel' \(16 entries\)"
    with pytest.warns(UserWarning, match=message) as caught:
        load_and_build(other, path, store)
    assert sum("replaces" in str(warning.message) for warning in caught) == 1
    assert mask_of(other) == fz.Mask.rows((8, 8), range(1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(other, path, store)  # the same masks


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("built", [False, True])
def test_what_nobody_stated_states_nothing(tmp_path, store, built, state):
    """A file of a run in which nothing was frozen does not unfreeze what a rule froze."""
    if store == "checkpoint" and state == "compact":
        pytest.skip("slots of another shape: TensorFlow refuses them")
    model = square()
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square(state=state)
    other.optimizer.freeze("a/kernel", ~MASK)
    if built:
        other.optimizer.build(other.trainable_variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(other, path, store)
    assert_kept(other)
    assert mask_of(other) == fz.Mask.from_array(MASK)


@pytest.mark.parametrize("store", STORES)
def test_unfreezing_counts_as_a_statement(tmp_path, store):
    model = square()
    model.optimizer.freeze("a/kernel")
    model.optimizer.unfreeze("a/kernel")
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square()
    other.optimizer.freeze("a/kernel")
    with pytest.warns(UserWarning, match="replaces masks"):
        load_and_build(other, path, store)
    assert mask_of(other).density == 1.0


@pytest.mark.parametrize("state", STATES)
def test_entries_unfrozen_after_a_load_before_the_build_follow_the_policy(tmp_path, state):
    """A checkpoint that is restored before the build leaves the load among the rules."""
    model = square(state=state)
    model.optimizer.freeze("a/kernel", [0])
    train(model, 20)
    path = save(model, "checkpoint", tmp_path / "s")
    other = square(state=state, capacity=1.0 if state == "compact" else None)
    if state == "compact":
        return  # its slots have another shape: TensorFlow refuses them
    load(other, path, "checkpoint")
    other.optimizer.unfreeze("a/kernel", [0])
    other.optimizer.build(other.trainable_variables)
    assert waiting_mask(other.optimizer, (8, 8)) == fz.Mask.rows((8, 8), [0]).with_layout((1, 64, 1))


# A bare optimizer's files.


def bare(inner=None):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a")])
    model.compile(inner or keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    train(model)
    return model


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("store", STORES[:2])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("scaled", ["", "inside", "outside"])
def test_file_of_a_bare_optimizer(tmp_path, store, built, state, scaled):
    """Weights and slots come, compact slots by taking the trainable entries; masks stay."""
    scaler = keras.optimizers.LossScaleOptimizer
    adam = keras.optimizers.Adam(0.01)
    source = bare(scaler(adam) if scaled == "outside" else None)
    path = save(source, store, tmp_path / "s")
    inner = keras.optimizers.Adam(0.01)
    optimizer = fz.MaskedOptimizer(
        scaler(inner) if scaled == "inside" else inner, masks={"a/kernel": MASK}, state=state
    )
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a")])
    model.compile(scaler(optimizer) if scaled == "outside" else optimizer, "mse", jit_compile=False)
    if built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    model.optimizer.build(model.trainable_variables)
    assert mask_of(model) == fz.Mask.from_array(MASK)
    assert int(inner.iterations) == 2
    base = source.optimizer.inner_optimizer if scaled == "outside" else source.optimizer
    momentum, expected = inner._momentums[0].numpy(), base._momentums[0].numpy()
    assert_same_bits(momentum, expected[MASK] if state == "compact" else expected)
    assert_kept(model)


@pytest.mark.parametrize("built", [False, True])
def test_bare_state_that_does_not_fit(tmp_path, built):
    path = save(bare(keras.optimizers.SGD(0.1, momentum=0.9)), "keras weights", tmp_path / "s")
    model = square(masks={"a/kernel": MASK})
    if built:
        model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=r"4 arrays.*skip_mismatch=True"):
        model.load_weights(path)
    assert mask_of(model) == fz.Mask.from_array(MASK)
    with pytest.warns(UserWarning, match="could not be loaded"):
        model.load_weights(path, skip_mismatch=True)
    assert_kept(model)


def test_compact_state_waits_for_its_rules(tmp_path):
    """Built while nothing says what is frozen, all variables would have full state."""
    path = save(bare(), "keras weights", tmp_path / "s")
    model = square(state="compact")
    model.load_weights(path)
    model.optimizer.freeze("a/kernel", ~MASK)
    assert_kept(model)
    assert model.optimizer.describe()[0].mode == "compact"
    assert int(model.optimizer.iterations) == 4


def test_state_that_does_not_fit_at_the_build(tmp_path):
    """Where a load had to wait, the error comes before any step, once, and the optimizer goes on."""
    path = save(bare(keras.optimizers.SGD(0.1, momentum=0.9)), "keras weights", tmp_path / "s")
    model = square(state="compact")
    model.load_weights(path)
    model.optimizer.freeze("a/kernel", ~MASK)
    before = model.trainable_variables[0].numpy()
    with pytest.raises(ValueError, match="must fit the optimizer"):
        train(model)
    assert_same_bits(model.trainable_variables[0].numpy(), before)
    model.compile(model.optimizer, "mse", jit_compile=False)
    assert_kept(model)
    again = square(state="compact")
    again.load_weights(path, skip_mismatch=True)
    again.optimizer.freeze("a/kernel", ~MASK)
    with pytest.warns(UserWarning, match="did without what does not fit"):
        train(again)
    assert_kept(again)


# What does not fit.


def headed(classes, state="full", jit_compile=False):
    layers = [keras.Input((8,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(classes, name="head")]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.01), state=state), loss, jit_compile=jit_compile)
    return model


def classify(model, classes):
    model.fit(X, np.arange(32) % classes, batch_size=16, shuffle=False, verbose=0)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("built", [False, True])
def test_a_head_of_another_size(tmp_path, built, state):
    old = headed(3, state)
    old.optimizer.freeze("body/kernel", ~MASK)
    old.optimizer.freeze("head/kernel", [0, 1])
    classify(old, 3)
    path = save(old, "keras weights", tmp_path / "s")
    new = headed(5, state)
    new.optimizer.freeze("head/kernel", [5])
    if state == "compact":
        new.optimizer.freeze("body/kernel", ~MASK)
    if built:
        new.optimizer.build(new.trainable_variables)
    with pytest.raises(ValueError, match="could not be loaded"):
        new.load_weights(path)
    with pytest.warns(UserWarning, match="could not be loaded"):
        new.load_weights(path, skip_mismatch=True)
    body, _, head, _ = new.trainable_variables
    assert new.optimizer.mask_for(body) == fz.Mask.from_array(MASK)
    assert new.optimizer.mask_for(head) == ~fz.Mask.rows((8, 5), [5])
    assert int(new.optimizer.iterations) == 2
    for a, b in zip(new.optimizer.inner_optimizer.variables, old.optimizer.inner_optimizer.variables, strict=True):
        if "body" in a.path:
            assert_same_bits(a.numpy(), b.numpy(), a.path)
    before = body.numpy(), head.numpy()
    classify(new, 5)
    assert_same_bits(body.numpy()[~MASK], before[0][~MASK])
    assert_same_bits(head.numpy()[5], before[1][5])


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shared", [False, True])
def test_a_refused_load_changes_nothing(tmp_path, state, shared):
    """Neither what an earlier load did, nor what another wrapper of the same optimizer has."""
    frozen = square(state=state)
    frozen.optimizer.freeze("a/kernel", [0])
    train(frozen)
    first = save(frozen, "keras weights", tmp_path / "first")
    inner = keras.optimizers.SGD(0.1, momentum=0.9)
    wrong = square()
    masks = {"a/kernel": np.arange(8)[:, None] != 1}
    wrong.compile(fz.MaskedOptimizer(inner, masks=masks), "mse", jit_compile=False)
    train(wrong)
    second = save(wrong, "keras weights", tmp_path / "second")  # masks that fit, slots that do not
    model = square(state=state)
    model.load_weights(first)
    model.optimizer.freeze("a/kernel", [5])
    if shared and state == "full":
        other = fz.MaskedOptimizer(model.optimizer.inner_optimizer, masks={"a/kernel": False})
        other.build(model.trainable_variables)
    state_before = [v.numpy() for v in model.optimizer.variables]
    masks = model.optimizer.masks_by_path()
    with pytest.raises(ValueError, match="must fit the optimizer"), pytest.warns(UserWarning, match="replaces masks"):
        model.load_weights(second)
    assert model.optimizer.masks_by_path() == masks
    if shared and state == "full":
        assert other.mask_for(model.trainable_variables[0]).count() == 0
    for variable, value in zip(model.optimizer.variables, state_before, strict=True):
        assert_same_bits(variable.numpy(), value, variable.path)
    assert_kept(model)


# Conversion between full and compact state.


@pytest.mark.parametrize("store", STORES[:2])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("there", ["full", "compact rows", "compact with room"])
@pytest.mark.parametrize("here", ["full", "compact", "compact with room"])
def test_slots_of_another_state(tmp_path, store, built, there, here):
    options = {
        "full": {},
        "compact": {"state": "compact"},
        "compact rows": {"state": "compact", "maskable": {"a/kernel": "rows"}},
        "compact with room": {"state": "compact", "capacity": 0.9},
    }
    rows = there == "compact rows"
    mask = np.repeat(np.arange(8)[:, None] > 2, 8, axis=1) if rows else MASK
    model = square(**options[there])
    model.optimizer.register_mask("a/kernel", mask)
    train(model)
    path = save(model, store, tmp_path / "s")
    other = square(**options[here], **({} if not built else {"maskable": {"a/kernel": "elements"}}))
    other.optimizer.register_mask("a/kernel", mask)
    if built:
        other.optimizer.build(other.trainable_variables)
    other.load_weights(path)

    def moments(of):
        """The first moments of trainable entries."""
        slot = of.optimizer.inner_optimizer._momentums[0].numpy()
        return slot[mask] if of.optimizer.state == "full" else slot.reshape(-1)[: int(mask.sum())]

    assert_same_bits(moments(other), moments(model))
    for each in (model, other):
        train(each)
    assert_same_bits(other.trainable_variables[0].numpy(), model.trainable_variables[0].numpy())


# Files of older versions.


def old_model(state, **options):
    inputs = keras.Input((5,))
    hidden = keras.layers.Dense(8, activation="tanh", name="body")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(hidden))
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.1), state=state, **options), "mse", jit_compile=False)
    return model


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("store", ["keras", "weights.h5", "checkpoint"])
@pytest.mark.parametrize("built", [False, True])
def test_files_without_layouts(tmp_path, state, store, built):
    expected = np.load(OLD / f"{state}.npz")
    first = np.array(expected["k0"])
    masks = {"body/kernel": first, "head/kernel": np.array(expected["k2"])[:, :1]}
    model = old_model(state, masks=masks if state == "compact" else None)

    def load_old(model):
        if store == "keras" and built:
            model = keras.models.load_model(OLD / f"{state}.keras")
        elif built:
            model.optimizer.build(model.trainable_variables)
        if store == "checkpoint":
            load_and_build(model, str(OLD / state), store)
        elif store == "weights.h5" or not built:
            load_and_build(model, OLD / f"{state}.{store}", store)
        return model

    with pytest.warns(UserWarning, match="stored without their layout") as caught:
        model = load_old(model)
    assert sum("without their layout" in str(warning.message) for warning in caught) == 1
    for i, variable in enumerate(model.trainable_variables):
        np.testing.assert_array_equal(model.optimizer.mask_for(variable).to_numpy(), expected[f"k{i}"])
        assert_same_bits(variable.numpy(), expected[f"m{i}"])
    for i, variable in enumerate(model.optimizer.inner_optimizer.variables):
        assert_same_bits(variable.numpy(), expected[f"s{i}"], variable.path)
    if state == "full":  # the first row was unfrozen, and waits
        waiting = waiting_mask(model.optimizer, (5, 8))
        assert waiting.count() > 0 and (waiting & ~fz.Mask.rows((5, 8), [0])).count() == 0


@pytest.mark.parametrize("store", ["weights.h5", "checkpoint"])
@pytest.mark.parametrize("built", [False, True])
def test_files_with_two_readings_are_refused(store, built):
    model = square()
    if built:
        model.optimizer.build(model.trainable_variables)
    before = model.trainable_variables[0].numpy()
    path = OLD / "square.weights.h5" if store == "weights.h5" else str(OLD / "square")
    with pytest.raises(ValueError, match=r"must leave one reading.*may be layout.*save_masks"):
        load_and_build(model, path, store)
    if built:
        assert model.optimizer.density == 1.0
    if store == "checkpoint" and built:
        assert_same_bits(model.trainable_variables[0].numpy(), before)


def test_a_config_says_the_layout_of_an_old_file():
    with pytest.warns(UserWarning, match="without their layout"):
        model = keras.models.load_model(OLD / "square.keras")
    assert mask_of(model) == fz.Mask.rows((8, 8), [3, 4, 5, 6, 7])


# Damage.


@pytest.mark.parametrize("where", [0, 20, 60, -1])
def test_altered_records_are_refused(tmp_path, where):
    import h5py

    model = square()
    model.optimizer.freeze("a/kernel", ~MASK)
    train(model)
    path = save(model, "keras weights", tmp_path / "s")
    with h5py.File(path, "r+") as file:
        record = next(v for k, v in file["optimizer/vars"].items() if "kernel" in k)
        data = record[:]
        data[where] ^= 1
        record[:] = data
    other = square(masks={"a/kernel": MASK})
    other.optimizer.build(other.trainable_variables)
    before = [v.numpy() for v in other.optimizer.variables]
    with pytest.raises(ValueError, match="stored mask"):
        other.load_weights(path)
    assert mask_of(other) == fz.Mask.from_array(MASK)
    for variable, value in zip(other.optimizer.variables, before, strict=True):
        assert_same_bits(variable.numpy(), value)


# fz.load_masks.


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", ["m.keras", "m.weights.h5", "m.weights.json", "m.h5", "checkpoint", "folder"])
def test_load_masks_reads_what_keras_and_tensorflow_save(tmp_path, name, built, state):
    model = square(state=state)
    model.optimizer.freeze("a/kernel", ~MASK)
    train(model)
    path = tmp_path / name
    if name in ("checkpoint", "folder"):
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        path = tmp_path / "d"
        written = checkpoint.save(str(path / "c"))
        path = path if name == "folder" else written
    elif name == "m.weights.json":
        save(model, "sharded weights", tmp_path)
    elif ".weights." in name:
        model.save_weights(path)
    else:
        model.save(path)
    other = square()
    if built:
        other.optimizer.build(other.trainable_variables)
    fz.load_masks(other.optimizer, path)
    assert_kept(other)
    assert mask_of(other) == fz.Mask.from_array(MASK)


@pytest.mark.parametrize("name", ["full.keras", "full.weights.h5", "full", "compact"])
def test_load_masks_reads_old_files(name):
    model = old_model("full")
    model.optimizer.build(model.trainable_variables)
    with pytest.warns(UserWarning, match="without their layout"):
        fz.load_masks(model.optimizer, OLD / name)
    expected = np.load(OLD / f"{name.partition('.')[0]}.npz")
    np.testing.assert_array_equal(mask_of(model).to_numpy(), expected["k0"])


def test_load_masks_of_files_without_masks(tmp_path):
    model = bare()
    model.save(tmp_path / "m.keras")
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "c"))
    other = square()
    for each in (tmp_path / "m.keras", path):
        with pytest.raises(ValueError, match="must hold masks"):
            fz.load_masks(other.optimizer, each)
    with pytest.raises(FileNotFoundError):
        fz.load_masks(other.optimizer, tmp_path / "nothing")


def test_a_task_that_comes_back_with_an_optimizer_of_its_own(tmp_path):
    """As KerasHub's presets do: the masks are in the file all the same."""
    model = square()
    model.optimizer.freeze("a/kernel", ~MASK)
    train(model)
    model.save_weights(tmp_path / "task.weights.h5")
    task = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a")])
    task.compile(keras.optimizers.Adam(), "mse", jit_compile=False)
    task.load_weights(tmp_path / "task.weights.h5", skip_mismatch=True)
    task.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.01)), "mse", jit_compile=False)
    fz.load_masks(task.optimizer, tmp_path / "task.weights.h5")
    assert_kept(task)
    assert mask_of(task) == fz.Mask.from_array(MASK)


# What carries no masks, and says so in docs/masks.md.


def test_state_tree_carries_no_masks():
    model = square(masks={"a/kernel": MASK})
    train(model)
    tree = model.get_state_tree()
    assert len(keras.tree.flatten(tree["optimizer_variables"])) == len(model.optimizer.inner_optimizer.variables)
    other = square(masks={"a/kernel": ~MASK})
    train(other)
    other.set_state_tree(tree)
    assert mask_of(other) == fz.Mask.from_array(~MASK)


def test_saved_model_holds_no_masks_for_the_optimizer(tmp_path):
    """Its functions have them, as variables; a new optimizer does not get them from there."""

    class Module(tf.Module):
        def __init__(self):
            self.v = tf.Variable(np.ones((8, 8), "float32"), name="w")
            self.optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(0.1), masks={"w": MASK})
            self.optimizer.build([self.v])

        @tf.function
        def step(self):
            self.optimizer.apply([tf.ones([8, 8])], [self.v])
            return self.v.read_value()

    module = Module()
    module.step()
    tf.saved_model.save(module, str(tmp_path / "m"))
    loaded = tf.saved_model.load(str(tmp_path / "m"))
    before = module.v.numpy()
    after = loaded.step().numpy()
    assert_same_bits(after[~MASK], before[~MASK])
    assert (after[MASK] != before[MASK]).all()
    shutil.rmtree(tmp_path / "m")


# What a review found.


def blocks(trainable):
    model = keras.Sequential([keras.Input((8,)), *(keras.layers.Dense(8, name=f"block_{i}") for i in (1, 2))])
    for i, layer in enumerate(model.layers, 1):
        layer.trainable = i in trainable
    model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(0.01)), "mse", jit_compile=False)
    return model


@pytest.mark.parametrize("store", [*STORES, "config"])
@pytest.mark.parametrize("built", [False, True])
def test_training_layer_by_layer(tmp_path, store, built):
    """The mask of a layer that is not trained any more is not that of one whose name looks like it counted up."""
    model = blocks([1])
    model.optimizer.freeze("block_1/kernel", [0, 1])
    train(model)
    other = blocks([2])
    if store == "config":
        if built:
            pytest.skip("a config makes an optimizer that is not built")
        other.compile(fz.MaskedOptimizer.from_config(model.optimizer.get_config()), "mse", jit_compile=False)
    else:
        path = save(model, store, tmp_path / "s")
        if built:
            other.optimizer.build(other.trainable_variables)
    with pytest.warns(UserWarning, match="not trained here were passed over: .*block_1/kernel"):
        train(other) if store == "config" else load_and_train(other, path, store)
    assert other.optimizer.density == 1.0


def load_and_train(model, path, store):
    load(model, path, store)
    train(model)


def test_a_model_whose_layer_is_not_trained_any_more_loads(tmp_path):
    model = blocks([1, 2])
    model.optimizer.freeze("block_1/kernel", [0])
    model.optimizer.freeze("block_2/kernel", [1])
    train(model)
    model.layers[0].trainable = False
    model.save(tmp_path / "m.keras")
    with pytest.warns(UserWarning, match="passed over: .*block_1/kernel"):
        loaded = keras.models.load_model(tmp_path / "m.keras")
    assert mask_of(loaded) == ~fz.Mask.rows((8, 8), [1])
    assert_kept(loaded)


def test_another_block_is_not_meant(tmp_path):
    def one(name):
        inputs = keras.Input((8,))
        inner = keras.Sequential([keras.layers.Dense(8, name="dense")], name=name)
        model = keras.Model(inputs, inner(inputs))
        model.compile(fz.MaskedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
        return model

    model = one("encoder")
    model.optimizer.freeze("encoder/dense/kernel", [0])
    train(model)
    model.save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ValueError, match="encoder/dense/kernel', which matches nothing"):
        one("decoder").load_weights(tmp_path / "m.weights.h5")


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_variables_with_one_path_are_not_told_apart_by_order(order):
    left, right = (tf.Variable(tf.ones([8]), name="proj/kernel") for _ in range(2))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([left, right])
    optimizer.freeze(left)
    again = fz.MaskedOptimizer.from_config(optimizer.get_config())
    with pytest.raises(ValueError, match="2 variables with the path 'proj/kernel', which only order tells apart"):
        again.build([left, right] if order[0] == "left" else [right, left])
    optimizer.freeze(right)  # the same mask for both
    again = fz.MaskedOptimizer.from_config(optimizer.get_config())
    again.build([right, left])
    assert again.density == 0.0


def test_a_part_of_a_multi_optimizer_that_refuses_is_heard(tmp_path):
    def make(maskable, rule=True):
        inputs = keras.Input((8,))
        model = keras.Model(inputs, keras.layers.Dense(8, name="b")(keras.layers.Dense(8, name="a")(inputs)))
        parts = [fz.MaskedOptimizer(keras.optimizers.SGD(0.1), maskable=each) for each in (None, maskable)]
        if rule:
            parts[1].freeze("b/kernel", ~MASK)
        maps = keras.optimizers.OptimizerMap(parts[0], {"b/.*": parts[1]})
        model.compile(keras.optimizers.MultiOptimizer(maps), "mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    model = make(None)
    train(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = make({"b/kernel": "columns"}, rule=False)
    with pytest.raises(ValueError, match="maskable="):
        other.load_weights(tmp_path / "m.weights.h5")


def test_a_checkpoint_that_does_not_fit_leaves_the_optimizer_usable(tmp_path):
    model = square("a")
    model.optimizer.freeze("a/kernel", [0])
    train(model)
    path = save(model, "checkpoint", tmp_path / "s")
    other = square("b")
    tf.train.Checkpoint(optimizer=other.optimizer).read(path)
    with pytest.raises(ValueError, match="matches nothing"):
        train(other)
    other.compile(other.optimizer, "mse", jit_compile=False)
    train(other)
    assert other.optimizer.density == 1.0


def test_old_masks_are_not_copied_before_they_found_their_variables():
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    fz.load_masks(optimizer, OLD / "full.weights.h5")
    with pytest.raises(ValueError, match="must find their variables before they can be copied"):
        optimizer.get_config()


@pytest.mark.parametrize("store", STORES)
def test_masks_that_were_left_out_stay_unknown_through_a_store(tmp_path, store, monkeypatch):
    monkeypatch.setattr(rules_config, "LIMIT", 1)
    model = square()
    model.optimizer.register_mask("a/kernel", MASK)
    train(model)
    copy = square()
    copy.compile(fz.MaskedOptimizer.from_config(model.optimizer.get_config()), "mse", jit_compile=False)
    copy.optimizer.build(copy.trainable_variables)
    path = save(copy, store, tmp_path / "s")
    other = square()
    other.optimizer.build(other.trainable_variables)
    load(other, path, store)
    with pytest.raises(ValueError, match="no mask yet for '.*a/kernel'"):
        train(other)
    other.optimizer.register_mask("a/kernel", MASK)
    other.compile(other.optimizer, "mse", jit_compile=False)
    assert_kept(other)


def test_load_masks_brings_rules_that_waited(tmp_path):
    model = square()
    model.optimizer.freeze("a/kernel", [0])
    path = save(model, "checkpoint", tmp_path / "s")
    other = square()
    fz.load_masks(other.optimizer, path)
    other.optimizer.build(other.trainable_variables)
    assert mask_of(other) == ~fz.Mask.rows((8, 8), [0])


SCALED = {
    "none": lambda make, inner: make(inner),
    "inside": lambda make, inner: make(keras.optimizers.LossScaleOptimizer(inner)),
    "outside": lambda make, inner: keras.optimizers.LossScaleOptimizer(make(inner)),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("here", SCALED)
@pytest.mark.parametrize("there", SCALED)
def test_another_scaler_around(tmp_path, there, here, built, state):
    """A run goes on under `mixed_float16`, which puts a scaler outside; what does not fit is refused wholly."""

    def scaled(kind, rule):
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a")])
        inner = keras.optimizers.Adam(0.01)
        masks = {"a/kernel": rule}
        optimizer = SCALED[kind](lambda of: fz.MaskedOptimizer(of, masks=masks, state=state), inner)
        model.compile(optimizer, "mse", jit_compile=False)
        return model, inner

    model, adam = scaled(there, MASK)
    train(model)
    model.save_weights(tmp_path / "m.weights.h5")
    fits = here == there or here == "outside" or (there, here) == ("outside", "inside")
    first = np.arange(8)[:, None] > 0
    other, inner = scaled(here, MASK if fits else first & MASK)
    if built:
        other.optimizer.build(other.trainable_variables)
    if fits:
        other.load_weights(tmp_path / "m.weights.h5")
        assert mask_of(other) == fz.Mask.from_array(MASK)
        assert int(inner.iterations) == 2
        assert_same_bits(inner._momentums[0].numpy(), adam._momentums[0].numpy())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="could not be loaded"):
                other.load_weights(tmp_path / "m.weights.h5")
        assert mask_of(other) == fz.Mask.from_array(first & MASK)
        assert int(inner.iterations) == 0
    assert_kept(other)


def test_a_refused_load_before_the_build_leaves_the_rules(tmp_path):
    model = square()
    model.compile(fz.MaskedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)), "mse", jit_compile=False)
    model.optimizer.freeze("a/kernel", [0])
    train(model)
    model.save_weights(tmp_path / "m.weights.h5")
    other = square()
    other.optimizer.freeze("a/bias")
    with pytest.raises(ValueError, match="must fit the optimizer"):
        other.load_weights(tmp_path / "m.weights.h5")
    assert mask_of(other).density == 1.0 and mask_of(other, 1).count() == 0
