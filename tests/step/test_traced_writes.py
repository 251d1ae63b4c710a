"""What else writes variables in a training step: warned of when the step is traced, before it runs."""

import contextlib
import gc
import warnings
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import freezeops as fz
from freezeops.step import traced_writes

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(32, 2)).astype("float32")

SETTINGS = {
    "graph": {"jit_compile": False},
    "jit": {"jit_compile": True},
    "steps": {"jit_compile": False, "steps_per_execution": 2},
}


@pytest.fixture
def said():
    """The warnings of freezeops so far, as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        class Said:
            @property
            def now(self):
                return [str(w.message) for w in caught if "frozen" in str(w.message) or "moves" in str(w.message)]

        yield Said()


def fit(model, optimizer, **setting):
    model.compile(optimizer, "mse", **({"jit_compile": False} | setting))
    model.fit(X, Y, batch_size=8, verbose=0)


def sequential(*layers):
    return keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dense(2, name="head")])


def spectral():
    dense = keras.layers.Dense(6, name="dense")
    return sequential(keras.layers.SpectralNormalization(dense, name="sn")), dense.kernel


def normed(**options):
    return sequential(keras.layers.Dense(6, name="dense"), keras.layers.BatchNormalization(name="bn", **options))


@pytest.mark.parametrize(
    "target, state, setting",
    [(target, "full", "graph") for target in ("variable", "pattern", "masks", "layer", "permanent")]
    + [("variable", "full", "jit"), ("variable", "full", "steps"), ("masks", "compact", "graph")],
)
def test_a_layer_that_rewrites_its_kernel(target, state, setting, said):
    model, kernel = spectral()
    masks = {"dense/kernel": np.arange(6)[None, :] >= 3} if target == "masks" else None
    optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(1e-2), masks=masks, state=state)
    if target == "permanent":
        optimizer.freeze(kernel, permanent=True)
    elif target != "masks":
        layer = model.get_layer("sn").layer
        optimizer.freeze({"variable": kernel, "pattern": "dense/kernel", "layer": layer}[target])
    assert not said.now
    fit(model, optimizer, **SETTINGS[setting])
    (message,) = said.now
    assert "outside of the optimizer" in message and "dense/kernel']" in message and "frozen_entries()" in message


@pytest.mark.parametrize(
    "target, setting",
    [(target, "graph") for target in ("variable", "pattern", "masks", "one entry")]
    + [("pattern", "jit"), ("pattern", "steps")],
)
def test_moving_statistics_beside_frozen_entries(target, setting, said):
    model = normed()
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.Adam(1e-2), masks={"(dense|bn)/.*": False} if target == "masks" else None
    )
    if target == "variable":
        optimizer.freeze(model.get_layer("bn").trainable_variables)
    elif target == "one entry":
        optimizer.freeze("bn/gamma", [0])
    elif target == "pattern":
        optimizer.freeze("(dense|bn)/.*")
    fit(model, optimizer, **SETTINGS[setting])
    (message,) = said.now
    assert "moving" in message and "bn/moving_mean" in message and "bn/moving_variance" in message
    assert "trainable = False" in message


def test_moving_statistics_of_a_layer_without_variables_of_its_own(said):
    """In a block that is frozen as a whole; not in one of which something trains."""

    class Block(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.dense = keras.layers.Dense(6, name="dense")
            self.norm = keras.layers.BatchNormalization(center=False, scale=False, name="bn")

        def build(self, shape):
            self.dense.build(shape)
            self.norm.build((None, 6))
            self.built = True

        def call(self, x, training=None):
            return self.norm(self.dense(x), training=training)

    for target, expected in (("block/dense/kernel", 0), ("block/.*", 1)):
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
        optimizer.freeze(target)
        fit(sequential(Block(name="block")), optimizer)
        assert len(said.now) == expected
    assert "block/bn/moving_mean" in said.now[0]


def test_a_layer_as_the_target_warns_at_once_and_once(said):
    model = normed()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.freeze(model.layers[:2])
    (message,) = said.now
    assert "still moves" in message and "bn/moving_mean" in message
    fit(model, optimizer)
    assert len(said.now) == 1


@pytest.mark.parametrize("verb", ["freeze", "train_only", "register_mask"])
def test_known_layers_are_named_at_once(verb, said):
    model, _ = spectral()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    for target in (model.get_layer("sn"), model.layers[0:1]):
        {
            "freeze": lambda t: optimizer.freeze(t),
            "train_only": lambda t: optimizer.train_only(t, []),
            "register_mask": lambda t: optimizer.register_mask(t, False),
        }[verb](target)
    (message,) = said.now
    assert "rewrite" in message and "sn/dense/kernel" in message and "sn/vector_u" in message
    fit(model, optimizer)
    assert len(said.now) == 1
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.register_mask(model.get_layer("sn"), True)
    optimizer.unfreeze(model)
    assert len(said.now) == 1


def test_the_warning_names_the_line_of_the_call():
    model = normed()
    for state in ("full", "built"):
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
        if state == "built":
            optimizer.build(model.trainable_variables)
        with pytest.warns(UserWarning, match="still moves") as caught:
            optimizer.freeze(model)
        assert [w.filename for w in caught] == [__file__]


def test_the_warning_comes_before_the_first_step(said):
    model, kernel = spectral()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.freeze(kernel)
    before = kernel.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="dense/kernel"):
            fit(model, optimizer)
    np.testing.assert_array_equal(kernel.numpy(), before)


def test_frozen_after_the_trace(said):
    """No new trace is made then, so it is known from the last one."""
    model, _ = spectral()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    fit(model, optimizer)
    assert not said.now
    optimizer.freeze("head/kernel")
    assert not said.now
    optimizer.freeze("dense/kernel", [0])
    (message,) = said.now
    assert "dense/kernel" in message
    optimizer.freeze("dense/kernel", [1])
    model.fit(X[:5], Y[:5], batch_size=5, verbose=0)  # another trace
    assert len(said.now) == 1


def steps_of(optimizer, variables, write):
    """Training steps with a write somewhere, by a name for where."""
    gradients = [tf.ones_like(v) for v in variables]
    called = tf.function(write)

    def before():
        write()
        optimizer.apply(gradients, variables)

    def after():
        optimizer.apply(gradients, variables)
        write()

    def in_function():
        tf.function(write)()
        optimizer.apply(gradients, variables)

    def in_function_under_a_tape():
        with tf.GradientTape() as tape:
            for v in variables:
                tape.watch(v)
            loss = tf.add_n([tf.reduce_sum(v * v) for v in variables]) + tf.cast(called() is None, tf.float32)
        optimizer.apply(tape.gradient(loss, variables), variables)

    def in_jit():
        tf.function(write, jit_compile=True)()
        optimizer.apply(gradients, variables)

    def in_cond():
        tf.cond(optimizer.iterations.value >= 0, lambda: write() or 1, lambda: 1)
        optimizer.apply(gradients, variables)

    def in_case():
        tf.switch_case(tf.cast(optimizer.iterations.value, tf.int32), [lambda: 1, lambda: write() or 1])
        optimizer.apply(gradients, variables)

    def in_loop():
        tf.while_loop(lambda i: i < 2, lambda i: [write() or i + 1], [0])
        optimizer.apply(gradients, variables)

    def in_function_in_cond():
        tf.cond(optimizer.iterations.value >= 0, lambda: tf.function(write)() or 1, lambda: 1)
        optimizer.apply(gradients, variables)

    def around_a_cond():
        write()
        tf.cond(optimizer.iterations.value >= 0, lambda: optimizer.apply(gradients, variables) or 1, lambda: 1)

    def around_a_loop():
        write()
        tf.while_loop(lambda i: i < 2, lambda i: [optimizer.apply(gradients, variables) or i + 1], [0])

    def around_a_function():
        write()
        tf.function(lambda: optimizer.apply(gradients, variables))()

    return {name: step for name, step in locals().items() if callable(step) and name not in ("write", "called")}


def calling(write, variable):
    def call():
        write(variable)

    return call


PLACES = list(steps_of(None, [], lambda: None))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_wherever_it_is_written(place, jit_compile, said):
    writes = {
        "assign": lambda v: v.assign(v * 2),
        "assign_add": lambda v: v.assign_add(v),
        "assign_sub": lambda v: v.assign_sub(v),
        "scatter": lambda v: v.scatter_update(tf.IndexedSlices(tf.ones([1]), [0])),
        "slice": lambda v: v[:1].assign([1.0]),
    }
    for kind, write in writes.items() if place == "before" else [("assign", writes["assign"])]:
        if jit_compile and kind == "slice":
            continue
        v, other = tf.Variable(tf.ones([3]), name="v"), tf.Variable(tf.ones([3]), name="other")
        optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"v": np.arange(3) > 0, "other": True})
        optimizer.build([v, other])
        counts = len(said.now)
        step = steps_of(optimizer, [v, other], calling(write, v))[place]
        tf.function(step, jit_compile=jit_compile)()
        assert len(said.now) == counts + 1, kind
        assert "['v']" in said.now[-1]
        step = steps_of(optimizer, [v, other], calling(write, other))[place]
        tf.function(step, jit_compile=jit_compile)()
        assert len(said.now) == counts + 1, kind


@pytest.mark.parametrize("place", PLACES)
def test_not_where_it_is_guarded(place, said):
    v = tf.Variable(tf.ones([3]), name="v")
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"v": np.arange(3) > 0})
    optimizer.build([v])

    def write():
        with optimizer.frozen_entries():
            v.assign(v * 2)

    tf.function(steps_of(optimizer, [v], write)[place])()
    assert v.numpy()[0] == 1 and not said.now


def test_several_steps_in_one_trace(said):
    v = tf.Variable(tf.ones([3]), name="v")
    optimizers = [
        fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"v": np.arange(3) > 0}, name=name) for name in "ab"
    ]
    for optimizer in optimizers:
        optimizer.build([v])
    one = tf.function(lambda: optimizers[0].apply([tf.ones([3])], [v]))
    one()

    @tf.function
    def steps():
        one()  # traced before
        for optimizer in [*optimizers, *optimizers]:
            optimizer.apply([tf.ones([3])], [v])
        for _ in tf.range(2):
            optimizers[1].apply([tf.ones([3])], [v])
        one()

    steps()
    assert not said.now

    @tf.function
    def clipped():
        for optimizer in optimizers:
            optimizer.apply([tf.ones([3])], [v])
        v.assign(tf.clip_by_value(v, -1.0, 1.0))

    clipped()
    assert len(said.now) == 2  # one for each optimizer


INNER = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "averaged": lambda: keras.optimizers.AdamW(1e-2, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2, global_clipnorm=1.0),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2)),
    "Ftrl": lambda: keras.optimizers.Ftrl(1e-2),
    "Nadam": lambda: keras.optimizers.Nadam(1e-2),
}


@pytest.mark.parametrize(
    "inner, fused, setting",
    [(inner, True, "graph") for inner in INNER]
    + [("SGD", False, "graph"), ("SGD", True, "jit"), ("scaled", False, "jit"), ("averaged", False, "steps")],
)
def test_no_false_alarm_in_fit(inner, fused, setting, said):
    """Of Keras's own writes: slots, averages, metrics, seeds, counts, loss scale, constraints, untouched layers."""
    still = keras.layers.BatchNormalization(name="still")
    still.trainable = False
    model = sequential(
        keras.layers.Dense(6, name="dense", kernel_constraint="non_neg"),
        keras.layers.Dropout(0.3, name="dropout"),
        still,
        keras.layers.Dense(6, name="free"),
        keras.layers.BatchNormalization(name="moves"),
        keras.layers.GaussianNoise(0.1),
    )
    optimizer = fz.MaskedOptimizer(INNER[inner](), fused=fused)
    optimizer.freeze("dense/kernel", [0])
    optimizer.freeze("head/.*")
    optimizer.freeze("free/bias", permanent=True)
    model.compile(optimizer, "mse", metrics=["mae"], **SETTINGS[setting])
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0)
    assert not said.now


