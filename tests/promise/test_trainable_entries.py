"""Trainable entries get what the inner optimizer alone gives them, on hand-masked gradients.

The other side is made by hand: gradients through `tf.where`, and after each step
the frozen entries assigned back. In eager mode and in `tf.function` both sides
agree bit for bit, but for fused updates where TensorFlow itself rounds otherwise in a
`tf.function`: there they may differ by `ULPS_PER_STEP`. XLA reorders arithmetic by itself and compiles two different
programs here, so there each side may differ by `JIT_ULPS` units in the last place
of the largest magnitude that took part.
"""

import numpy as np
import pytest
from common import MODES, OPTIONS, ROUNDED_OTHERWISE, SETUPS, WAYS, assert_same_bits
from training import Training

import freezeops as fz

STEPS = 6
JIT_ULPS = 8
"""After six steps. Most set-ups differ by 0; clipped and mixing ones by the order of a sum."""

ULPS_PER_STEP = 2

SHAPES = {"v0": (9, 14), "v1": (21,)}


def train(setup, options, mode, **wrapping):
    """Values before and after of the trainable entries; by hand if nothing is said about wrapping."""
    training = Training(SHAPES, density=0.6, seed=11, mean=0.0)
    first = training.values()
    optimizer = SETUPS[setup](**options)
    training.start(fz.MaskedOptimizer(optimizer, **wrapping) if wrapping else optimizer, mode)
    training.step(STEPS)
    last = training.values()
    return [(first[name][mask], last[name][mask]) for name, mask in training.masks.items()]


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
    ours = train(setup, OPTIONS[option], mode, fused=fused)
    by_hand = train(setup, OPTIONS[option], mode)
    for (start, actual), (_, expected) in zip(ours, by_hand, strict=True):
        rounded_otherwise = mode == "function" and fused and setup.split()[0] in ROUNDED_OTHERWISE
        if mode != "jit" and not rounded_otherwise:
            assert_same_bits(actual, expected, f"{setup} {option} {mode}")
        else:
            # Entries near zero came there by cancellation: measure against where they started.
            unit = np.spacing(np.maximum(np.abs(expected), np.abs(start)))
            most = ULPS_PER_STEP * STEPS if rounded_otherwise else JIT_ULPS
            assert np.max(np.abs(actual - expected) / unit) <= most
