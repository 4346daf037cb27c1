"""svdengine convert: a checkpoint becomes a model file."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

DTYPES = ("f32", "f16", "bf16", "q8", "q4")


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .svdp file.")
@click.option("--dtype", type=click.Choice(DTYPES), default="q8", show_default=True, help="How weights are stored.")
@click.option("--activation", metavar="NAME", help="The FFN's activation, where the checkpoint names it wrongly.")
def command(source: Path, output: Path, dtype: str, activation: str | None) -> None:
    """Convert SRC, a Hugging Face folder or a .gguf file, into a model file."""
    from typing import cast

    from svdengine.converters import convert
    from svdengine.kernels.formats import WeightFormat

    begin = time.perf_counter()
    with click.progressbar(length=1, label=f"Converting to {dtype}", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        convert(source, output, cast(WeightFormat, dtype), activation, progress)
        bar.update(max(0, (bar.length or 0) - bar.pos))
    seconds = time.perf_counter() - begin
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s", err=True)
