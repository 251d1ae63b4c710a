"""Freeze single entries of one kernel: two filters set by hand, and the corners of the rest.

The first two 3 x 3 filters of `conv_1` become Sobel's edge detectors, and every other
filter loses its four corners, so that it looks at a pixel and its four neighbours
only. The other entries of the same kernel go on training.

`trainable` is a property of whole variables, so plain Keras has no switch for this.
What people write instead, and how far it reaches:

- **`gradient * mask`** is enough for SGD, Adam and most others if it is there from the
  first step, and without weight decay, averaged weights (`use_ema`) or a gradient that
  is ever infinite or NaN (NaN * 0 is NaN). AdamW has weight decay by default. (In the
  table it moves 12 of 74: the other 62 are zeros, which decay to zero.)
- **A constraint** that puts the old values back after each step holds in `fit`. But
  the frozen gradients still count in `clipnorm` and `global_clipnorm`, a constraint set
  on a variable is not saved, and averaged weights (`use_ema`) are written after it ran.

freezeops enforces the freeze around the optimizer and holds in all of these.
"""

from typing import Any

import _digits as digits
import keras
import numpy as np

import freezeops as fz

EPOCHS = 2
LAYER = "conv_1"


def frozen_entries() -> np.ndarray:
    """True = frozen; the shape is that of the kernel, `(height, width, in, out)`."""
    frozen = np.zeros((3, 3, 1, 16), bool)
    frozen[::2, ::2] = True  # the four corners of every filter
    frozen[..., :2] = True  # all of the first two filters
    return frozen


def set_by_hand(model: keras.Model) -> list[np.ndarray]:
    """Writes what will be frozen into the kernel; returns all of the model's weights."""
    kernel = model.get_layer(LAYER).kernel
    values = np.where(frozen_entries(), 0.0, kernel.numpy())
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    values[:, :, 0, 0] = sobel
    values[:, :, 0, 1] = sobel.T
    kernel.assign(values)
    return model.get_weights()


def frozen_by_weight(model: keras.Model) -> list[np.ndarray]:
    """`frozen_entries` for the kernel, nothing for the other weights."""
    path = model.get_layer(LAYER).kernel.path
    return [frozen_entries() if weight.path == path else np.zeros(weight.shape, bool) for weight in model.weights]


def with_freezeops(inner: keras.optimizers.Optimizer) -> digits.Result:
    """The optimizer is told which entries stay."""
    model = digits.pretrained_model()
    before = set_by_hand(model)

    optimizer = fz.MaskedOptimizer(inner)
    optimizer.freeze(model.get_layer(LAYER).kernel, frozen_entries())
    digits.compile_model(model, optimizer)
    digits.fit(model, digits.load()[0], EPOCHS)
    return digits.judge(model, before, frozen_by_weight(model))


def with_multiplied_gradients(optimizer: keras.optimizers.Optimizer) -> digits.Result:
    """Gradients times 0 where frozen, in a `train_step` of one's own."""
    model = digits.pretrained_model(digits.MultipliedGradients)
    before = set_by_hand(model)

    model.masks = [~frozen for frozen in frozen_by_weight(model)]
    digits.compile_model(model, optimizer)
    digits.fit(model, digits.load()[0], EPOCHS)
    return digits.judge(model, before, frozen_by_weight(model))


class PutBack(keras.constraints.Constraint):
    """Writes the old values over the frozen entries after every step.

    Args:
        frozen: Boolean array of the variable's shape, True = frozen.
        values: Array of the same shape.
    """

    def __init__(self, frozen: np.ndarray, values: np.ndarray):
        self.frozen, self.values = frozen, values

    def __call__(self, w: keras.Variable) -> Any:
        """The variable with the frozen entries as they were."""
        return keras.ops.where(self.frozen, self.values, w)


def with_constraint(optimizer: keras.optimizers.Optimizer) -> digits.Result:
    """A constraint on the kernel; the optimizer knows nothing of it."""
    model = digits.pretrained_model()
    before = set_by_hand(model)

    kernel = model.get_layer(LAYER).kernel
    kernel.constraint = PutBack(frozen_entries(), kernel.numpy())
    digits.compile_model(model, optimizer)
    digits.fit(model, digits.load()[0], EPOCHS)
    return digits.judge(model, before, frozen_by_weight(model))


def main() -> dict[str, dict]:
    """Runs all ways and returns their figures."""
    sgd, adamw = keras.optimizers.SGD, keras.optimizers.AdamW
    averaged = {"use_ema": True, "ema_momentum": 0.9}
    return digits.show(
        "Single entries frozen: two filters and every corner of conv_1's kernel",
        {
            "freezeops, AdamW": with_freezeops(adamw(1e-3)),
            "freezeops, AdamW, averaged": with_freezeops(adamw(1e-3, **averaged)),
            "gradient * mask, SGD": with_multiplied_gradients(sgd(0.05)),
            "gradient * mask, AdamW": with_multiplied_gradients(adamw(1e-3)),
            "constraint, AdamW": with_constraint(adamw(1e-3)),
            "constraint, AdamW, averaged": with_constraint(adamw(1e-3, **averaged)),
        },
    )


if __name__ == "__main__":
    main()
