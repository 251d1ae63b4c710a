"""`MaskedOptimizer` as a Keras optimizer: arguments, delegation, and unusual inner optimizers."""

import keras
import numpy as np
import pytest
import rich.console
import tensorflow as tf
from common import OPTIONS, assert_same_bits, bits

import freezeops as fz

MASK = np.random.default_rng(2).random((6, 8)) < 0.5


def variables_like(*shapes, dtype="float32"):
    rng = np.random.default_rng(5)
    return [
        keras.Variable(rng.normal(size=shape).astype(dtype), name=f"v{i}", dtype=dtype)
        for i, shape in enumerate(shapes)
    ]


def gradients_like(variables, seed=0):
    rng = np.random.default_rng(seed)
    return [tf.constant(rng.normal(size=v.shape).astype("float32")) for v in variables]


def test_delegates_to_the_inner_optimizer():
    inner = keras.optimizers.Adam(0.5, loss_scale_factor=8.0)
    optimizer = fz.MaskedOptimizer(inner)
    assert float(optimizer.learning_rate) == 0.5
    optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == 0.25
    assert float(optimizer.scale_loss(tf.constant(2.0))) == 16.0
    assert optimizer.iterations is inner.iterations
    (variable,) = variables_like((3,))
    counter = optimizer.apply_gradients([(tf.ones(3), variable)])
    assert int(counter) == int(optimizer.iterations) == 1
    assert optimizer.inner_optimizer is inner


def test_schedule():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [1.0, 0.5])
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(schedule))
    (variable,) = variables_like((3,))
    values = [variable.numpy()]
    for _ in range(3):
        optimizer.apply([tf.ones(3)], [variable])
        values.append(variable.numpy())
    assert np.allclose(-np.diff(values, axis=0)[:, 0], [1.0, 1.0, 0.5])
    with pytest.raises(TypeError, match="LearningRateSchedule"):
        optimizer.learning_rate = 0.1


@pytest.mark.parametrize("state", ["full", "compact"])
def test_variables_are_the_inner_ones(state):
    """So that whoever resets an optimizer by writing its `variables` does not reset masks."""
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v0": MASK}, state=state)
    variables = variables_like((6, 8), (8,))
    optimizer.build(variables)
    assert [id(v) for v in optimizer.variables] == [id(v) for v in optimizer.inner_optimizer.variables]
    optimizer.apply(gradients_like(variables))
    for variable in optimizer.variables[2:]:  # but for the count of steps and the learning rate
        variable.assign(tf.zeros_like(variable.value))
    before = variables[0].numpy()
    optimizer.apply(gradients_like(variables))
    assert optimizer.mask_for(variables[0]) == fz.Mask.from_array(MASK)
    np.testing.assert_array_equal(bits(variables[0].numpy()) != bits(before), MASK)


def test_nothing_frozen_is_the_inner_optimizer():
    inner, bare = keras.optimizers.AdamW(0.1), keras.optimizers.AdamW(0.1)
    wrapped, plain = variables_like((6, 8), (8,)), variables_like((6, 8), (8,))
    optimizer = fz.MaskedOptimizer(inner)
    for step in range(4):
        optimizer.apply(gradients_like(wrapped, step), wrapped)
        bare.apply(gradients_like(plain, step), plain)
    for a, b in zip(wrapped, plain, strict=True):
        assert_same_bits(a.numpy(), b.numpy())
    assert optimizer.density == 1.0


def test_empty_list_is_no_step():
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.apply([])
    assert not optimizer.built and int(optimizer.iterations) == 0


def test_everything_frozen_still_counts_steps():
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v.": False})
    variables = variables_like((6, 8), (8,))
    before = [v.numpy() for v in variables]
    optimizer.apply(gradients_like(variables), variables)
    assert int(optimizer.iterations) == 1 and optimizer.density == 0.0
    for variable, value in zip(variables, before, strict=True):
        assert_same_bits(variable.numpy(), value)


