"""Freeze one layer's kernel but not its bias.

Plain Keras 3 is enough when the kernel stays frozen for a whole `compile`: a
variable has a `trainable` of its own (in Keras 2 one had to split the layer in two).
Three things to know: set it before `compile`; switching `trainable` of the layer or
of the model off and on again sets it for every variable inside, so it is undone in
silence; and it is not saved with the model.

freezeops says it to the optimizer instead: nothing about the model changes, the mask
is saved with the optimizer, and it can be lifted without compiling again.
"""

import _digits as digits
import keras

import freezeops as fz

EPOCHS = 3


def with_freezeops() -> digits.Result:
    """Freezes the kernel in the optimizer."""
    model = digits.pretrained_model()
    before = model.get_weights()
    kernel = model.get_layer("conv_2").kernel

    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(1e-3))
    optimizer.freeze(kernel)
    digits.compile_model(model, optimizer)
    digits.fit(model, digits.load()[0], EPOCHS)
    return digits.judge(model, before, digits.frozen_variables(model, [kernel]))


def with_keras() -> digits.Result:
    """Freezes the kernel in the model."""
    model = digits.pretrained_model()
    before = model.get_weights()
    kernel = model.get_layer("conv_2").kernel

    kernel.trainable = False
    digits.compile_model(model, keras.optimizers.AdamW(1e-3))
    digits.fit(model, digits.load()[0], EPOCHS)
    return digits.judge(model, before, digits.frozen_variables(model, [kernel]))


def main() -> dict[str, dict]:
    """Runs both ways and returns their figures."""
    return digits.show(
        "A kernel frozen, its bias not: conv_2",
        {"freezeops": with_freezeops(), "plain Keras": with_keras()},
    )


if __name__ == "__main__":
    main()
