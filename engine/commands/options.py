"""Options that several commands share: the model and how it runs, and how tokens are sampled."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.arguments import ModelArgument, Number
from svdengine.files.hub_name import HubName

if TYPE_CHECKING:
    from svdengine.llm import LLM

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Size(click.ParamType):
    """Bytes: a number with K, M, G or T after it for 2^10, 2^20, 2^30 or 2^40 of them."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes, at least 1."""
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
        size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
        if not 0 < size < 1 << 62:
            self.fail(f"expected a size such as 512M or 4G, found {value!r}", param, ctx)
        return size


_MODEL: tuple[Decorator, ...] = (
    click.argument("model", required=False, type=ModelArgument(), metavar="[MODEL]"),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "ascend", "reference"]),
        default="auto",
        show_default=True,
        help="Where the model runs.",
    ),
)

_EXECUTION: tuple[Decorator, ...] = (
    click.option(
        "--predictor",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A predictor from `svdengine calibrate`; by default the model's own.",
    ),
    click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads; by default one a core."),
    click.option(
        "--context",
        type=click.IntRange(min=2),
        metavar="N",
        help="Most tokens of prompt and answer; by default the model's own, up to 4096.",
    ),
    click.option(
        "--kv-dtype",
        type=click.Choice(["f16", "q8", "f32"]),
        default="f16",
        show_default=True,
        help="How keys and values are cached. With q8 the same memory holds nearly twice the tokens; CPU only.",
    ),
    click.option(
        "--kv-memory",
        type=Size(),
        metavar="SIZE",
        help="Memory of the KV cache, such as 4G, for all sequences together; by default one context's.",
    ),
    click.option(
        "--gpu-memory",
        type=Size(),
        metavar="SIZE",
        help="What the model may take of a GPU's memory; by default all that is free. FFN weights that do not fit stay"
        " in the host's memory.",
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        help="The same request gets the same bits whatever runs beside it. Prompts are read more slowly. CPU only.",
    ),
    click.option("--prefetch", is_flag=True, help="Read the weights into memory before anything runs."),
    click.option("--mlock", is_flag=True, help="Keep the weights in memory; the system may have to permit it."),
)

_SHARED_CONTEXTS = 2  # that the KV cache holds for many requests

_SPECULATIVE = click.option(
    "--speculative",
    is_flag=True,
    help="Guess several tokens at once, where a text repeats itself or the model has a predictor. Used only where it is"
    " measured to be faster.",
)

_SPARSITY_BIAS = click.option(
    "--sparsity-bias",
    type=Number(),
    metavar="X",
    help="Shift the predictor's thresholds: above 0, fewer neurons are computed.",
)

