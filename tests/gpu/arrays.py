"""Where the kernels' arrays live: on the host, or on a GPU by way of CuPy or PyTorch. One small interface for each."""

import ctypes
from typing import Any

import numpy as np


class HostArrays:
    """NumPy: the kernels' code compiled for the host."""

    name = "host"
    stream = ctypes.c_void_p(0)

    def put(self, array: np.ndarray, offset: int = 0) -> "HostArray":
        """A copy of an array, beginning `offset` bytes past a boundary of 256 bytes, with guards around it."""
        return HostArray(array, offset)

    def synchronize(self) -> None:
        """Nothing runs by itself."""


GUARD = 512
"""Bytes before and after each array that must stay as they are."""

_GUARDS = np.random.default_rng(5).integers(0, 256, GUARD, np.uint8)


def _guarded(array: np.ndarray, offset: int) -> np.ndarray:
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.concatenate([_GUARDS, np.zeros(offset, np.uint8), content, _GUARDS])


def _unguarded(content: np.ndarray, like: np.ndarray, offset: int) -> np.ndarray:
    begin = GUARD + offset
    np.testing.assert_array_equal(content[:GUARD], _GUARDS, "written in front of an array")
    np.testing.assert_array_equal(content[begin + like.nbytes :], _GUARDS, "written behind an array")
    return content[begin : begin + like.nbytes].view(like.dtype).reshape(like.shape)


class HostArray:
    """See `HostArrays.put`. `pointer` is what a kernel is given."""

    def __init__(self, array: np.ndarray, offset: int):
        self._like, self._offset = array, offset
        content = _guarded(array, offset)
        self._memory = np.zeros(content.size + 256, np.uint8)
        start = -self._memory.ctypes.data % 256
        self._content = self._memory[start : start + content.size]
        self._content[:] = content
        self.pointer = ctypes.c_void_p(self._content.ctypes.data + GUARD + offset)

    def get(self) -> np.ndarray:
        """The array as it is now. Fails where anything around it was written."""
        return _unguarded(self._content.copy(), self._like, self._offset)


class CupyArrays:
    """A GPU by way of CuPy."""

    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        if cupy.cuda.runtime.getDeviceCount() < 1:
            raise RuntimeError("CuPy sees no GPU")
        self.device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        self.stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)

    def put(self, array: np.ndarray, offset: int = 0) -> "GpuArray":
        """As for the host."""
        memory = self._cupy.asarray(_guarded(array, offset))
        return GpuArray(memory, memory.data.ptr, array, offset, self._cupy.asnumpy)

    def empty(self, size: int) -> tuple[Any, int]:
        """Uninitialised bytes, and where they are."""
        memory = self._cupy.empty(size, self._cupy.uint8)
        return memory, memory.data.ptr

    def where(self, flags: Any) -> np.ndarray:
        """Positions of what is true in a vector."""
        return self._cupy.asnumpy(self._cupy.flatnonzero(flags))

    def free_bytes(self) -> int:
        """How much memory is left."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        return int(self._cupy.cuda.runtime.memGetInfo()[0])

    def synchronize(self) -> None:
        """Waits for the GPU."""
        self._cupy.cuda.get_current_stream().synchronize()


class TorchArrays:
    """A GPU by way of PyTorch."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch sees no GPU")
        self.device = torch.cuda.get_device_name(0)
        self.stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def put(self, array: np.ndarray, offset: int = 0) -> "GpuArray":
        """As for the host."""
        memory = self._torch.from_numpy(_guarded(array, offset)).cuda()
        return GpuArray(memory, memory.data_ptr(), array, offset, lambda x: x.cpu().numpy())

    def empty(self, size: int) -> tuple[Any, int]:
        """Uninitialised bytes, and where they are."""
        memory = self._torch.empty(size, dtype=self._torch.uint8, device="cuda")
        return memory, memory.data_ptr()

    def where(self, flags: Any) -> np.ndarray:
        """Positions of what is true in a vector."""
        return flags.nonzero(as_tuple=True)[0].cpu().numpy()

    def free_bytes(self) -> int:
        """How much memory is left."""
        self._torch.cuda.empty_cache()
        return int(self._torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        """Waits for the GPU."""
        self._torch.cuda.synchronize()


class GpuArray:
    """See `HostArrays.put`."""

    def __init__(self, memory: Any, address: int, array: np.ndarray, offset: int, to_host: Any):
        self._memory, self._like, self._offset, self._to_host = memory, array, offset, to_host
        self.pointer = ctypes.c_void_p(address + GUARD + offset)

    def get(self) -> np.ndarray:
        """As for the host; waits for the GPU."""
        return _unguarded(np.asarray(self._to_host(self._memory)), self._like, self._offset)


def zero_entries(arrays: "CupyArrays | TorchArrays", memory: Any, count: int) -> np.ndarray:
    """Which of `count` entries of 16 bits are zero, in bytes of `empty`: looked at on the GPU, some at a time."""
    most = 2**27
    return np.concatenate(
        [
            begin + arrays.where((memory[2 * begin : 2 * min(begin + most, count)].reshape(-1, 2) == 0).all(1))
            for begin in range(0, count, most)
        ]
    )


def gpu_arrays() -> "CupyArrays | TorchArrays":
    """Whichever of CuPy and PyTorch is installed and sees a GPU.

    Raises:
        RuntimeError: If neither is and does; the message says why.
    """
    reasons = []
    for kind in (CupyArrays, TorchArrays):
        try:
            return kind()
        except ImportError:
            reasons.append(f"{kind.name} is not installed")
        except Exception as error:
            reasons.append(f"{kind.name}: {error}")
    raise RuntimeError("no GPU: " + "; ".join(reasons))
