"""The values of trainable parts: how exact they are, and NaN and infinities."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from agreement import PART
from common import assert_same_bits

import freezeops as fz

TOKENS, ROWS, COLUMNS = 300, 40, 56
"""More tokens, and more columns, than the kernel takes in one go."""

KINDS = ("entries", "rows", "columns", "sum", "channels")
JIT = pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])


def mask_of(kind, rng, share=0.2):
    if kind == "sum":
        return rng.random(COLUMNS) < share
    mask = np.zeros((ROWS, COLUMNS), bool)
    if kind == "rows":
        mask[rng.permutation(ROWS)[:8]] = True
    elif kind == "entries":
        mask = rng.random(mask.shape) < share
    else:
        mask[:, rng.permutation(COLUMNS)[:10]] = True
    return np.tile(mask, (3, 1, 1)) if kind == "channels" else mask


class Step:
    """Steps of SGD from zero weights, whose gradient is `x^T dy`: afterwards the weights are minus that.

    Args:
        kind: Of the mask, and of what the weights are.
        mask: The mask.
        skips: Whether parts are made.
        dtype: Of the factors; weights are `float32`, or `float64`.
        jit: Whether XLA compiles it.
        around: Makes an optimizer of the `MaskedOptimizer`.
        inner: The inner optimizer.
        options: For `MaskedOptimizer`.
    """

    def __init__(self, kind, mask, skips, dtype="float32", jit=False, around=lambda each: each, inner=None, **options):
        keras.utils.clear_session()
        self.kind, self.mask, self.dtype = kind, mask, dtype
        own = "float64" if dtype == "float64" else "float32"
        self.variable = keras.Variable(np.zeros(mask.shape), dtype=own, name="w")
        inner = inner or keras.optimizers.SGD(1.0)
        given = mask[:, :1] if kind == "rows" else mask  # a bit for each row
        self.masked = fz.MaskedOptimizer(inner, {"w": given}, state="compact", skip_frozen_gradients=skips, **options)
        self.optimizer = around(self.masked)
        self.optimizer.build([self.variable])
        self._run = tf.function(self._step, jit_compile=jit)

    def _step(self, x, dy):
        with tf.GradientTape() as tape:
            weights = tf.cast(tf.convert_to_tensor(self.variable), self.dtype)
            loss = tf.cast(tf.reduce_sum(self._output(x, weights) * dy), "float32")
            loss = self.optimizer.scale_loss(loss)
        self.optimizer.apply(tape.gradient(loss, [self.variable.value]), [self.variable])

    def _output(self, x, weights):
        if self.kind == "sum":
            return tf.nn.bias_add(tf.zeros([TOKENS, COLUMNS], self.dtype), weights)
        if self.kind == "channels":
            return tf.nn.conv1d(x[None], weights, 1, "SAME")[0]
        return tf.matmul(x, weights)

    def __call__(self, x, dy):
        """Takes a step; returns the negative of the weights."""
        self._run(tf.cast(tf.constant(x), self.dtype), tf.cast(tf.constant(dy), self.dtype))
        (report,) = self.masked.describe()
        if self.masked.skip_frozen_gradients:
            assert (report.gradient, report.gradient_reason) == PART
        return -self.variable.numpy()


def whole_product(kind, x, dy):
    """The gradient in float64."""
    x, dy = x.astype("float64"), dy.astype("float64")
    with np.errstate(invalid="ignore"):
        if kind == "sum":
            return dy.sum(0)
        if kind != "channels":
            return x.T @ dy
        padded = np.pad(x, ((1, 1), (0, 0)))
        return np.stack([padded[tap : tap + TOKENS].T @ dy for tap in range(3)])


def factors(rng, dtype="float32"):
    real = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x, dy = rng.normal(size=(TOKENS, ROWS)), rng.normal(size=(TOKENS, COLUMNS))
    return [each.astype(real).astype("float64" if dtype == "float64" else "float32") for each in (x, dy)]


def bound(kind, x, dy, dtype="float32"):
    return 4 * np.finfo(dtype).eps * np.sqrt(TOKENS) * whole_product(kind, np.abs(x), np.abs(dy))


@JIT
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32(kind, jit):
    rng = np.random.default_rng(0)
    x, dy = factors(rng)
    mask = mask_of(kind, rng)
    part, whole = (Step(kind, mask, skips, jit=jit)(x, dy) for skips in (True, False))
    assert (np.abs(part - whole) <= bound(kind, x, dy)).all()
    assert (np.abs(part - whole_product(kind, x, dy)) <= bound(kind, x, dy))[mask].all()
    assert_same_bits(part[~mask], -np.zeros_like(part[~mask]))


@pytest.mark.parametrize("kind", ["rows", "columns", "sum"])
def test_in_float64(kind):
    rng = np.random.default_rng(0)
    x, dy = factors(rng, "float64")
    mask = mask_of(kind, rng)
    part = Step(kind, mask, True, "float64")(x, dy)
    assert (np.abs(part - whole_product(kind, x, dy)) <= bound(kind, x, dy, "float64"))[mask].all()


@JIT
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_16_bits(kind, dtype, jit):
    """Added up in float32 and rounded once."""
    rng = np.random.default_rng(0)
    x, dy = factors(rng, dtype)
    mask = mask_of(kind, rng)
    part = Step(kind, mask, True, dtype, jit)(x, dy)
    exact = whole_product(kind, x, dy)
    real = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert_same_bits(part, part.astype(real).astype("float32"))
    # The unit in the last place of the larger of the two; a sum that cancels is off by roundings in float32.
    information = ml_dtypes.finfo(real)
    unit = 2.0 ** np.floor(np.log2(np.maximum(np.abs(exact), float(information.tiny)))) * float(information.eps)
    off = np.abs(part - exact)[mask]
    if (kind, dtype, jit) == ("channels", "float16", False):
        # TensorFlow adds a convolution's gradient up in float16, the whole one as well.
        whole = Step(kind, mask, False, dtype)(x, dy)
        assert off.max() <= 1.5 * np.abs(whole - exact)[mask].max()
    else:
        assert (off <= (unit + bound(kind, x, dy))[mask]).all()


def test_16_bits_that_overflow():
    """Past the largest number of float16 in the product itself, as the whole product."""
    rng = np.random.default_rng(0)
    x, dy = factors(rng, "float16")
    mask = mask_of("entries", rng)
    x, dy = np.abs(x) * 256, np.abs(dy) * 256
    part, whole = (Step("entries", mask, skips, "float16")(x, dy) for skips in (True, False))
    assert np.isposinf(part[mask]).all()
    assert_same_bits(part, whole)


# NaN and infinities.


def odd_factors(rng, kind, mask):
    """Factors with NaN and infinities; the rows and columns of the product that see none."""
    x, dy = factors(rng)
    dy[10:20] = 0  # an infinity times this is NaN
    x[3, 1], x[12, 2], x[30, 4] = np.nan, np.inf, -np.inf
    dy[5, 3], dy[7, 6], dy[9, 7] = np.nan, np.inf, -np.inf
    return x, dy


def assert_like(part, whole, allowed):
    for kind_of in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind_of(part), kind_of(whole))
    finite = np.isfinite(whole)
    assert finite.any() and not finite.all()
    assert (np.abs(part[finite] - whole[finite]) <= allowed[finite]).all()


@JIT
@pytest.mark.parametrize("kind", KINDS)
def test_trainable_entries_get_what_the_product_gives(kind, jit):
    rng = np.random.default_rng(0)
    mask = mask_of(kind, rng)
    # Some rows and columns with NaN and infinities are trainable, some are not.
    if kind in ("columns", "channels"):
        mask[..., :5], mask[..., 6] = [False, False, False, True, False], True
    elif kind == "sum":
        mask[:8] = [False, True, False, True, False, False, True, True]
    elif kind == "rows":
        mask[:5] = np.array([True, True, True, False, False])[:, None]
    x, dy = odd_factors(rng, kind, mask)
    part, whole = (Step(kind, mask, skips, jit=jit)(x, dy) for skips in (True, False))
    with np.errstate(invalid="ignore"):
        allowed = np.nan_to_num(
            bound(kind, np.nan_to_num(x, posinf=0, neginf=0), np.nan_to_num(dy, posinf=0, neginf=0))
        )
    assert_like(part[mask], whole[mask], allowed[mask])
    assert_same_bits(part[~mask], -np.zeros_like(part[~mask]))


def hidden(kind):
    """A mask, and factors whose NaN and infinities only frozen entries see."""
    rng = np.random.default_rng(0)
    mask = mask_of(kind, rng)
    x, dy = factors(rng)
    if kind in ("entries", "rows"):
        mask[0], mask[5] = False, False  # the first entry stands for room that is left
        x[:, 0], x[4, 5] = np.nan, np.inf
    if kind != "rows":
        mask[..., 0], mask[..., 8] = False, False
        dy[:, 0], dy[2, 8] = np.nan, -np.inf
    assert mask.any()
    return mask, x, dy


@JIT
@pytest.mark.parametrize("room", [None, 0.4], ids=["full", "room"])
@pytest.mark.parametrize("kind", ["entries", "rows", "columns", "sum"])
def test_what_only_frozen_entries_see(kind, room, jit):
    """It reaches neither entries nor norms."""
    mask, x, dy = hidden(kind)
    options = {"capacity": room, "jit": jit}
    part = Step(kind, mask, True, **options)(x, dy)
    expected = whole_product(kind, x, dy)
    assert np.isfinite(part).all()
    assert (np.abs(part - expected)[mask] <= bound(kind, x, dy)[mask]).all()
    clipped = Step(kind, mask, True, inner=keras.optimizers.SGD(1.0, clipnorm=0.5), **options)(x, dy)
    norm = np.sqrt((expected[mask] ** 2).sum())
    np.testing.assert_allclose(clipped[mask], expected[mask] * 0.5 / norm, rtol=1e-3, atol=1e-6)


@JIT
@pytest.mark.parametrize("kind", ["entries", "rows", "columns", "sum"])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_loss_scaling_skips_for_trainable_entries_alone(where, kind, jit):
    def scaler(inner):
        return keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)

    mask, x, dy = hidden(kind)
    options = {"inner": scaler(keras.optimizers.SGD(1.0))} if where == "inside" else {"around": scaler}
    step = Step(kind, mask, True, jit=jit, capacity=0.4, **options)
    scaler = step.optimizer if where == "outside" else step.masked.inner_optimizer
    first = step(x, dy)
    assert (
        np.isfinite(first).all()
        and (np.abs(first - whole_product(kind, x, dy))[mask] <= bound(kind, x, dy)[mask]).all()
    )
    assert float(scaler.dynamic_scale) == 8.0 and int(step.masked.iterations) == 1
    dy[1, np.argwhere(mask)[0][-1]] = np.inf
    assert_same_bits(step(x, dy), first)
    assert float(scaler.dynamic_scale) == 4.0 and int(step.masked.iterations) == 1
