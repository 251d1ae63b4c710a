"""Entries that become trainable late start from sane slots."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MODES, SETUPS, assert_same_bits, in_mode

import freezeops as fz

LR = 1e-2
LATE = np.s_[:8]
"""Entries that are frozen at first; among them gradients of 0.1, 1 and 20 times the root mean square."""

GRADIENT = np.random.default_rng(0).choice([-1.0, 1.0], 64).astype("float32")
GRADIENT[:8] = [0.1, -0.1, 1.0, -1.0, 20.0, -20.0, 1e-3, 0.0]


def adaptive(name, **options):
    return {
        "Adam": lambda: keras.optimizers.Adam(LR, **options),
        "AdamW": lambda: keras.optimizers.AdamW(LR, weight_decay=0.0, **options),
        "Adam amsgrad": lambda: keras.optimizers.Adam(LR, amsgrad=True, **options),
        "Nadam": lambda: keras.optimizers.Nadam(LR, **options),
        "RMSprop": lambda: keras.optimizers.RMSprop(LR, **options),
        "RMSprop centered": lambda: keras.optimizers.RMSprop(LR, centered=True, **options),
        "RMSprop momentum": lambda: keras.optimizers.RMSprop(LR, momentum=0.9, **options),
        "Adamax": lambda: keras.optimizers.Adamax(LR, **options),
        "Lion": lambda: keras.optimizers.Lion(LR, weight_decay=0.0, **options),
        "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(LR, weight_decay=0.0, **options),
    }[name]()


ADAPTIVE = ("Adam", "AdamW", "Adam amsgrad", "Nadam", "RMSprop", "RMSprop centered", "RMSprop momentum",
            "Adamax", "Lion", "ScheduleFreeAdamW")  # fmt: skip
ADAPTIVE = tuple(name for name in ADAPTIVE if hasattr(keras.optimizers, name.split()[0]))


def make(inner, shape=(64,), dtype="float32", **options):
    variable = keras.Variable(np.zeros(shape), dtype=dtype, name="v")
    optimizer = fz.MaskedOptimizer(inner, **options)
    optimizer.build([variable])
    return variable, optimizer


def first_steps(name, steps, mode="function", policy="seed", frozen_from=0, gradient=GRADIENT):
    """What the late entries move in their first step after `steps` steps."""
    variable, optimizer = make(adaptive(name), unfreeze_policy=policy)
    step = in_mode(lambda g: optimizer.apply([g]), mode)
    for i in range(steps):
        if i == frozen_from:
            optimizer.freeze(variable, LATE)
        step(tf.constant(gradient))
    before = variable.numpy()
    optimizer.unfreeze(variable, LATE)
    step(tf.constant(gradient))
    return (variable.numpy() - before)[LATE], variable, optimizer, step


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ADAPTIVE)
def test_first_step_is_at_most_the_learning_rate(name, mode, backend):
    steps = 40 if mode == "eager" else 400
    moved, *_ = first_steps(name, steps, mode)
    assert (np.abs(moved) <= LR * 1.001).all(), moved / LR
    assert (moved[:7] != 0).all() and (np.sign(moved[:7]) == -np.sign(GRADIENT[:7])).all()
    assert moved[7] == 0 or name == "ScheduleFreeAdamW"
    if name in ("Adam", "AdamW", "Adam amsgrad", "RMSprop"):
        # Not less either, where the gradient is well above epsilon.
        assert np.allclose(np.abs(moved[:6]), LR * (1 - 0.9**400 if steps == 400 else 1), rtol=2e-3), moved / LR


@pytest.mark.parametrize("name", ["Adam", "Nadam", "RMSprop"])
def test_that_is_what_the_policy_is_for(name):
    """From slots of zero the first step is longer: the test above can fail."""
    moved, *_ = first_steps(name, 400, policy="zero")
    assert (np.abs(moved[:6]) > 1.1 * LR).all(), moved / LR


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Nadam"])
@pytest.mark.parametrize("steps", [2, 3, 5, 10, 30, 100])
def test_early(name, steps):
    moved, *_ = first_steps(name, steps)
    assert (np.abs(moved) <= LR * 1.001).all(), moved / LR


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
@pytest.mark.parametrize("size", [0.1, 1.0, 20.0])
def test_following_steps_stay_sane(name, size):
    """With gradients of one size the steps stay about the learning rate; with noise below that of fresh slots."""
    gradient = GRADIENT.copy()
    gradient[LATE] = size
    _, variable, _, step = first_steps(name, 300, gradient=gradient)
    for _ in range(50):
        before = variable.numpy()
        step(tf.constant(gradient))
        assert np.allclose((before - variable.numpy())[LATE], LR, rtol=1e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sparse", [False, True])
def test_each_waits_for_its_own_gradient(sparse, mode, backend):
    """A zero gradient, or a row that the gradient does not name, seeds nothing; repeated rows add up."""
    variable, optimizer = make(keras.optimizers.Adam(LR), (6, 2))
    optimizer.freeze(variable)

    def apply(rows, value):
        if sparse:
            index = tf.constant([row for row in rows for _ in range(2)])
            slices = tf.IndexedSlices(tf.fill([2 * len(rows), 2], value / 2), index, tf.constant([6, 2]))
            optimizer.apply([slices])
        else:
            optimizer.apply([value * tf.reduce_sum(tf.one_hot(rows, 6)[:, :, None] * tf.ones(2), 0)])

    steps = [in_mode(lambda v, rows=rows: apply(rows, v), mode) for rows in ([0], [1, 2], [0, 3, 4])]
    for _ in range(100):
        steps[0](tf.constant(1.0))
    optimizer.unfreeze(variable)
    for new, step in zip(([0], [1, 2], [3, 4]), steps, strict=True):
        before = variable.numpy()
        step(tf.constant(3.0 + len(new)))
        moved = np.abs(variable.numpy() - before)
        # Of repeated rows Keras sums the squares, not the square of the sum.
        assert np.allclose(moved[new], LR, rtol=4e-3 if sparse else 1e-3), (new, moved)
    assert not variable.numpy()[5].any()


def test_clipping_loss_scale_and_accumulation():
    """Seeds come from the gradient that the optimizer uses in the end."""
    inner = keras.optimizers.Adam(LR, global_clipnorm=0.1, gradient_accumulation_steps=2)
    variable, optimizer = make(keras.optimizers.LossScaleOptimizer(inner, initial_scale=1024.0))
    step = in_mode(lambda g: optimizer.apply([g * 1024.0]), "function")
    optimizer.freeze(variable, LATE)
    for _ in range(200):
        step(tf.constant(GRADIENT))
    optimizer.unfreeze(variable, LATE)
    before = variable.numpy()
    step(tf.constant(np.full(64, np.nan, "float32")))  # skipped
    for _ in range(2):
        assert_same_bits(variable.numpy(), before)
        step(tf.constant(GRADIENT))
    moved = np.abs(variable.numpy() - before)[LATE]
    assert np.allclose(moved[:6], LR, rtol=1e-3)
    m = inner._momentums[0].numpy()[LATE]
    assert np.abs(m[4]) < 0.1 and np.allclose(m[4] / m[0], 200, rtol=1e-3)


def test_entries_that_were_never_frozen_are_as_without():
    """Also those whose first gradient comes late: from zero, as the inner optimizer would."""
    variable, optimizer = make(keras.optimizers.Adam(LR))
    bare = keras.Variable(np.zeros(64, "float32"), name="v")
    twin = keras.optimizers.Adam(LR)
    twin.build([bare])
    optimizer.freeze(variable, LATE)
    for i in range(60):
        gradient = GRADIENT.copy()
        gradient[32:] *= i > 40
        if i == 30:
            optimizer.unfreeze(variable, LATE)
        optimizer.apply([tf.constant(gradient)])
        twin.apply([tf.constant(gradient)])
    assert_same_bits(variable.numpy()[8:], bare.numpy()[8:])


def test_frozen_and_unfrozen_between_two_steps_is_no_change():
    variable, optimizer = make(keras.optimizers.Adam(LR))
    for _ in range(5):
        optimizer.apply([tf.constant(GRADIENT)])
    state = [v.numpy() for v in optimizer.variables]
    optimizer.freeze(variable)
    optimizer.unfreeze(variable, LATE)
    optimizer.unfreeze(variable)
    for now, before in zip(optimizer.variables, state, strict=True):
        assert_same_bits(now.numpy(), before)


def test_frozen_again_before_it_was_seeded():
    variable, optimizer = make(keras.optimizers.Adam(LR))
    optimizer.freeze(variable)
    for _ in range(3):
        optimizer.apply([tf.constant(GRADIENT)])
    optimizer.unfreeze(variable, LATE)
    optimizer.freeze(variable, LATE)
    before = variable.numpy()
    optimizer.apply([tf.constant(GRADIENT)])
    assert_same_bits(variable.numpy(), before)
    assert not optimizer.inner_optimizer._velocities[0].numpy().any()


def test_frozen_and_unfrozen_while_it_waits():
    variable, optimizer = make(keras.optimizers.Adam(LR), masks={"v": False})
    for _ in range(400):
        optimizer.apply([tf.constant(GRADIENT)])
    optimizer.unfreeze(variable)
    for _ in range(3):
        optimizer.apply([tf.constant(GRADIENT * (np.arange(64) >= 8))])
    optimizer.freeze(variable, LATE)
    optimizer.unfreeze(variable, LATE)
    before = variable.numpy()
    optimizer.apply([tf.constant(GRADIENT)])
    assert np.allclose(np.abs(variable.numpy() - before)[:6], LR, rtol=2e-3)


def test_state_that_is_set_is_no_change_since_the_last():
    variable, optimizer = make(keras.optimizers.Adam(LR), masks={"v": False})
    for _ in range(200):
        optimizer.apply([tf.constant(GRADIENT)])
    frozen = [v.numpy() for v in optimizer.variables]
    optimizer.freeze(variable)
    optimizer.unfreeze(variable)
    optimizer.set_weights(frozen)
    optimizer.unfreeze(variable)
    before = variable.numpy()
    optimizer.apply([tf.constant(GRADIENT)])
    assert np.allclose(np.abs(variable.numpy() - before)[:6], LR, rtol=2e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Adam", "Nadam", "RMSprop"])
def test_repeated_rows_that_cancel(name, mode, backend):
    """They leave a second moment behind, and the first moment that comes later must fit it."""
    variable, optimizer = make(adaptive(name), (3, 2))
    optimizer.freeze(variable)

    def apply(values):
        rows = tf.IndexedSlices(tf.repeat(values[:, None], 2, 1), tf.constant([1, 1]), tf.constant([3, 2]))
        optimizer.apply([rows])

    step = in_mode(apply, mode)
    for _ in range(40 if mode == "eager" else 400):
        step(tf.constant([1.0, 1.0]))
    optimizer.unfreeze(variable)
    step(tf.constant([1.0, -1.0]))
    before = variable.numpy()
    step(tf.constant([1.0, 0.5]))
    moved = np.abs(variable.numpy() - before)
    assert (moved[1] <= 1.1 * LR).all() and (moved[1] > 0).all(), moved / LR


def test_before_the_first_step_nothing_is_late():
    variable, optimizer = make(keras.optimizers.RMSprop(LR), masks={"v": False})
    optimizer.unfreeze(variable)
    bare = keras.Variable(np.zeros(64, "float32"), name="v")
    keras.optimizers.RMSprop(LR).apply([tf.constant(GRADIENT)], [bare])
    optimizer.apply([tf.constant(GRADIENT)])
    assert_same_bits(variable.numpy(), bare.numpy())


KEPT = {"Ftrl": ["_accumulators", "_linears"], "ScheduleFreeAdamW": ["_momentums"]}


@pytest.mark.parametrize("policy", ["seed", "zero", "keep"])
@pytest.mark.parametrize("setup", SETUPS)
def test_what_each_policy_does_to_slots(setup, policy):
    variable, optimizer = make(SETUPS[setup](), (8, 8), unfreeze_policy=policy)
    gradient = tf.constant(GRADIENT.reshape(8, 8) + 0.5)
    for _ in range(3):
        optimizer.apply([gradient])
    optimizer.freeze(variable, np.s_[:4])
    optimizer.apply([gradient])
    inner = optimizer.inner_optimizer
    slots = {
        name: value[0]
        for name, value in vars(inner).items()
        if isinstance(value, list) and value and tuple(getattr(value[0], "shape", ())) == (8, 8)
        and name not in ("_trainable_variables",)
    }  # fmt: skip
    before = {name: slot.numpy() for name, slot in slots.items()}
    optimizer.unfreeze(variable, np.s_[:4])
    assert slots or setup == "SGD"
    for name, slot in slots.items():
        now = slot.numpy()
        assert_same_bits(now[4:], before[name][4:], name)
        if policy == "keep" or name in KEPT.get(setup, []):
            assert_same_bits(now, before[name], name)
        else:
            start = inner.initial_accumulator_value if setup == "Adagrad" else 0
            assert (now[:4] == np.float32(start)).all(), name


class Own(keras.optimizers.Optimizer):
    """A user's: one slot that is declared, one that is not."""

    def build(self, variables):
        super().build(variables)
        self.averages, self.secrets = self.add_optimizer_variables(variables, ["average", "secret"])

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        self.assign(self.averages[index], 0.99 * self.averages[index] + 0.01 * gradient**2)
        self.assign_add(self.secrets[index], gradient)
        self.assign_sub(variable, learning_rate * gradient / (keras.ops.sqrt(self.averages[index]) + 1e-7))


