"""A GPU through CuPy: its memory, stream and graphs; products by cuBLAS; kernels that Numba compiled.

Launches go from Numba's machine code through CuPy, since Numba's own take longer than most kernels run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.availability import find_driver, find_gpu
from svdengine.kernels.cuda.compilation import machine_code, machine_codes, target_of
from svdengine.kernels.cuda.cuda_errors import as_device_error, error_types
from svdengine.kernels.cuda.device import Array, Gemm, Graph
from svdengine.kernels.cuda.early_launch import EarlyLauncher, packed, why_not_early
from svdengine.kernels.cuda.intrinsics import SIMULATED, Kernel

_DEFAULT_ALGORITHM = -1  # cuBLAS chooses
_TRIED = Gemm(5, 8, 3, weight_stride=8, x_stride=8, y_stride=5, transposed=False, factor=0.5, add=True)


class CupyDevice:
    """See Device (kernels/cuda/device.py). Raises DeviceError where there is no usable GPU.

    `without_blas` says why cuBLAS is not used, where it is not: own kernels do its work then, slower.
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
        self._errors = error_types(cupy)
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._noted: dict[str, Kernel] | None = None  # while steps are not run, but asked which kernels they need
        driver = find_driver()
        self.without_early_launches = why_not_early(gpu.capability, driver.cuda if driver else 0)
        self.launches_early = not self.without_early_launches
        self._early: EarlyLauncher | None = None  # while a step is recorded so
        self._has_begun = False
        self._stream: Any = None
        self._blas: int | None = None
        with self._used():
            self._stream = cupy.cuda.Stream(non_blocking=True)
        # Before anything plans with what memory is free: the library's handle and workspace take some of it.
        self.without_blas = self._open_blas()
        self.has_blas = not self.without_blas

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
            memory = self._locked(values.nbytes)
            ctypes.memmove(memory.ptr, values.ctypes.data, values.nbytes)
            owned = cuda.UnownedMemory(memory.ptr, values.nbytes, memory, self._index)
            return self._cupy.ndarray(values.size, values.dtype, cuda.MemoryPointer(owned, 0))

    def staging(self, size: int, dtype: Any) -> NDArray:
        """See Device."""
        with self._used():
            memory = self._locked(size * np.dtype(dtype).itemsize)
        buffer = (ctypes.c_byte * (size * np.dtype(dtype).itemsize)).from_address(memory.ptr)
        buffer.memory = memory  # NumPy keeps the buffer's object, and the object keeps the memory
        return np.frombuffer(buffer, dtype, size)

    def write(self, to: Array, values: NDArray) -> None:
        """See Device."""
        with self._used():
            to[: values.size].set(np.ascontiguousarray(values).reshape(-1), stream=self._stream)

    def download(self, array: Array, to: NDArray | None = None) -> NDArray:
        """See Device."""
        with self._used():
            if to is None:
                found: NDArray = array.get(stream=self._stream)
                return found
            array.get(stream=self._stream, out=to[: array.size])
            return to[: array.size]

    def fetch(self, array: Array, to: NDArray) -> Callable[[], None]:
        """See Device."""
        with self._used():
            array.get(stream=self._stream, out=to[: array.size], blocking=False)
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self._stream)

        def wait() -> None:
            with self._used():
                event.synchronize()

        return wait

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """See Device."""
        if self._noted is not None:
            self._noted[kernel.name] = kernel
            return
        function = self._functions.get(kernel.name) or self._load(kernel)
        values = tuple(
            value if kind.endswith("*") else np.dtype(kind).type(value)
            for kind, value in zip(kernel.parameters, arguments, strict=True)
        )
        with self._used():
            if self._early is None or not self._has_begun:  # nothing of the recording comes before the first one
                self._has_begun = True
                function(grid, (threads,), values, stream=self._stream)
            else:
                packs = packed(kernel.parameters, values)
                self._early.launch(function.ptr, grid, threads, packs, self._stream.ptr)

    def prepare(self, steps: Iterable[Callable[[], None]]) -> None:
        """See Device. What is compiled already comes from the disk."""
        noted: dict[str, Kernel] = {}
        self._noted = noted
        try:
            for step in steps:
                step()
        finally:
            self._noted = None
        new = [kernel for name, kernel in noted.items() if name not in self._functions]
        for name, (entry, cubin) in machine_codes(new, target_of(*self.gpu.capability)).items():
            self._add_function(name, entry, cubin)

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """See Device; by cuBLAS, whose matrices are column-major: it sees the transposes of ours."""
        if self._noted is not None:
            return
        from cupy_backends.cuda.libs import cublas

        runtime = self._cupy.cuda.runtime
        kind = runtime.CUDA_R_16F if weights.dtype == np.float16 else runtime.CUDA_R_32F
        alpha, beta = np.array([gemm.factor], np.float32), np.array([float(gemm.add)], np.float32)
        with self._used():
            cublas.gemmEx(
                self._blas,
                cublas.CUBLAS_OP_N if gemm.transposed else cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N,
                gemm.rows, gemm.n, gemm.columns,
                alpha.ctypes.data, weights.data.ptr, kind, gemm.weight_stride, x.data.ptr, kind, gemm.x_stride,
                beta.ctypes.data, y.data.ptr, runtime.CUDA_R_32F, gemm.y_stride,
                cublas.CUBLAS_COMPUTE_32F, _DEFAULT_ALGORITHM,
            )  # fmt: skip

    def record(self, step: Callable[[], None], *, early: bool = False) -> Graph:
        """See Device."""
        launcher = EarlyLauncher() if early else None
        with self._used():
            self._stream.begin_capture()
            self._early, self._has_begun = launcher, False
            try:
                step()
            finally:
                self._early = None
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
        with self._used():
            self._stream.synchronize()

    def close(self) -> None:
        """See Device. Arrays go with their last reference; here goes what CuPy keeps of them for reuse.

        So whoever has arrays lets go of them before. Where the GPU has stopped, there is nothing to give back.
        """
        with suppress(DeviceError):
            self.synchronize()  # before modules are unloaded that may still run
        self._functions.clear()
        self._modules.clear()
        with suppress(DeviceError), self._used():
            if self._blas is not None:
                from cupy_backends.cuda.libs import cublas

                cublas.destroy(self._blas)
                self._blas = None
            self._cupy.get_default_memory_pool().free_all_blocks()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """This device and stream are this thread's current ones, and errors of CUDA are DeviceErrors."""
        try:
            with self._cupy.cuda.Device(self._index):
                if self._stream is None:
                    yield
                else:
                    with self._stream:
                        yield
        except self._errors as error:
            raise as_device_error(error) from error

    def _locked(self, size: int) -> Any:
        """Page-locked host memory."""
        cuda = self._cupy.cuda
        try:
            return cuda.PinnedMemory(size)
        except cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"the system refuses to lock {size / 2**20:.1f} MiB more of its memory: {error}"
            ) from error

    def _open_blas(self) -> str:
        """Make a handle of cuBLAS and try it; why it cannot be used, or "".

        A library that is installed may have no code for the GPU: wheels for aarch64 have none for Jetson boards.
        """
        try:
            from cupy_backends.cuda.libs import cublas

            gemm_ex = cublas.gemmEx
        except (ImportError, AttributeError):
            return "cuBLAS is not installed"
        del gemm_ex
        try:
            with self._used():
                self._blas = cublas.create()
            return "" if self._blas_is_right() else "cuBLAS gave wrong results"
        except DeviceError as error:
            return f"cuBLAS cannot be used: {error}"

    def _blas_is_right(self) -> bool:
        """Whether a small product in float16 is what it should be."""
        weights, x, y = np.arange(40.0) - 17, np.arange(24.0) % 7, np.arange(15.0)
        found = self.upload(y.astype(np.float32))
        self.gemm(self.upload(weights.astype(np.float16)), self.upload(x.astype(np.float16)), found, _TRIED)
        expected = y.reshape(3, 5) + 0.5 * (x.reshape(3, 8) @ weights.reshape(5, 8).T)
        return bool(np.array_equal(self.download(found).reshape(3, 5), expected))

    def _load(self, kernel: Kernel) -> Any:
        """A kernel's function, compiled or read from the disk."""
        return self._add_function(kernel.name, *machine_code(kernel, target_of(*self.gpu.capability)))

    def _add_function(self, name: str, entry: str, cubin: bytes) -> Any:
        with self._used():
            module = self._cupy.cuda.function.Module()
            module.load(cubin)
            function = module.get_function(entry)
        self._modules.append(module)
        self._functions[name] = function
        return function
