"""Generated variables for the op FusedUpdate and its twin, and how their results are compared."""

import ml_dtypes
import numpy as np
import tensorflow as tf
from common import assert_same_bits

from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.ops import reference
from freezeops.ops.reference_updates import FusedOperand
from freezeops.partitions import compact

RULES = {
    # Slots, and scalars: rate, decay, its rate, then the rule's own.
    "sgd": (0, [0.1, 0.01, 0.1]),
    "sgd_momentum": (1, [0.1, 0.01, 0.1, 0.9]),
    "sgd_nesterov": (1, [0.1, 0.01, 0.1, 0.9]),
    "adam": (2, [0.01, 0.01, 0.1, 0.1, 0.05, 1e-3]),
    "adam_amsgrad": (3, [0.01, 0.01, 0.1, 0.1, 0.05, 1e-3]),
    "nadam": (2, [0.01, 0.01, 0.1, 0.1, 0.05, 1e-3, 0.9, 0.5, 0.2, 0.6, 0.7]),
    "rmsprop": (1, [0.01, 0.01, 0.1, 0.9, 0.1, 1e-3]),
    "rmsprop_momentum": (2, [0.01, 0.01, 0.1, 0.9, 0.1, 1e-3, 0.9]),
    "rmsprop_centered": (2, [0.01, 0.01, 0.1, 0.9, 0.1, 1.0]),
    "rmsprop_momentum_centered": (3, [0.01, 0.01, 0.1, 0.9, 0.1, 1.0, 0.9]),
    "adagrad": (1, [0.01, 0.01, 0.1, 1e-3]),
    "lion": (1, [0.01, 0.01, 0.1, 0.9, 0.1, 0.8, 0.2]),
}
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def passing_of(packed, layout):
    """Which entries are trainable."""
    passing = np.unpackbits(packed, count=layout.kept, bitorder="little").astype(bool)
    return np.broadcast_to(passing[None, :, None], layout).reshape(-1)


def variables_of(rng, rule, dtype, layouts, density, compact_state, seeded):
    """The same generated variables, twice; and what the op is told beside them."""
    real, (slot_count, scalars) = DTYPES[dtype], RULES[rule]
    seed_slots = list(range(min(slot_count, 2)))[::-1] if seeded else []

    def normal(size):
        return rng.normal(size=size).astype(real)

    results = [], []
    for number, layout in enumerate(layouts):
        size = layout.size
        packed = np.packbits(rng.random(layout.kept) < density, bitorder="little")
        room = packing.count_bits(packed, layout.kept) + number
        slot_size = room * layout.inner if compact_state else size
        offsets, indices = compact.TrainableIndex.arrays(packed, layout, room)
        values, gradient = normal(size), normal(size)
        masked = compact_state or number != 1 or layout.outer * layout.inner > 1
        # NaN, infinities and subnormals where nothing may be written.
        frozen = np.flatnonzero(~passing_of(packed, layout)) if masked else np.zeros(0, int)
        odd = rng.integers(0, 256, frozen.size * real.itemsize, dtype=np.uint8).view(real)
        values[frozen] = gradient[frozen] = odd
        slots = [np.abs(normal(slot_size)) for _ in range(slot_count)]
        for slot in slots:
            slot[rng.random(slot_size) < 0.3] = 0
        waiting = np.packbits(rng.random(slot_size) < 0.5, bitorder="little")
        for variables in results:
            variables.append(
                FusedOperand(
                    variable=tf.Variable(values),
                    gradient=tf.constant(gradient),
                    slots=[tf.Variable(slot) for slot in slots],
                    layout=layout if masked else Layout(1, 1, size),
                    bits=tf.Variable(packed) if masked else None,
                    ranks=(tf.Variable(offsets), tf.Variable(indices)) if compact_state else None,
                    unseeded=tf.Variable(waiting) if seeded else None,
                    decays=number % 2 == 0,
                )
            )
    scales = [tf.constant(0.5, tf.float64), tf.constant(0.25, tf.float64)][: len(seed_slots)]
    scalars = tf.constant(np.array(scalars).astype(real))
    return *results, (scalars, seed_slots, [2, 1][: len(seed_slots)], scales)


def with_compact_gradient(one, room=0.0):
    """The variable with its gradient as `gather_trainable` returns it, and any number where there is room."""
    index = [tf.convert_to_tensor(variable) for variable in (one.bits, *one.ranks)]
    gradient = reference.gather_trainable(one.gradient, *index, one.layout).numpy()
    gradient[packing.count_bits(index[0].numpy(), one.layout.kept) * one.layout.inner :] = room
    return one._replace(gradient=tf.constant(gradient), gathered=True)


def with_gradient_of_rows(one, slices):
    """The variable with this gradient, and in its shape: generated variables are flat."""
    shape = tf.get_static_value(slices.dense_shape)
    return one._replace(gradient=slices, variable=tf.Variable(tf.reshape(one.variable, shape)))


def assert_same_state(ours, twins, told):
    """Frozen entries bit for bit; trainable ones too, but that one NaN is as good as another."""
    for one, twin in zip(ours, twins, strict=True):
        pairs = [(one.variable, twin.variable), *zip(one.slots, twin.slots, strict=True)]
        if one.unseeded is not None:
            assert_same_bits(one.unseeded.numpy(), twin.unseeded.numpy(), f"{told} unseeded")
        for number, (actual, expected) in enumerate(pairs):
            actual, expected = actual.numpy().reshape(-1), expected.numpy().reshape(-1)
            if one.ranks is not None and number:
                used = packing.count_bits(one.bits.numpy(), one.layout.kept) * one.layout.inner
                actual, expected, passing = actual[:used], expected[:used], np.ones(used, bool)
            else:
                passing = passing_of(np.array([255], np.uint8) if one.bits is None else one.bits.numpy(), one.layout)
            both_nan = np.isnan(actual) & np.isnan(expected) & passing
            actual[both_nan] = expected[both_nan] = 0
            assert_same_bits(actual, expected, f"{told} array {number}")


def fused_notes(optimizer):
    """`fused`, or the reason against it, for each variable."""
    return ["fused" if report.fused else report.fused_reason for report in optimizer.describe()]
