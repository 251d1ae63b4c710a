"""How one variable is split between frozen and trainable entries: one class per way.

The interface is small: `inner_variable` is what the inner optimizer sees,
`take(gradient)` is what it is given, `remember()` is called before it runs and
`put_back(snapshot)` after. (Compact state is in `compact.py`.) A snapshot is passed on, not stored, because the
replicas of a distributed step share their partitions.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import keras
import tensorflow as tf

from freezeops import ops
from freezeops.keras_compat.variables import Variable, components, dtype_name, tf_variable, variable_path
from freezeops.masks import layout as layouts
from freezeops.masks.layout import Layout
from freezeops.masks.mask import Mask
from freezeops.ops.gradients import Gradient, dense_shape, mask_with_bits, merge_slices

Way = Literal["full", "compact", "permanent", "unmasked"]


@dataclass(frozen=True)
class Plan:
    """What `choose` decided for one variable.

    Attributes:
        way: Which partition class.
        layout: Layout of the mask variable; `None` where there is none.
        mask: The first mask, in that layout; `None` where there is none.
        reason: Why the variable can't be masked, or why its state is not compact though
            that was asked for; else empty.
        capacity: With compact state: how many of the mask's bits may be 1.
        pending: With compact state: whether the mask is still to come, from a file.
    """

    way: Way
    layout: Layout | None = None
    mask: Mask | None = None
    reason: str = ""
    capacity: int = 0
    pending: bool = False


def choose(
    variable: Variable,
    mask: Mask | None,
    permanent: bool = False,
    maskable: str | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Plan:
    """Chooses the way and the mask layout of a variable. Both stay from then on.

    Args:
        variable: The model's variable.
        mask: What the rules make of it; `None` where no rule names it.
        permanent: Whether a rule freezes it for good.
        maskable: What the user asked to set aside: `"elements"`, `"rows"`,
            `"columns"` or `"none"`; `None` where nothing was said.
        saved: Way and layout from a saved config, which a file's masks will need.

    Returns:
        A `Plan`.

    Raises:
        ValueError: If the mask needs more than can be set aside.
    """
    if permanent or (saved is not None and saved["way"] == "permanent" and (mask is None or not mask.count())):
        return Plan("permanent")
    dtype = dtype_name(variable)
    if dtype not in ops.FLOAT_DTYPES:
        if mask is not None and mask.count() != mask.size:
            raise ValueError(
                f"A mask must be for a variable of a dtype in {ops.FLOAT_DTYPES}. "
                f"Received: variable {variable_path(variable)!r} of dtype={dtype}"
            )
        return Plan("unmasked", reason=f"dtype {dtype}")
    if maskable == "none" or (maskable is None and saved is not None and saved["way"] == "unmasked"):
        if mask is not None and mask.count() != mask.size:
            raise ValueError(cannot_hold_message(variable, None))
        return Plan("unmasked", reason="maskable='none'")
    shape = tuple(variable.shape)
    if maskable is not None:
        layout = layouts.named(maskable, shape)
    elif saved is not None and saved["way"] == "full":
        layout = Layout(*saved["layout"])
    elif mask is None or mask.layout.kept == 1:
        layout = layouts.elementwise(shape)
    else:
        layout = mask.layout
    if mask is None:
        mask = Mask.trainable(shape)
    return Plan("full", layout, fit(mask, layout, variable))


def fit(mask: Mask, layout: Layout, variable: Variable) -> Mask:
    """The mask in a variable's layout.

    Raises:
        ValueError: If the layout can't hold it; the message names `maskable`.
    """
    try:
        return mask.with_layout(layout)
    except ValueError:
        raise ValueError(cannot_hold_message(variable, layout)) from None


def cannot_hold_message(variable: Variable, layout: Layout | None) -> str:
    """What to tell someone whose mask needs more bits than were set aside."""
    path = variable_path(variable)
    set_aside = "no bits" if layout is None else f"layout {tuple(layout)}"
    return (
        f"A mask must fit into what was set aside for its variable when the optimizer was built. "
        f"Received: a mask of single entries for {path!r}, which has {set_aside}. Pass "
        f"maskable={{{path!r}: 'elements'}} (or 'rows', 'columns') to MaskedOptimizer to set "
        "more aside."
    )


class Partition(ABC):
    """One variable, as the model and as the inner optimizer see it.

    Args:
        variable: The model's variable.
    """

    way: Way

    def __init__(self, variable: Variable):
        self.variable = variable
        self.path = variable_path(variable)
        self.size = int(tf.TensorShape(variable.shape).num_elements())

    @property
    def inner_variable(self) -> Variable | None:
        """What the inner optimizer is built with; `None`: it never sees this variable."""
        return self.variable

    @abstractmethod
    def masked(self, gradient: Gradient) -> Gradient:
        """A gradient of the variable with +0.0 in the frozen entries.

        Raises:
            ValueError: If it has not the variable's shape.
        """

    def take(self, gradient: Gradient) -> Gradient:
        """What the inner optimizer is given for a gradient of the variable."""
        return self.masked(gradient)

    def take_and_remember(self, gradient: Gradient) -> tuple[Gradient, Any]:
        """`take`, and what `remember` would return right after it; `None` where that is still to be called."""
        return self.take(gradient), None

    def checked(self, gradient: Any) -> Gradient:
        """A gradient of the variable as it is, if it has the variable's shape.

        What is not known of that yet is looked at when the step runs; where all is known, that
        costs nothing.
        """
        if not isinstance(gradient, tf.IndexedSlices):
            gradient = tf.convert_to_tensor(gradient)
        shape, own = dense_shape(gradient), tf.TensorShape(self.variable.shape)
        if not shape.is_compatible_with(own):
            raise ValueError(
                "A gradient must have the shape of its variable. Received: gradient of shape "
                f"{shape} for {self.path!r} of shape {tuple(self.variable.shape)}"
            )
        if not isinstance(gradient, tf.IndexedSlices):
            return gradient if shape.is_fully_defined() else tf.ensure_shape(gradient, own)
        values = tf.convert_to_tensor(gradient.values)
        if values.shape[1:].is_fully_defined():
            return gradient
        return tf.IndexedSlices(tf.ensure_shape(values, [None, *own[1:]]), gradient.indices, gradient.dense_shape)

    def remember(self, rows: tf.Tensor | None = None) -> Any:
        """Called before the inner optimizer runs.

        Args:
            rows: Indices of the only rows that can be written until `put_back`, where
                that is known.

        Returns:
            Something opaque, for `put_back` alone.
        """
        return None

    def clear_accumulator(self, accumulator: Variable) -> None:
        """Sets the frozen entries of an accumulated gradient to zero."""

    def put_back(self, snapshot: Any) -> None:
        """Called after it ran: makes the frozen entries what they were when `snapshot` was taken."""

    def abandon(self, snapshot: Any) -> None:
        """Called instead of `put_back` where it failed."""
        self.put_back(snapshot)

    def put_into_average(self, average: Variable) -> None:
        """Makes the frozen entries of a moving-average slot the variable's own."""

    def remember_frozen(self) -> Any:
        """Called before something else than the inner optimizer may write the model's variable.

        Returns:
            Something opaque, for `restore_frozen` alone.
        """
        return None

    def restore_frozen(self, snapshot: Any) -> None:
        """Called after it: makes the model's variable's frozen entries what they were, and leaves all others."""

    @property
    @abstractmethod
    def mask(self) -> Mask:
        """The mask as it is now."""

    @abstractmethod
    def fit(self, mask: Mask) -> Mask:
        """The mask as `assign` takes it.

        Raises:
            ValueError: If this variable can't take it.
        """

    def assign(self, mask: Mask) -> None:
        """Sets a mask that `fit` returned; no retracing."""

    @property
    def pending(self) -> bool:
        """Whether the mask is still to come, from a file."""
        return False

    @property
    def frozen_count(self) -> int:
        """How many entries are frozen now."""
        return self.size - self.mask.count()

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask on the device."""
        return 0

    @property
    def bytes_beside_slots(self) -> dict[str, int]:
        """Bytes that compact state needs beside slots, by what for."""
        return {}

    @property
    def note(self) -> str:
        """A word for people on why the way is what it is."""
        return ""

    def get_config(self) -> dict[str, Any]:
        """Way and layout, serializable; no mask bits."""
        return {"way": self.way}


class _Snapshot(NamedTuple):
    """What a `MaskedPartition` remembers of one copy of its variable.

    Attributes:
        bits: The packed mask.
        old: What `ops.remember_frozen` returned; or the old rows.
        rows: Indices of the rows in `old`; `None` for the whole variable.
    """

    bits: tf.Tensor
    old: tf.Tensor
    rows: tf.Tensor | None = None


class MaskedPartition(Partition):
    """One with a mask that can change: a packed one on the device.

    Attributes:
        layout: Layout of the bits.
        bits: `uint8` variable of the packed mask.
    """

    layout: Layout
    bits: keras.Variable

    def masked(self, gradient: Gradient) -> Gradient:
        bits = tf.convert_to_tensor(tf_variable(self.bits))
        return mask_with_bits(self.checked(gradient), bits, self.layout, self.rows)

    @property
    def rows(self) -> int | None:
        """How many rows slices can be of; `None` for a scalar, which has none."""
        return self.variable.shape[0] if len(self.variable.shape) else None

    @property
    def mask(self) -> Mask:
        return Mask(tuple(self.variable.shape), self.layout, self.bits.numpy())

    def fit(self, mask: Mask) -> Mask:
        return fit(mask, self.layout, self.variable)

    def remember_frozen(self) -> list[_Snapshot]:
        # With the bits of this moment: another thread may change the mask meanwhile.
        return [
            _Snapshot(bits, ops.remember_frozen(variable, bits, self.layout))
            for variable, bits in self._components(self.variable)
        ]

    def restore_frozen(self, snapshot: list[_Snapshot]) -> None:
        for variable, (bits, old, _) in zip(components(self.variable), snapshot, strict=True):
            ops.restore_frozen(variable, bits, old, self.layout)

    def _components(self, variable: Variable) -> list[tuple[tf.Variable, tf.Tensor]]:
        """The copies of a variable that this context holds, each with the bits beside it."""
        bits = [tf.convert_to_tensor(copy) for copy in components(self.bits)]
        return list(zip(components(variable), bits, strict=True))

    @property
    def mask_bytes(self) -> int:
        return self.layout.packed_bytes

    def get_config(self) -> dict[str, Any]:
        return {"way": self.way, "layout": list(self.layout)}


class FullPartition(MaskedPartition):
    """The inner optimizer has slots of the variable's shape; what it does to frozen entries is undone.

    Args:
        variable: The model's variable.
        layout: Layout of the bits.
        bits: `uint8` variable of the packed mask.
        reason: Why the state is not compact though that was asked for.
    """

    way = "full"

    def __init__(self, variable: Variable, layout: Layout, bits: keras.Variable, reason: str = ""):
        super().__init__(variable)
        self.layout = layout
        self.bits = bits
        self._reason = reason

    def remember(self, rows: tf.Tensor | None = None) -> list[_Snapshot]:
        if rows is None:
            return self.remember_frozen()
        return [_Snapshot(bits, variable.sparse_read(rows), rows) for variable, bits in self._components(self.variable)]

    def put_back(self, snapshot: list[_Snapshot]) -> None:
        if all(part.rows is None for part in snapshot):
            self.restore_frozen(snapshot)
            return
        for variable, (bits, old, rows) in zip(components(self.variable), snapshot, strict=True):
            if rows is not None:
                new = variable.sparse_read(rows)
                merged = merge_slices(new, old, rows, bits, self.layout, variable.shape[0])
                variable.scatter_update(tf.IndexedSlices(merged, rows))

    def put_into_average(self, average: Variable) -> None:
        variables = components(self.variable)
        for (slot, bits), variable in zip(self._components(average), variables, strict=True):
            own = tf.reshape(variable.read_value(), [self.size])
            ops.restore_frozen(slot, bits, own, self.layout)

    def clear_accumulator(self, accumulator: Variable) -> None:
        for slot, bits in self._components(accumulator):
            slot.assign(ops.mask_gradient(slot.read_value(), bits, self.layout))

    def assign(self, mask: Mask) -> None:
        self.bits.assign(mask.packed)

    @property
    def note(self) -> str:
        return self._reason


class PermanentPartition(Partition):
    """The inner optimizer never sees the variable: no slots, no cost, no way back."""

    way = "permanent"

    @property
    def inner_variable(self) -> None:
        return None

    def masked(self, gradient: Gradient) -> Gradient:
        gradient = self.checked(gradient)
        if isinstance(gradient, tf.IndexedSlices):
            values = tf.zeros_like(gradient.values)
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return tf.zeros_like(gradient)

    def remember_frozen(self) -> list[tf.Tensor]:
        return [variable.read_value() for variable in components(self.variable)]

    def restore_frozen(self, snapshot: list[tf.Tensor]) -> None:
        for variable, old in zip(components(self.variable), snapshot, strict=True):
            variable.assign(old)

    @property
    def mask(self) -> Mask:
        return Mask.frozen(tuple(self.variable.shape))

    def fit(self, mask: Mask) -> Mask:
        if mask.count():
            raise ValueError(
                "A variable that was frozen with `permanent=True` must stay frozen: the inner "
                f"optimizer has no slots for it. Received: {self.path!r} with {mask.count()} "
                "trainable entries"
            )
        return mask


class UnmaskedPartition(Partition):
    """The variable trains as without freezeops: no bits were set aside for it.

    Args:
        variable: The model's variable.
        reason: Why, for `summary()`.
    """

    way = "unmasked"

    def __init__(self, variable: Variable, reason: str):
        super().__init__(variable)
        self._reason = reason

    def masked(self, gradient: Gradient) -> Gradient:
        return self.checked(gradient)

    @property
    def mask(self) -> Mask:
        return Mask.trainable(tuple(self.variable.shape))

    def fit(self, mask: Mask) -> Mask:
        if mask.count() != mask.size:
            if not tf.as_dtype(self.variable.dtype).is_floating:
                raise ValueError(
                    "A mask must be for a variable of a floating dtype. "
                    f"Received: variable {self.path!r} of dtype={dtype_name(self.variable)}"
                )
            raise ValueError(cannot_hold_message(self.variable, None))
        return mask

    @property
    def note(self) -> str:
        return self._reason
