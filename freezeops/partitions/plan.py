"""Plans: which mode, layout and room a variable gets. The only place that decides it.

Mode, layout and room stay as they are from then on, but for `repack`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from freezeops import ops
from freezeops.keras_compat.variables import Variable, dtype_name, variable_path
from freezeops.masks import layout as layouts
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.partitions.capacity import Capacity, beyond_capacity_message, capacity_in_bits

Mode = Literal["full", "compact", "permanent", "unmasked"]


@dataclass(frozen=True)
class Room:
    """The room that was asked for in compact state.

    Attributes:
        capacity: As the user gave it; `None`: room for the entries that are trainable now.
        named: Whether the user asked that for this variable in particular.
        at_least: Whether there may be more room than that, if the mask needs it.
    """

    capacity: Capacity | None = None
    named: bool = False
    at_least: bool = False


@dataclass(frozen=True)
class Request:
    """A request for the plan of one variable.

    Attributes:
        variable: The model's variable.
        mask: The mask that calls and loads come to; `None` where none names the variable.
        permanent: Whether a call freezes it for good.
        maskable: What the user asked to set aside: `"elements"`, `"rows"`, `"columns"` or `"none"`; `None` where
            nothing was said.
        saved: Mode, layout and capacity from a saved config, which a file's masks will need; `None`: there is none.
        room: What was asked for in compact state; `None`: full state.
    """

    variable: Variable
    mask: Mask | None = None
    permanent: bool = False
    maskable: str | None = None
    saved: Mapping[str, Any] | None = None
    room: Room | None = None

    def was_saved(self, mode: Mode) -> bool:
        """Returns whether a saved config names this mode."""
        return self.saved is not None and self.saved["way"] == mode

    @property
    def freezes(self) -> bool:
        """True if the mask freezes an entry."""
        return self.mask is not None and self.mask.count() != self.mask.size


@dataclass(frozen=True)
class FullPlan:
    """Full state.

    Attributes:
        layout: Layout of the mask variable.
        mask: The first mask, in that layout.
        reason: Why the state is not compact though that was asked for; else empty.
    """

    layout: Layout
    mask: Mask
    reason: str = ""
    mode: Mode = "full"


@dataclass(frozen=True)
class CompactPlan:
    """Compact state.

    Attributes:
        layout: Layout of the mask variable, `(1, kept, inner)`.
        mask: The first mask, in that layout.
        capacity: How many of the mask's bits may be 1.
        pending: Whether the mask is still to come, from a file.
    """

    layout: Layout
    mask: Mask
    capacity: int
    pending: bool = False
    mode: Mode = "compact"


@dataclass(frozen=True)
class PermanentPlan:
    """The inner optimizer never sees the variable."""

    mode: Mode = "permanent"


@dataclass(frozen=True)
class UnmaskedPlan:
    """No bits are set aside.

    Attributes:
        reason: Why.
    """

    reason: str
    mode: Mode = "unmasked"


Plan: TypeAlias = FullPlan | CompactPlan | PermanentPlan | UnmaskedPlan


def plan(request: Request) -> Plan:
    """Decides on the mode and the mask layout of a variable.

    Args:
        request: What is asked for.

    Returns:
        A plan. Compact state is not for variables without a frozen entry, nor for those of which something looks at
        the whole; the plan says so.

    Raises:
        ValueError: If the mask needs more than can be set aside.
    """
    full = _without_compact_state(request)
    if request.room is None or not isinstance(full, FullPlan) or request.was_saved("full"):
        return full
    return _with_compact_state(request, request.room, full)


def _without_compact_state(request: Request) -> FullPlan | PermanentPlan | UnmaskedPlan:
    variable, mask, maskable = request.variable, request.mask, request.maskable
    if request.permanent or (request.was_saved("permanent") and (mask is None or not mask.count())):
        return PermanentPlan()
    dtype = dtype_name(variable)
    if dtype not in ops.FLOAT_DTYPES:
        if request.freezes:
            raise ValueError(
                f"A mask must be for a variable of a dtype in {ops.FLOAT_DTYPES}. "
                f"Received: variable {variable_path(variable)!r} of dtype={dtype}"
            )
        return UnmaskedPlan(f"dtype {dtype}")
    if maskable == "none" or (maskable is None and request.was_saved("unmasked")):
        if request.freezes:
            raise ValueError(cannot_hold_message(variable, None))
        return UnmaskedPlan("maskable='none'")
    shape = tuple(variable.shape)
    if maskable is not None:
        layout = layouts.named(maskable, shape)
    elif request.saved is not None and request.was_saved("full"):
        layout = Layout(*request.saved["layout"])
    elif mask is None or mask.layout.kept == 1:
        layout = layouts.elementwise(shape)
    else:
        layout = mask.layout
    return FullPlan(layout, fit(Mask.trainable(shape) if mask is None else mask, layout, variable))


def _with_compact_state(request: Request, asked: Room, full: FullPlan) -> FullPlan | CompactPlan:
    variable, saved = request.variable, request.saved if request.was_saved("compact") else None
    if reason := _reason_against_compact(variable):
        return FullPlan(full.layout, full.mask, reason)
    if full.mask.count() == full.mask.size and not asked.named and saved is None:
        return FullPlan(full.layout, full.mask, "nothing was frozen when built")
    shape = tuple(variable.shape)
    if saved is not None and request.mask is None:
        layout = Layout(*saved["layout"])
        empty = Mask.frozen(shape).with_layout(layout)
        return CompactPlan(layout, empty, saved["capacity"], pending=saved["capacity"] > 0)
    layout = full.layout if full.layout.outer == 1 and full.layout.kept > 1 else layouts.elementwise(shape)
    mask = fit(full.mask, layout, variable)
    count = mask.count() // max(layout.inner, 1)
    room = count if asked.capacity is None else capacity_in_bits(asked.capacity, layout)
    if count > room and asked.at_least:
        room = count
    if count > room:
        raise ValueError(beyond_capacity_message(variable_path(variable), mask.count(), room * layout.inner))
    if saved is not None:
        room = max(room, capacity_in_bits(saved["capacity"] * Layout(*saved["layout"]).inner, layout))
    return CompactPlan(layout, mask, room)


def _reason_against_compact(variable: Variable) -> str:
    """Why compact state is wrong for a variable, whatever its mask; empty where it is right."""
    if getattr(variable, "constraint", None) is not None:
        return f"a constraint, {type(variable.constraint).__name__}, looks at the whole variable"
    if getattr(variable, "overwrite_with_gradient", False):
        return "its gradient overwrites it"
    return ""


def fit(mask: Mask, layout: Layout, variable: Variable) -> Mask:
    """Returns the mask in a variable's layout.

    Raises:
        ValueError: If the layout can't hold it; the message names `maskable`.
    """
    try:
        return mask.with_layout(layout)
    except ValueError:
        raise ValueError(cannot_hold_message(variable, layout)) from None


def cannot_hold_message(variable: Variable, layout: Layout | None) -> str:
    """The message for a mask that needs more bits than were set aside."""
    path = variable_path(variable)
    set_aside = "no bits" if layout is None else f"layout {tuple(layout)}"
    return (
        f"A mask must fit into what was set aside for its variable when the optimizer was built. "
        f"Received: a mask of single entries for {path!r}, which has {set_aside}. Pass "
        f"maskable={{{path!r}: 'elements'}} (or 'rows', 'columns') to MaskedOptimizer to set "
        "more aside."
    )
