"""The pure-TensorFlow twin of the fused updates: what Keras's optimizers do to an entry, operation by operation.

The same arithmetic is in `csrc/kernels/fused_rules.h`. Read in Keras 3.15.1, `optimizers/*.py`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from freezeops.masks.layout import Layout
from freezeops.ops import reference


class FusedVariable(NamedTuple):
    """One variable in a fused step.

    Attributes:
        variable: The model's variable.
        gradient: Of its dtype; dense or `tf.IndexedSlices`.
        slots: Those of the rule. In full state of the variable's size; in compact state flat (or of
            rows) with one entry for each trainable one, in their order, and room for more.
        layout: Layout of the mask; `(1, 1, n)` where there is none.
        bits: `uint8` variable of the packed mask; `None`: every entry is trainable.
        ranks: With compact state the variables of rank offsets and of indices, see
            `reference.gather_trainable`; `None` with full state.
        unseeded: `uint8` variable of one bit for each entry of a slot, see `reference.seed_slots`;
            `None`: no entry waits.
        decays: Whether the weight decays.
    """

    variable: tf.Variable
    gradient: tf.Tensor | tf.IndexedSlices
    slots: list[tf.Variable]
    layout: Layout
    bits: tf.Variable | None
    ranks: tuple[tf.Variable, tf.Variable] | None
    unseeded: tf.Variable | None
    decays: bool


Update = Callable[
    [tf.Tensor, tf.Tensor, tf.Tensor, list[tf.Tensor], tf.Tensor, list[tf.Tensor]], tuple[tf.Tensor, list[tf.Tensor]]
]
"""From variable, gradient, its square, slots, the rate and the rule's other scalars to variable and slots."""


