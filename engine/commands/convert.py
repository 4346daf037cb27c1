"""svdengine convert: a checkpoint becomes a model file, with a predictor where its FFNs can run sparse."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from svdengine.commands.arguments import ModelArgument, Number, check_writable
from svdengine.commands.calibrate import KINDS, THRESHOLDS, RankOrAuto, paper_options
from svdengine.commands.conversion import Wanted, announce, convert_file
from svdengine.commands.options import Size
from svdengine.files.hub_name import HubName

_TYPED = click.core.ParameterSource.COMMANDLINE
DTYPES = ("f32", "f16", "bf16", "q8", "q6", "q4", "ternary")  # WEIGHT_FORMATS, without NumPy: help comes at once


@click.command("convert")
@click.argument("source", type=ModelArgument(), metavar="SRC")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The .svdp file; by default beside SRC, or in the models folder.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="q8", show_default=True, help="How weights are stored.")
@click.option(
    "--bits",
    type=Number(min=1, max=32),
    metavar="X",
    help="Choose among q4, q6 and q8 for each tensor, so that a weight takes X bits on average at the least loss.",
)
@click.option(
    "--size",
    type=Size(),
    metavar="SIZE",
    help="The same for a file, with tokenizer and predictor, of at most this size, such as 95M or 4.2G.",
)
@click.option(
    "--embedding-dtype",
    type=click.Choice(DTYPES),
    help="How embedding and output projection are stored; by default like the rest, and in q8 with q6, q4 and ternary,"
    " or q6 with a calibrated q4 of a small model.",
)
@click.option(
    "--down-dtype",
    type=click.Choice(DTYPES),
    help="How the FFNs' down projections are stored; by default like the rest, and in q6 with a calibrated q4 of a"
    " small model. They lose most by 4 bits.",
)
@click.option("--quick", is_flag=True, help="Round q4 and q6 weights to nearest, without calibrating them.")
@click.option("--verbose", is_flag=True, help="Say what calibrated rounding changed, tensor by tensor.")
@click.option(
    "--activation",
    metavar="NAME",
    help="The FFN's activation, where the checkpoint names it wrongly; fatrelu:0.03 has a threshold.",
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Measure whether the weights were trained with another activation, and stop if so.",
)
@click.option(
    "--predictor",
    "kind",
    type=click.Choice([*KINDS, "none"]),
    help="The predictor's kind; by default svd for a large model and with --rank, lowbit for one with a hidden size"
    " below 2048, auto for a mixture of experts: what reads least; and none for a model outside the ReLU family.",
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
@paper_options
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Text to calibrate on, weights of q4 and q6 and the predictor; see `calibrate`.",
)
def command(source: HubName | Path, output: Path | None, **options: Any) -> None:
    """Convert SRC into a model file: a Hugging Face folder, a .gguf file, or the name of a model on a hub.

    Without -o the model file is written beside the source, and that of a name into the models folder, where other
    commands find it by the name. A model of the ReLU family gets a predictor, as `svdengine calibrate` makes it with
    its own defaults, once the weights are written. If that is interrupted, the model file is complete without one.

    With q4 and q6, weights are rounded for the inputs that they have on text: that of --text, or text that every
    machine has. This takes minutes, or longer for a large model; --quick leaves it out.

    --bits and --size measure on that text what each tensor loses in each format, and spend bytes where they pay;
    --verbose shows it. That takes longer than one format, and room for 2.3 times the model in q8 beside the file.

    Before the file is put in place, a short text is run through it under each activation that its weights could mean.
    Where another one than the stated predicts the text far better, the conversion stops with both figures.
    """
    from svdengine.commands.named_model import download_model, make_model

    _check_formats()
    wanted = Wanted(**options)
    if isinstance(source, HubName):
        if output is None:
            make_model(source, wanted)
            return
        check_writable(output)
        checkpoint, hub = download_model(source, wanted, output.parent)
        _convert_path(checkpoint, output, wanted, hub)
        return
    _convert_path(source, output, wanted)


def _check_formats() -> None:
    """Raise UsageError where formats are asked for in two ways."""
    context = click.get_current_context()
    ways = [("bits",), ("size",), ("dtype", "embedding_dtype", "down_dtype")]
    given = [[name for name in way if context.get_parameter_source(name) is _TYPED] for way in ways]
    if sum(map(bool, given)) > 1:
        *others, last = [f"--{name.replace('_', '-')}" for way in given for name in way]
        raise click.UsageError(f"{', '.join(others)} and {last} say different things of the size; give one of them")
    if (given[0] or given[1]) and context.params["quick"]:
        raise click.UsageError("--quick does not read the text on which formats are compared; give --dtype with it")


def _convert_path(source: Path, output: Path | None, wanted: Wanted, hub: dict[str, Any] | None = None) -> None:
    from svdengine.converters.conversion import open_checkpoint
    from svdengine.errors import RequestError

    begin = time.perf_counter()
    checkpoint = open_checkpoint(source, wanted.activation)
    config = checkpoint.config
    kind = wanted.predictor_kind(config)
    if output is None:
        full = source.resolve()
        stem = full.name if full.is_dir() else full.stem
        output = full.with_name(f"{stem}-{wanted.variant(None)}.svdp")
        if output.exists():
            raise RequestError(f"{output} is there already; name it with -o to replace it")
        check_writable(output)
    if hub is None or not source.is_dir():  # what a folder on a hub comes to was said before its download
        announce(config, wanted, checkpoint.notes)
    convert_file(source, output, wanted, kind, hub=hub)
    seconds = time.perf_counter() - begin
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB in {seconds:.1f} s", err=True)
