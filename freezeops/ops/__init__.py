"""The only place that chooses between a native op and its reference twin.

The native op runs when a library for the running TensorFlow is loaded and has a
kernel for the device; otherwise, and with `FREEZEOPS_BACKEND=reference` in the
environment, the twin in `freezeops.ops.reference` does. The environment is read at
every call, so at trace time inside `tf.function`.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from types import ModuleType

import tensorflow as tf

from freezeops import backend
from freezeops.masks import packing
from freezeops.masks.layout import Layout
from freezeops.ops import native, reference, reference_updates
from freezeops.ops.reference_updates import FusedVariable

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that can be masked."""

_OPS = (
    "mask_gradient",
    "mask_slices",
    "remember_frozen",
    "restore_frozen",
    "gather_trainable",
    "read_trainable",
    "take_trainable",
    "scatter_trainable",
    "rank_trainable",
    "seed_slots",
    "fused_update",
)


def _reason_for_reference() -> str | None:
    """Why the twins run, or None if the native ops do."""
    if backend.is_reference():
        return "FREEZEOPS_BACKEND=reference"
    if native.op_library() is None:
        return "no library for the running TensorFlow"
    if tf.config.list_logical_devices("GPU"):
        if not native.has_cuda():
            return "a GPU is visible and the library has no CUDA kernels"
        return _too_old_for_cuda()
    return None


_too_old: dict[native.CudaKernels, str | None] = {}


def _too_old_for_cuda() -> str | None:
    """Why the CUDA kernels cannot run on the GPUs here, or None if they can. Warns the first time that they cannot."""
    kernels = native.cuda_kernels()
    assert kernels is not None
    if kernels not in _too_old:
        _too_old[kernels] = problem = gpu_problem(kernels, native.gpus())
        if problem:
            warnings.warn(
                f"freezeops has CUDA kernels that cannot run here and uses the slower reference ops, with the same "
                f"results: {problem} To do without the kernels and without this warning, set "
                "FREEZEOPS_BACKEND=reference.",
                UserWarning,
                stacklevel=5,
            )
    return _too_old[kernels]


def gpu_problem(kernels: native.CudaKernels, gpus: Sequence[native.Gpu]) -> str | None:
    """Why kernels cannot run on GPUs, with the remedy, or None if they can.

    Asked before the first launch, which would fail.

    Args:
        kernels: The CUDA kernels and the driver.
        gpus: The GPUs that TensorFlow sees.

    Returns:
        A sentence or two.
    """
    needed, supported = kernels.runtime // 1000, kernels.driver // 1000
    if supported < needed:
        return (
            f"the driver supports CUDA {cuda_version(kernels.driver)} and they were compiled for CUDA "
            f"{cuda_version(kernels.runtime)}. Install a driver for CUDA {needed} or newer, or build freezeops with "
            f"the compiler of CUDA {max(supported, 12)}."
        )
    for gpu in gpus:
        if gpu.capability and not kernels.run_on(gpu.capability):
            if dataclasses.replace(kernels, driver=kernels.runtime).run_on(gpu.capability):
                return (
                    f"{gpu.name} needs them compiled by the driver, which supports CUDA {cuda_version(kernels.driver)} "
                    f"and not the {cuda_version(kernels.runtime)} that they are of. Install a driver for CUDA "
                    f"{cuda_version(kernels.runtime)} or newer, or build freezeops with "
                    f"FREEZEOPS_CUDA_ARCHITECTURES={gpu.capability}."
                )
            built_for = ", ".join(f"{each / 10}" for each in kernels.architectures)
            return (
                f"{gpu.name} has compute capability {gpu.capability / 10} and they were compiled for {built_for}. "
                f"Build freezeops with FREEZEOPS_CUDA_ARCHITECTURES={gpu.capability}, and a CUDA compiler that knows "
                "this GPU."
            )
    return None


def cuda_version(number: int) -> str:
    """1000 * major + 10 * minor as people write it."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _library(dtype: tf.DType = tf.float32) -> ModuleType | None:
    # Gradients may be of another dtype than any variable: integers, booleans.
    if dtype.name not in FLOAT_DTYPES or _reason_for_reference():
        return None
    return native.op_library()


def paths() -> dict[str, str]:
    """Which path each op takes here, as text for people: `python -m freezeops` prints it."""
    reason = _reason_for_reference()
    host = "native" if packing.host_module() else "reference (no host module)"
    if backend.is_reference():
        host = "reference (FREEZEOPS_BACKEND=reference)"
    device = dict.fromkeys(_OPS, f"reference ({reason})" if reason else "native")
    return device | dict.fromkeys(packing.HOST_OPS, host)


def mask_gradient(gradient: tf.Tensor, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """The gradient where the mask's bit is 1, and +0.0 where it is 0.

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
    """Masks the values of a `tf.IndexedSlices`; see `reference.mask_slices`."""
    if library := _library(values.dtype):
        return library.freezeops_mask_slices(values, indices, mask, layout=list(layout), rows=rows)
    return reference.mask_slices(values, indices, mask, layout, rows)