def _sgd(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
    return w - g * rate, []


def _sgd_momentum(nesterov: bool) -> Update:
    def update(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
        (momentum,) = others
        m = slots[0] * momentum - g * rate
        return w + (m * momentum - g * rate if nesterov else m), [m]

    return update


def _maximum(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`tf.maximum` is NaN where one of the two is; on the CPU XLA's may be the other one."""
    return tf.where(tf.math.is_nan(b) & ~tf.math.is_nan(a), b, tf.maximum(a, b))


def _adam(amsgrad: bool) -> Update:
    def update(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
        m, v, *rest = slots
        of_m, of_v, epsilon = others
        m = m + (g - m) * of_m
        v = v + (square - v) * of_v
        rest = [_maximum(rest[0], v)] if amsgrad else []
        return w - m * rate / (tf.sqrt(rest[0] if amsgrad else v) + epsilon), [m, v, *rest]

    return update


def _nadam(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
    m, v = slots
    of_m, of_v, epsilon, next_u, rest_of_next, of_g, rest, correction = others
    m = m + (g - m) * of_m
    v = v + (square - v) * of_v
    mean = next_u * m / rest_of_next + of_g * g / rest
    return w - mean * rate / (tf.sqrt(v / correction) + epsilon), [m, v]


def _rmsprop(with_momentum: bool, centered: bool) -> Update:
    def update(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
        rho, rest, epsilon, *momentum = others
        v, *more = slots
        v = rho * v + rest * square
        denominator, new = v, [v]
        if centered:
            mean = rho * more[-1] + rest * g
            denominator = denominator - mean * mean
        step = rate * g / tf.sqrt(denominator + epsilon)
        if with_momentum:
            step = momentum[0] * more[0] + step
            new.append(step)
        return w - step, [*new, mean] if centered else new

    return update


def _adagrad(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
    total = slots[0] + square
    return w - rate * g / tf.sqrt(total + others[0]), [total]


def _lion(w, g, square, slots, rate, others):  # type: ignore[no-untyped-def]
    beta_1, rest_1, beta_2, rest_2 = others
    m = slots[0]
    return w - rate * tf.sign(m * beta_1 + g * rest_1), [m * beta_2 + g * rest_2]


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
    variables: Sequence[FusedVariable],
    scalars: tf.Tensor,
    seed_slots: Sequence[int],
    seed_powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> None:
    """One step of an optimizer for the trainable entries of several variables of one dtype.

    Args:
        rule: A key of `UPDATES`.
        variables: The variables, all with full or all with compact state.
        scalars: Of the variables' dtype: what an update is multiplied by, the weight decay, the
            learning rate that this is multiplied by, and the rule's own in the order above.
        seed_slots: Which slots are seeded, in the order of `reference.seed_slots`.
        seed_powers: 1 or 2 for each.
        scales: A float64 scalar for each.
    """
    rate, decay, decay_rate, *others = tf.unstack(scalars, num=scalars.shape[0])
    for one in variables:
        _update(UPDATES[rule], rule, one, rate, decay, decay_rate, others, seed_slots, seed_powers, scales)


def _update(
    update: Update,
    rule: str,
    one: FusedVariable,
    rate: tf.Tensor,
    decay: tf.Tensor,
    decay_rate: tf.Tensor,
    others: list[tf.Tensor],
    seed_slots: Sequence[int],
    seed_powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> None:
    size = one.layout.size
    gradient = reference.of_shape(one.gradient, one.variable.shape)
    if not size:
        return
    gradient, square = _dense(gradient, rate if rule.startswith("sgd") else None, size)
    if rule.startswith("sgd") and isinstance(one.gradient, tf.IndexedSlices):
        rate = tf.ones_like(rate)
    bits = tf.fill([1], tf.constant(255, tf.uint8)) if one.bits is None else tf.convert_to_tensor(one.bits)
    value = tf.reshape(one.variable.read_value(), [size])

    if one.ranks is None:
        passing = reference.expand_mask(bits, one.layout)
        read, old_slots = value, [tf.reshape(slot.read_value(), [size]) for slot in one.slots]
        due = passing
    else:
        offsets, indices = (tf.convert_to_tensor(variable) for variable in one.ranks)
        read, gradient, square = (
            reference.gather_trainable(x, bits, offsets, indices, one.layout) for x in (value, gradient, square)
        )
        length = read.shape[0]
        old_slots = [tf.reshape(slot.read_value(), [length]) for slot in one.slots]
        due = reference.valid_indices(reference.signed_indices(indices), bits, one.layout)
        due = tf.repeat(due, one.layout.inner)

    if one.unseeded is not None and seed_slots:
        waiting = reference.unpack_mask(one.unseeded.read_value(), due.shape[0])
        wide = tf.cast(gradient, tf.float64 if gradient.dtype == tf.float64 else tf.float32)
        of_seed = wide * wide
        if isinstance(one.gradient, tf.IndexedSlices):
            of_seed = tf.maximum(of_seed, tf.cast(square, wide.dtype))
        seeded = reference.seeded_slots(
            waiting & due, wide, of_seed, [old_slots[i] for i in seed_slots], seed_powers, scales
        )
        for number, slot in zip(seed_slots, seeded, strict=True):
            old_slots[number] = slot
        wait = waiting & ~(due & (seeded[0] != 0))
        one.unseeded.assign(reference.pack_mask(wait))

    decayed = read - read * decay * decay_rate if one.decays else read
    new, new_slots = update(decayed, gradient, square, old_slots, rate, others)
    for slot, values, old in zip(one.slots, new_slots, old_slots, strict=True):
        slot.assign(tf.reshape(reference.select(due, values, old), slot.shape))
    if one.ranks is None:
        one.variable.assign(tf.reshape(reference.select(due, new, value), one.variable.shape))
    else:
        reference.scatter_trainable(one.variable, new, bits, offsets, indices, one.layout)


def _dense(gradient: tf.Tensor | tf.IndexedSlices, factor: tf.Tensor | None, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """A gradient and its square, flat. Repeated rows add up, and so do their squares.

    `factor`: what slices are multiplied by before they are summed.
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
