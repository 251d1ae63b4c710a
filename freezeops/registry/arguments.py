"""Checks of the arguments that every `MaskedOptimizer` takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from freezeops.masks import layout
from freezeops.messages import short
from freezeops.registry.methods import mask_pairs

INNER_ARGUMENTS = (
    "learning_rate",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)
"""Arguments that every optimizer takes and that are meant for the inner one."""


def check_arguments(masks: Any, maskable: Any, inner_arguments: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Raises where arguments of a `MaskedOptimizer` are wrong.

    Args:
        masks: Must be a mapping, pairs or `None`.
        maskable: Likewise, with values of `layout.MASKABLE`.
        inner_arguments: Names of arguments that belong to the inner optimizer.
        arguments: Further keyword arguments that were given; there must be none.
    """
    for argument, value in arguments.items():
        if argument in inner_arguments:
            raise ValueError(
                f"MaskedOptimizer does not support `{argument}`: it must be set on the "
                f"`inner_optimizer`. Received: {argument}={short(value)}"
            )
    if arguments:
        raise ValueError(f"Arguments must be known ones. Received: {short(dict(arguments))}")
    mask_pairs(masks)
    if maskable is not None and not isinstance(maskable, Mapping):
        raise TypeError(
            f"`maskable` must map path patterns to one of {layout.MASKABLE}. Received: maskable={short(maskable)}"
        )
    for pattern, value in (maskable or {}).items():
        if value not in layout.MASKABLE:
            raise ValueError(
                f"`maskable` must map path patterns to one of {layout.MASKABLE}. "
                f"Received: maskable={short({pattern: value})}"
            )