def test_user_written_optimizer():
    def late(cls):
        variable, optimizer = make(cls(learning_rate=LR))
        for i in range(50):
            if i == 20:
                optimizer.freeze(variable, LATE)
            optimizer.apply([tf.constant(GRADIENT)])
        secret = optimizer.inner_optimizer.secrets[0].numpy()
        averages = optimizer.inner_optimizer.averages[0].numpy()
        before = variable.numpy()
        optimizer.unfreeze(variable, LATE)
        assert_same_bits(optimizer.inner_optimizer.secrets[0].numpy(), secret)
        kept = optimizer.inner_optimizer.averages[0].numpy()
        optimizer.apply([tf.constant(GRADIENT)])
        return np.abs(variable.numpy() - before)[:6], (kept == averages).all()

    moved, kept = late(Own)
    assert kept and (moved > 1.1 * LR).all()
    declared = type("Declared", (Own,), {})
    fz.declare_slots(declared, {"averages": fz.Slot("second_moment")})
    moved, kept = late(type("Subclass", (declared,), {}))
    assert not kept and np.allclose(moved, LR, rtol=1e-3)


def test_bad_declarations():
    with pytest.raises(ValueError, match="`role` must be one of"):
        fz.Slot("third_moment")
    with pytest.raises(TypeError, match="must be a subclass of keras"):
        fz.declare_slots(int, {})
    with pytest.raises(TypeError, match="must map attributes to fz.Slot"):
        fz.declare_slots(Own, {"averages": "second_moment"})
    with pytest.raises(ValueError, match="`unfreeze_policy` must be one of"):
        fz.MaskedOptimizer(keras.optimizers.SGD(), unfreeze_policy="sow")


