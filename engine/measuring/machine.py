"""What this machine can run on: CPU, memory, and which accelerators are there, or why not."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svdengine.files.residency import memory_bytes

if TYPE_CHECKING:
    from svdengine.kernels.cuda.description import GpuDescription


@dataclass(frozen=True)
class Accelerator:
    """One kind of accelerator."""

    name: str
    available: bool
    reason: str  # what was found, or what is missing


@dataclass(frozen=True)
class Machine:
    """A description of the machine; unknown numbers are None."""

    cpu: str
    architecture: str
    isa: str  # the kernels' choice of instruction set
    features: tuple[str, ...]  # of the CPU, those that the kernels could use
    cores: int  # that this process may use
    threads: int  # used by default
    memory_bytes: int | None
    bandwidth_gb_per_second: float | None  # measured, reading with `threads` threads
    accelerators: tuple[Accelerator, ...]
    gpus: tuple[GpuDescription, ...]  # that can be used


_INTERESTING: tuple[str, ...] = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vnni",
    "avx512bf16",
    "avxvnni",
    "amx-int8",
    "neon",
)
_INTERESTING += ("dotprod", "i8mm", "sve", "bf16")


def describe_machine(measure: bool = True) -> Machine:
    """Look at the machine; `measure` read bandwidths too, which takes some seconds."""
    cores = usable_cores()
    isa, features = _instruction_sets()
    gpus = _gpus(measure)
    return Machine(
        cpu=_cpu_name(),
        architecture=platform.machine() or "unknown",
        isa=isa,
        features=features,
        cores=cores,
        threads=cores,
        memory_bytes=memory_bytes(),
        bandwidth_gb_per_second=measured_bandwidth(cores) if measure else None,
        accelerators=(_cuda(len(gpus)), _ascend()),
        gpus=gpus,
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def measured_bandwidth(threads: int) -> float | None:
    """Read bandwidth of the memory in GB/s, or None where it cannot be measured."""
    if importlib.util.find_spec("svdengine.kernels.cpu.bandwidth") is None:
        return None
    from svdengine.kernels.cpu.bandwidth import read_bandwidth

    return float(read_bandwidth(threads))


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _instruction_sets() -> tuple[str, tuple[str, ...]]:
    from svdengine.kernels.cpu.isa import active_isa, host_features

    found = host_features()
    return active_isa(), tuple(name for name in _INTERESTING if name in found)


def gpu_bandwidth() -> float:
    """Read bandwidth of the GPU's memory in GB/s, measured. Raises DeviceError where there is none."""
    from svdengine.kernels.cuda.description import measured_bandwidth

    return measured_bandwidth()


def _gpus(measure: bool) -> tuple[GpuDescription, ...]:
    from svdengine.kernels.cuda.description import describe_gpus

    return describe_gpus(measure)


def _cuda(count: int) -> Accelerator:
    from svdengine.kernels.cuda.availability import find_gpu

    gpu = find_gpu()
    if isinstance(gpu, str):
        return Accelerator("CUDA", False, gpu)
    return Accelerator("CUDA", True, "1 GPU" if count == 1 else f"{count} GPUs")


def _ascend() -> Accelerator:
    from svdengine.kernels.ascend.availability import find_npu

    npu = find_npu()
    if isinstance(npu, str):
        return Accelerator("Ascend", False, npu)
    found = f"{npu.soc}, {npu.memory_bytes / 2**30:.1f} GiB, {npu.vector_cores} vector cores, CANN {npu.cann}"
    return Accelerator("Ascend", True, found)