def test_no_false_alarm_with_loss_scaling_outside(said):
    with contextlib.ExitStack() as stack:
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_float16")
        stack.callback(keras.config.set_dtype_policy, before)
        model = normed()
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(1e-2), masks={"dense/.*": False})
        fit(model, optimizer)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) and not said.now
        optimizer.freeze("bn/.*")
        assert len(said.now) == 1 and "moving" in said.now[0]
        model, kernel = spectral()
        optimizer = fz.MaskedOptimizer(keras.optimizers.Adam(1e-2))
        optimizer.freeze(kernel)
        fit(model, optimizer)
        assert len(said.now) == 2 and "dense/kernel" in said.now[1]


def test_no_false_alarm_of_variables_that_are_created_in_the_step(said):
    class Model(tf.Module):
        w = None

        @tf.function
        def step(self):
            if self.w is None:
                self.w = tf.Variable(lambda: tf.ones([3]), name="layer/w")
                self.average = tf.Variable(lambda: tf.ones([3]), name="layer/w/average", trainable=False)
            self.average.assign(0.9 * self.average + 0.1 * self.w)
            optimizer.apply([tf.ones([3])], [self.w])

    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"w": False})
    model = Model()
    for _ in range(3):
        model.step()
    assert not said.now
    np.testing.assert_array_equal(model.w.numpy(), 1)


