"""As much of CuPy as CupyDevice uses, in NumPy, which notes what was asked of streams, graphs and kernels."""

from __future__ import annotations

import ctypes
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Array(np.ndarray):
    """An array of the device."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(ptr=self.ctypes.data)

    def set(self, values: NDArray, stream: Any) -> None:
        """Copy from the host; refused during capture, as on a GPU, and where types or sizes differ."""
        assert not stream.captured_in_progress and values.dtype == self.dtype and values.shape == self.shape
        self[...] = values

    def get(self, stream: Any, out: NDArray | None = None, blocking: bool = True) -> NDArray:
        """Copy to the host, and wait."""
        assert not stream.captured_in_progress
        if out is None:
            return np.array(self)
        assert out.dtype == self.dtype and out.shape == self.shape and out.flags.c_contiguous
        out[...] = self
        return out


class Stream:
    """A stream; in a capture it notes launches instead of running them."""

    current: Stream | None = None

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking  # another kind would wait for the default stream
        self.captured: list[Any] = []
        self.captured_in_progress = False
        self.outer: list[Stream | None] = []

    def __enter__(self) -> Stream:
        self.outer.append(Stream.current)
        Stream.current = self
        return self

    def __exit__(self, *_: Any) -> None:
        Stream.current = self.outer.pop()

    def begin_capture(self) -> None:
        self.captured, self.captured_in_progress = [], True

    def end_capture(self) -> Any:
        self.captured_in_progress = False
        launches = list(self.captured)
        return SimpleNamespace(upload=lambda stream: None, launch=lambda stream: [run() for run in launches])

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""


class Event:
    """An event, which notes on which stream it was recorded."""

    def __init__(self, disable_timing: bool = False) -> None: ...

    def record(self, stream: Stream) -> None:
        assert stream is Stream.current and not stream.captured_in_progress
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """It has happened."""


class CUDARuntimeError(RuntimeError):
    """An error of the runtime."""


class CUDADriverError(RuntimeError):
    """An error of the driver."""


class CUBLASError(RuntimeError):
    """An error of cuBLAS."""


class OutOfMemoryError(MemoryError):
    """An error of the memory pool."""


class Function:
    """A kernel that notes its calls."""

    def __init__(self, calls: list[Any], name: str) -> None:
        self.calls, self.name = calls, name

    def __call__(self, grid: tuple, block: tuple, arguments: tuple, stream: Stream) -> None:
        assert stream is Stream.current
        if stream.captured_in_progress:
            stream.captured.append(lambda: self.calls.append((self.name, grid, block, arguments)))
        else:
            self.calls.append((self.name, grid, block, arguments))


class PinnedMemory:
    """Page-locked memory of the host, which is given back with the last reference; `held` counts bytes."""

    held = 0
    most = 1 << 20

    def __init__(self, size: int) -> None:
        if PinnedMemory.held + size > PinnedMemory.most:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        self.size, self.buffer = size, ctypes.create_string_buffer(size)
        self.ptr = ctypes.addressof(self.buffer)
        PinnedMemory.held += size

    def __del__(self) -> None:
        PinnedMemory.held -= getattr(self, "size", 0)


class UnownedMemory:
    """Memory at an address, which another object owns."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int) -> None:
        assert device_id == 0
        self.ptr, self.size, self.owner = ptr, size, owner


class MemoryPointer:
    """A place in memory."""

    def __init__(self, memory: UnownedMemory, offset: int) -> None:
        self.memory, self.ptr = memory, memory.ptr + offset


def array_at(size: int, dtype: Any, pointer: MemoryPointer) -> Array:
    """An array of the memory at a place, which keeps its owner alive."""
    assert size * np.dtype(dtype).itemsize <= pointer.memory.size
    # NumPy keeps the buffer's object, and the object keeps the pointer.
    buffer = (ctypes.c_byte * pointer.memory.size).from_address(pointer.ptr)
    buffer.pointer = pointer
    return np.frombuffer(buffer, dtype, size).view(Array)


def fake_cupy(free: int = 1 << 30) -> Any:
    """The module; `calls` lists what kernels were called with."""
    cupy: Any = ModuleType("cupy")
    cupy.calls = calls = []
    cupy.ndarray = array_at

    def zeros(size: int, dtype: Any) -> Any:
        if size * np.dtype(dtype).itemsize > free:
            raise OutOfMemoryError("Out of memory allocating")
        assert Stream.current is not None and not Stream.current.captured_in_progress
        return np.zeros(size, dtype).view(Array)

    class Device(SimpleNamespace):
        def __init__(self, index: int) -> None:
            assert index == 0

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    class Module:
        def load(self, cubin: bytes) -> None:
            self.cubin = cubin

        def get_function(self, entry: str) -> Function:
            return Function(calls, f"{entry} of {self.cubin.decode()}")

    cupy.zeros = zeros
    pool = SimpleNamespace(free_bytes=lambda: 7, freed=0)

    def free_all_blocks() -> None:
        pool.freed += 1

    pool.free_all_blocks = free_all_blocks
    cupy.get_default_memory_pool = lambda: pool
    cupy.cuda = SimpleNamespace(
        Device=Device,
        Stream=Stream,
        Event=Event,
        get_elapsed_time=lambda start, end: 1e3 * (end.time - start.time),
        function=SimpleNamespace(Module=Module),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        driver=SimpleNamespace(CUDADriverError=CUDADriverError),
        runtime=SimpleNamespace(
            memGetInfo=lambda: (free, free), CUDA_R_16F=2, CUDA_R_32F=0, CUDARuntimeError=CUDARuntimeError
        ),
        PinnedMemory=PinnedMemory,
        UnownedMemory=UnownedMemory,
        MemoryPointer=MemoryPointer,
    )
    return cupy


def fake_cublas() -> Any:
    """cuBLAS's product of column-major matrices at addresses, for types 0 (float32) and 2 (float16)."""
    cublas: Any = SimpleNamespace(CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_COMPUTE_32F=68, CUBLASError=CUBLASError)
    cublas.handles = []
    cublas.create = lambda: cublas.handles.append("handle") or "handle"
    cublas.destroy = cublas.handles.remove

    def at(address: int, kind: int, stride: int, columns: int) -> NDArray:
        dtype = np.dtype(np.float16 if kind == 2 else np.float32)
        buffer = (ctypes.c_byte * (stride * columns * dtype.itemsize)).from_address(address)
        return np.frombuffer(buffer, dtype).reshape(columns, stride).T

    def gemm_ex(
        handle: str, a_op: int, b_op: int, m: int, n: int, k: int, alpha: int, a: int, a_kind: int, a_stride: int,
        b: int, b_kind: int, b_stride: int, beta: int, c: int, c_kind: int, c_stride: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        assert (handle, b_op, c_kind, compute, algorithm) == ("handle", 0, 0, 68, -1)
        left = at(a, a_kind, a_stride, m if a_op else k)
        left = left[:k, :m].T if a_op else left[:m, :k]
        scale, keep = (ctypes.c_float.from_address(p).value for p in (alpha, beta))
        out = at(c, c_kind, c_stride, n)[:m]
        out[...] = scale * (np.float32(left) @ np.float32(at(b, b_kind, b_stride, n)[:k])) + keep * out

    cublas.gemmEx = gemm_ex
    return cublas
