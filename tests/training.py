"""Variables that train: odd values, masks by kind, gradients with NaN, and steps in a mode, with masks or by hand."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf
from common import MIXING, SETUPS, assert_same_bits, in_mode

import freezeops as fz

ODD_BITS = {
    "float16": [0x8000, 0x7C00, 0xFC00, 0x0001, 0x83FF, 0x7C01, 0x7E55, 0xFDFF],
    "bfloat16": [0x8000, 0x7F80, 0xFF80, 0x0001, 0x807F, 0x7F81, 0x7FD5, 0xFFFF],
    "float32": [1 << 31, 0x7F800000, 0xFF800000, 1, 0x807FFFFF, 0x7F800001, 0x7FD00001, 2**32 - 1],
    "float64": [
        1 << 63, 0x7FF << 52, 0xFFF << 52, 1, 0x800FFFFFFFFFFFFF, (0x7FF << 52) + 1,
        0x7FFD000000000001, 2**64 - 1,
    ],
}  # fmt: skip
"""-0.0, inf, -inf, two subnormals, and three NaN payloads (the first one signalling)."""
_FINITE = [0, 3, 4]


def numpy_dtype(dtype: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def odd_values(dtype: str, finite: bool) -> np.ndarray:
    """The values of `ODD_BITS`, or those of them that are finite."""
    codes = ODD_BITS[dtype]
    codes = [codes[i] for i in _FINITE] if finite else codes
    real = numpy_dtype(dtype)
    return np.array(codes, dtype=f"u{real.itemsize}").view(real)


def random_mask(rng: np.random.Generator, shape: tuple, kind: str = "elements", density: float = 0.5) -> np.ndarray:
    """A mask that broadcasts to the shape: of its elements, its rows (first axis) or its columns (last axis)."""
    ones = (1,) * (len(shape) - 1)
    return rng.random({"elements": shape, "rows": (shape[0], *ones), "columns": (*ones, shape[-1])}[kind]) < density


def _is_bare(optimizer: Any) -> bool:
    return not hasattr(optimizer, "register_mask")


class Training:
    """Variables, their masks and gradients, all from one random generator; and an optimizer that trains them.

    Args:
        shapes: Shapes of the variables, by name.
        masks: Masks by name, which broadcast; a variable that is not named has none. By default every variable has
            one of its elements, with `density`.
        density: Share of trainable entries of the masks that are made here.
        dtype: Of variables and gradients.
        seed: Of the generator.
        odd: Names of the variables with odd values in frozen entries.
        finite: Leaves infinities and NaN out of the odd values.
        nan: Names of the variables with NaN and infinite gradients in frozen entries.
        slices: Names of the variables whose gradients are `tf.IndexedSlices`, with repeated rows.
        mean: Of the gradients. Above zero, steps of one size (Lion) do not cancel out.
        make: Makes a variable: `keras.Variable` or `tf.Variable`.

    Attributes:
        optimizer: Set by `start`, which also builds it.
        traces: How often a step was traced.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple],
        masks: Mapping[str, np.ndarray] | None = None,
        *,
        density: float = 0.5,
        dtype: str = "float32",
        seed: int = 7,
        odd: Collection[str] = (),
        finite: bool = False,
        nan: Collection[str] = (),
        slices: Collection[str] = (),
        mean: float = 1.0,
        make: Callable = keras.Variable,
    ):
        self.optimizer: Any = None
        self.traces = 0
        self.rng = np.random.default_rng(seed)
        self.shapes, self.nan, self.slices, self.mean = shapes, nan, slices, mean
        self.dtype = numpy_dtype(dtype)
        if masks is None:
            masks = {name: random_mask(self.rng, shape, density=density) for name, shape in shapes.items()}
        self.masks = dict(masks)
        values = {name: self.normal(shape) for name, shape in shapes.items()}
        for name in odd:
            self._put_into_frozen(name, values[name], odd_values(dtype, finite))
        self.variables = {name: make(value, dtype=dtype, name=name) for name, value in values.items()}

    def normal(self, shape: tuple) -> np.ndarray:
        return self.rng.normal(size=shape).astype(self.dtype)

    def frozen(self, name: str) -> np.ndarray:
        """The entries of a variable that are frozen now."""
        if self.optimizer is not None and not self.by_hand:
            return ~self.optimizer.mask_for(self.variables[name]).to_numpy()
        return ~np.broadcast_to(self.masks.get(name, True), self.shapes[name])

    def _put_into_frozen(self, name: str, array: np.ndarray, values: np.ndarray) -> None:
        frozen = self.frozen(name)
        array[frozen] = np.resize(values, np.count_nonzero(frozen))

    def values(self) -> dict[str, np.ndarray]:
        return {name: variable.numpy() for name, variable in self.variables.items()}

    def gradients(self) -> list:
        """A gradient for each variable; of slices, their rows and values."""
        return [self._slices(name) if name in self.slices else self._gradient(name) for name in self.shapes]

    def _gradient(self, name: str) -> tf.Tensor:
        gradient = self.normal(self.shapes[name]) + self.dtype.type(self.mean)
        if name in self.nan:
            self._put_into_frozen(name, gradient, np.array([np.nan, np.inf, -np.inf], self.dtype))
        return tf.constant(gradient)

    def _slices(self, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        rows, *others = self.shapes[name]
        count = rows * 3 // 4
        return tf.constant(self.rng.integers(0, rows, count)), tf.constant(self.normal((count, *others)))

    def start(self, optimizer: Any, mode: str) -> None:
        """Registers all masks with a masked optimizer, builds it, and compiles the step.

        An optimizer without masks trains by hand: with gradients that are masked, and frozen entries assigned back.
        """
        self.optimizer, self.mode = optimizer, mode
        self.by_hand = _is_bare(optimizer)
        if not self.by_hand:
            for name, mask in self.masks.items():
                optimizer.register_mask(self.variables[name], mask)
        optimizer.build(list(self.variables.values()))
        self.compile()

    def compile(self) -> None:
        """A step that is not traced yet."""
        self._step = in_mode(self._step_by_hand if self.by_hand else self._apply, self.mode)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            given = [self.gradients()]
            if self.by_hand:
                given.append({name: tf.constant(mask) for name, mask in self.masks.items()})
            self._step(*given)

    def _apply(self, gradients: list) -> None:
        self.traces += 1
        pairs = zip(self.shapes, gradients, strict=True)
        gradients = [self._put_together(name, g) if name in self.slices else g for name, g in pairs]
        variables = list(self.variables.values())
        if isinstance(self.optimizer, keras.optimizers.Optimizer):
            self.optimizer.apply(gradients, variables)
        else:  # tf_keras
            self.optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))

    def _put_together(self, name: str, slices: tuple) -> tf.IndexedSlices:
        """Within the step, where the shape is a constant, as XLA needs it."""
        rows, values = slices
        return tf.IndexedSlices(values, rows, tf.constant(self.shapes[name]))

    def _step_by_hand(self, gradients: list, masks: dict) -> None:
        old = {name: tf.identity(tf.convert_to_tensor(self.variables[name])) for name in masks}
        pairs = zip(self.shapes, gradients, strict=True)
        self._apply([tf.where(masks[name], g, tf.zeros_like(g)) if name in masks else g for name, g in pairs])
        for name, mask in masks.items():
            variable = self.variables[name]
            variable.assign(tf.where(mask, tf.convert_to_tensor(variable), old[name]))

    def train_with_late_mask(self, optimizer: Any, mode: str, steps: int, late: str) -> list[dict[str, np.ndarray]]:
        """Trains twice so many steps; one variable's mask is registered between.

        Returns:
            The variables' values at first, in the middle and at the end.
        """
        mask = self.masks.pop(late)
        if _is_bare(optimizer):  # the mask's value changes, so that nothing is traced again
            self.masks[late] = np.ones_like(mask)
        self.start(optimizer, mode)
        seen = [self.values()]
        self.step(steps)
        self.masks[late] = mask
        if not self.by_hand:
            optimizer.register_mask(self.variables[late], mask)
        seen.append(self.values())
        self.step(steps)
        return [*seen, self.values()]

    def check_promise(self, optimizer: Any, mode: str, steps: int) -> list[dict[str, np.ndarray]]:
        """Trains with a mask for `late` that comes late, and compares the bits of frozen entries.

        Returns:
            The variables' values at first, in the middle, at the end and finalized.
        """
        first, middle, last = seen = self.train_with_late_mask(optimizer, mode, steps, late="late")
        optimizer.finalize_variable_values(list(self.variables.values()))
        final = self.values()
        for name, mask in self.masks.items():
            before = (middle if name == "late" else first)[name]
            for values, when in ((last, "after training"), (final, "after finalizing")):
                assert_same_bits(values[name][~mask], before[~mask], f"{name} {when}")
            moved = last[name][mask] != before[mask]
            assert moved.mean() > 0.3, f"{name}: only {moved.sum()} of {moved.size} entries trained"
            assert np.isfinite(last[name][mask].astype("float64")).all(), name
        assert mode == "eager" or self.traces == 1, f"{self.traces} traces"
        return [*seen, final]