_SAMPLING_OPTIONS: tuple[Decorator, ...] = (
    click.option("--temperature", type=Number(), metavar="T", help="0 takes the likeliest token."),
    click.option("--top-k", type=int, metavar="K", help="Sample among the K likeliest tokens; 0: among all."),
    click.option("--top-p", type=Number(), metavar="P", help="Sample among the likeliest tokens that make up P."),
    click.option("--min-p", type=Number(), metavar="P", help="Drop tokens less likely than P times the likeliest."),
    click.option("--repetition-penalty", type=Number(), metavar="R", help="Above 1: tokens seen become less likely."),
    click.option("--presence-penalty", type=Number(), metavar="X", help="Taken once from logits of generated tokens."),
    click.option("--frequency-penalty", type=Number(), metavar="X", help="Taken for every time that a token came."),
    click.option("--logit-bias", multiple=True, metavar="ID=X", help="Add X to the logit of a token. Repeatable."),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same text."),
    click.option("-n", "--max-tokens", type=int, metavar="N", help="Most tokens to generate."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
    click.option("--context-shift", is_flag=True, help="Forget the oldest half of a full context, instead of ending."),
    _SPARSITY_BIAS,
)


_FIELDS: tuple[str, ...] = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_FIELDS += ("seed", "max_tokens", "sparsity_bias")


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the MODEL argument and the options of `open_model`."""
    return _apply((*_MODEL, _ffn_option("auto", "dense", "exact", "sparse"), *_EXECUTION, _SPECULATIVE), function)


def measuring_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the same for a measurement, which can run both paths of the FFN, and --sparsity-bias."""
    options: tuple[Decorator, ...] = (
        *_MODEL,
        _ffn_option("auto", "dense", "exact", "sparse", "both"),
        *_EXECUTION,
        _SPARSITY_BIAS,
    )
    return _apply(options, function)


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `sampling_fields`, and --context-shift."""
    return _apply(_SAMPLING_OPTIONS, function)


def open_model(options: dict[str, Any], context: int | None = None, sequences: int = 1) -> LLM:
    """Load the model that the options name, or the demo model. `context` counts where --context was not given.

    A name on a hub is downloaded and converted the first time.

    `sequences`: how many of that length are to fit at once.

    With --ffn both, the model is one that can run sparse.
    """
    from svdengine.errors import RequestError
    from svdengine.kernels.batch import BLOCK_SIZE
    from svdengine.loading import load
    from svdengine.scheduling.sampling import check_sparsity_bias
    from svdengine.scheduling.scheduler import PREFILL_ROWS
    from svdengine.scheduling.sequence import blocks_for

    check_sparsity_bias(options.get("sparsity_bias") or 0.0)
    llm = load(
        _model_path(options["model"]),
        options["device"],
        "sparse" if options["ffn"] == "both" else options["ffn"],
        options["threads"],
        options["predictor"],
        context=options["context"] or context,
        kv_memory=options["kv_memory"],
        sequences=sequences,
        gpu_memory=options["gpu_memory"],
        kv_dtype=options["kv_dtype"],
        speculative=options.get("speculative", False),
        prefill_rows=options.get("prefill_rows") or PREFILL_ROWS,
        mlock=options["mlock"],
        prefetch=options["prefetch"],
        deterministic=options["deterministic"],
    )
    if llm.executor.block_count < sequences * blocks_for(llm.context):
        llm.close()
        raise RequestError(
            f"--kv-memory holds {llm.executor.block_count * BLOCK_SIZE} tokens, fewer than {sequences} sequences of"
            f" {llm.context}; use more, or a smaller context"
        )
    return llm


def open_shared_model(options: dict[str, Any]) -> LLM:
    """Load the model for many requests at a time: its KV cache holds two contexts, or what --kv-memory says."""
    return open_model(options, sequences=1 if options["kv_memory"] else _SHARED_CONTEXTS)


def model_label(options: dict[str, Any]) -> str:
    """What the model is called where it has no other name: as its file or repository."""
    return options["model"].stem if options["model"] else "smollm2"


def prefill_rows_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --prefill-rows, which `open_model` reads."""
    return click.option(
        "--prefill-rows",
        type=click.IntRange(1, 4096),
        metavar="N",
        help="Prompt tokens that a step reads while other requests decode. More read prompts faster; fewer keep the"
        " others from waiting.  [default: 64]",
    )(function)


def kv_save_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --kv-save, for `kept_kv`."""
    return click.option(
        "--kv-save",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Keep the KV cache in FILE, so that the next run need not read the same prompts again.",
    )(function)


@contextmanager
def kept_kv(llm: LLM, path: Path | None) -> Iterator[None]:
    """Load the KV cache from a file, or make the file, and save to it when the block ends without an error.

    Raises RequestError or ModelFileError before the block where the file could not be used or written.
    """
    if path is None:
        yield
        return
    if path.exists():
        click.echo(f"{llm.load_kv(path)} tokens of {path} are in the KV cache", err=True)
    else:
        llm.save_kv(path)
    yield
    saved = llm.save_kv(path)
    with suppress(OSError):  # the terminal may be gone
        click.echo(f"{saved} tokens of the KV cache are in {path}", err=True)


def sampling_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams that were given on the command line; the others stay the model's own."""
    fields = {name: options[name] for name in _FIELDS if options[name] is not None}
    if options["stop"]:
        fields["stop"] = options["stop"]
    if options["logit_bias"]:
        fields["logit_bias"] = dict(_bias(text) for text in options["logit_bias"])
    if options["ignore_eos"]:
        fields["ignore_eos"] = True
    return fields


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises RequestError when it is missing, a folder, binary or empty."""
    from svdengine.errors import RequestError

    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if "\0" in text:
        raise RequestError(f"{path} is not a text file: it holds zero bytes")
    if not text.strip():
        raise RequestError(f"{path} is empty")
    return text


def printable(text: str) -> str:
    """Text without characters that would steer the terminal, when standard output is one."""
    if not sys.stdout.isatty():
        return text
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def _model_path(model: HubName | Path | None) -> Path:
    if model is None:
        return _demo_model()
    if isinstance(model, Path):
        return model
    from svdengine.commands.named_model import named_model

    return named_model(model)


def _demo_model() -> Path:
    from svdengine.commands.demo_model import demo_model

    def report(message: str) -> None:
        click.echo(message, err=True)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{100 * done // max(total, 1):3d} %" + ("\n" if done >= total else ""), err=True, nl=False)

    return demo_model(report, progress)


def _ffn_option(*choices: str) -> Decorator:
    return click.option(
        "--ffn",
        type=click.Choice(choices),
        default="auto",
        show_default=True,
        help="Compute all FFN neurons, all but exact zeros (the same text, faster), or those that the predictor calls"
        " active; auto takes what is faster.",
    )


def _apply(decorators: tuple[Decorator, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise click.BadParameter(f"expected ID=X, such as 42=-5, found {text!r}", param_hint="--logit-bias") from None