def test_missing_gradients():
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0, **OPTIONS["ema_overwrite"]))
    variables = variables_like((6, 8), (8,))
    optimizer.register_mask(variables[1], np.arange(8) < 4)
    optimizer.build(variables)
    before = variables[1].numpy()
    for step in range(4):
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply([gradients_like(variables, step)[0], None])
    assert_same_bits(variables[1].numpy()[4:], before[4:])
    with pytest.raises(ValueError, match="No gradients provided"):
        optimizer.apply([None, None])


def test_frozen_entries_of_an_average_hold_the_variables_own_value():
    inner = keras.optimizers.AdamW(0.1, weight_decay=0.1, use_ema=True, ema_momentum=0.9)
    optimizer = fz.MaskedOptimizer(inner)
    (variable,) = variables_like((6, 8))
    optimizer.build([variable])
    for step in range(3):
        optimizer.apply(gradients_like([variable], step))
    optimizer.register_mask(variable, MASK)
    assert_same_bits(inner._model_variables_moving_average[0].numpy()[~MASK], variable.numpy()[~MASK])
    for step in range(2):
        optimizer.apply(gradients_like([variable], step))
        average = inner._model_variables_moving_average[0].numpy()
        assert_same_bits(average[~MASK], variable.numpy()[~MASK])
        assert (average[MASK] != variable.numpy()[MASK]).all()


def test_constraint():
    (variable,) = variables_like((6, 8))
    variable.constraint = keras.constraints.MaxNorm(0.01)
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.register_mask(variable, MASK)
    before = variable.numpy()
    optimizer.apply(gradients_like([variable]), [variable])
    assert_same_bits(variable.numpy()[~MASK], before[~MASK])
    assert np.abs(variable.numpy()[MASK]).max() < 0.02


def test_norms_count_trainable_entries_only():
    (variable,) = variables_like((4,))
    before = variable.numpy()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=1.0))
    optimizer.freeze(variable, [0])
    optimizer.apply([tf.constant([np.inf, 3.0, 0.0, 4.0])], [variable])
    assert np.allclose(before - variable.numpy(), [0, 0.6, 0, 0.8], atol=1e-6)


def test_weight_decay_exclusions():
    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(1.0, weight_decay=0.5))
    variables = variables_like((4,), (4,), (4,))
    before = [v.numpy() for v in variables]
    optimizer.exclude_from_weight_decay(var_list=[variables[0]], var_names=["v1"])
    optimizer.apply([tf.zeros(4)] * 3, variables)
    moved = [(v.numpy() != b).any() for v, b in zip(variables, before, strict=True)]
    assert moved == [False, False, True]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_indexed_slices_stay_sparse(jit_compile, backend):
    table, columns = variables_like((50, 4), (50, 4))
    masks = [np.arange(50)[:, None] % 2 == 0, np.random.default_rng(1).random((50, 4)) < 0.5]
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.register_mask(table, masks[0])
    optimizer.register_mask(columns, masks[1])
    optimizer.build([table, columns])
    indices = tf.constant([3, 4, 4, 7, 8])
    values = tf.constant(np.random.default_rng(0).normal(size=(5, 4)).astype("float32"))
    gradient = tf.IndexedSlices(values, indices, tf.constant([50, 4], tf.int64))
    masked = optimizer.mask_gradients([gradient] * 2, [table, columns])
    for result, mask in zip(masked, masks, strict=True):
        assert isinstance(result, tf.IndexedSlices)
        rows = np.broadcast_to(mask, (50, 4))[indices.numpy()]
        assert_same_bits(result.values.numpy(), np.where(rows, values, np.float32(0)))
    before = [table.numpy(), columns.numpy()]

    @tf.function(jit_compile=jit_compile)
    def step():
        optimizer.apply([gradient] * 2, [table, columns])

    step()
    for variable, value, mask in zip((table, columns), before, masks, strict=True):
        expected = value.copy()
        np.subtract.at(expected, indices.numpy(), values.numpy())
        full = np.broadcast_to(mask, (50, 4))
        assert_same_bits(variable.numpy()[~full], value[~full])
        assert np.allclose(variable.numpy()[full], expected[full])


