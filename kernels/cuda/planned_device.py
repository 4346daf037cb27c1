"""A device that runs nothing: it notes the launches that it is asked for, which tells what a model needs of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.device import Array, Gemm, Graph
from svdengine.kernels.cuda.intrinsics import Kernel
from svdengine.kernels.executor import FfnMode, KvDtype
from svdengine.kernels.formats import WeightFormat
from svdengine.kernels.predictor import Predictor
from svdengine.models import ModelConfig

_PLENTY = 1 << 50  # bytes


@dataclass(frozen=True)
class Launch:
    """A kernel that a step would run."""

    kernel: Kernel
    grid: tuple[int, ...]
    threads: int
    arguments: tuple[Any, ...]


class PlannedDevice:
    """See Device (kernels/cuda/device.py). Arrays are never touched, so that they take addresses but no memory."""

    name = "planned"
    launches_early = False

    def __init__(self, has_blas: bool = True) -> None:
        self.has_blas, self.without_blas = has_blas, ""
        self.kernels: dict[str, Kernel] = {}
        self.launches: list[Launch] = []

    def zeros(self, size: int, dtype: Any) -> Array:
        """See Device."""
        return np.empty(size, dtype)

    def upload(self, array: NDArray) -> Array:
        """See Device."""
        return np.empty(array.size, array.dtype)

    def pin(self, array: NDArray) -> Array:
        """See Device."""
        return np.empty(array.size, array.dtype)

    def staging(self, size: int, dtype: Any) -> NDArray:
        """See Device."""
        found: NDArray = np.zeros(size, dtype)
        return found

    def write(self, to: Array, values: NDArray) -> None:
        """Nothing is copied."""

    def download(self, array: Array, to: NDArray | None = None) -> NDArray:
        """Zeros."""
        found: NDArray = np.zeros(array.size, array.dtype)
        return found

    def fetch(self, array: Array, to: NDArray) -> Callable[[], None]:
        """Nothing is copied."""
        return lambda: None

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        """See Device; it is noted."""
        self.kernels[kernel.name] = kernel
        self.launches.append(Launch(kernel, grid, threads, arguments))

    def gemm(self, weights: Array, x: Array, y: Array, gemm: Gemm) -> None:
        """No kernel of ours."""

    def prepare(self, steps: Iterable[Callable[[], None]]) -> None:
        """See Device."""
        for step in steps:
            step()
            self.launches.clear()

    def record(self, step: Callable[[], None], *, early: bool = False) -> Graph:
        """See Device."""
        step()
        return None

    def replay(self, graph: Graph) -> None:
        """Nothing runs."""

    def seconds(self, work: Callable[[], None]) -> float:
        """A second: nobody waits for it."""
        work()
        return 1.0

    def free_bytes(self) -> int:
        """More than any model takes."""
        return _PLENTY

    def synchronize(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """There is nothing to give back."""


def needed_kernels(
    config: ModelConfig,
    arrays: Mapping[str, NDArray],
    formats: Mapping[str, WeightFormat],
    predictor: Predictor | None,
    kv_dtype: KvDtype = "f16",
) -> dict[str, Kernel]:
    """The kernels that a model may launch, by name, on every path of the FFN and with and without cuBLAS."""
    from svdengine.kernels.cuda.executor import CudaExecutor

    found: dict[str, Kernel] = {}
    blocks = -(-config.max_position // BLOCK_SIZE)
    for has_blas in (True, False):
        device = PlannedDevice(has_blas)
        setup = ExecutorSetup(config, arrays, formats, block_count=blocks, kv_dtype=kv_dtype, predictor=predictor)
        executor = CudaExecutor(setup, device=device)
        modes: tuple[FfnMode, ...] = ("dense", "exact", "sparse")
        for ffn in modes:
            executor.ffn = ffn
            executor.prepare()
        found |= device.kernels
        executor.close()
    return found
