"""svdengine calibrate: make the predictor that lets a model's FFNs run sparse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.arguments import ModelArgument, Number, check_writable, kept_file
from svdengine.commands.progress import StageProgress
from svdengine.files.hub_name import HubName

if TYPE_CHECKING:
    from svdengine.converters.calibration import CalibrationOptions
    from svdengine.executors import Device
    from svdengine.files.model_file import ModelFile
    from svdengine.kernels.predictor import Predictor

KINDS = ("svd", "svd-naive", "lowbit", "svd+lowbit", "auto")
THRESHOLDS = ("error", "recall", "uniform", "greedy")
ABLATIONS = ("naive", "whitening", "constant", "gate", "gate-up", "full")  # without NumPy: help comes at once
_BUDGETS = ("max_loss", "max_error", "density")


class RankOrAuto(click.ParamType):
    """A whole number of at least 1, or auto, which is None."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Parse what was typed."""
        if value is None or value == "auto":
            return None
        try:
            rank = int(value)
        except ValueError:
            rank = 0
        if rank < 1:
            self.fail(f"{value!r} is neither auto nor a whole number above 0", param, ctx)
        return rank


def paper_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the paper's own construction."""
    share = click.option(
        "--s",
        "share",
        type=Number(min=0, max=1, min_open=True),
        metavar="X",
        help="With greedy: share of the inactive neurons that is predicted inactive, less 0.1 in the first two layers."
        "  [default: 0.5]",
    )
    ablation = click.option(
        "--ablation",
        type=click.Choice(ABLATIONS),
        help="With greedy: an ablation of the paper. naive and whitening have no thresholds, constant one a layer;"
        " gate, gate-up and full weigh what is missed.  [default: full]",
    )
    return share(ablation(function))


@click.command("calibrate")
@click.argument("model", type=ModelArgument())
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the predictor to a .safetensors file, or a copy of the model with it to a .svdp file.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="UTF-8 text, or chats in a .jsonl file. Give several files by repeating it: each gets the same share.",
)
@click.option(
    "--tokens",
    type=click.IntRange(256, 1 << 31),
    metavar="N",
    help="Tokens of text to use.  [default: 14336; of a large model 4096]",
)
@click.option(
    "--predictor",
    "kind",
    type=click.Choice([*KINDS, "powerinfer"]),
    help="Kind of the predictor; by default svd for a large model, lowbit for one with a hidden size below 2048, and"
    " auto, what reads least, for a mixture of experts. powerinfer: trained ones, PowerInfer's or the paper's own, out"
    " of files.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The GGUF file with trained predictors, or the folder with model_0.pt and so on.",
)
@click.option("--rank", type=RankOrAuto(), default="auto", show_default=True, metavar="N", help="Rank of the SVD.")
@click.option(
    "--bits",
    type=click.IntRange(1, 2),
    metavar="1|2",
    help="Bits a weight of the low-bit part.  [default: 2; of experts both are tried]",
)
@click.option(
    "--factors",
    type=click.Choice(["q8", "q4"]),
    default="q8",
    show_default=True,
    help="How the factors of the SVD are stored.",
)
@click.option(
    "--thresholds",
    type=click.Choice([*THRESHOLDS, "trained"]),
    default="error",
    show_default=True,
    help="How thresholds are chosen. trained: those that a powerinfer predictor was trained with; they meet no budget."
    " greedy: as the paper does, with its svd predictor.",
)
@paper_options
@click.option(
    "--max-loss",
    type=Number(),
    metavar="X",
    help="Budget: rise of the perplexity on the worst kind of held-out text.  [default: 0.00025]",
)
@click.option(
    "--max-error", type=Number(), metavar="X", help="Budget: share of each FFN's output energy that is missed."
)
@click.option("--density", type=Number(), metavar="X", help="Budget: share of neurons that are predicted active.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep statistics in FILE, to go on after an interruption.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda", "ascend", "reference"]),
    default="auto",
    help="Where the model runs.",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads; by default one a core.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: HubName | Path, output: Path | None, as_json: bool, **options: Any) -> None:
    """Make a predictor for MODEL, a .svdp file or a name of `list`, and write it into that file.

    The text should be like what the model will read and write; without --text it is text of many kinds
    that every machine has, and a small model writes some of it. Part of the text is held out, of the default
    one whole kinds, and the tables that are printed are measured on it. At most one budget may be
    given. The file is replaced only when all is done; with -o it is left as it is.
    """
    from svdengine.files.model_file import read_model_file
    from svdengine.measuring.predictor_table import predictor_lines, predictor_report

    if sum(options[name] is not None for name in _BUDGETS) > 1:
        raise click.UsageError("give one budget: --max-loss, --max-error or --density")
    path = kept_file(model)
    output = output or path
    predictor = calibrate_file(path, output, **options)
    with read_model_file(path) as file:
        report = predictor_report(predictor, file.config)
    if as_json:
        click.echo(json.dumps({"file": str(output), **report}, indent=2))
        return
    click.echo("\n".join(predictor_lines(report)))
    click.echo(f"written to {output}", err=True)


