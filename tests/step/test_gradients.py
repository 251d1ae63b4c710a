"""Gradients of every kind: of unknown or other shapes, of other dtypes, slices. The bare optimizer is the model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from common import assert_same_bits

import freezeops as fz
from freezeops import legacy

SHAPE = (6, 4)
MASK = np.arange(24).reshape(SHAPE) % 3 > 0
ROWS = np.arange(6)[:, None] % 2 > 0

WAYS = {
    "full": {"state": "full"},
    "full unfused": {"state": "full", "fused": False},
    "compact": {"state": "compact"},
    "compact unfused": {"state": "compact", "fused": False},
    "legacy": None,
}

INNER = {
    "SGD": lambda module: module.optimizers.SGD(0.1),
    "momentum": lambda module: module.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda module: module.optimizers.Adam(0.1),
    "Ftrl": lambda module: module.optimizers.Ftrl(0.1),
    "global_clipnorm": lambda module: module.optimizers.Adam(0.1, global_clipnorm=1.0),
}


def make(way, inner, mask):
    """A masked optimizer, and the bare one that it is compared with."""
    module = tf_keras if way == "legacy" else keras
    one, bare = INNER[inner](module), INNER[inner](module)
    if way == "legacy":
        return legacy.MaskedOptimizer(one, masks={"w": mask}), bare
    return fz.MaskedOptimizer(one, masks={"w": mask}, **WAYS[way]), bare


def step(optimizer, variable, make_gradient, specs, arguments, jit):
    optimizer.build([variable])

    def apply(*given):
        optimizer.apply_gradients([(make_gradient(*given), variable)])

    if specs or jit:
        apply = tf.function(apply, input_signature=specs, jit_compile=jit, autograph=False)
    apply(*arguments)


def train(way, inner, mask, shape, make_gradient, specs=(), arguments=(), jit=False):
    """One step of both: the values of each, or the error."""
    results = []
    for optimizer in make(way, inner, mask):
        variable = tf.Variable(tf.ones(shape), name="w")
        try:
            step(optimizer, variable, make_gradient, specs, arguments, jit)
            results.append(variable.numpy())
        except (ValueError, TypeError, tf.errors.OpError) as error:
            # Nothing was applied.
            assert_same_bits(variable.numpy(), np.ones(shape, np.float32))
            results.append(error)
    return results


def check_same(actual, expected, mask):
    """The frozen entries as they were, and the trainable ones as the bare optimizer's."""
    assert not isinstance(actual, Exception), actual
    mask = np.broadcast_to(mask, actual.shape)
    assert_same_bits(actual[~mask], np.ones(actual.shape, np.float32)[~mask])
    np.testing.assert_allclose(actual[mask], expected[mask], rtol=1e-6)