def remember_frozen(variable: tf.Variable, mask: tf.Tensor, layout: Layout) -> tf.Tensor:
    """What `restore_frozen` needs; opaque. See `reference.remember_frozen`."""
    if library := _library():
        return library.freezeops_remember_frozen(variable.handle, mask, T=variable.dtype, layout=list(layout))
    return reference.remember_frozen(variable, mask, layout)


def restore_frozen(variable: tf.Variable, mask: tf.Tensor, snapshot: tf.Tensor, layout: Layout) -> None:
    """Writes the frozen entries of a variable back, in place where possible.

    Args:
        variable: Resource variable with `layout.size` entries.
        mask: `uint8` vector of `layout.packed_bytes` bytes.
        snapshot: What `remember_frozen` returned, or a vector of `layout.size`
            entries to take the frozen ones from.
        layout: How the bits spread over the variable.
    """
    if library := _library():
        library.freezeops_restore_frozen(variable.handle, mask, snapshot, layout=list(layout))
    else:
        reference.restore_frozen(variable, mask, snapshot, layout)


def gather_trainable(
    source: tf.Tensor, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, layout: Layout
) -> tf.Tensor:
    """The trainable entries of a tensor in order; see `reference.gather_trainable`."""
    if library := _library(source.dtype):
        return library.freezeops_gather_trainable(source, mask, offsets, indices, layout=list(layout))
    return reference.gather_trainable(source, mask, offsets, indices, layout)


def read_trainable(
    variable: tf.Variable, mask: tf.Tensor, offsets: tf.Tensor, indices: tf.Tensor, layout: Layout
) -> tf.Tensor:
    """`gather_trainable` from a variable."""
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
    """`gather_trainable` of a gradient of the variable's dtype, and `read_trainable`, at once."""
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
    """How many ones there are before each of some bits; see `reference.rank_trainable`."""
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
    """Starts the slots of entries that were unfrozen late; see `reference.seed_slots`.

    `materialized`: whether the gradient is in memory anyway, so that XLA does better to call a
    kernel than to fuse.
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
    variables: Sequence[FusedVariable],
    scalars: tf.Tensor,
    seed_slots: Sequence[int],
    seed_powers: Sequence[int],
    scales: Sequence[tf.Tensor],
) -> None:
    """One step of an optimizer in one pass over each variable; see `reference_updates.fused_update`."""
    library = _library()
    if library is None:
        reference_updates.fused_update(rule, variables, scalars, seed_slots, seed_powers, scales)
        return
    sparse = [i for i, one in enumerate(variables) if isinstance(one.gradient, tf.IndexedSlices)]
    masks = {i: one.bits for i, one in enumerate(variables) if one.bits is not None}
    seeded = {i: one.unseeded for i, one in enumerate(variables) if one.unseeded is not None and seed_slots}
    ranks = [one.ranks for one in variables if one.ranks is not None]
    library.freezeops_fused_update(
        variables=[one.variable.handle for one in variables],
        gradients=[one.gradient.values if i in sparse else one.gradient for i, one in enumerate(variables)],
        rows=[tf.cast(variables[i].gradient.indices, tf.int64) for i in sparse],
        slots=[slot.handle for one in variables for slot in one.slots],
        masks=[bits.handle for bits in masks.values()],
        offsets=[offsets.handle for offsets, _ in ranks],
        indices=[indices.handle for _, indices in ranks],
        unseeded=[unseeded.handle for unseeded in seeded.values()],
        scalars=scalars,
        scales=tf.stack(scales) if scales else tf.zeros([0], tf.float64),
        rule=rule,
        layouts=[number for one in variables for number in one.layout],
        decays=[one.decays for one in variables],
        sparse=sparse,
        masked=list(masks),
        seeded=list(seeded),
        seed_slots=list(seed_slots),
        seed_powers=list(seed_powers),
        compact=bool(ranks),
    )


def _mask_gradient_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    layout = Layout(*op.get_attr("layout"))
    return [mask_gradient(upstream, op.inputs[1], layout), None]


def _mask_slices_gradient(op: tf.Operation, upstream: tf.Tensor) -> list[tf.Tensor | None]:
    layout = Layout(*op.get_attr("layout"))
    masked = mask_slices(upstream, op.inputs[1], op.inputs[2], layout, op.get_attr("rows"))
    return [masked, None, None]


tf.RegisterGradient("Freezeops>MaskGradient")(_mask_gradient_gradient)
tf.RegisterGradient("Freezeops>MaskSlices")(_mask_slices_gradient)
tf.no_gradient("Freezeops>RememberFrozen")
tf.no_gradient("Freezeops>RestoreFrozen")
tf.no_gradient("Freezeops>GatherTrainable")
tf.no_gradient("Freezeops>ReadTrainable")
tf.no_gradient("Freezeops>TakeTrainable")
tf.no_gradient("Freezeops>ScatterTrainable")
tf.no_gradient("Freezeops>RankTrainable")
tf.no_gradient("Freezeops>SeedSlots")
tf.no_gradient("Freezeops>FusedUpdate")