def test_gradient_tape_with_plain_tf_variables():
    weights, bias = tf.Variable(tf.ones((3, 2)), name="w"), tf.Variable(tf.zeros(2), name="b")
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1))
    optimizer.freeze(weights, (0, 1))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((x @ weights + bias) ** 2)
        gradients = tape.gradient(loss, [weights, bias])
        optimizer.apply_gradients(zip(gradients, [weights, bias], strict=True))

    for _ in range(3):
        step(tf.ones((5, 3)))
    moved = weights.numpy() != 1
    assert np.array_equal(moved, [[True, False], [True, True], [True, True]])


def test_numpy_gradients():
    (variable,) = variables_like((6, 8))
    before = variable.numpy()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0), masks={"v0": MASK})
    optimizer.apply([np.ones((6, 8), "float32")], [variable])
    assert_same_bits(variable.numpy()[~MASK], before[~MASK])
    assert (variable.numpy()[MASK] != before[MASK]).all()


def test_mask_gradients_builds_and_masks():
    variables = variables_like((6, 8), (8,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), masks={"v0": MASK})
    gradients = gradients_like(variables)
    masked = optimizer.mask_gradients([gradients[0], None], variables)
    assert_same_bits(masked[0].numpy(), np.where(MASK, gradients[0], np.float32(0)))
    assert masked[1] is None


def test_wraps_an_optimizer_that_is_already_built():
    (variable,) = variables_like((6, 8))
    inner = keras.optimizers.Adam(0.1)
    for step in range(3):
        inner.apply(gradients_like([variable], step), [variable])
    slots = [v.numpy() for v in inner.variables]
    optimizer = fz.MaskedOptimizer(inner)
    optimizer.register_mask(variable, MASK)
    optimizer.build([variable])
    for slot, value in zip(inner.variables, slots, strict=True):
        assert_same_bits(slot.numpy(), value)
    before = variable.numpy()
    optimizer.apply(gradients_like([variable]))
    assert_same_bits(variable.numpy()[~MASK], before[~MASK])
    assert int(optimizer.iterations) == 4
    twice = fz.MaskedOptimizer(inner)
    twice.freeze(variable, permanent=True)
    with pytest.raises(ValueError, match="before the inner optimizer is built"):
        twice.build([variable])