PROMISE_SHAPES = {"start": (7, 11), "late": (6, 12), "nan": (5, 13), "odd": (8, 10), "bias": (19,)}


def check_promise(setup: str, options: dict, mode: str, dtype: str = "float32", **wrapping: Any) -> None:
    """Trains five variables under one optimizer, and compares the bits of their frozen entries. One per situation:

    - `start`: masked from the first step;
    - `late`: frozen after some steps, when the slots are full;
    - `nan`: NaN and infinite gradients in the frozen entries;
    - `odd`: -0.0, infinities and subnormals (and NaN payloads, but for the optimizers that take a norm of the
      variable) among the frozen values;
    - `bias`: a vector.

    Args:
        setup: Of `SETUPS`.
        options: What the inner optimizer is given.
        mode: Of `MODES`.
        dtype: Of the variables.
        wrapping: What `MaskedOptimizer` is given besides the inner optimizer.
    """
    training = Training(PROMISE_SHAPES, dtype=dtype, odd=["odd"], finite=setup in MIXING, nan=["nan"])
    training.check_promise(fz.MaskedOptimizer(SETUPS[setup](**options), **wrapping), mode, steps=4)


def body_and_head(module: Any = keras, seed: int | None = None, **head: Any) -> Any:
    """A model of two dense layers, `body` (6 to 12) and `head` (12 to 3), of Keras or tf_keras."""
    if seed is not None:
        module.utils.set_random_seed(seed)
    body = module.layers.Dense(12, activation="tanh", name="body")
    return module.Sequential([module.Input((6,)), body, module.layers.Dense(3, name="head", **head)])


def descend(model: Any, optimizer: Any, x: np.ndarray, y: np.ndarray, total: int) -> None:
    """A step of a custom loop, on the squared error of this batch over `total` samples."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum((model(x) - y) ** 2) / total
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
