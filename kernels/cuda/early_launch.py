"""Kernels that start while the one before them ends: programmatic dependent launch, from compute capability 9.0 on.

A kernel that is launched so may take its place on the GPU before the one before it is done. Every kernel waits at its
beginning until that one has ended and all that it wrote is seen (`compilation.py` adds the instruction), so that order
is kept; what is saved is the time between two kernels. Where a stream is captured, the dependency becomes a
programmatic one of the graph (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"; graphs
have it from CUDA 12.3 on).

CuPy launches without attributes, and so does Numba. cuda-bindings, which numba-cuda brings, can set them. It takes
longer on the host than CuPy, so that only recorded steps are launched so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.compilation import EARLY_CAPABILITY
from svdengine.kernels.cuda.device import Array, Device, Graph

LEAST_DRIVER = 12030  # CUDA 12.3


def why_not_early(capability: tuple[int, int], driver: int) -> str:
    """Why kernels cannot start early on a GPU whose driver accepts CUDA `driver`, 12030 for 12.3; "" where they can."""
    if capability < EARLY_CAPABILITY:
        return "the GPU is older than compute capability 9.0"
    if driver < LEAST_DRIVER:
        return "the driver is older than CUDA 12.3"
    try:
        from cuda.bindings import driver as bindings

        early = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        del early
    except (ImportError, AttributeError):
        return "cuda-bindings cannot set attributes of a launch"
    return ""


class EarlyLauncher:
    """Launches functions of CuPy with the attribute. Raises DeviceError where the driver refuses one."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        self._attributes = [attribute]

    def launch(
        self, function: int, grid: tuple[int, ...], threads: int, arguments: list[np.ndarray[Any, Any]], stream: int
    ) -> None:
        """Launch a function of the driver. arguments: one item each, of the parameter's size; addresses are uint64."""
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = 0, self._driver.CUstream(stream)
        config.attrs, config.numAttrs = self._attributes, len(self._attributes)
        addresses = np.array([argument.ctypes.data for argument in arguments], np.uint64)
        (error,) = self._driver.cuLaunchKernelEx(
            config, self._driver.CUfunction(function), int(addresses.ctypes.data), 0
        )  # fmt: skip
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"the GPU refused an early launch: {error.name}")


def packed(kinds: tuple[str, ...], values: tuple[Any, ...]) -> list[np.ndarray[Any, Any]]:
    """A kernel's arguments as `EarlyLauncher.launch` takes them; arrays are CuPy's."""
    return [
        np.array([value.data.ptr], np.uint64) if kind.endswith("*") else np.array([value], kind)
        for kind, value in zip(kinds, values, strict=True)
    ]


def record_and_run(device: Device, step: Callable[[], None], left: Sequence[Array], counts: Array) -> Graph:
    """Record a step, and run it.

    Where kernels can start early, the graph that lets them is tried: it runs the same step, and has to leave the same
    bits in the arrays `left`. What is tried once is no proof, but what does not work at all does not come into use.
    counts: an array that the step adds to.
    """
    graph = device.record(step)
    if not device.launches_early:
        device.replay(graph)
        return graph
    expected, counted = _bits_left(device, graph, left), device.download(counts)
    try:
        early = device.record(step, early=True)
        device.launches_early = _bits_left(device, early, left) == expected
    except DeviceError:
        device.launches_early = False
    if not device.launches_early:
        device.replay(graph)  # what the trial left, in the KV cache too, may be wrong
    device.write(counts, counted)  # the step was counted more than once
    return early if device.launches_early else graph


def _bits_left(device: Device, graph: Graph, left: Sequence[Array]) -> list[bytes]:
    """What a step leaves in some arrays, none of which keeps what was there before."""
    for array in left:
        device.write(array, np.full(array.size, -1, array.dtype))
    device.replay(graph)
    return [device.download(array).tobytes() for array in left]