def test_first_step_inside_a_function_builds():
    variables = variables_like((6, 8), (8,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(0.1), masks={"v0": MASK})
    before = variables[0].numpy()

    @tf.function
    def step(gradients):
        optimizer.apply(gradients, variables)

    for seed in range(3):
        step(gradients_like(variables, seed))
    assert_same_bits(variables[0].numpy()[~MASK], before[~MASK])
    assert optimizer.mask_for(variables[0]) == fz.Mask.from_array(MASK)


def test_frozen_entries_come_back_when_the_inner_optimizer_fails():
    class Failing(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate)
            variable.assign(variable * 2)
            raise RuntimeError("in the middle of a step")

    (variable,) = variables_like((6, 8))
    optimizer = fz.MaskedOptimizer(Failing(0.1), masks={"v0": MASK})
    before = variable.numpy()
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        optimizer.apply(gradients_like([variable]), [variable])
    assert_same_bits(variable.numpy()[~MASK], before[~MASK])


@keras.saving.register_keras_serializable(package="tests")
class SignWithMemory(keras.optimizers.Optimizer):
    """A user's own optimizer: slots of its own, and it writes more than it is asked to."""

    def build(self, variables):
        super().build(variables)
        self.memory = self.add_optimizer_variables(variables, "memory")

    def update_step(self, gradient, variable, learning_rate):
        memory = self.memory[self._get_variable_index(variable)]
        memory.assign(0.5 * memory + tf.sign(gradient) + 0.1)
        variable.assign(variable - tf.cast(learning_rate, variable.dtype) * memory)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_user_written_optimizer(jit_compile):
    (variable,) = variables_like((6, 8))
    optimizer = fz.MaskedOptimizer(SignWithMemory(0.1), masks={"v0": MASK})
    optimizer.build([variable])
    before = variable.numpy()
    step = tf.function(lambda g: optimizer.apply(g), jit_compile=jit_compile)
    for seed in range(3):
        step(gradients_like([variable], seed))
    assert_same_bits(variable.numpy()[~MASK], before[~MASK])
    assert (variable.numpy()[MASK] != before[MASK]).all()
    twin = fz.MaskedOptimizer.from_config(optimizer.get_config())
    assert isinstance(twin.inner_optimizer, SignWithMemory)


def test_loss_scale_optimizer_inside():
    scaler = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.AdamW(0.1, weight_decay=0.1), initial_scale=4.0, dynamic_growth_steps=100
    )
    optimizer = fz.MaskedOptimizer(scaler, masks={"v0": MASK})
    (variable,) = variables_like((6, 8))
    before = variable.numpy()
    optimizer.build([variable])
    assert float(optimizer.scale_loss(tf.constant(1.0))) == 4.0
    step = tf.function(lambda g: optimizer.apply(g))
    bad = np.where(MASK, np.float32(1), np.float32(np.nan))
    step([tf.constant(bad)])
    middle = variable.numpy()
    assert (middle[MASK] != before[MASK]).all(), "a NaN in a frozen entry skipped the step"
    assert float(scaler.dynamic_scale) == 4.0 and int(optimizer.iterations) == 1
    step([tf.constant(np.where(MASK, np.float32(np.nan), np.float32(1)))])
    assert_same_bits(variable.numpy(), middle)
    assert float(scaler.dynamic_scale) == 2.0 and int(optimizer.iterations) == 1
    assert_same_bits(middle[~MASK], before[~MASK])


def test_multi_optimizer_inside():
    choose = keras.optimizers.OptimizerMap(
        keras.optimizers.SGD(0.1, weight_decay=0.1), {"v1": keras.optimizers.AdamW(0.1, use_ema=True)}
    )
    optimizer = fz.MaskedOptimizer(keras.optimizers.MultiOptimizer(choose))
    variables = variables_like((6, 8), (6, 8))
    for variable in variables:
        optimizer.register_mask(variable, MASK)
    before = [v.numpy() for v in variables]
    for seed in range(3):
        optimizer.apply(gradients_like(variables, seed), variables)
    optimizer.finalize_variable_values(variables)
    for variable, value in zip(variables, before, strict=True):
        assert_same_bits(variable.numpy()[~MASK], value[~MASK])
        assert (variable.numpy()[MASK] != value[MASK]).all()
    assert int(optimizer.iterations) == 3
    with pytest.raises(AttributeError):
        _ = optimizer.learning_rate
    twin = fz.MaskedOptimizer.from_config(optimizer.get_config())
    assert isinstance(twin.inner_optimizer, keras.optimizers.MultiOptimizer)


