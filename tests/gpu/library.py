"""Compiles the CUDA kernels into a plain shared library: with nvcc for a GPU, with a C++ compiler for the host."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("kernels_c_api.cu")
_INCLUDE = ("-std=c++17", "-I", str(ROOT / "csrc"), str(SOURCE))


def find_nvcc() -> str | None:
    """The CUDA compiler, looked for where the build looks for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _make(name: str, command: list[str]) -> Path:
    """Runs a compiler unless the library is there already, made by the same command from the same sources."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*(ROOT / "csrc").glob("**/*.h"), *(ROOT / "csrc").glob("**/*.cu"), SOURCE]):
        digest.update(path.read_bytes())
    folder = Path(os.environ.get("FREEZEOPS_TEST_BUILD") or ROOT / "build" / "test-gpu")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        # Into a file of its own first: other processes may be making the same one.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / library.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            made.replace(library)
    return library


def host_library() -> Path:
    """The kernels' code for the host.

    Raises:
        FileNotFoundError: If there is no C++ compiler.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    warnings = ("-Wall", "-Wextra", "-Werror")
    shared = ("-shared", "-fPIC", "-fvisibility=hidden")
    return _make("host", [compiler, "-x", "c++", "-O2", "-ffp-contract=off", *warnings, *shared, *_INCLUDE])


def gpu_library(architecture: str = "native") -> Path:
    """The kernels for the GPU of this machine, or for an architecture such as `"sm_90"`.

    Raises:
        FileNotFoundError: If there is no CUDA compiler.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("there is no nvcc: set CUDACXX or CUDA_HOME, or put it on the PATH")
    host = "-Wall,-Wextra,-fPIC,-fvisibility=hidden"
    options = ("-O3", "--fmad=false", "-lineinfo", "-Werror", "all-warnings", "-Xcompiler", host)
    return _make("gpu", [nvcc, f"-arch={architecture}", "--shared", "-cudart", "static", *options, *_INCLUDE])


def load(path: Path) -> ctypes.CDLL:
    """The library, with the types that ctypes cannot guess."""
    library = ctypes.CDLL(str(path))
    if hasattr(library, "fz_error_text"):
        library.fz_error_text.restype = ctypes.c_char_p
    if hasattr(library, "fz_float16"):
        library.fz_float16.restype = ctypes.c_uint32
    return library


class FusedVariable(ctypes.Structure):
    """`cuda::FusedVariable` of `csrc/kernels/cuda/kernels.h`. Slots are in the rule's own order."""

    _fields_ = (
        ("variable", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("slots", ctypes.c_void_p * 3),
        ("bits", ctypes.c_void_p),
        ("layout", ctypes.c_int64 * 3),
        ("offsets", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("unseeded", ctypes.c_void_p),
        ("named", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
        ("slices", ctypes.c_int64),
        ("row_size", ctypes.c_int64),
        ("wide", ctypes.c_bool),
        ("decays", ctypes.c_bool),
        ("gathered", ctypes.c_bool),
    )
