"""The only place that chooses between a native op and its reference twin.

The native op runs when a library for the running TensorFlow is loaded and has a
kernel for the device; otherwise, and with `FREEZEOPS_BACKEND=reference` in the
environment, the twin in `freezeops.ops.reference` does. The environment is read at
every call, so at trace time inside `tf.function`.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import tensorflow as tf

from freezeops import backend
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.ops import gpu_check, native, reference, reference_updates
from freezeops.ops.reference_updates import FusedOperand

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that can be masked."""

SAMPLED_DTYPES = ("float16", "bfloat16", "float32")
"""The dtypes of `sampled_matmul`."""

CPU_ONLY = ("sampled_matmul",)
"""The ops that have no kernel for GPUs. Where a GPU is visible their twins run."""


def reason_for_reference() -> str:
    """Returns the reason for which the twins run; an empty string if the native ops do."""
    if backend.is_reference():
        return "FREEZEOPS_BACKEND=reference"
    if native.op_library() is None:
        return "no library for the running TensorFlow"
    if tf.config.list_logical_devices("GPU"):
        if not native.has_cuda():
            return "a GPU is visible and the library has no CUDA kernels"
        return gpu_check.problem_here() or ""
    return ""


def _library(dtype: tf.DType = tf.float32) -> ModuleType | None:
    # A gradient may have a dtype that no variable has: integers, booleans.
    if dtype.name not in FLOAT_DTYPES or reason_for_reference():
        return None
    return native.op_library()


def paths() -> dict[str, str]:
    """Returns for each op "native", or "reference" and the reason, as `python -m freezeops` prints it."""
    reason = reason_for_reference()
    host = "native" if packing.host_module() else "reference (no host module)"
    if backend.is_reference():
        host = "reference (FREEZEOPS_BACKEND=reference)"
    device = dict.fromkeys(_OPS, f"reference ({reason})" if reason else "native")
    if not reason and tf.config.list_logical_devices("GPU"):
        device |= dict.fromkeys(CPU_ONLY, "reference (a GPU is visible and the op is for CPUs)")
    return device | dict.fromkeys(packing.HOST_OPS, host)