def test_scalar_and_empty_variables(backend):
    variables = variables_like((), (0, 4), (3, 0), (1,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(1.0, momentum=0.9))
    optimizer.freeze(variables[0])
    optimizer.freeze(variables[1], np.s_[:, 1])
    optimizer.freeze(variables[2], [1])
    before = [v.numpy() for v in variables]
    for _ in range(2):
        optimizer.apply([tf.ones(v.shape) for v in variables], variables)
    assert_same_bits(variables[0].numpy(), before[0])
    assert (variables[3].numpy() != before[3]).all()


def test_integer_variables_train_unmasked():
    counter = keras.Variable(np.zeros(3, "int32"), dtype="int32", name="counter")
    (weight,) = variables_like((3,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD())
    optimizer.build([weight, counter])
    assert optimizer.mask_for(counter).density == 1.0
    with pytest.raises(ValueError, match=r"floating dtype\. Received: variable 'counter'"):
        optimizer.freeze(counter)


def test_summary(capsys):
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"v2": "none"}, name="mine")
    variables = variables_like((6, 8), (8,), (2,), (4,))
    optimizer.freeze(variables[0], [0])
    optimizer.freeze("v3", permanent=True)
    optimizer.summary()
    waiting = capsys.readouterr().out
    assert "not built" in waiting and "freeze permanent" in waiting and "v3" in waiting
    optimizer.build(variables)
    optimizer.summary(console=rich.console.Console(width=120))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[3:7]] == [
        ["v0", "6x8", "0.8333", "1", "B", "full,", "fused"],
        ["v1", "8", "1", "1", "B", "full,", "fused"],
        ["v2", "2", "1", "0", "B", "unmasked,", "fused", "[1]"],
        ["v3", "4", "0", "0", "B", "permanent"],
    ]
    assert lines[7:] == ["total: 62 entries, 12 frozen, density 0.8065, 2 B", "[1] maskable='none'"]


