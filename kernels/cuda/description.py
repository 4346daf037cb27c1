"""What a GPU is and how fast its memory reads, for people: `svdengine devices` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svdengine.kernels.cuda.availability import Gpu, find_gpu

_MEMORY_CLOCK, _BUS_WIDTH = 36, 37  # attributes of a device, in kHz and bits


@dataclass(frozen=True)
class GpuDescription:
    """A GPU and what it runs with; unknown numbers are None."""

    name: str
    memory_bytes: int
    free_bytes: int
    capability: str
    driver_cuda: str  # the newest CUDA that the driver supports
    runtime_cuda: str  # the CUDA that CuPy was made for
    peak_gb_per_second: float | None  # of the memory, by its clock and width
    read_gb_per_second: float | None  # measured, reading by a kernel of ours


def describe_gpus(measure: bool = False) -> tuple[GpuDescription, ...]:
    """All GPUs that can be used; `measure` their read bandwidth too, which takes a second or two."""
    found: list[GpuDescription] = []
    while not isinstance(gpu := find_gpu(len(found)), str):
        found.append(_describe(len(found), gpu, measure))
    return tuple(found)


def _describe(index: int, gpu: Gpu, measure: bool) -> GpuDescription:
    import cupy

    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(index):
        free = int(runtime.memGetInfo()[0])
    return GpuDescription(
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        free_bytes=free,
        capability=".".join(map(str, gpu.capability)),
        driver_cuda=_version(runtime.driverGetVersion()),
        runtime_cuda=_version(runtime.runtimeGetVersion()),
        peak_gb_per_second=_peak_bandwidth(runtime, index),
        read_gb_per_second=measured_bandwidth(index) if measure else None,
    )


def _version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _peak_bandwidth(runtime: Any, index: int) -> float | None:
    """GB/s of two transfers a clock; None where the driver does not tell, as newer ones may not."""
    try:
        kilohertz = runtime.deviceGetAttribute(_MEMORY_CLOCK, index)
        bits = runtime.deviceGetAttribute(_BUS_WIDTH, index)
    except Exception:  # of CuPy's own kinds, which differ between its versions
        return None
    return 2 * kilohertz * bits / 8 / 1e6 or None


def measured_bandwidth(index: int = 0) -> float:
    """Read bandwidth of a GPU's memory in GB/s. Raises DeviceError where the GPU cannot be used after all."""
    from svdengine.kernels.cuda.bandwidth import read_bandwidth
    from svdengine.kernels.cuda.cupy_device import CupyDevice

    device = CupyDevice(index)
    try:
        return read_bandwidth(device)
    finally:
        device.close()
