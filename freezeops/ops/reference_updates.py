"""The pure-TensorFlow twin of the fused updates: Keras's optimizers on each entry, operation by operation.

The same arithmetic is in `csrc/kernels/common/update_rules.h`. Read in Keras 3.15.1, `optimizers/*.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from freezeops.masks.layout import Layout
from freezeops.ops import reference


class FusedOperand(NamedTuple):
    """One variable in a fused step, with everything that the step reads and writes of it.

    Attributes:
        variable: The model's variable.
        gradient: Its gradient, of its dtype; dense, `tf.IndexedSlices` or, if `gathered`, compact.
        slots: The slots of the formula. In full state of the variable's size; in compact state flat (or of
            rows) with one entry for each trainable one, in their order, and room for more.
        layout: Layout of the mask; `(1, 1, n)` where there is none.
        bits: `uint8` variable of the packed mask; `None`: every entry is trainable.
        ranks: With compact state the variables of rank offsets and of indices, see
            `reference.gather_trainable`; `None` with full state.
        unseeded: `uint8` variable of one bit for each entry of a slot, see `reference.seed_slots`;
            `None`: no entry waits.
        decays: `True` if the weight decays.
        gathered: With compact state: `True` if the gradient holds the trainable entries alone, in their order and with
            the slots' room, as `gather_trainable` returns them.
    """

    variable: tf.Variable
    gradient: tf.Tensor | tf.IndexedSlices
    slots: list[tf.Variable]
    layout: Layout
    bits: tf.Variable | None
    ranks: tuple[tf.Variable, tf.Variable] | None
    unseeded: tf.Variable | None
    decays: bool
    gathered: bool = False


Update = Callable[
    [tf.Tensor, tf.Tensor, tf.Tensor, list[tf.Tensor], tf.Tensor, list[tf.Tensor]], tuple[tf.Tensor, list[tf.Tensor]]
]
"""Function of variable, gradient, squared gradient, slots, rate and further scalars, returning variable and slots."""


def _sgd(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
    return w - g * rate, []


def _sgd_momentum(nesterov: bool) -> Update:
    def update(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
        (momentum,) = scalars
        m = slots[0] * momentum - g * rate
        return w + (m * momentum - g * rate if nesterov else m), [m]

    return update


def _maximum(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`tf.maximum`: NaN if either is NaN. XLA's, on the CPU, may return the other one."""
    return tf.where(tf.math.is_nan(b) & ~tf.math.is_nan(a), b, tf.maximum(a, b))