def calibrate_file(
    model: Path,
    output: Path,
    *,
    kind: str | None = None,
    source: Path | None = None,
    rank: int | None = None,
    bits: int | None = None,
    factors: str = "q8",
    thresholds: str = "error",
    share: float | None = None,
    ablation: str | None = None,
    text: Sequence[Path] = (),
    tokens: int | None = None,
    state: Path | None = None,
    device: Device = "auto",
    threads: int | None = None,
    **budget: float | None,
) -> Predictor:
    """Calibrate a model file as the options of the command say, and write what came of it."""
    from svdengine.converters.calibration import CalibrationOptions, calibrate
    from svdengine.converters.calibration_size import calibration_size, default_kind, default_tokens
    from svdengine.converters.calibration_text import WINDOW, split_files
    from svdengine.converters.default_text import default_text, written_tokens
    from svdengine.converters.predictor_choice import AUTO
    from svdengine.files.model_file import read_model_file
    from svdengine.files.predictor_file import require_relu_family, write_model_with_predictor, write_predictor
    from svdengine.loading import load

    shape: Any = {"source": source, "rank": rank, "bits": bits, "factor_format": factors}
    paper: Any = {"thresholds": thresholds, "share": share, "ablation": ablation}
    with read_model_file(model) as file:
        require_relu_family(file)
        kind = kind or default_kind(file.config, rank, thresholds)
        if bits is None and not (kind == AUTO and file.config.expert_count):
            shape["bits"] = 2
        wanted = CalibrationOptions(kind=kind, **{**shape, **paper, **budget})
        _check_candidates(file, wanted)
        context = min(WINDOW, file.config.max_position)
        tokens = tokens or default_tokens(file.config, thresholds)
        size = calibration_size(file.config)
        writes = size.written and not text
    check_writable(output)
    progress = StageProgress()
    # In short windows, since a step takes little longer for more sequences.
    shorter = max(2, context // 2)
    written = _written_windows(model, device, threads, written_tokens(tokens), shorter, progress) if writes else []
    with load(model, device, "dense", threads, context=context, kv_tokens=context) as llm:
        if text:
            split = split_files(llm, text, tokens, context)
        else:
            template = llm.model_file.chat_template
            split = default_text(llm.tokenizer, template, tokens, context, written, size.loss_tokens)
        executor: Any = llm.executor
        predictor = calibrate(llm.model_file, executor, split, wanted, state=state, progress=progress)
        if output.suffix == ".svdp" or output == model:
            write_model_with_predictor(output, llm.model_file, predictor)
        else:
            write_predictor(output, predictor)
    if state is not None:
        state.unlink(missing_ok=True)
    return predictor


def _check_candidates(file: ModelFile, wanted: CalibrationOptions) -> None:
    """Find out before the work whether there can be such a predictor."""
    from svdengine.converters.calibration import find_candidates
    from svdengine.errors import ConversionError

    if wanted.kind == "lowbit" and wanted.rank is not None:
        raise ConversionError("a lowbit predictor has no rank: leave --rank out, or choose --predictor svd")
    find_candidates(file, wanted)


def _written_windows(
    model: Path, device: Device, threads: int | None, tokens: int, window: int, progress: StageProgress
) -> list[list[int]]:
    """Text that the model writes. It is loaded for this alone: the KV cache of many sequences is large."""
    from svdengine.converters.calibration_size import calibration_size
    from svdengine.converters.calibration_text import sampled_windows
    from svdengine.files.model_file import read_model_file
    from svdengine.loading import load

    with read_model_file(model) as file:
        together = calibration_size(file.config).together
    with load(model, device, "dense", threads, context=window, kv_tokens=together * window) as llm:
        return sampled_windows(llm, tokens, window, progress=partial(progress, "writing text"), together=together)