def test_what_waits_is_saved(tmp_path):
    """Unfrozen, saved before the next step, loaded: seeded then."""

    def model():
        layers = [keras.Input((3,)), keras.layers.Dense(4, name="d")]
        model = keras.Sequential(layers)
        model.compile(fz.MaskedOptimizer(keras.optimizers.Adam(LR)), "mse", jit_compile=False)
        return model

    first = model()
    x, y = np.ones((8, 3), "float32"), 5 * np.ones((8, 4), "float32")
    first.optimizer.freeze("d/kernel")
    first.fit(x, y, epochs=50, verbose=0)
    first.optimizer.unfreeze("d/kernel")
    first.save(tmp_path / "m.keras")
    tf.train.Checkpoint(model=first, optimizer=first.optimizer).write(str(tmp_path / "c"))
    kernel = first.layers[0].kernel.numpy()
    second = keras.models.load_model(tmp_path / "m.keras")
    third = model()
    third.optimizer.build(third.trainable_variables)
    tf.train.Checkpoint(model=third, optimizer=third.optimizer).read(str(tmp_path / "c")).assert_consumed()
    for loaded in (second, third):
        loaded.fit(x, y, verbose=0)
        assert np.allclose(loaded.layers[0].kernel.numpy() - kernel, LR, rtol=2e-3)
    assert second.optimizer.unfreeze_policy == "seed"


