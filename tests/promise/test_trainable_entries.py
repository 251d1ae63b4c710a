"""Trainable entries get what the inner optimizer alone gives them, on hand-masked gradients.

The other side is made by hand: gradients through `tf.where`, and after each step
the frozen entries assigned back. In eager mode and in `tf.function` both sides
agree bit for bit, but for fused updates where TensorFlow itself rounds otherwise in a
`tf.function`: there they may differ by `ULPS_PER_STEP`. XLA reorders arithmetic by itself and compiles two different
programs here, so there each side may differ by `JIT_ULPS` units in the last place
of the largest magnitude that took part.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from common import MODES, OPTIONS, ROUNDED_OTHERWISE, SETUPS, WAYS, assert_same_bits, in_mode

import freezeops as fz

STEPS = 6
JIT_ULPS = 8
"""After six steps. Most set-ups differ by 0; clipped and mixing ones by the order of a sum."""

ULPS_PER_STEP = 2

SHAPES = [(9, 14), (21,)]


def train(setup, options, mode, by_hand, **wrapping):
    """Values before and after of the trainable entries; `wrapping` is what `MaskedOptimizer` is given besides."""
    rng = np.random.default_rng(11)
    masks = [rng.random(shape) < 0.6 for shape in SHAPES]
    variables = [
        keras.Variable(rng.normal(size=shape).astype("float32"), name=f"v{i}") for i, shape in enumerate(SHAPES)
    ]
    first = [variable.numpy() for variable in variables]
    optimizer = SETUPS[setup](**options)
    if not by_hand:
        optimizer = fz.MaskedOptimizer(optimizer, **wrapping)
        for variable, mask in zip(variables, masks, strict=True):
            optimizer.register_mask(variable, mask)
    optimizer.build(variables)

    def step(gradients):
        if not by_hand:
            optimizer.apply(gradients, variables)
            return
        old = [tf.identity(variable.value) for variable in variables]
        gradients = [tf.where(mask, gradient, 0.0) for mask, gradient in zip(masks, gradients, strict=True)]
        optimizer.apply(gradients, variables)
        for variable, mask, value in zip(variables, masks, old, strict=True):
            variable.assign(tf.where(mask, variable.value, value))

    step = in_mode(step, mode)
    for _ in range(STEPS):
        step([tf.constant(rng.normal(size=shape).astype("float32")) for shape in SHAPES])
    last = [variable.numpy() for variable in variables]
    return [(before[mask], after[mask]) for before, after, mask in zip(first, last, masks, strict=True)]


CASES = [
    (setup, fused, option, mode)
    for setup, fused in WAYS
    for option in OPTIONS
    for mode in MODES
    # Compiling takes long, and those that are not fused all go the same way.
    if mode != "jit" or fused or option in ("plain", "weight_decay", "global_clipnorm")
]


@pytest.mark.parametrize(("setup", "fused", "option", "mode"), CASES)
def test_as_by_hand(setup, fused, option, mode):
    ours = train(setup, OPTIONS[option], mode, by_hand=False, fused=fused)
    by_hand = train(setup, OPTIONS[option], mode, by_hand=True)
    for (start, actual), (_, expected) in zip(ours, by_hand, strict=True):
        rounded_otherwise = mode == "function" and fused and setup.split()[0] in ROUNDED_OTHERWISE
        if mode != "jit" and not rounded_otherwise:
            assert_same_bits(actual, expected, f"{setup} {option} {mode}")
        else:
            # Entries near zero came there by cancellation: measure against where they started.
            unit = np.spacing(np.maximum(np.abs(expected), np.abs(start)))
            most = ULPS_PER_STEP * STEPS if rounded_otherwise else JIT_ULPS
            assert np.max(np.abs(actual - expected) / unit) <= most
