"""svdengine devices: what this machine can run on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from svdengine.kernels.cuda.description import GpuDescription


@click.command("devices")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure read bandwidths of memories.")
def command(as_json: bool, measure: bool) -> None:
    """Show the CPU, its memory, and which accelerators can be used."""
    from svdengine.measuring.machine import describe_machine

    machine = describe_machine(measure)
    if as_json:
        click.echo(json.dumps(asdict(machine), indent=2))
        return
    memory = f"{machine.memory_bytes / 2**30:.1f} GiB" if machine.memory_bytes else "unknown"
    bandwidth = machine.bandwidth_gb_per_second
    rows = [
        ("CPU", f"{machine.cpu} ({machine.architecture})"),
        ("kernels", f"{machine.isa}; the CPU has {', '.join(machine.features) or 'none of the known extensions'}"),
        ("cores", f"{machine.cores}, {machine.threads} threads by default"),
        ("memory", memory),
        ("read bandwidth", f"{bandwidth:.1f} GB/s with {machine.threads} threads" if bandwidth else "not measured"),
        *((a.name, f"{'available' if a.available else 'not available'}: {a.reason}") for a in machine.accelerators),
        *(row for number, gpu in enumerate(machine.gpus) for row in _gpu_rows(number, gpu)),
    ]
    for name, value in rows:
        click.echo(f"{name:<16}{value}")


def _gpu_rows(number: int, gpu: GpuDescription) -> list[tuple[str, str]]:
    gib = 2.0**30
    measured, peak = gpu.read_gb_per_second, gpu.peak_gb_per_second
    bandwidth = f"{measured:.0f} GB/s" if measured else "not measured"
    return [
        (f"GPU {number}", f"{gpu.name}, compute capability {gpu.capability}"),
        ("  memory", f"{gpu.memory_bytes / gib:.1f} GiB, {gpu.free_bytes / gib:.1f} GiB free"),
        ("  CUDA", f"{gpu.driver_cuda} of the driver, {gpu.runtime_cuda} of CuPy"),
        ("  bandwidth", f"{bandwidth}; by clock and width {peak:.0f} GB/s" if peak else bandwidth),
    ]
