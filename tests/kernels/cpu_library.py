"""Builds the CPU kernels as a plain shared library, with the options that CMakeLists.txt has for them."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("generic", "avx2", "avx512")


def build() -> Path:
    """Returns the library, built anew where its sources have changed.

    `FREEZEOPS_KERNELS_LIBRARY` names one that is built already (`make sanitize-cpu`).

    Raises:
        FileNotFoundError: If there is no CMake or no C++ compiler.
    """
    if given := os.environ.get("FREEZEOPS_KERNELS_LIBRARY"):
        return Path(given).resolve()
    for tool in ("cmake", os.environ.get("CXX") or "c++"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not installed")
    folder = Path(os.environ.get("FREEZEOPS_TEST_BUILD") or ROOT / "build" / "test-kernels")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # several processes may run tests
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = ("-DFREEZEOPS_KERNELS_ONLY=ON", "-DFREEZEOPS_WERROR=ON", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
        generator = ("-G", "Ninja") if shutil.which("ninja") else ()
        _run("cmake", "-S", ROOT, "-B", folder, *generator, *options)
        _run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1), "--target", "kernels_c_api")
    return folder / "libkernels_c_api.so"


def _run(*command) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def load(library: Path, isa: str, folder: Path) -> ctypes.CDLL | None:
    """The library with the kernels of an instruction set; `None` if this machine cannot run them.

    The set is chosen once for each loaded library, so each set gets a copy of the file.
    """
    copy = folder / f"{isa}.so"
    shutil.copyfile(library, copy)
    before = os.environ.get("FREEZEOPS_ISA")
    os.environ["FREEZEOPS_ISA"] = isa
    try:
        functions = ctypes.CDLL(str(copy))
        functions.fz_isa.restype = ctypes.c_char_p
        chosen = functions.fz_isa().decode()
    finally:
        del os.environ["FREEZEOPS_ISA"]
        if before is not None:
            os.environ["FREEZEOPS_ISA"] = before
    for name in ("fz_count_frozen", "fz_count_ones"):
        getattr(functions, name).restype = ctypes.c_int64
    return functions if chosen == isa else None
