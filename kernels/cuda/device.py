"""What a step needs of a device: memory, launches, and recorded steps. A GPU through CuPy, or Numba's simulator.

Arrays are flat. A kernel's parameters say what it reads an array as, so that float32 may be read as uint32 words.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.availability import find_gpu
from svdengine.kernels.cuda.compilation import machine_code, target_of
from svdengine.kernels.cuda.intrinsics import SIMULATED, Kernel

Array = Any  # flat, on the device; slices and views of it are arrays too
Graph = Any  # a recorded step
_DEFAULT_ALGORITHM = -1  # cuBLAS chooses


@dataclass(frozen=True)
class Gemm:
    """y (n, rows) = or += factor * x (n, columns) times weights (rows, columns), or (columns, rows) if transposed."""

    rows: int
    columns: int
    n: int
    weight_stride: int  # items from one row of an array to the next
    x_stride: int
    y_stride: int
    transposed: bool
    factor: float
    add: bool


class Device(Protocol):
    """One device, one stream: what is asked for is done in order, and `download` waits for it."""

    name: str
    has_blas: bool  # whether `gemm` works

    def zeros(self, size: int, dtype: Any) -> Array:
        """A flat array of zeros. Raises DeviceError when memory runs out."""
        ...

    def upload(self, array: NDArray) -> Array:
        """A flat copy of a host array."""
        ...

    def pin(self, array: NDArray) -> Array:
        """A flat copy of a host array in page-locked host memory, which kernels read over the bus.

        Raises DeviceError when the system refuses to lock that much.
        """
        ...

    def write(self, to: Array, values: NDArray) -> None:
        """Copy a host array to the beginning of a device array of the same type."""
        ...

    def download(self, array: Array) -> NDArray:
        """A host copy of a device array, once all work before it is done."""
        ...

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Run a kernel on a grid of blocks of `threads`; arguments are arrays and numbers, in its parameters' order."""
        ...

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """A product by the vendor's library: weights and x both float16 or both float32, y float32."""
        ...

    def record(self, step: Callable[[], None]) -> Graph:
        """What `step` launches, recorded and not run. All its kernels must have run before."""
        ...

    def replay(self, graph: Graph) -> None:
        """Run a recorded step."""
        ...

    def seconds(self, work: Callable[[], None]) -> float:
        """How long the device is busy with what `work` asks for."""
        ...

    def free_bytes(self) -> int:
        """Memory that could still be allocated."""
        ...

    def synchronize(self) -> None:
        """Wait for all work."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class SimulatedDevice:
    """NumPy arrays and Numba's simulator, for tests. A graph is the list of its launches.

    Raises DeviceError unless NUMBA_ENABLE_CUDASIM=1 was set before Numba was first imported.
    """

    name = "simulator"

    def __init__(self, memory: int = 1 << 30, has_blas: bool = False) -> None:
        if not SIMULATED:
            raise DeviceError("the simulator needs NUMBA_ENABLE_CUDASIM=1")
        self._memory, self._recorded, self.has_blas = memory, None, has_blas
        self.pinned = 0  # bytes of host memory
        self.launches = 0  # how many were asked for: replays count, and recordings do not

    _recorded: list[tuple[Any, ...]] | None

    def zeros(self, size: int, dtype: Any) -> Array:
        """See Device."""
        self._memory -= size * np.dtype(dtype).itemsize
        return np.zeros(size, dtype)

    def upload(self, array: NDArray) -> Array:
        """See Device."""
        copy = self.zeros(array.size, array.dtype)
        copy[:] = array.reshape(-1)
        return copy

    def pin(self, array: NDArray) -> Array:
        """See Device."""
        self.pinned += array.nbytes
        return array.reshape(-1).copy()

    def write(self, to: Array, values: NDArray) -> None:
        """See Device."""
        assert to.dtype == values.dtype
        to[: values.size] = values.reshape(-1)

    def download(self, array: Array) -> NDArray:
        """See Device."""
        copy: NDArray = array.copy()
        return copy

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """See Device."""
        values = [_simulated(kind, value) for kind, value in zip(kernel.parameters, arguments, strict=True)]
        if self._recorded is not None:
            self._recorded.append((kernel, grid, threads, values))
            return
        self._run(kernel, grid, threads, values)

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """See Device; by NumPy."""
        items = (gemm.columns if gemm.transposed else gemm.rows) * gemm.weight_stride
        w = weights[:items].astype(np.float32).reshape(-1, gemm.weight_stride)
        w = w[:, : gemm.rows].T if gemm.transposed else w[:, : gemm.columns]
        a = x[: gemm.n * gemm.x_stride].astype(np.float32).reshape(gemm.n, -1)[:, : gemm.columns]
        for row, values in enumerate(np.float32(gemm.factor) * (a @ w.T)):
            at = row * gemm.y_stride
            y[at : at + gemm.rows] = values + (y[at : at + gemm.rows] if gemm.add else 0)

    def record(self, step: Callable[[], None]) -> Graph:
        """See Device."""
        self._recorded = []
        try:
            step()
            return self._recorded
        finally:
            self._recorded = None

    def replay(self, graph: Graph) -> None:
        """See Device."""
        for launch in graph:
            self._run(*launch)

    def seconds(self, work: Callable[[], None]) -> float:
        """See Device; the simulator's own time, which says nothing of a GPU."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def free_bytes(self) -> int:
        """See Device."""
        return self._memory

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def close(self) -> None:
        """Nothing to give back."""

    def _run(self, kernel: Kernel, grid: tuple[int, ...], threads: int, values: list[Any]) -> None:
        self.launches += 1
        kernel.dispatcher[grid, threads](*values)


