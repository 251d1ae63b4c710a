"""Training with trainable parts of gradients against training with whole ones."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from common import assert_same_bits
from network import NETWORKS, Network, Trained

PART = ("trainable part only", "")


def sgd() -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.05, momentum=0.9)


def untrained(
    name: str | Callable[[], Network],
    skips: bool,
    jit: bool | str = False,
    policy: str = "float32",
    inner: Callable[[], keras.optimizers.Optimizer] = sgd,
    compile_options: dict | None = None,
    **options: Any,
) -> Trained:
    """A network that was not trained yet, under a dtype policy."""
    make = NETWORKS[name] if isinstance(name, str) else name
    compile_options = {"jit_compile": jit} | (compile_options or {})
    return Trained(make, inner, compile_options=compile_options, skip_frozen_gradients=skips, policy=policy, **options)


def trained(name: str | Callable[[], Network], jit: bool | str, skips: bool, policy: str = "float32", **options: Any):
    """Three steps of `fit`."""
    result = untrained(name, skips, jit, policy, **options)
    result.fit()
    return result


def frozen(of: Trained, path: str) -> np.ndarray:
    """The frozen entries of a variable, under its first mask."""
    return ~np.broadcast_to(of.masks[path], of.initial[path].shape)


def assert_frozen_bits(of: Trained) -> None:
    """Fails where a frozen entry has moved, or where no trainable entry has."""
    values = of.values()
    for path in of.masks:
        where = frozen(of, path)
        assert_same_bits(values[path][where], of.initial[path][where], path)
        assert (values[path][~where] != of.initial[path][~where]).any(), path


def assert_agree(part: Trained, whole: Trained, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    expected = whole.values()
    for path, values in part.values().items():
        np.testing.assert_allclose(values, expected[path], rtol=rtol, atol=atol, err_msg=path)
    assert_frozen_bits(part)
