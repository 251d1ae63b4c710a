"""Freeze variables chosen by name, in a `GradientTape` loop.

Plain Keras is enough when the choice stays: give the tape and the optimizer only the
variables that are to train. The optimizer must never see the others: it refuses
variables that it was not built with, so a second choice needs a second optimizer,
and weight decay moves whatever it was given.

With freezeops the loop hands over every variable and the optimizer knows the choice,
as a pattern, which can change between two steps without tracing the step again.
"""

import re
from collections.abc import Sequence

import _digits as digits
import keras
import tensorflow as tf

import freezeops as fz

FROZEN = r"conv_\d/kernel|hidden/bias"
EPOCHS = 3


def train(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence[keras.Variable],
) -> None:
    """The loop: the same for both ways."""
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    train_images, _ = digits.load()
    batches = tf.data.Dataset.from_tensor_slices(tuple(train_images))
    batches = batches.shuffle(len(train_images.y), seed=1).batch(digits.BATCH_SIZE, drop_remainder=True)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = loss_function(y, model(x, training=True))
        gradients = tape.gradient(loss, variables)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))

    for _ in range(EPOCHS):
        for x, y in batches:
            step(x, y)


def chosen(model: keras.Model) -> list[keras.Variable]:
    """The variables whose path ends in `FROZEN`."""
    return [v for v in model.trainable_variables if re.search(f"(^|/)({FROZEN})$", v.path)]


def with_freezeops() -> digits.Result:
    """Every variable goes to the optimizer, which freezes by pattern."""
    model = digits.pretrained_model()
    before = model.get_weights()

    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(1e-3))
    optimizer.freeze(FROZEN)
    train(model, optimizer, model.trainable_variables)
    return digits.judge(model, before, digits.frozen_variables(model, chosen(model)))


def with_keras() -> digits.Result:
    """Only the variables that are to train go to the optimizer."""
    model = digits.pretrained_model()
    before = model.get_weights()

    frozen = chosen(model)
    paths = {v.path for v in frozen}
    optimizer = keras.optimizers.AdamW(1e-3)
    train(model, optimizer, [v for v in model.trainable_variables if v.path not in paths])
    return digits.judge(model, before, digits.frozen_variables(model, frozen))


def main() -> dict[str, dict]:
    """Runs both ways and returns their figures."""
    return digits.show(
        f"Variables frozen by name: {FROZEN}",
        {"freezeops": with_freezeops(), "plain Keras": with_keras()},
    )


if __name__ == "__main__":
    main()
