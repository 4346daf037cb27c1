"""What a step needs of a device: memory, launches, and recorded steps. And Numba's simulator as one, for tests.

Arrays are flat. A kernel's parameters say what it reads an array as, so that float32 may be read as uint32 words. A GPU
is kernels/cuda/cupy_device.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.intrinsics import SIMULATED, Kernel

Array = Any  # flat, on the device; slices and views of it are arrays too
Graph = Any  # a recorded step


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
    without_blas: str  # why it does not, where it should
    launches_early: bool  # whether `record` can be `early`

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

    def staging(self, size: int, dtype: Any) -> NDArray:
        """A flat host array of zeros that is copied from and to fastest.

        What is written from it must not change until the device has done it.
        """
        ...

    def write(self, to: Array, values: NDArray) -> None:
        """Copy a host array to the beginning of a device array of the same type."""
        ...

    def download(self, array: Array, to: NDArray | None = None) -> NDArray:
        """A host copy of a device array, once all work before it is done: new, or at the beginning of `to`."""
        ...

    def fetch(self, array: Array, to: NDArray) -> Callable[[], None]:
        """Copy a device array to the beginning of `to`, of `staging`, once all work before it is done.

        Returns at once what waits for it, but not for work that is asked for after it.
        """
        ...

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """Run a kernel on a grid of blocks of `threads`; arguments are arrays and numbers, in its parameters' order."""
        ...

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """A product by the vendor's library: weights and x both float16 or both float32, y float32."""
        ...

    def prepare(self, steps: Iterable[Callable[[], None]]) -> None:
        """Have the machine code of the kernels that `steps` launch, which are not run.

        What is compiled for the first time on a machine takes seconds, so that is better done before a user waits.
        """
        ...

    def record(self, step: Callable[[], None], *, early: bool = False) -> Graph:
        """What `step` launches, recorded and not run. All its kernels must have run before.

        With `early` a kernel may start before the one before it has ended, and waits for it then: see
        kernels/cuda/early_launch.py.
        """
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
    launches_early = False

    def __init__(self, memory: int = 1 << 30, has_blas: bool = False) -> None:
        if not SIMULATED:
            raise DeviceError("the simulator needs NUMBA_ENABLE_CUDASIM=1")
        self._memory, self.has_blas, self.without_blas = memory, has_blas, ""
        self.pinned = 0  # bytes of host memory
        self.launches = 0  # how many were asked for: replays count, and recordings do not
        self.prepared: set[str] = set()  # names of kernels

    _recorded: list[tuple[Any, ...]] | None = None

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

    def staging(self, size: int, dtype: Any) -> NDArray:
        """See Device."""
        found: NDArray = np.zeros(size, dtype)
        return found

    def write(self, to: Array, values: NDArray) -> None:
        """See Device."""
        assert to.dtype == values.dtype
        to[: values.size] = values.reshape(-1)

    def download(self, array: Array, to: NDArray | None = None) -> NDArray:
        """See Device."""
        copy: NDArray = np.empty(array.size, array.dtype) if to is None else to[: array.size]
        copy[:] = array
        return copy

    def fetch(self, array: Array, to: NDArray) -> Callable[[], None]:
        """See Device."""
        self.download(array, to)
        return lambda: None

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """See Device."""
        values = [_simulated(kind, value) for kind, value in zip(kernel.parameters, arguments, strict=True)]
        if self._recorded is not None:
            self._recorded.append((kernel, grid, threads, values))
            return
        self._run(kernel, grid, threads, values)

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """See Device; by NumPy."""
        if self._recorded is not None:  # by `prepare`: a step with products of the library is not recorded otherwise
            return
        items = (gemm.columns if gemm.transposed else gemm.rows) * gemm.weight_stride
        w = weights[:items].astype(np.float32).reshape(-1, gemm.weight_stride)
        w = w[:, : gemm.rows].T if gemm.transposed else w[:, : gemm.columns]
        a = x[: gemm.n * gemm.x_stride].astype(np.float32).reshape(gemm.n, -1)[:, : gemm.columns]
        for row, values in enumerate(np.float32(gemm.factor) * (a @ w.T)):
            at = row * gemm.y_stride
            y[at : at + gemm.rows] = values + (y[at : at + gemm.rows] if gemm.add else 0)

    def prepare(self, steps: Iterable[Callable[[], None]]) -> None:
        """See Device; nothing is compiled."""
        for step in steps:
            self.prepared |= {launch[0].name for launch in self.record(step)}

    def record(self, step: Callable[[], None], *, early: bool = False) -> Graph:
        """See Device; launches are one after another either way."""
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
