"""The options of a step that may be set at any time."""

from typing import Any

from freezeops.messages import short


class StepOptions:
    """The options `fused` and `skip_frozen_gradients` of a `MaskedOptimizer`.

    Functions that were traced before an option was set go on as they were traced.
    """

    state: str
    _fused: bool | None
    _skips: bool

    @property
    def fused(self) -> bool:
        """True if variables are updated in one native pass where that can be; may be set at any time.

        Functions that were traced before go on as they were traced.
        """
        return bool(self._fused)

    @fused.setter
    def fused(self, fused: bool) -> None:
        check_fused(fused)
        self._fused = fused

    @property
    def skip_frozen_gradients(self) -> bool:
        """True if gradients of frozen entries are left uncomputed where that can be; may be set at any time.

        Functions that were traced before go on as they were traced.
        """
        return self._skips

    @skip_frozen_gradients.setter
    def skip_frozen_gradients(self, skip: bool) -> None:
        check_skips(skip, self.state)
        self._skips = skip


def check_fused(fused: Any) -> None:
    """Raises a `TypeError` unless this is a bool."""
    if not isinstance(fused, bool):
        raise TypeError(f"`fused` must be a bool. Received: fused={short(fused)}")


def check_skips(skip: Any, state: str) -> None:
    """Raises a `ValueError` unless this is a bool, and with full state unless it is False."""
    if not isinstance(skip, bool):
        raise ValueError(
            f"`skip_frozen_gradients` must be True or False. Received: skip_frozen_gradients={short(skip)}"
        )
    if skip and state != "compact":
        raise ValueError(
            "`skip_frozen_gradients` must be used with state='compact': with full state a mask may name any entry in "
            f"the next step. Received: skip_frozen_gradients=True, state={short(state)}"
        )