def test_no_false_alarm_of_a_metric_of_a_layers_name(said):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(inputs))
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1), masks={"head/.*": False})
    model.compile(optimizer, "mse", metrics=[keras.metrics.RootMeanSquaredError(name="head")])
    model.fit(X, Y, verbose=0)
    assert not said.now


def test_no_false_alarm_of_a_copy_of_the_model(said):
    """A target network, whose variables have the same paths."""

    class Student(keras.Sequential):
        def train_step(self, data):
            logs = super().train_step(data)
            for slow, fast in zip(teacher, self.trainable_variables, strict=True):
                slow.assign(0.9 * slow + 0.1 * fast)
            return logs

    model = Student([keras.Input((8,)), keras.layers.Dense(6, name="dense"), keras.layers.Dense(2, name="head")])
    teacher = [tf.Variable(v.value, trainable=False, name=v.value.name[:-2]) for v in model.trainable_variables]
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.freeze("dense/.*")
    fit(model, optimizer)
    assert not said.now


def test_eager_steps_are_not_looked_at(said):
    model, kernel = spectral()
    optimizer = fz.MaskedOptimizer(keras.optimizers.SGD(0.1))
    optimizer.freeze(kernel)
    model.compile(optimizer, "mse", run_eagerly=True)
    model.fit(X, Y, verbose=0)
    assert not said.now


