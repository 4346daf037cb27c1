"""svdengine convert: a checkpoint becomes a model file, with a predictor where its FFNs can run sparse."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from svdengine.commands.calibrate import KINDS, THRESHOLDS, RankOrAuto, calibrate_file

DTYPES = ("f32", "f16", "bf16", "q8", "q6", "q4")  # WEIGHT_FORMATS, without NumPy: help comes at once


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path), metavar="SRC")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .svdp file.")
@click.option("--dtype", type=click.Choice(DTYPES), default="q8", show_default=True, help="How weights are stored.")
@click.option(
    "--embedding-dtype",
    type=click.Choice(DTYPES),
    help="How embedding and output projection are stored; by default like the rest, and in q8 with q6 and q4.",
)
@click.option(
    "--down-dtype",
    type=click.Choice(DTYPES),
    help="How the FFNs' down projections are stored; by default like the rest. They lose most by 4 bits.",
)
@click.option("--quick", is_flag=True, help="Round q4 and q6 weights to nearest, without calibrating them.")
@click.option("--verbose", is_flag=True, help="Say what calibrated rounding changed, tensor by tensor.")
@click.option("--activation", metavar="NAME", help="The FFN's activation, where the checkpoint names it wrongly.")
@click.option(
    "--predictor",
    "kind",
    type=click.Choice([*KINDS, "none"]),
    help="The predictor's kind; by default lowbit (svd with --rank), and none for a model outside the ReLU family.",
)
@click.option(
    "--rank", type=RankOrAuto(), default="auto", show_default=True, metavar="N", help="Rank of the predictor's SVD."
)
@click.option(
    "--calibration",
    "thresholds",
    type=click.Choice(THRESHOLDS),
    default="error",
    show_default=True,
    help="How its thresholds are chosen.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Text to calibrate on, weights of q4 and q6 and the predictor; see `calibrate`.",
)
def command(
    source: Path,
    output: Path,
    dtype: str,
    embedding_dtype: str | None,
    down_dtype: str | None,
    quick: bool,
    verbose: bool,
    activation: str | None,
    kind: str | None,
    **options: Any,
) -> None:
    """Convert SRC, a Hugging Face folder or a .gguf file, into a model file.

    With q4 and q6, weights are rounded for the inputs that they have on text: that of --text, or text that every
    machine has. This takes minutes, or longer for a large model; --quick leaves it out.

    A model of the ReLU family gets a predictor, as `svdengine calibrate` makes it with its own defaults, once the
    weights are written. If that is interrupted, the model file is complete without one.
    """
    from typing import cast

    from svdengine.converters import convert
    from svdengine.converters.conversion import open_checkpoint
    from svdengine.converters.weight_calibration import WeightCalibration
    from svdengine.files.predictor_file import why_not_sparse
    from svdengine.kernels.formats import WeightFormat

    begin = time.perf_counter()
    config = open_checkpoint(source, activation).config
    if kind not in (None, "none") and not config.sparse_ffn:
        raise click.UsageError(f"--predictor {kind}: {why_not_sparse(config)}")
    calibrated = not quick and not {"q4", "q6"}.isdisjoint({dtype, embedding_dtype, down_dtype})
    changed: dict[str, list[float]] = {}
    with click.progressbar(length=1, label=f"Converting to {dtype}", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        convert(
            source,
            output,
            cast(WeightFormat, dtype),
            activation,
            progress,
            embedding_dtype=cast("WeightFormat | None", embedding_dtype),
            down_dtype=cast("WeightFormat | None", down_dtype),
            calibration=WeightCalibration(text=options["text"]) if calibrated else None,
            observe=(lambda name, _, share: changed.setdefault(name, []).append(share)) if verbose else None,
        )
        bar.update(max(0, (bar.length or 0) - bar.pos))
    if changed:
        click.echo("\n".join(_changes(changed, output)))
    if config.sparse_ffn and kind != "none":
        _calibrate(output, kind or ("lowbit" if options["rank"] is None else "svd"), options)
    seconds = time.perf_counter() - begin
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s", err=True)


def _calibrate(output: Path, kind: str, options: dict[str, Any]) -> None:
    from svdengine.errors import ConversionError, SvdEngineError

    click.echo(f"Calibrating a predictor ({kind}); --predictor none leaves it out", err=True)
    try:
        calibrate_file(output, output, kind=kind, **options)
    except SvdEngineError as error:
        raise ConversionError(f"{output} is complete, but has no predictor: {error}") from error


def _changes(changed: Mapping[str, Sequence[float]], output: Path) -> Iterator[str]:
    """Of each tensor its format, its size, and what rounding changed: a share of its output's energy."""
    from svdengine.files.model_file import read_model_file
    from svdengine.kernels.formats import gather_parts

    yield "| tensor | format | MB | changed, mean of layers | worst layer |"
    yield "| --- | --- | ---: | ---: | ---: |"
    with read_model_file(output) as file:
        for name, shares in sorted(changed.items(), key=lambda item: -sum(item[1]) / len(item[1])):
            size = sum(part.nbytes for part in gather_parts(file.arrays, name).values()) / 1e6
            worst = max(range(len(shares)), key=shares.__getitem__)
            mean = sum(shares) / len(shares)
            layer = f"{shares[worst]:.3%} in {worst}" if len(shares) > 1 else ""
            yield f"| {name} | {file.formats[name]} | {size:.1f} | {mean:.3%} | {layer} |"