# Bad input: an error in Keras's style, and nothing changed.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fz.MaskedOptimizer("adam"), TypeError, r"must be a keras.optimizers.Optimizer"),
        (
            lambda: fz.MaskedOptimizer(fz.MaskedOptimizer(keras.optimizers.SGD())),
            ValueError,
            r"must not be a MaskedOptimizer itself",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), weight_decay=0.1),
            ValueError,
            r"set on the `inner_optimizer`\. Received: weight_decay=0\.1",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), mask=1),
            ValueError,
            r"Received: {'mask': 1}",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), masks=[1]),
            TypeError,
            r"must map targets to masks, or be a list of pairs",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), state="sparse"),
            ValueError,
            r"`state` must be 'full' or 'compact'\. Received: state='sparse'",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), maskable={"a": "cells"}),
            ValueError,
            r"Received: maskable={'a': 'cells'}",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), maskable="rows"),
            TypeError,
            r"`maskable` must map",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD(), state="small"),
            ValueError,
            r"`state` must be 'full' or 'compact'. Received: state='small'",
        ),
        (
            lambda: fz.MaskedOptimizer(keras.optimizers.SGD()).density,
            ValueError,
            r"must be built before `density`",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


BAD_CALLS = {
    "mask shape": (
        lambda o, v: o.register_mask(v, np.ones((6, 7), bool)),
        ValueError,
        r"mask\.shape=\(6, 7\), shape=\(6, 8\)",
    ),
    "mask rank": (
        lambda o, v: o.register_mask(v, np.ones(6, bool)),
        ValueError,
        r"Write `mask\[:, None\]`",
    ),
    "mask dtype": (
        lambda o, v: o.register_mask(v, np.ones((6, 8))),
        TypeError,
        r"must be boolean.*dtype=float64",
    ),
    "mask of another shape": (
        lambda o, v: o.register_mask(v, fz.Mask.trainable((8, 6))),
        ValueError,
        r"mask\.shape=\(8, 6\)",
    ),
    "Mask as where": (
        lambda o, v: o.freeze(v, fz.Mask.frozen((6, 8))),
        TypeError,
        r"Use `register_mask\(target, mask\)`",
    ),
    "where shape": (
        lambda o, v: o.freeze(v, np.ones(8, bool)),
        ValueError,
        r"`where\[None, :\]`",
    ),
    "where dtype": (lambda o, v: o.freeze(v, [0.5]), TypeError, r"dtype=float64"),
    "where index": (lambda o, v: o.unfreeze(v, [6]), IndexError, r"from -6 to 5"),
    "where expression": (
        lambda o, v: o.train_only(v, (0, 0, 0)),
        IndexError,
        r"valid index of a variable of shape \(6, 8\)",
    ),
    "target": (lambda o, v: o.freeze(7), TypeError, r"`target` must be a variable, a layer"),
    "regular expression": (lambda o, v: o.freeze("v(0"), ValueError, r"regular expression"),
    "integer variable": (
        lambda o, v: o.freeze(keras.Variable(np.zeros(2, "int32"), dtype="int32", name="i")),
        ValueError,
        r"floating dtype|built with",
    ),
    "second of two": (
        lambda o, v: o.freeze(["v1", v], np.s_[:, 7]),
        IndexError,
        r"valid index of a variable of shape \(8,\)",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("when", ["before build", "after build"])
def test_bad_calls_change_nothing(case, when):
    call, error, message = BAD_CALLS[case]
    variables = variables_like((6, 8), (8,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(), masks={"v0": MASK})
    if when == "after build":
        optimizer.build(variables)
    state = [v.numpy() for v in [*variables, *optimizer.variables]]
    if case == "second of two" and when == "before build":
        # A pattern meets its variables when the optimizer is built, and fails there.
        call(optimizer, variables[0])
        with pytest.raises(error, match=message):
            optimizer.build(variables)
        assert not optimizer.built and not optimizer.inner_optimizer.built
        return
    with pytest.raises(error, match=message):
        call(optimizer, variables[0])
    assert optimizer.mask_for(variables[0]) == fz.Mask.from_array(MASK)
    assert optimizer.mask_for(variables[1]).density == 1.0
    for variable, value in zip([*variables, *optimizer.variables], state, strict=True):
        assert_same_bits(variable.numpy(), value)


def test_bad_steps_change_nothing():
    variables = variables_like((6, 8), (8,))
    (stranger,) = variables_like((3,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    with pytest.raises(ValueError, match="must be built before"):
        optimizer.apply([tf.ones(3)])
    optimizer.build(variables)
    state = [v.numpy() for v in [*variables, *optimizer.variables]]
    gradients = gradients_like(variables)
    with pytest.raises(ValueError, match="Received: 1 gradients and 2 variables"):
        optimizer.apply(gradients[:1])
    with pytest.raises(ValueError, match="built with"):
        optimizer.apply([tf.ones(3)], [stranger])
    with pytest.raises(ValueError, match=r"gradient of shape \(8, 6\) for 'v0'"):
        optimizer.apply([tf.transpose(gradients[0]), gradients[1]])
    with pytest.raises(ValueError, match="built with"):
        optimizer.mask_for(stranger)
    with pytest.raises(TypeError, match=r"keras.Variable or a tf.Variable. Received: 'v0'"):
        optimizer.mask_for("v0")
    masks = [np.zeros(6, np.uint8), np.zeros(1, np.uint8)]
    with pytest.raises(ValueError, match=r"inner optimizer, 6; masks are not among them.*save_masks.*8 arrays"):
        optimizer.set_weights([*masks, *(v.numpy() for v in optimizer.variables)])
    slices = tf.IndexedSlices(tf.ones((1, 7)), tf.constant([0]))
    with pytest.raises(ValueError, match=r"gradient of shape"):
        optimizer.apply([slices, gradients[1]])
    for variable, value in zip([*variables, *optimizer.variables], state, strict=True):
        assert_same_bits(variable.numpy(), value)


def test_masks_do_not_change_while_a_function_is_traced():
    variables = variables_like((6, 8), (8,))
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam())
    optimizer.build(variables)
    with pytest.raises(RuntimeError, match="outside of `tf.function`"):
        tf.function(lambda: optimizer.freeze("v0"))()


def test_inner_optimizer_that_knows_more_variables():
    first, second = variables_like((3,), (4,))
    inner = keras.optimizers.Adam(use_ema=True)
    inner.build([first, second])
    optimizer = fz.MaskedOptimizer(inner)
    optimizer.build([second])
    optimizer.freeze(second, [0])
    before = second.numpy()
    optimizer.apply([tf.ones(4)], [second])
    assert_same_bits(second.numpy()[:1], before[:1])
    assert (second.numpy()[1:] != before[1:]).all()
