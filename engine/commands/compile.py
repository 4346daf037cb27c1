"""svdengine compile: make kernels beforehand, for this machine or for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from svdengine.errors import SvdEngineError
from svdengine.kernels.cpu.isa import compilable_isas

if TYPE_CHECKING:
    from svdengine.kernels.cuda.intrinsics import Kernel

# Those of kernels/cuda/compilation.py, which needs packages that may be missing; a test compares them.
CUDA_TARGETS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@click.command("compile")
@click.argument("model", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--isa",
    "isas",
    multiple=True,
    type=click.Choice(compilable_isas()),
    help="An instruction set, which this CPU need not have. Repeatable; by default the one that is used here.",
)
@click.option(
    "--cuda",
    "cuda_targets",
    multiple=True,
    type=click.Choice(CUDA_TARGETS),
    help="An NVIDIA GPU's architecture, which need not be here: then its kernels are made, and --isa is not used."
    " Repeatable.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder to bring along, for SVDENGINE_KERNELS or as the package svdengine_kernels; by default your cache.",
)
def command(model: Path | None, isas: tuple[str, ...], cuda_targets: tuple[str, ...], output: Path | None) -> None:
    """Compile kernels beforehand: those that the file MODEL needs, or all. They are the CPU's, without --cuda.

    What is there already is not compiled again. Prints the folder of each instruction set, or of the GPUs.
    """
    from svdengine.kernels.user_cache import lasting_cache_directory

    root = lasting_cache_directory() / "kernels" if output is None else output
    if cuda_targets:
        _compile_for_cuda(model, cuda_targets, root)
    if isas or not cuda_targets:
        _compile_for_cpus(model, isas, root)


def _compile_for_cpus(model: Path | None, isas: tuple[str, ...], root: Path) -> None:
    from svdengine.files.model_file import read_model_file
    from svdengine.kernels.cpu.compilation import compile_parts, estimate
    from svdengine.kernels.cpu.isa import active_isa
    from svdengine.kernels.cpu.kernel_files import folder_name, read_kernels
    from svdengine.kernels.cpu.model import read_whole
    from svdengine.kernels.cpu.parts import PARTS, needed_parts

    parts = frozenset(PARTS)
    if model is not None:
        file = read_model_file(model)
        try:
            copied = read_whole(file.config, file.formats)
            parts = needed_parts(file.config, copied, deterministic=False)
        finally:
            file.close()
    for isa in isas or (active_isa(),):
        folder = root / folder_name(isa)
        missing = sorted(part for part in parts if read_kernels(folder, part) is None)
        if missing:
            click.echo(f"compiling kernels for {isa}, about {estimate(missing)} s ...", err=True)
            compile_parts(missing, isa, folder)
        click.echo(folder)


def _compile_for_cuda(model: Path | None, targets: tuple[str, ...], root: Path) -> None:
    if find_spec("numba_cuda") is None:
        raise SvdEngineError('compiling for CUDA needs numba-cuda: pip install "svdengine[cuda]"')
    from svdengine.kernels.cuda.intrinsics import SIMULATED

    if SIMULATED:
        raise SvdEngineError("CUDA kernels cannot be compiled while NUMBA_ENABLE_CUDASIM is set")
    click.echo(compile_cuda_kernels(_cuda_kernels(model), targets, root))


def compile_cuda_kernels(kernels: Mapping[str, Kernel], targets: Sequence[str], root: Path) -> Path:
    """Compile what is missing for each of TARGETS named; returns the folder below `root` that has them.

    The driver is not asked: the GPU need not be there. Raises SvdEngineError where the folder cannot be written.
    """
    from svdengine.kernels.cuda.compilation import TARGETS, compile_into, folder_name, read_machine_code

    if unknown := [target for target in targets if target not in TARGETS]:
        raise SvdEngineError(f"found the target {unknown[0]}, expected one of {', '.join(TARGETS)}")
    folder = root / folder_name()
    # What a kernel is missing for is compiled at once: much of the work is the same for all.
    missing: dict[tuple[str, ...], list[Kernel]] = {}
    for name, kernel in kernels.items():
        lacking = tuple(t for t in targets if read_machine_code(folder, name, TARGETS[t]) is None)
        missing.setdefault(lacking, []).append(kernel)
    for lacking, some in missing.items():
        if lacking:
            click.echo(f"compiling {len(some)} CUDA kernels for {', '.join(lacking)} ...", err=True)
            try:
                compile_into(folder, some, *(TARGETS[target] for target in lacking), must_keep=True)
            except OSError as error:
                raise SvdEngineError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def _cuda_kernels(model: Path | None) -> dict[str, Kernel]:
    if model is None:
        from svdengine.kernels.cuda.catalogue import all_kernels

        return all_kernels()
    from svdengine.files.model_file import read_model_file
    from svdengine.files.predictor_file import find_predictor
    from svdengine.kernels.cuda.planned_device import needed_kernels

    file = read_model_file(model)
    try:
        return needed_kernels(file.config, file.arrays, file.formats, find_predictor(file))
    finally:
        file.close()
