"""Finds the compiled libraries, refuses those built for another TensorFlow, loads the rest.

A library of ops works with the TensorFlow minor version it was compiled for and with no other. That it loads proves
nothing (one for 2.19 loads in 2.18 and is misread there), so versions are compared before anything is loaded. Without
a library everything works on the reference twins; a warning says so once, at the first use.

The import of freezeops loads the library (some 15 ms), so that its ops are registered: `tf.saved_model.load` of a
function that was traced with them asks for them by name.
"""

import ctypes
import dataclasses
import functools
import json
import os
import platform
import re
import struct
import threading
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from freezeops import backend
from freezeops._version import __version__
from freezeops.masks import packing
from freezeops.notices import warn

# The package's own folder, where the build installs the libraries.
_DIRECTORY = Path(__file__).resolve().parents[1]
_LIBRARY_NAME = re.compile(r"libfreezeops_tf(\d+)_(\d+)\.so")
_REMEDY = "pip install --no-deps --force-reinstall ."

_lock = threading.Lock()
_loaded: "_Outcome | None" = None
_warned = False


@dataclasses.dataclass(frozen=True)
class LibraryReport:
    """One compiled library of ops that was found.

    Attributes:
        path: The file.
        built_for: The TensorFlow version that it was built for, by its build information ("" if that is missing).
        loaded: True if it is in use.
        reason: Reason for loading or refusing it.
        build: The build information written next to it: compiler, instruction sets, CUDA.
    """

    path: Path
    built_for: str
    loaded: bool
    reason: str
    build: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CudaKernels:
    """The CUDA kernels of the library in use, and the driver for them.

    Attributes:
        compiler: Compiler and version.
        architectures: Compute capabilities with machine code, as 10 * major + minor.
        ptx: Compute capabilities with PTX, which newer GPUs run as well.
        runtime: CUDA version that they were compiled for, as 1000 * major + 10 * minor.
        driver: Newest CUDA version that the driver of this machine supports; 0 without a driver.
    """

    compiler: str
    architectures: tuple[int, ...]
    ptx: tuple[int, ...]
    runtime: int
    driver: int

    def run_on(self, capability: int) -> bool:
        """Returns True if a GPU of a compute capability can run them."""
        # Machine code is for one major version, from its minor version on.
        if any(each <= capability and each // 10 == capability // 10 for each in self.architectures):
            return True
        # A driver does not compile PTX of a newer CUDA than its own.
        return self.driver >= self.runtime and any(each <= capability for each in self.ptx)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that TensorFlow sees: its name, and its compute capability as 10 * major + minor (0: not known)."""

    name: str
    capability: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The content of `python -m freezeops`: versions, libraries, and which of them are in use.

    Attributes:
        versions: Name to version, for freezeops, TensorFlow, Keras, NumPy and Python.
        backend: `FREEZEOPS_BACKEND`, "auto" where it is not set.
        libraries: Every library of ops found, each with the reason for loading or refusing it.
        host: `"loaded"`, or the reason for not using the host module (`freezeops._host`).
        isa: Instruction set of the CPU kernels, None if no library is in use.
        cuda: The CUDA kernels of the library in use; None if it has none.
        gpus: The GPUs that TensorFlow sees.
    """

    versions: dict[str, str]
    backend: str
    libraries: list[LibraryReport]
    host: str
    isa: str | None
    cuda: CudaKernels | None
    gpus: tuple[Gpu, ...]


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The result of looking for a library: at most one is loaded."""

    module: ModuleType | None
    reports: list[LibraryReport]

    @property
    def used(self) -> LibraryReport | None:
        return next((report for report in self.reports if report.loaded), None)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _read_build_info(library: Path) -> tuple[dict[str, Any], str]:
    """Returns a library's build information, and the reason if it cannot be used, else ""."""
    path = library.with_suffix(".json")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"its build information ({path.name}) is missing"
    except (OSError, ValueError) as error:
        return {}, f"its build information ({path.name}) cannot be read: {error}"
    if not isinstance(info, dict) or not isinstance(info.get("tensorflow_version"), str):
        return {}, f"its build information ({path.name}) does not name a TensorFlow version"
    return info, ""


def _is_whole(library: Path) -> bool:
    """Returns True if a shared library is as long as its header says: the system's loader crashes on a shorter one."""
    try:
        with library.open("rb") as file:
            header, length = file.read(64), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # 64 bit, little endian
        return False
    # The table of sections is the last thing in the file: offset, and size and number of its entries.
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, number = struct.unpack_from("<HH", header, 58)
    return offset + size * number <= length


def _examine(library: Path, running: str) -> LibraryReport:
    """Returns a report on a library that is not loaded yet: with an empty reason TensorFlow `running` may load it."""
    info, reason = _read_build_info(library)
    built_for = info.get("tensorflow_version", "")
    named = _LIBRARY_NAME.fullmatch(library.name)
    name_minor = f"{named[1]}.{named[2]}" if named else ""
    if not reason:
        if _minor(built_for) != name_minor:
            reason = f"its name says TensorFlow {name_minor}, its build information TensorFlow {built_for}"
        elif _minor(built_for) != _minor(running):
            reason = f"built for TensorFlow {built_for}, running TensorFlow {running}"
        elif info.get("freezeops_version") != __version__:
            reason = f"built from freezeops {info.get('freezeops_version')}, running freezeops {__version__}"
        elif not _is_whole(library):
            reason = "it could not be loaded: the file is damaged or not a library for this platform"
    return LibraryReport(library, built_for, False, reason, info)


def _find_and_load() -> _Outcome:
    import tensorflow as tf

    running = tf.__version__
    module = None
    reports = []
    for library in sorted(_DIRECTORY.glob("libfreezeops_tf*.so")):
        report = _examine(library, running)
        if not report.reason:
            try:
                module = tf.load_op_library(str(library))
                report = dataclasses.replace(report, loaded=True, reason=f"built for TensorFlow {report.built_for}")
            except (tf.errors.OpError, OSError, RuntimeError) as error:
                first_line = next(iter(str(error).splitlines()), type(error).__name__)
                report = dataclasses.replace(report, reason=f"it could not be loaded: {first_line}")
        reports.append(report)
    return _Outcome(module, reports)


def _warn_without_library(reports: list[LibraryReport]) -> None:
    import tensorflow as tf

    running = tf.__version__
    if reports:
        found = "; ".join(f"{report.path.name}: {report.reason}" for report in reports)
        found = f"Found and refused: {found}."
    else:
        found = f"None was found in {_DIRECTORY}."
    warn(
        f"freezeops {__version__} has no compiled ops for TensorFlow {running} and uses the slower reference ones, "
        f"with the same results. {found} To build them for this TensorFlow, run `{_REMEDY}` in freezeops's source "
        "tree. To do without them and without this warning, set FREEZEOPS_BACKEND=reference."
    )


def _outcome(used: bool = True) -> _Outcome:
    """Returns the libraries found, loaded at the first call.

    Args:
        used: True if an op is about to run: without a library the first such call warns.
    """
    global _loaded, _warned
    with _lock:
        if _loaded is None:
            _loaded = _find_and_load()
        outcome, first_use = _loaded, used and not _warned
        _warned = _warned or used
    if outcome.module is None and first_use:
        _warn_without_library(outcome.reports)
    return outcome


def register_ops() -> None:
    """Loads the compiled ops, so that TensorFlow knows them by name; says nothing where there are none.

    Does nothing where `FREEZEOPS_BACKEND=reference` asks for none.
    """
    if not backend.is_reference():
        _outcome(used=False)


def op_library() -> ModuleType | None:
    """Returns the compiled ops for the running TensorFlow, loaded at the first call.

    Returns:
        A module with the ops as functions (`freezeops_mask_gradient` and so on). None if there is none for this
        TensorFlow (the first call then warns, with the reason and the command that mends it), and with
        `FREEZEOPS_BACKEND=reference`.
    """
    return None if backend.is_reference() else _outcome().module


def has_cuda() -> bool:
    """Returns True if the ops in use have CUDA kernels."""
    if backend.is_reference():
        return False
    used = _outcome().used
    return used is not None and bool(used.build.get("cuda"))


def cuda_kernels() -> CudaKernels | None:
    """Returns the CUDA kernels of the ops in use, or None if there are none. Needs no driver."""
    used = _outcome().used if has_cuda() else None
    return None if used is None else _read_cuda_kernels(used)


def _read_cuda_kernels(used: LibraryReport) -> CudaKernels:
    return CudaKernels(
        compiler=used.build.get("cuda_compiler", ""),
        architectures=tuple(used.build.get("cuda_architectures", ())),
        ptx=tuple(used.build.get("cuda_ptx", ())),
        runtime=_library_number(used.path, "freezeops_cuda_runtime_version"),
        driver=_library_number(used.path, "freezeops_cuda_driver_version"),
    )


@functools.cache
def _library_number(library: Path, function: str) -> int:
    return int(getattr(ctypes.CDLL(str(library)), function)())


def gpus() -> tuple[Gpu, ...]:
    """Returns the GPUs that TensorFlow sees and may use."""
    import tensorflow as tf

    found = []
    for device in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        major, minor = details.get("compute_capability", (0, 0))
        found.append(Gpu(details.get("device_name", device.name), 10 * major + minor))
    return tuple(found)


def _isa(library: Path) -> str:
    function = ctypes.CDLL(str(library)).freezeops_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def _version_of(distributions: tuple[str, ...]) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"


def diagnosis() -> Diagnosis:
    """Returns the versions installed and the code in use. Loads the libraries unless the environment forbids it."""
    import tensorflow as tf

    versions = {
        "freezeops": __version__,
        "TensorFlow": tf.__version__,
        "Keras": _version_of(("keras", "keras-nightly")),
        "NumPy": _version_of(("numpy",)),
        "Python": platform.python_version(),
    }
    if backend.is_reference():
        reports = [
            dataclasses.replace(report, reason=report.reason or "not loaded: FREEZEOPS_BACKEND=reference")
            for report in (_examine(path, tf.__version__) for path in sorted(_DIRECTORY.glob("libfreezeops_tf*.so")))
        ]
        return Diagnosis(versions, backend.name(), reports, packing.host_status(), None, None, gpus())
    outcome = _outcome()
    isa = _isa(outcome.used.path) if outcome.used else None
    return Diagnosis(versions, backend.name(), outcome.reports, packing.host_status(), isa, cuda_kernels(), gpus())
