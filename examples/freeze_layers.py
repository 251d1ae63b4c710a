"""Freeze whole layers: the convolutions stay, the dense layers learn five more digits.

Plain Keras is enough when the same layers stay frozen for a whole `compile`. Set
`layer.trainable = False` before it; that also stops BatchNormalization's moving
statistics and spares the backward pass of the layers at the bottom. To change your
mind, compile again (without it, nothing happens and nothing is said) and with a new
optimizer: the old one refuses variables that it was not built with. The moments that
it has gathered for the other layers are lost.

With freezeops the frozen layers can change at any time, in the middle of `fit` too,
without compiling and without losing the moments of the rest.
"""

import _digits as digits
import keras

import freezeops as fz

FROZEN = ("conv_1", "conv_2")
EPOCHS = 3


def with_freezeops() -> tuple[digits.Result, digits.Result]:
    """Freezes both convolutions; then lets the second one go, and trains on."""
    model = digits.pretrained_model()
    before = model.get_weights()
    convolutions = [model.get_layer(name) for name in FROZEN]

    optimizer = fz.MaskedOptimizer(keras.optimizers.AdamW(1e-3))
    optimizer.freeze(convolutions)
    digits.compile_model(model, optimizer)
    digits.fit(model, digits.load()[0], EPOCHS)
    variables = [v for layer in convolutions for v in layer.weights]
    result = digits.judge(model, before, digits.frozen_variables(model, variables))

    optimizer.unfreeze(convolutions[1])  # neither compiled nor traced again
    digits.fit(model, digits.load()[0], EPOCHS)
    return result, digits.judge(model, before, digits.frozen_variables(model, convolutions[0].weights))


def with_keras() -> digits.Result:
    """The same in plain Keras, without the second half."""
    model = digits.pretrained_model()
    before = model.get_weights()
    convolutions = [model.get_layer(name) for name in FROZEN]

    for layer in convolutions:
        layer.trainable = False
    digits.compile_model(model, keras.optimizers.AdamW(1e-3))
    digits.fit(model, digits.load()[0], EPOCHS)
    variables = [v for layer in convolutions for v in layer.weights]
    return digits.judge(model, before, digits.frozen_variables(model, variables))


def main() -> dict[str, dict]:
    """Runs both ways and returns their figures."""
    frozen, unfrozen = with_freezeops()
    return digits.show(
        "Whole layers frozen: conv_1, conv_2",
        {"freezeops": frozen, "plain Keras": with_keras(), "freezeops, conv_2 let go": unfrozen},
    )


if __name__ == "__main__":
    main()
