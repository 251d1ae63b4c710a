"""The kernels on the host and on a GPU: what a test calls."""

import library
import pytest
from arrays import HostArrays, gpu_arrays


class Kernels:
    """A library of kernels and the arrays that it works on."""

    def __init__(self, functions, arrays):
        self.functions, self.arrays = functions, arrays

    @property
    def on_gpu(self):
        return self.arrays.name != "host"

    def put(self, array, offset=0):
        return self.arrays.put(array, offset)

    def run(self, name, *arguments):
        """Calls a kernel on the current stream; raises where it could not be started."""
        error = getattr(self.functions, name)(*arguments, self.arrays.stream)
        if error:
            raise RuntimeError(self.functions.fz_error_text(error).decode())
        self.arrays.synchronize()


def on_host():
    try:
        return Kernels(library.load(library.host_library()), HostArrays())
    except FileNotFoundError as error:
        pytest.skip(str(error))


def on_gpu():
    try:
        arrays = gpu_arrays()
        return Kernels(library.load(library.gpu_library()), arrays)
    except (FileNotFoundError, RuntimeError) as error:
        if "failed:" in str(error):
            raise
        pytest.skip(str(error))
