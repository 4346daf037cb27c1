"""Time single kernels on an NVIDIA GPU against its measured read bandwidth, and against cuBLAS.

    python -m svdengine.tools.time_cuda_kernels

The table can be pasted into BENCHMARKS.md. Take nothing else to the GPU meanwhile.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svdengine.errors import DeviceError, SvdEngineError
from svdengine.kernels.cuda.availability import find_gpu
from svdengine.kernels.cuda.description import describe_gpus
from svdengine.kernels.formats import WEIGHT_FORMATS

if TYPE_CHECKING:
    from svdengine.kernels.cuda.description import GpuDescription
    from svdengine.tools.cuda_kernel_timings import Timing

_HEADER = (
    "| work | us | least us | MB | GB/s | of bandwidth | ratio | to reach |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)


def markdown(gpu: GpuDescription, bandwidth: float, timings: Sequence[Timing]) -> str:
    """A table of all timings, and what they were measured on."""
    lines = [
        "| "
        + " | ".join(
            (
                t.name,
                f"{t.microseconds:.1f}",
                f"{t.floor_microseconds:.1f}",
                f"{t.megabytes:.1f}",
                f"{1e3 * t.megabytes / t.microseconds:.0f}",
                f"{t.of_bandwidth:.0%}".replace("%", " %"),
                "" if t.ratio is None else f"{t.ratio:.2f} x {t.against}",
                t.to_reach,
            )
        )
        + " |"
        for t in timings
    ]
    peak = f", {gpu.peak_gb_per_second:.0f} by clock and width" if gpu.peak_gb_per_second else ""
    note = (
        f"{gpu.name}, CUDA {gpu.driver_cuda} of the driver; its memory reads {bandwidth:.0f} GB/s{peak}. Medians; the"
        " least is what the bytes take at that bandwidth."
    )
    return "\n".join([*_HEADER, *lines, "", note])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.time_cuda_kernels", description="Time kernels on a GPU.")
    parser.add_argument("--formats", nargs="+", choices=WEIGHT_FORMATS, default=["f16", "q8", "q4"], help="of weights")
    parser.add_argument("--layers", type=int, default=16, help="of the 7B shape, each read once in a run (default: 16)")
    parser.add_argument("--repetitions", type=int, default=21, help="of each work (default: 21)")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    options = parser.parse_args(arguments)
    if options.layers < 1 or options.repetitions < 1:
        parser.error("--layers and --repetitions must be at least 1")
    try:
        print(_measure(options))
    except SvdEngineError as error:
        sys.exit(f"error: {error}")


def _measure(options: Any) -> str:
    gpu = find_gpu()
    if isinstance(gpu, str):  # without the packages the kernels cannot even be imported
        raise DeviceError(f"CUDA cannot be used: {gpu}")
    from svdengine.kernels.cuda.cupy_device import CupyDevice
    from svdengine.tools.cuda_kernel_timings import Shape, time_kernels

    described, device = describe_gpus()[0], CupyDevice()
    try:
        shape = Shape(layers=options.layers)
        bandwidth, timings = time_kernels(device, shape, options.formats, options.repetitions, _report)
    finally:
        device.close()
    if not options.json:
        return markdown(described, bandwidth, timings)
    found = {"gpu": asdict(described), "read_bandwidth": bandwidth, "timings": [asdict(t) for t in timings]}
    return json.dumps(found, indent=1)


def _report(name: str) -> None:
    print(name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