def test_inner_optimizer_that_is_wrapped_again():
    inner = keras.optimizers.Adam(LR)
    variable, optimizer = make(inner)
    for _ in range(100):
        optimizer.apply([tf.constant(GRADIENT)])
    again = fz.MaskedOptimizer(inner, masks={"v": False})
    again.build([variable])
    again.apply([tf.constant(GRADIENT)])
    before = variable.numpy()
    again.unfreeze(variable, LATE)
    again.apply([tf.constant(GRADIENT)])
    assert np.allclose(np.abs(variable.numpy() - before)[:6], LR, rtol=2e-3)


def test_multi_optimizer_and_16_bits():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has no MultiOptimizer")
    a = keras.Variable(np.zeros(8), dtype="bfloat16", name="a")
    b = keras.Variable(np.zeros(8), name="b")
    adam = keras.optimizers.Adam(LR, beta_2=0.99)
    maps = keras.optimizers.OptimizerMap(keras.optimizers.RMSprop(LR), {"a": adam})
    optimizer = fz.MaskedOptimizer(keras.optimizers.MultiOptimizer(maps))
    optimizer.build([a, b])
    optimizer.freeze(".*", np.s_[:4])
    for _ in range(60):
        optimizer.apply([tf.ones(8, "bfloat16"), tf.ones(8)])
    optimizer.unfreeze(".*")
    optimizer.apply([tf.ones(8, "bfloat16"), tf.ones(8)])
    assert np.allclose(a.numpy()[:4].astype("float32"), -LR, rtol=0.1)  # the arithmetic of bfloat16
    assert np.allclose(b.numpy()[:4], -LR, rtol=1e-3)
