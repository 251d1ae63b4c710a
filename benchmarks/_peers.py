"""Steps of other libraries' optimizers, in an interpreter that has the library; `bench_fused.py` asks for each.

    python _peers.py "torch, fused" adam 16777216 3

makes 3 instances of a variable of 16,777,216 float32 with a gradient, and prints a line of
JSON: the library's version or, where there is none, why. Then each line read, an instance's
number, is answered with a line once that instance has made a step. Nothing but the standard
library and that library is imported.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

RATE, MOMENTUM, GRADIENT = 1e-4, 0.9, 0.01
PEERS = ("torch, fused", "torch, foreach", "optax, jitted")


def make_torch(optimizer: str, size: int, instances: int, **kind: bool) -> tuple[str, list[Callable[[], Any]]]:
    """Steps of `torch.optim` on as many threads as there are cores."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    gradient = torch.full([size], GRADIENT)

    def make() -> Callable[[], Any]:
        parameter = torch.ones(size, requires_grad=True)
        parameter.grad = gradient
        if optimizer == "adam":
            return torch.optim.Adam([parameter], RATE, **kind).step
        return torch.optim.SGD([parameter], RATE, momentum=MOMENTUM, **kind).step

    return f"PyTorch {torch.__version__}", [make() for _ in range(instances)]


def make_optax(optimizer: str, size: int, instances: int) -> tuple[str, list[Callable[[], Any]]]:
    """Jitted steps of Optax on the CPU, which may write to the buffers of the step before."""
    import functools

    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp
    import optax

    rule = optax.adam(RATE) if optimizer == "adam" else optax.sgd(RATE, momentum=MOMENTUM)
    gradient = jnp.full([size], GRADIENT, jnp.float32)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(variable: jax.Array, state: Any, gradient: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = rule.update(gradient, state, variable)
        return optax.apply_updates(variable, updates), state

    def make() -> Callable[[], Any]:
        variable = jnp.ones([size], jnp.float32)
        held = [variable, rule.init(variable)]

        def step() -> None:
            held[:] = update(*held, gradient)
            jax.block_until_ready(held)

        return step

    return f"Optax {optax.__version__}, JAX {jax.__version__}", [make() for _ in range(instances)]


def make(peer: str, optimizer: str, size: int, instances: int) -> tuple[str, list[Callable[[], Any]]]:
    """The version of a peer's library, and steps."""
    library, kind = peer.split(", ")
    if library == "optax":
        return make_optax(optimizer, size, instances)
    return make_torch(optimizer, size, instances, **{kind: True})


def main(peer: str, optimizer: str, size: str, instances: str) -> None:
    """Answers until there is nothing left to read."""
    try:
        version, steps = make(peer, optimizer, int(size), int(instances))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        steps[int(line)]()
        print(flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
