"""Fixtures: the CPU kernels of each instruction set, as a plain library. Neither TensorFlow nor freezeops is imported.

The twins, the arrays and most of the cases are those of the CUDA kernels, in `tests/gpu`.
"""

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
sys.path.insert(0, str(Path(__file__).parent))

import cpu_library
from arrays import HostArrays
from under_test import Kernels


class ExactArray:
    """Memory of exactly an array's size, so that AddressSanitizer sees what is read or written beside it."""

    def __init__(self, array, offset):
        self._like, self._offset = array, offset
        self._libc = ctypes.CDLL(None)
        memory = ctypes.c_void_p()
        size = offset + array.nbytes
        if self._libc.posix_memalign(ctypes.byref(memory), ctypes.c_size_t(256), ctypes.c_size_t(size)):
            raise MemoryError
        self._memory = memory
        self.pointer = ctypes.c_void_p(memory.value + offset)
        ctypes.memmove(self.pointer, np.ascontiguousarray(array).tobytes(), array.nbytes)

    def get(self):
        content = ctypes.string_at(self.pointer, self._like.nbytes)
        return np.frombuffer(bytearray(content), self._like.dtype).reshape(self._like.shape)

    def __del__(self):
        self._libc.free(self._memory)


class ExactArrays(HostArrays):
    def put(self, array, offset=0):
        return ExactArray(array, offset)


class CpuKernels(Kernels):
    """The kernels of one instruction set. `run` raises where offsets or indices are said not to be the mask's."""

    def __init__(self, functions, isa):
        # AddressSanitizer sees more than guards do, if memory ends where the array does.
        sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
        super().__init__(functions, ExactArrays() if sanitized else HostArrays())
        self.isa = isa

    def fits(self, name, *arguments):
        """Runs a kernel; returns whether offsets and indices are those of the mask."""
        return getattr(self.functions, name)(*arguments, self.arrays.stream) == 0

    def run(self, name, *arguments):
        if not self.fits(name, *arguments):
            raise RuntimeError(f"{name}: offsets or indices are not those of the mask")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    try:
        return cpu_library.build(), tmp_path_factory.mktemp("kernels")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=cpu_library.ISAS)
def kernels(request, library):
    functions = cpu_library.load(library[0], request.param, library[1])
    if functions is None:
        pytest.skip(f"this machine has no {request.param}")
    return CpuKernels(functions, request.param)


@pytest.fixture(autouse=True)
def clean_keras():
    """In the place of the other tests' fixture: there is nothing of Keras here."""