def mask_gradient(gradient: tf.Tensor, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Returns the gradient where the mask's bit is 1, and +0.0 where it is 0.

    Args:
        gradient: Tensor with `layout.size` entries; the native op is for a dtype in `FLOAT_DTYPES`.
        mask: `uint8` vector of `layout.packed_bytes` bytes.
        layout: How the bits spread over the gradient.

    Returns:
        A tensor of the gradient's shape; in the gradient's own buffer where
        TensorFlow allows that. Differentiable any number of times.
    """
    if library := _library(gradient.dtype):
        return library.freezeops_mask_gradient(gradient, mask, layout=list(layout))
    return reference.mask_gradient(gradient, mask, layout)


def mask_slices(values: tf.Tensor, indices: tf.Tensor, mask: tf.Tensor, layout: Layout, rows: int) -> tf.Tensor:
    """Returns masked values of a `tf.IndexedSlices`; see `reference.mask_slices`."""
    if library := _library(values.dtype):
        return library.freezeops_mask_slices(values, indices, mask, layout=list(layout), rows=rows)
    return reference.mask_slices(values, indices, mask, layout, rows)


def remember_frozen(variable: tf.Variable, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Returns a snapshot of the frozen entries, for `restore_frozen`; see `reference.remember_frozen`."""
    if library := _library():
        return library.freezeops_remember_frozen(variable.handle, mask, T=variable.dtype, layout=list(layout))
    return reference.remember_frozen(variable, mask, layout)


def restore_frozen(variable: tf.Variable, mask: tf.Tensor, snapshot: tf.Tensor, layout: Layout) -> None:
    """Writes the frozen entries of a variable back, in place where possible.

    Args:
        variable: Resource variable with `layout.size` entries.
        mask: `uint8` vector of `layout.packed_bytes` bytes.
        snapshot: A snapshot of `remember_frozen`, or a vector of `layout.size` entries.
        layout: How the bits spread over the variable.
    """
    if library := _library():
        library.freezeops_restore_frozen(variable.handle, mask, snapshot, layout=list(layout))
    else:
        reference.restore_frozen(variable, mask, snapshot, layout)


def gather_trainable(
    source: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, layout: Layout
) -> tf.Tensor:
    """Returns the trainable entries of a tensor in order; see `reference.gather_trainable`."""
    if library := _library(source.dtype):
        return library.freezeops_gather_trainable(source, mask, offsets, indices, layout=list(layout))
    return reference.gather_trainable(source, mask, offsets, indices, layout)


def sampled_matmul(
    x: tf.Tensor, dy: tf.Tensor, visits: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor
) -> tf.Tensor:
    """Returns the trainable entries of `x^T dy` in order, without the others; see `reference.sampled_matmul`.

    The native op goes by `visits` alone, and is for CPUs. Where a GPU is visible the twin runs, which makes the whole
    product.

    Args:
        x: Tensor of shape `[tokens, rows]`, of a dtype in `SAMPLED_DTYPES`; the last axis is static.
        dy: Tensor of shape `[tokens, columns]` and the same dtype; likewise.
        visits: `int32` vector of `masks.visits.visits` for the mask and its capacity.
        mask: As for `gather_trainable`.
        offsets: Likewise.
        indices: Likewise.

    Returns:
        A vector as long as the capacity.

    Raises:
        ValueError: If shapes or dtypes are others.
    """
    x, dy = tf.convert_to_tensor(x), tf.convert_to_tensor(dy)
    if x.dtype.name not in SAMPLED_DTYPES or dy.dtype != x.dtype:
        raise ValueError(
            f"`x` and `dy` must be of the same dtype, one of {', '.join(SAMPLED_DTYPES)}. "
            f"Received: x of dtype {x.dtype.name}, dy of dtype {dy.dtype.name}"
        )
    if x.shape.rank != 2 or dy.shape.rank != 2 or None in (x.shape[1], dy.shape[1]):
        raise ValueError(
            "`x` and `dy` must be matrices whose last axis is static. "
            f"Received: x of shape {x.shape}, dy of shape {dy.shape}"
        )
    library = None if tf.config.list_logical_devices("GPU") else _library(x.dtype)
    if library is None:
        return reference.sampled_matmul(x, dy, visits, mask, offsets, indices)
    return library.freezeops_sampled_matmul(x, dy, visits, indices)


def read_trainable(
    variable: tf.Variable, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, layout: Layout
) -> tf.Tensor:
    """Returns `gather_trainable` of a variable's value."""
    if library := _library():
        return library.freezeops_read_trainable(
            variable.handle, mask, offsets, indices, T=variable.dtype, layout=list(layout)
        )
    return reference.read_trainable(variable, mask, offsets, indices, layout)


def take_trainable(
    variable: tf.Variable,
    gradient: tf.Tensor,
    mask: tf.Tensor,
    offsets: tf.Tensor,
    indices: tf.Tensor,
    layout: Layout,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `gather_trainable` of a gradient of the variable's dtype, and `read_trainable`, in one op."""
    if library := _library():
        return library.freezeops_take_trainable(variable.handle, gradient, mask, offsets, indices, layout=list(layout))
    return reference.take_trainable(variable, gradient, mask, offsets, indices, layout)


def scatter_trainable(
    variable: tf.Variable,
    compact: tf.Tensor,
    mask: tf.Tensor,
    offsets: tf.Tensor,
    indices: tf.Tensor,
    layout: Layout,
) -> None:
    """Writes the trainable entries of a variable, in place where possible; see `reference.scatter_trainable`."""
    if library := _library():
        library.freezeops_scatter_trainable(variable.handle, compact, mask, offsets, indices, layout=list(layout))
    else:
        reference.scatter_trainable(variable, compact, mask, offsets, indices, layout)


def rank_trainable(bits: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, kept: int) -> tf.Tensor:
    """Returns the number of ones before each of some bits; see `reference.rank_trainable`."""
    if library := _library():
        return library.freezeops_rank_trainable(bits, mask, offsets, indices, kept=kept)
    return reference.rank_trainable(bits, mask, offsets, indices, kept)


def seed_slots(
    unseeded: tf.Variable,
    gradient: tf.Tensor | tf.IndexedSlices,
    scales: Sequence[tf.Tensor],
    slots: Sequence[tf.Variable],
    powers: Sequence[int],
    materialized: bool = False,
) -> None:
    """Seeds the slots of entries that were unfrozen late; see `reference.seed_slots`.

    `materialized` is True if the gradient is in memory anyway: XLA then calls a kernel rather than fusing.
    """
    library = _library()
    if library is None:
        reference.seed_slots(unseeded, gradient, scales, slots, powers)
        return
    sparse = isinstance(gradient, tf.IndexedSlices)
    library.freezeops_seed_slots(
        unseeded.handle,
        gradient.values if sparse else gradient,
        tf.cast(gradient.indices, tf.int64) if sparse else tf.zeros([0], tf.int64),
        tf.stack(scales),
        [slot.handle for slot in slots],
        powers=list(powers),
        size=slots[0].shape.num_elements(),
        sparse=sparse,
        materialized=materialized,
    )


def fused_update(
    rule: str,
    operands: Sequence[FusedOperand],
    scalars: tf.Tensor,
    seed_slots: Sequence[int],
    seed_powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> None:
    """One step of an optimizer in one pass over each variable; see `reference_updates.fused_update`."""
    library = _library()
    if library is None:
        reference_updates.fused_update(rule, operands, scalars, seed_slots, seed_powers, scales)
        return
    sparse = [i for i, operand in enumerate(operands) if isinstance(operand.gradient, tf.IndexedSlices)]
    masks = {i: operand.bits for i, operand in enumerate(operands) if operand.bits is not None}
    seeded = {i: operand.unseeded for i, operand in enumerate(operands) if operand.unseeded is not None and seed_slots}
    ranks = [operand.ranks for operand in operands if operand.ranks is not None]
    library.freezeops_fused_update(
        variables=[operand.variable.handle for operand in operands],
        gradients=[operand.gradient.values if i in sparse else operand.gradient for i, operand in enumerate(operands)],
        rows=[tf.cast(operands[i].gradient.indices, tf.int64) for i in sparse],
        slots=[slot.handle for operand in operands for slot in operand.slots],
        masks=[bits.handle for bits in masks.values()],
        offsets=[offsets.handle for offsets, _ in ranks],
        indices=[indices.handle for _, indices in ranks],
        unseeded=[unseeded.handle for unseeded in seeded.values()],
        scalars=scalars,
        scales=tf.stack(scales) if scales else tf.zeros([0], tf.float64),
        rule=rule,
        layouts=[number for operand in operands for number in operand.layout],
        decays=[operand.decays for operand in operands],
        sparse=sparse,
        masked=list(masks),
        seeded=list(seeded),
        seed_slots=list(seed_slots),
        seed_powers=list(seed_powers),
        compact=bool(ranks),
        gathered=[i for i, operand in enumerate(operands) if operand.gathered],
    )


def _mask_gradient_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    layout = Layout(*op.get_attr("layout"))
    return [mask_gradient(upstream, op.inputs[1], layout), None]


def _mask_slices_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    layout = Layout(*op.get_attr("layout"))
    masked = mask_slices(upstream, op.inputs[1], op.inputs[2], layout, op.get_attr("rows"))
    return [masked, None, None]


_OPS: dict[str, Callable[..., list[tf.Tensor | None]] | None] = {
    "mask_gradient": _mask_gradient_gradient,
    "mask_slices": _mask_slices_gradient,
    "remember_frozen": None,
    "restore_frozen": None,
    "gather_trainable": None,
    "sampled_matmul": None,
    "read_trainable": None,
    "take_trainable": None,
    "scatter_trainable": None,
    "rank_trainable": None,
    "seed_slots": None,
    "fused_update": None,
}
"""Every native op by the name of its function here, and its gradient (None: it has none)."""

for _name, _gradient in _OPS.items():
    _registered = "Freezeops>" + _name.title().replace("_", "")
    if _gradient is None:
        tf.no_gradient(_registered)
    else:
        tf.RegisterGradient(_registered)(_gradient)