@pytest.mark.parametrize(
    "shape, inner, jit",
    [
        *((shape, "Adam", False) for shape in ([4, 6], [24], [24, 1], [3, 4], [])),
        ([24], "SGD", False),
        ([24], "global_clipnorm", False),
        ([4, 6], "Adam", True),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS)
def test_another_shape_than_the_variables_is_refused(shape, way, inner, jit):
    """Also where it is not known before the step runs; it was applied to the wrong entries."""
    error, _ = train(way, inner, MASK, SHAPE, lambda g: g, [tf.TensorSpec(None)], [tf.ones(shape)], jit)
    assert isinstance(error, tf.errors.InvalidArgumentError), error
    assert "shape" in str(error).lower()
    # Known before: an error in words for people.
    error, _ = train(way, inner, ROWS, SHAPE, lambda g: g, [tf.TensorSpec(shape)], [tf.ones(shape)], jit)
    assert isinstance(error, ValueError) and "A gradient must have the shape of its variable" in str(error)


@pytest.mark.parametrize("spec, jit", [(None, False), ([None, 4], False), (None, True)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_unknown_shapes_that_are_right(spec, jit, way):
    gradient = tf.constant(np.linspace(-1.0, 1.0, 24, dtype=np.float32).reshape(SHAPE))
    actual, expected = train(way, "Adam", MASK, SHAPE, lambda g: g, [tf.TensorSpec(spec)], [gradient], jit)
    check_same(actual, expected, MASK)


@pytest.mark.parametrize("way", WAYS)
def test_static_shapes_cost_no_operation(way):
    optimizer, _ = make(way, "Adam", MASK)
    variable = tf.Variable(tf.ones(SHAPE), name="w")
    optimizer.build([variable])

    @tf.function(autograph=False)
    def function(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    graph = function.get_concrete_function(tf.TensorSpec(SHAPE)).graph
    assert "EnsureShape" not in {operation.type for operation in graph.get_operations()}
    unknown = function.get_concrete_function(tf.TensorSpec(None)).graph
    assert "EnsureShape" in {operation.type for operation in unknown.get_operations()}


@pytest.mark.parametrize("shape", [(3,), (5,), (2, 2)], ids=str)
@pytest.mark.parametrize("maskable", ["none", "permanent"])
def test_variables_without_a_mask_are_checked_too(shape, maskable):
    optimizer = fz.MaskedOptimizer(
        keras.optimizers.SGD(0.1), maskable={"w": "none"} if maskable == "none" else None, fused=False
    )
    if maskable == "permanent":
        optimizer.freeze("w", permanent=True)
    with pytest.raises(ValueError, match="must have the shape of its variable"):
        optimizer.apply([tf.ones(shape)], [tf.Variable(tf.ones([4]), name="w")])


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float64"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sparse", [False, True])
def test_other_dtypes(dtype, way, sparse):
    """The same values as the bare optimizer's, or an error of the same kind."""
    values = tf.cast(np.arange(8 if sparse else 24) % 4, dtype)

    def gradient():
        if sparse:
            return tf.IndexedSlices(tf.reshape(values, [2, 4]), tf.constant([1, 4]), tf.constant(SHAPE))
        return tf.reshape(values, SHAPE)

    for inner, mask in (("SGD", ROWS), ("Adam", MASK), ("global_clipnorm", MASK)):
        actual, expected = train(way, inner, mask, SHAPE, gradient)
        if isinstance(expected, Exception):
            assert type(actual) is type(expected)
        elif inner != "global_clipnorm":  # the norm is one of trainable entries only
            check_same(actual, expected, mask)


@pytest.mark.parametrize("dtype, mode", [("int32", "eager"), ("bool", "eager"), ("int32", "jit")])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "legacy"])
def test_other_dtypes_in_other_modes(dtype, mode, way, backend):
    gradient = tf.cast(tf.reshape(tf.range(24) % 4, SHAPE), dtype)
    if mode == "jit":
        actual, expected = train(way, "Adam", MASK, SHAPE, lambda: gradient, jit=True)
    else:
        values = []
        for optimizer in make(way, "Adam", MASK):
            variable = tf.Variable(tf.ones(SHAPE), name="w")
            optimizer.apply([gradient], [variable])
            values.append(variable.numpy())
        actual, expected = values
    check_same(actual, expected, MASK)


SLICES = {
    "unknown rank": (SHAPE, tf.TensorSpec(None), [1, 4]),
    "unknown width": (SHAPE, tf.TensorSpec([None, None]), [1, 4]),
    "no row": (SHAPE, tf.TensorSpec(None), []),
    "repeated rows": (SHAPE, tf.TensorSpec(None), [4, 1, 4]),
    "width 0": ((3, 0), tf.TensorSpec([None, 0]), [0, 1]),
    "width 0, unknown": ((3, 0), tf.TensorSpec(None), [0, 1]),
    "no rows at all": ((0, 4), tf.TensorSpec(None), []),
    "a vector": ((6,), tf.TensorSpec(None), [1, 4]),
    "three axes": ((6, 2, 3), tf.TensorSpec(None), [1, 4]),
}


@pytest.mark.parametrize(
    "case, by, jit",
    [
        *((case, "entries", False) for case in SLICES),
        *((case, by, True) for case in ("unknown rank", "width 0") for by in ("rows", "entries")),
        ("unknown rank", "rows", False),
        ("repeated rows", "rows", False),
    ],
)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "legacy"])
def test_slices_of_which_nothing_is_known_before(case, by, jit, way):
    shape, spec, rows = SLICES[case]
    mask = np.arange(np.prod(shape, dtype=int)).reshape(shape) % 3 > 0
    if by == "rows":
        mask = np.arange(shape[0]).reshape([-1] + [1] * (len(shape) - 1)) % 2 > 0
    specs = [spec, tf.TensorSpec([None], tf.int32), tf.TensorSpec([len(shape)], tf.int32)]
    values = np.linspace(-1.0, 1.0, len(rows) * int(np.prod(shape[1:], dtype=int)), dtype=np.float32)
    values = tf.constant(values.reshape([len(rows), *shape[1:]]))
    arguments = [values, tf.constant(rows, tf.int32), tf.constant(shape)]
    inner = "SGD" if case == "a vector" else "Adam"
    actual, expected = train(way, inner, mask, shape, tf.IndexedSlices, specs, arguments, jit)
    check_same(actual, expected, mask)


def test_slices_of_which_nothing_is_known_before_legacy():
    specs = [tf.TensorSpec(None), tf.TensorSpec([None], tf.int32), tf.TensorSpec([2], tf.int32)]
    arguments = [tf.ones([2, 4]), tf.constant([1, 4]), tf.constant(SHAPE)]
    actual, expected = train("legacy", "Adam", MASK, SHAPE, tf.IndexedSlices, specs, arguments)
    check_same(actual, expected, MASK)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [[2, 3], [2, 2, 2], [8]], ids=str)
def test_slices_that_are_no_rows_of_the_variable(way, shape):
    specs, arguments = [tf.TensorSpec(None)], [tf.ones(shape)]
    error, _ = train(
        way,
        "SGD",
        MASK,
        SHAPE,
        lambda g: tf.IndexedSlices(g, tf.constant([1, 4]), tf.constant(SHAPE)),
        specs,
        arguments,
    )
    assert isinstance(error, tf.errors.InvalidArgumentError)


@pytest.mark.parametrize("gradient", [np.ones(SHAPE, np.int64), np.ones(SHAPE, bool), np.ones(SHAPE).tolist()])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "legacy"])
def test_gradients_that_are_no_tensors(gradient, way):
    values = []
    for optimizer in make(way, "Adam", MASK):
        variable = tf.Variable(tf.ones(SHAPE), name="w")
        optimizer.apply([tf.constant(gradient) if isinstance(gradient, list) else gradient], [variable])
        values.append(variable.numpy())
    check_same(*values, MASK)