def test_graphs_are_not_kept():
    """TensorFlow keeps those that anything was traced in for long, so one without operations."""
    graph = tf.__internal__.FuncGraph("step")
    watching = traced_writes.TracedWrites()
    with graph.as_default(), traced_writes.guarded():
        watching.watch([])
    assert graph in traced_writes._traces
    kept = weakref.ref(graph)
    del graph
    gc.collect()
    assert kept() is None


# tf_keras.


def legacy_layers():
    tf_keras = pytest.importorskip("tf_keras")

    class PruneLowMagnitude(tf_keras.layers.Wrapper):
        """Multiplies its layer's kernel by a mask in each call, as TensorFlow Model Optimization's wrapper does."""

        def build(self, shape):
            super().build(shape)
            kernel = self.layer.kernel
            self.mask = self.add_weight("mask", shape=kernel.shape, initializer="ones", trainable=False)
            self.pruning_vars = [(kernel, self.mask, None)]

        def call(self, x, training=None):
            self.add_update(self.layer.kernel.assign(self.layer.kernel * self.mask))
            return self.layer(x)

    return tf_keras, PruneLowMagnitude


@pytest.mark.parametrize(
    "scaled, setting", [("no", "graph"), ("no", "jit"), ("no", "steps"), ("inside", "graph"), ("outside", "graph")]
)
def test_legacy(scaled, setting, said):
    tf_keras, Pruned = legacy_layers()
    from freezeops import legacy

    model = tf_keras.Sequential(
        [
            tf_keras.Input((8,)),
            Pruned(tf_keras.layers.Dense(6), name="pruned"),
            tf_keras.layers.BatchNormalization(name="bn"),
            tf_keras.layers.Dropout(0.5),
            tf_keras.layers.Dense(2, name="head"),
        ]
    )
    scaler = tf_keras.mixed_precision.LossScaleOptimizer
    inner = tf_keras.optimizers.AdamW(1e-2, use_ema=True, ema_overwrite_frequency=2)
    masked = legacy.MaskedOptimizer(scaler(inner) if scaled == "inside" else inner)
    masked.freeze("pruned/kernel", [0])
    masked.freeze("head/.*")
    model.compile(scaler(masked) if scaled == "outside" else masked, "mse", metrics=["mae"], **SETTINGS[setting])
    model.fit(X, Y, batch_size=8, verbose=0)
    (message,) = said.now
    assert "['pruned/kernel']" in message and "bn" not in message
    masked.freeze("bn/gamma", [0])
    assert len(said.now) == 2 and "bn/moving_mean" in said.now[1] and "moving_variance" in said.now[1]


def test_legacy_layers_as_targets(said):
    tf_keras, Pruned = legacy_layers()
    from freezeops import legacy

    model = tf_keras.Sequential([tf_keras.Input((8,)), Pruned(tf_keras.layers.Dense(2), name="pruned")])
    legacy.MaskedOptimizer(tf_keras.optimizers.SGD()).freeze(model)
    (message,) = said.now
    assert "rewrite" in message and "pruned/kernel" in message