def _adam(amsgrad: bool) -> Update:
    def update(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
        m, v, *v_hat = slots
        one_minus_beta_1, one_minus_beta_2, epsilon = scalars
        m = m + (g - m) * one_minus_beta_1
        v = v + (square - v) * one_minus_beta_2
        v_hat = [_maximum(v_hat[0], v)] if amsgrad else []
        return w - m * rate / (tf.sqrt(v_hat[0] if amsgrad else v) + epsilon), [m, v, *v_hat]

    return update


def _nadam(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
    m, v = slots
    one_minus_beta_1, one_minus_beta_2, epsilon, next_u, next_m_weight, one_minus_u, g_weight, v_weight = scalars
    m = m + (g - m) * one_minus_beta_1
    v = v + (square - v) * one_minus_beta_2
    m_hat = next_u * m / next_m_weight + one_minus_u * g / g_weight
    return w - m_hat * rate / (tf.sqrt(v / v_weight) + epsilon), [m, v]


def _rmsprop(with_momentum: bool, centered: bool) -> Update:
    def update(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
        rho, one_minus_rho, epsilon, *momentum = scalars
        v, *others = slots
        v = rho * v + one_minus_rho * square
        denominator, new_slots = v, [v]
        if centered:
            mean = rho * others[-1] + one_minus_rho * g
            denominator = denominator - mean * mean
        step = rate * g / tf.sqrt(denominator + epsilon)
        if with_momentum:
            step = momentum[0] * others[0] + step
            new_slots.append(step)
        return w - step, [*new_slots, mean] if centered else new_slots

    return update


def _adagrad(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
    (epsilon,) = scalars
    total = slots[0] + square
    return w - rate * g / tf.sqrt(total + epsilon), [total]


def _lion(w, g, square, slots, rate, scalars):  # type: ignore[no-untyped-def]
    beta_1, one_minus_beta_1, beta_2, one_minus_beta_2 = scalars
    m = slots[0]
    return w - rate * tf.sign(m * beta_1 + g * one_minus_beta_1), [m * beta_2 + g * one_minus_beta_2]


UPDATES: dict[str, Update] = {
    "sgd": _sgd,
    "sgd_momentum": _sgd_momentum(nesterov=False),
    "sgd_nesterov": _sgd_momentum(nesterov=True),
    "adam": _adam(amsgrad=False),
    "adam_amsgrad": _adam(amsgrad=True),
    "nadam": _nadam,
    "rmsprop": _rmsprop(with_momentum=False, centered=False),
    "rmsprop_momentum": _rmsprop(with_momentum=True, centered=False),
    "rmsprop_centered": _rmsprop(with_momentum=False, centered=True),
    "rmsprop_momentum_centered": _rmsprop(with_momentum=True, centered=True),
    "adagrad": _adagrad,
    "lion": _lion,
}


def fused_update(
    rule: str,
    operands: Sequence[FusedOperand],
    scalars: tf.Tensor,
    seed_slots: Sequence[int],
    seed_powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> None:
    """One step of an optimizer for the trainable entries of several variables of one dtype.

    Args:
        rule: A key of `UPDATES`.
        operands: The variables, all with full or all with compact state.
        scalars: Vector of the variables' dtype: the factor of an update, the weight decay, the
            learning rate that this is multiplied by, and the formula's further scalars in the order above.
        seed_slots: Indices of the slots that are seeded, in the order of `reference.seed_slots`.
        seed_powers: 1 or 2 for each.
        scales: A float64 scalar for each.
    """
    rate, decay, decay_rate, *further = tf.unstack(scalars, num=scalars.shape[0])
    for operand in operands:
        size, layout, shape = operand.layout.size, operand.layout, operand.variable.shape
        gradient = operand.gradient if operand.gathered else reference.of_shape(operand.gradient, shape)
        if not size:
            continue
        factor, slices_factor = rate, None
        if rule.startswith("sgd") and isinstance(operand.gradient, tf.IndexedSlices):
            # As Keras, which multiplies the slices before it sums those of a row.
            factor, slices_factor = tf.ones_like(rate), rate
        slot_size = size if operand.ranks is None else operand.ranks[1].shape[0] * layout.inner
        gradient, square = _dense(gradient, slices_factor, slot_size if operand.gathered else size)
        bits = tf.fill([1], tf.constant(255, tf.uint8)) if operand.bits is None else tf.convert_to_tensor(operand.bits)
        value = tf.reshape(operand.variable.read_value(), [size])

        if operand.ranks is None:
            trainable = reference.expand_mask(bits, layout)
            entries = value
        else:
            offsets, indices = (tf.convert_to_tensor(variable) for variable in operand.ranks)
            gather = functools.partial(
                reference.gather_trainable, mask=bits, offsets=offsets, indices=indices, layout=layout
            )
            entries = gather(value)
            if not operand.gathered:
                gradient, square = gather(gradient), gather(square)
            trainable = reference.valid_indices(reference.signed_indices(indices), bits, layout)
            trainable = tf.repeat(trainable, layout.inner)
        old_slots = [tf.reshape(slot.read_value(), [slot_size]) for slot in operand.slots]
        if operand.unseeded is not None and seed_slots:
            old_slots = _seeded(operand, trainable, gradient, square, old_slots, seed_slots, seed_powers, scales)

        decayed = entries - entries * decay * decay_rate if operand.decays else entries
        new, new_slots = UPDATES[rule](decayed, gradient, square, old_slots, factor, further)
        for slot, values, old in zip(operand.slots, new_slots, old_slots, strict=True):
            slot.assign(tf.reshape(reference.select(trainable, values, old), slot.shape))
        if operand.ranks is None:
            operand.variable.assign(tf.reshape(reference.select(trainable, new, value), shape))
        else:
            reference.scatter_trainable(operand.variable, new, bits, offsets, indices, layout)


def _seeded(
    operand: FusedOperand,
    trainable: tf.Tensor,
    gradient: tf.Tensor,
    square: tf.Tensor,
    slots: list[tf.Tensor],
    seed_slots: Sequence[int],
    seed_powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """Returns the slots with those of waiting entries seeded; clears the bits of these."""
    assert operand.unseeded is not None
    waiting = reference.unpack_mask(operand.unseeded.read_value(), trainable.shape[0])
    wide = tf.cast(gradient, tf.float64 if gradient.dtype == tf.float64 else tf.float32)
    seed_square = wide * wide
    if isinstance(operand.gradient, tf.IndexedSlices):
        seed_square = tf.maximum(seed_square, tf.cast(square, wide.dtype))
    seeded = reference.seeded_slots(
        waiting & trainable, wide, seed_square, [slots[i] for i in seed_slots], seed_powers, scales
    )
    operand.unseeded.assign(reference.pack_mask(waiting & ~(trainable & (seeded[0] != 0))))
    by_index = dict(zip(seed_slots, seeded, strict=True))
    return [by_index.get(i, slot) for i, slot in enumerate(slots)]


def _dense(gradient: tf.Tensor | tf.IndexedSlices, factor: tf.Tensor | None, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns a gradient and its square, flat. Repeated rows add up, and so do their squares.

    Args:
        gradient: The gradient.
        factor: Slices are multiplied by it before they are summed; `None`: by nothing.
        size: Number of entries.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        flat = tf.reshape(gradient, [size])
        return flat, flat * flat
    values = gradient.values if factor is None else gradient.values * factor
    sums = (
        tf.convert_to_tensor(tf.IndexedSlices(x, gradient.indices, gradient.dense_shape))
        for x in (values, values * values)
    )
    flat, square = (tf.reshape(x, [size]) for x in sums)
    return flat, square
