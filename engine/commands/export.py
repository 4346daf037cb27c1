"""svdengine export: write a predictor as other programs keep theirs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from svdengine.commands.arguments import check_writable

LAYOUTS = ("paper", "powerinfer")


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="FOLDER",
    help="The folder for model_0.pt and so on, a file for each layer.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="paper",
    show_default=True,
    help="paper: two matrices and a bias, of the FFN's input after its norm. powerinfer: two matrices with ReLU"
    " between them, of what enters the norm.",
)
@click.option("--predictor", type=click.Path(path_type=Path), metavar="FILE", help="A predictor in a file of its own.")
def command(model: Path, output: Path, layout: Any, predictor: Path | None) -> None:
    """Write the predictor of MODEL, a .svdp file, for other programs that run the same model.

    Only predictors of low rank can be written (`calibrate --predictor svd`), and networks that were read from such
    files (`calibrate --predictor powerinfer`).
    """
    from svdengine.converters.predictor_folder import export_predictor
    from svdengine.files.model_file import read_model_file
    from svdengine.files.predictor_file import find_predictor, require_predictor

    check_writable(output)
    with read_model_file(model) as file:
        found = find_predictor(file, predictor)
        require_predictor(file, found)
        assert found is not None
        with click.progressbar(length=len(found.layers), label="Writing", file=sys.stderr) as bar:
            export_predictor(output, file, found, layout, lambda done, total: bar.update(1))
