"""Networks by the layer that they are for, and steps of them, with trainable parts of gradients or with whole ones."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

import freezeops as fz

layers = keras.layers


class Network(NamedTuple):
    """A network.

    Attributes:
        shape: Of one input.
        body: Layers from the input's tensor to the output's.
        mask: `"entries"`, `"rows"`, `"columns"` or `"inputs"` (the last axis but one); or these by layer.
        masked: What the paths of masked variables end in.
        integers: Whether inputs are numbers of tokens, below this; 0: floats.
    """

    shape: tuple
    body: Callable[[Any], Any]
    mask: str | dict[str, str] = "entries"
    masked: tuple[str, ...] = ("kernel",)
    integers: int = 0


def in_a_row(*of: layers.Layer) -> Callable[[Any], Any]:
    def call(x: Any) -> Any:
        for layer in of:
            x = layer(x)
        return x

    return call


def _twice(x: Any) -> Any:
    layer = layers.Dense(x.shape[-1], activation="tanh")
    return layer(layer(x))


def _attention(x: Any) -> Any:
    return layers.MultiHeadAttention(3, 4)(x, x)


def _grouped(x: Any) -> Any:
    return layers.GroupQueryAttention(4, 4, 2)(x, x)


def _tied(x: Any) -> Any:
    embedding = layers.ReversibleEmbedding(16, 12)
    return embedding(layers.Dense(12)(embedding(x)), reverse=True)


NETWORKS = {
    "Dense": lambda: Network((12,), in_a_row(layers.Dense(16, "tanh"), layers.Dense(5))),
    "Dense, rows": lambda: Network((12,), in_a_row(layers.Dense(16, "tanh"), layers.Dense(5)), "rows"),
    "Dense, columns": lambda: Network((12,), in_a_row(layers.Dense(16, "tanh"), layers.Dense(8)), "columns"),
    "Dense of rank 3": lambda: Network((6, 12), in_a_row(layers.Dense(16, "tanh"), layers.Dense(5))),
    "Dense of rank 4": lambda: Network((3, 6, 12), in_a_row(layers.Dense(16))),
    "Dense, bias": lambda: Network((6, 12), in_a_row(layers.Dense(16)), masked=("kernel", "bias")),
    "EinsumDense": lambda: Network((6, 12), in_a_row(layers.EinsumDense("abc,cde->abde", (None, 4, 5)))),
    "EinsumDense, two summed": lambda: Network((6, 3, 4), in_a_row(layers.EinsumDense("abcd,cde->abe", (None, 8)))),
    "EinsumDense, rows": lambda: Network((6, 12), in_a_row(layers.EinsumDense("abc,cde->abde", (None, 4, 5))), "rows"),
    "MultiHeadAttention": lambda: Network((6, 12), _attention),
    "MultiHeadAttention, rows": lambda: Network((6, 12), _attention, "rows"),
    "GroupQueryAttention": lambda: Network((6, 12), _grouped),
    "Embedding": lambda: Network((7,), in_a_row(layers.Embedding(16, 12)), "rows", ("embeddings",), 16),
    "tied embedding": lambda: Network((7,), _tied, "rows", ("embeddings",), 16),
    "tied embedding, entries": lambda: Network((7,), _tied, "entries", ("embeddings",), 16),
    "Conv1D": lambda: Network((10, 6), in_a_row(layers.Conv1D(8, 3)), "columns"),
    "Conv1D, inputs": lambda: Network((10, 6), in_a_row(layers.Conv1D(8, 3)), "inputs"),
    "Conv2D": lambda: Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3, padding="same", strides=2)), "columns"),
    "Conv2D, inputs": lambda: Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3)), "inputs"),
    "Conv2D 1x1, entries": lambda: Network((5, 5, 12), in_a_row(layers.Conv2D(8, 1))),
    "Conv2D, dilated": lambda: Network((9, 9, 6), in_a_row(layers.Conv2D(8, 3, dilation_rate=2)), "columns"),
    "Conv3D": lambda: Network((5, 5, 5, 4), in_a_row(layers.Conv3D(8, 3)), "columns"),
    "Conv3D, inputs": lambda: Network((5, 5, 5, 6), in_a_row(layers.Conv3D(8, 3)), "inputs"),
    "Conv1DTranspose": lambda: Network((6, 6), in_a_row(layers.Conv1DTranspose(8, 3)), "columns"),
    "Conv2DTranspose": lambda: Network((6, 6, 6), in_a_row(layers.Conv2DTranspose(8, 3, strides=2)), "columns"),
    "Conv2DTranspose, inputs": lambda: Network((6, 6, 6), in_a_row(layers.Conv2DTranspose(8, 3)), "inputs"),
    "Conv3DTranspose": lambda: Network((4, 4, 4, 6), in_a_row(layers.Conv3DTranspose(8, 2)), "columns"),
    "DepthwiseConv1D": lambda: Network((9, 8), in_a_row(layers.DepthwiseConv1D(3, depth_multiplier=2)), "inputs"),
    "DepthwiseConv2D": lambda: Network((9, 9, 8), in_a_row(layers.DepthwiseConv2D(3)), "inputs"),
    "DepthwiseConv2D, multiplier": lambda: Network(
        (9, 9, 8), in_a_row(layers.DepthwiseConv2D(3, depth_multiplier=4)), "columns"
    ),
    "SeparableConv2D": lambda: Network(
        (9, 9, 8), in_a_row(layers.SeparableConv2D(6, 3)), "inputs", ("depthwise_kernel", "pointwise_kernel")
    ),
    "SeparableConv1D": lambda: Network(
        (9, 8), in_a_row(layers.SeparableConv1D(6, 3)), "inputs", ("depthwise_kernel", "pointwise_kernel")
    ),
    "a layer twice": lambda: Network((12,), _twice),
    "TimeDistributed": lambda: Network((5, 12), in_a_row(layers.TimeDistributed(layers.Dense(7)))),
    "TimeDistributed of many axes": lambda: Network((2, 5, 12), in_a_row(layers.TimeDistributed(layers.Dense(7)))),
    "unrolled SimpleRNN": lambda: Network((4, 12), in_a_row(layers.SimpleRNN(7, unroll=True))),
    "unrolled LSTM": lambda: Network((3, 12), in_a_row(layers.LSTM(7, unroll=True))),
    "unrolled GRU": lambda: Network((3, 12), in_a_row(layers.GRU(7, unroll=True))),
    "l1": lambda: Network((12,), in_a_row(layers.Dense(16, kernel_regularizer="l1"))),
    "l2": lambda: Network((12,), in_a_row(layers.Dense(16, kernel_regularizer="l2"))),
    "l1 and l2": lambda: Network((12,), in_a_row(layers.Dense(16, kernel_regularizer=keras.regularizers.L1L2(.1, .1)))),
    "a sum in the loss": lambda: Network(
        (12,), in_a_row(layers.Dense(16, kernel_regularizer=lambda kernel: 0.1 * tf.reduce_sum(kernel)))
    ),
    "LayerNormalization": lambda: Network(
        (6, 12), in_a_row(layers.LayerNormalization()), masked=("gamma", "beta")
    ),
    "RMSNormalization": lambda: Network((6, 12), in_a_row(layers.RMSNormalization()), masked=("scale",)),
    "GroupNormalization": lambda: Network(
        (6, 12), in_a_row(layers.GroupNormalization(3)), masked=("gamma", "beta")
    ),
    "Dropout and GELU": lambda: Network(
        (6, 12), in_a_row(layers.Dense(16, "gelu"), layers.Dropout(0.0), layers.Dense(5))
    ),
}  # fmt: skip
"""The networks, by name; made when they are called, under the dtype policy of that moment."""


def every_way() -> Network:
    """A network with a layer for each way in which the part of a gradient is made."""
    body = in_a_row(
        layers.Dense(16, "tanh", name="entries"),
        layers.Conv1D(12, 3, activation="tanh", padding="same", name="channels"),
        layers.Dense(16, "tanh", name="rows"),
        layers.Dense(8, "tanh", name="columns"),
        layers.Dense(5, name="sums"),
    )
    kinds = {"entries": "entries", "channels": "columns", "rows": "rows", "columns": "columns", "sums": "entries"}
    masked = ("entries/kernel", "channels/kernel", "rows/kernel", "columns/kernel", "sums/bias")
    return Network((6, 12), body, kinds, masked)


def mask_of(shape: tuple, kind: str, rng: np.random.Generator, share: float = 0.25) -> np.ndarray:
    """A mask that broadcasts to a shape, with at least one trainable entry and one frozen one."""
    axis = {"rows": 0, "columns": len(shape) - 1, "inputs": max(len(shape) - 2, 0)}.get(kind)
    of = tuple(shape) if axis is None else tuple(size if i == axis else 1 for i, size in enumerate(shape))
    count = int(np.prod(of))
    mask = np.zeros(count, bool)
    mask[rng.permutation(count)[: max(1, round(share * count))]] = True
    return mask.reshape(of)


def _kind(network: Network, path: str) -> str:
    return network.mask if isinstance(network.mask, str) else network.mask[path.split("/")[-2]]


class Trained:
    """A network with an optimizer, and what it is given.

    Args:
        make: Makes the network.
        inner: Makes the inner optimizer.
        seed: Of weights, masks and data: equal ones give equal networks.
        share: Of trainable entries in a mask.
        compile_options: For `compile`.
        model_class: Of the model.
        policy: The dtype policy that all is made under.
        around: Makes what `compile` is given, of the `MaskedOptimizer`.
        options: For `MaskedOptimizer`.
    """

    def __init__(
        self,
        make: Callable[[], Network],
        inner: Callable[[], keras.optimizers.Optimizer],
        seed: int = 0,
        share: float = 0.25,
        compile_options: dict | None = None,
        model_class: type[keras.Model] = keras.Model,
        around: Callable[[Any], Any] | None = None,
        policy: str = "float32",
        **options: Any,
    ):
        keras.utils.clear_session()  # so that equal networks have equal paths; it forgets the policy as well
        keras.utils.set_random_seed(seed)
        keras.config.set_dtype_policy(policy)
        rng = np.random.default_rng(seed)
        network = make()
        given = keras.Input(network.shape, dtype="int32" if network.integers else "float32")
        self.model = model_class(given, network.body(given))
        self.masks = {
            v.path: mask_of(v.shape, _kind(network, v.path), rng, share)
            for v in self.model.trainable_variables
            if v.path.endswith(network.masked)
        }
        assert self.masks
        self.optimizer = fz.MaskedOptimizer(inner(), masks=self.masks, state="compact", **options)
        batch = 8
        if network.integers:
            self.x = rng.integers(0, network.integers, (batch, *network.shape)).astype("int32")
        else:
            self.x = rng.normal(size=(batch, *network.shape)).astype("float32")
        self.y = rng.normal(size=self.model(self.x).shape).astype("float32")
        for v in self.model.trainable_variables:  # scales and biases that are all alike would hide mistakes
            v.assign(v.numpy() + rng.normal(size=v.shape).astype("float32") * 0.1)
        given_to_compile = self.optimizer if around is None else around(self.optimizer)
        self.model.compile(given_to_compile, "mse", **(compile_options or {}))
        self.initial = self.values()

    def fit(self, steps: int = 3, **options: Any) -> None:
        data = tf.data.Dataset.from_tensors((self.x, self.y)).repeat()
        self.model.fit(data, steps_per_epoch=steps, verbose=0, shuffle=False, **options)

    def values(self) -> dict[str, np.ndarray]:
        return {v.path: v.numpy() for v in self.model.trainable_variables}

    def outcomes(self) -> dict[str, tuple[str, str]]:
        """How the gradients of masked variables were made, with the reason, by path."""
        return {r.path: (r.gradient, r.gradient_reason) for r in self.optimizer.describe() if r.path in self.masks}


def optimized_nodes(call: Callable[[], Any]) -> list[Any]:
    """The nodes of the functions that a call runs, as TensorFlow has optimized them."""
    context.context().enable_run_metadata()
    try:
        call()
        metadata = context.context().export_run_metadata()
    finally:
        context.context().disable_run_metadata()
    nodes = []
    for graphs in metadata.function_graphs:
        optimized = graphs.post_optimization_graph
        nodes += [*optimized.node, *(node for function in optimized.library.function for node in function.node_def)]
    return nodes


def hlo_shapes_of(text: str, operation: str) -> list[tuple[int, ...]]:
    """The shapes of what an operation makes, in HLO text."""
    found = re.findall(rf"= \w+\[([\d,]*)\](?:{{[\d,]*}})? {operation}\(", text)
    return [tuple(int(size) for size in each.split(",") if size) for each in found]