def _simulated(kind: str, value: Any) -> Any:
    """An argument as a kernel would find it on a GPU."""
    if kind.endswith("*"):
        return value.view(kind[:-1])
    return np.dtype(kind).type(value)


class CupyDevice:
    """A GPU: CuPy's memory, stream and graphs, and kernels that Numba compiled. DeviceError: no usable GPU.

    Launches go from Numba's machine code through CuPy, since Numba's own take longer than most kernels run.
    """

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        gpu = find_gpu(index)
        if isinstance(gpu, str):
            raise DeviceError(f"CUDA cannot be used: {gpu}")
        if SIMULATED:
            raise DeviceError("CUDA cannot be used while NUMBA_ENABLE_CUDASIM is set")
        import cupy

        self.gpu, self._cupy, self._index = gpu, cupy, index
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        with cupy.cuda.Device(index):
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self.has_blas = _has_cublas()

    def zeros(self, size: int, dtype: Any) -> Array:
        """See Device."""
        with self._used():
            try:
                return self._cupy.zeros(size, dtype)
            except self._cupy.cuda.memory.OutOfMemoryError as error:
                raise DeviceError(f"the GPU has no room for {size * np.dtype(dtype).itemsize} more bytes") from error

    def upload(self, array: NDArray) -> Array:
        """See Device."""
        to = self.zeros(array.size, array.dtype)
        self.write(to, array)
        return to

    def pin(self, array: NDArray) -> Array:
        """See Device. Page-locked memory has the same address for kernels as for the host."""
        values, cuda = np.ascontiguousarray(array).reshape(-1), self._cupy.cuda
        with self._used():
            try:
                memory = cuda.PinnedMemory(values.nbytes)
            except cuda.runtime.CUDARuntimeError as error:
                size = f"{values.nbytes / 2**20:.1f} MiB"
                raise DeviceError(f"the system refuses to lock {size} more of its memory: {error}") from error
            ctypes.memmove(memory.ptr, values.ctypes.data, values.nbytes)
            owned = cuda.UnownedMemory(memory.ptr, values.nbytes, memory, self._index)
            return self._cupy.ndarray(values.size, values.dtype, cuda.MemoryPointer(owned, 0))

    def write(self, to: Array, values: NDArray) -> None:
        """See Device."""
        with self._used():
            to[: values.size].set(np.ascontiguousarray(values).reshape(-1), stream=self._stream)

    def download(self, array: Array) -> NDArray:
        """See Device."""
        with self._used():
            found: NDArray = array.get(stream=self._stream)
        return found

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """See Device."""
        function = self._functions.get(kernel.name) or self._load(kernel)
        values = tuple(
            value if kind.endswith("*") else np.dtype(kind).type(value)
            for kind, value in zip(kernel.parameters, arguments, strict=True)
        )
        with self._used():
            function(grid, (threads,), values, stream=self._stream)

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """See Device; by cuBLAS, whose matrices are column-major: it sees the transposes of ours."""
        from cupy_backends.cuda.libs import cublas

        runtime = self._cupy.cuda.runtime
        kind = runtime.CUDA_R_16F if weights.dtype == np.float16 else runtime.CUDA_R_32F
        alpha, beta = np.array([gemm.factor], np.float32), np.array([float(gemm.add)], np.float32)
        with self._used():
            cublas.gemmEx(
                self._cupy.cuda.get_cublas_handle(),
                cublas.CUBLAS_OP_N if gemm.transposed else cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N,
                gemm.rows, gemm.n, gemm.columns,
                alpha.ctypes.data, weights.data.ptr, kind, gemm.weight_stride, x.data.ptr, kind, gemm.x_stride,
                beta.ctypes.data, y.data.ptr, runtime.CUDA_R_32F, gemm.y_stride,
                cublas.CUBLAS_COMPUTE_32F, _DEFAULT_ALGORITHM,
            )  # fmt: skip

    def record(self, step: Callable[[], None]) -> Graph:
        """See Device."""
        with self._used():
            self._stream.begin_capture()
            try:
                step()
            finally:
                graph = self._stream.end_capture()  # also when a launch failed: the stream must come back
            graph.upload(self._stream)
        return graph

    def replay(self, graph: Graph) -> None:
        """See Device."""
        with self._used():
            graph.launch(self._stream)

    def seconds(self, work: Callable[[], None]) -> float:
        """See Device; between two events of the stream."""
        with self._used():
            start, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            start.record(self._stream)
            work()
            end.record(self._stream)
            end.synchronize()
            return float(self._cupy.cuda.get_elapsed_time(start, end)) / 1e3

    def free_bytes(self) -> int:
        """See Device."""
        with self._used():
            free = self._cupy.cuda.runtime.memGetInfo()[0] + self._cupy.get_default_memory_pool().free_bytes()
        return int(free)

    def synchronize(self) -> None:
        """See Device."""
        self._stream.synchronize()

    def close(self) -> None:
        """See Device. Arrays are freed with their last reference; here what CuPy keeps of them for reuse is."""
        self._functions.clear()
        self._modules.clear()
        with self._used():
            self._stream.synchronize()
            self._cupy.get_default_memory_pool().free_all_blocks()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """This device and stream are this thread's current ones."""
        with self._cupy.cuda.Device(self._index), self._stream:
            yield

    def _load(self, kernel: Kernel) -> Any:
        """A kernel's function, compiled or read from the disk."""
        entry, cubin = machine_code(kernel, target_of(*self.gpu.capability))
        with self._used():
            module = self._cupy.cuda.function.Module()
            module.load(cubin)
            function = module.get_function(entry)
        self._modules.append(module)
        self._functions[kernel.name] = function
        return function


def _has_cublas() -> bool:
    """Whether cuBLAS is installed: without it own kernels do its work, slower."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError:
        return False
    return hasattr(cublas, "gemmEx")
