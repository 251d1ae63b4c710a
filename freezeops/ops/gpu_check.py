"""Checks that compiled CUDA kernels can run on the GPUs of this machine: driver and compute capability."""

import dataclasses
from collections.abc import Sequence

from freezeops.notices import warn
from freezeops.ops import native

_problems: dict[native.CudaKernels, str | None] = {}


def problem_here() -> str | None:
    """Returns why the CUDA kernels in use cannot run on the GPUs here, or None if they can.

    Warns the first time that they cannot.
    """
    kernels = native.cuda_kernels()
    assert kernels is not None
    if kernels not in _problems:
        _problems[kernels] = problem = gpu_problem(kernels, native.gpus())
        if problem:
            warn(
                f"freezeops has CUDA kernels that cannot run here and uses the slower reference ops, with the same "
                f"results: {problem} To do without the kernels and without this warning, set "
                "FREEZEOPS_BACKEND=reference."
            )
    return _problems[kernels]


def gpu_problem(kernels: native.CudaKernels, gpus: Sequence[native.Gpu]) -> str | None:
    """Returns why kernels cannot run on GPUs, with the remedy, or None if they can.

    Call it before the first launch, which would fail.

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
    """Returns a version as people write it: 13010 as `"13.1"`."""
    return f"{number // 1000}.{number % 1000 // 10}"
