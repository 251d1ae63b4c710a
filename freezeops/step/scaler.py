"""Gradients in a step of a `LossScaleOptimizer` around: it looks at trainable parts where these can be made.

It checks that gradients are finite, divides them, and calls the `MaskedOptimizer` in a `tf.cond`, in which a gradient
no longer says what it is made of. So the parts are made before, and known again inside.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from freezeops.backward.skipping import trainable_part
from freezeops.keras_compat.variables import replicas_step_by_themselves
from freezeops.ops.gradients import Gradient
from freezeops.partitions.compact import IndexTensors, TrainablePart
from freezeops.step.managed import ManagedVariable

_parts: ContextVar[Mapping[int, list[IndexTensors]] | None] = ContextVar("_parts", default=None)
"""The variables whose gradients are trainable parts in this thread's step, by the `id` of their records, each with the
index that its part was made with; `None`: no scaler is around, or it looks at whole gradients."""


@contextmanager
def gradients_for_scaler(
    managed: Sequence[ManagedVariable], gradients: Sequence[Gradient | None], skips: bool
) -> Iterator[list[Gradient | None]]:
    """Around the step of a scaler: gives the gradients that it looks at, masked or trainable parts.

    Args:
        managed: The records of the variables.
        gradients: Their gradients.
        skips: Whether parts are made where that can be.
    """
    # Where replicas wait for each other, the scaler's step is made in other threads, which would not know of parts.
    skips = skips and replicas_step_by_themselves()
    looked_at: list[Gradient | None] = []
    parts: dict[int, list[IndexTensors]] = {}
    for each, gradient in zip(managed, gradients, strict=True):
        part: Gradient | TrainablePart | None = gradient
        if skips and gradient is not None:
            part, each.gradient = trainable_part(each.partition, gradient)
        if isinstance(part, TrainablePart):
            parts[id(each)] = part.indices
            looked_at.append(part.values)
        else:
            looked_at.append(None if gradient is None else each.partition.masked(gradient))
    token = _parts.set(parts if skips else None)
    try:
        yield looked_at
    finally:
        _parts.reset(token)


def is_in_step_of_scaler() -> bool:
    """Returns whether this is called in the step of a scaler, whose gradients were looked at before."""
    return _parts.get() is not None


def as_part(managed: ManagedVariable, gradient: Gradient) -> Gradient | TrainablePart:
    """Returns a gradient as a scaler hands it on: as a trainable part where it was made as one."""
    indices = (_parts.get() or {}).get(id(managed))
    return gradient if indices is None else TrainablePart(gradient, indices)
