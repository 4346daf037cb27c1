"""svdengine compile: make the CPU's kernels beforehand, for this machine or for an image."""

from __future__ import annotations

from pathlib import Path

import click

from svdengine.kernels.cpu.isa import compilable_isas


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
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder to bring along, for SVDENGINE_KERNELS or as the package svdengine_kernels; by default your cache.",
)
def command(model: Path | None, isas: tuple[str, ...], output: Path | None) -> None:
    """Compile the kernels of the CPU beforehand: those that the file MODEL needs, or all.

    What is there already is not compiled again. Prints the folder of each instruction set.
    """
    from svdengine.files.model_file import read_model_file
    from svdengine.kernels.cpu.compilation import compile_parts, estimate
    from svdengine.kernels.cpu.isa import active_isa
    from svdengine.kernels.cpu.kernel_files import folder_name, read_kernels
    from svdengine.kernels.cpu.model import read_whole
    from svdengine.kernels.cpu.parts import PARTS, needed_parts
    from svdengine.kernels.user_cache import lasting_cache_directory

    parts = frozenset(PARTS)
    if model is not None:
        file = read_model_file(model)
        try:
            copied = read_whole(file.config, file.formats)
            parts = needed_parts(file.config, copied, deterministic=False)
        finally:
            file.close()
    root = lasting_cache_directory() / "kernels" if output is None else output
    for isa in isas or (active_isa(),):
        folder = root / folder_name(isa)
        missing = sorted(part for part in parts if read_kernels(folder, part) is None)
        if missing:
            click.echo(f"compiling kernels for {isa}, about {estimate(missing)} s ...", err=True)
            compile_parts(missing, isa, folder)
        click.echo(folder)
