"""Options that several commands share: the model and how it runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.arguments import ModelArgument, Number, existing_file
from svdengine.commands.help_pages import MODEL, MODEL_OPTION, SPARSITY, SPEED, option
from svdengine.files.hub_name import HubName

if TYPE_CHECKING:
    from svdengine.llm import LLM

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _about_layers(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        click.echo(
            "-ngl changes nothing: the whole model runs on the device that --device names (cpu, cuda, ascend), and"
            " --gpu-memory limits what a GPU holds of it",
            err=True,
        )


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
    option(
        "-m",
        "--model",
        MODEL_OPTION,
        group=MODEL,
        type=str,
        expose_value=False,
        metavar="MODEL",
        help="The same as MODEL, as llama.cpp has it.",
    ),
    option(
        "--device",
        group=MODEL,
        type=click.Choice(["auto", "cpu", "cuda", "ascend", "reference"]),
        default="auto",
        show_default=True,
        help="Where the model runs.",
    ),
)

_PREDICTOR = option(
    "--predictor",
    group=SPARSITY,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A predictor from `svdengine calibrate`; by default the model's own.",
)
_EXECUTION: tuple[Decorator, ...] = (
    option(
        "-c",
        "--context",
        other_names=("--ctx-size", "--n-ctx"),
        group=MODEL,
        type=click.IntRange(min=2),
        metavar="N",
        help="Most tokens of prompt and answer; by default the model's own, up to 4096.",
    ),
    option(
        "-t",
        "--threads",
        group=SPEED,
        type=click.IntRange(1, 1024),
        metavar="N",
        help="CPU threads; by default one a core.",
    ),
    option(
        "--kv-dtype",
        group=SPEED,
        type=click.Choice(["f16", "q8", "f32"]),
        default="f16",
        show_default=True,
        help="How keys and values are cached. With q8 the same memory holds nearly twice the tokens; CPU only.",
    ),
    option(
        "--kv-memory",
        group=SPEED,
        type=Size(),
        metavar="SIZE",
        help="Memory of the KV cache, such as 4G, for all sequences together; by default one context's.",
    ),
    option(
        "--gpu-memory",
        group=SPEED,
        type=Size(),
        metavar="SIZE",
        help="What the model may take of a GPU's memory; by default all that is free. FFN weights that do not fit stay"
        " in the host's memory.",
    ),
    option(
        "--memory",
        group=SPEED,
        type=Size(),
        metavar="SIZE",
        help="What the process may take of memory, such as 8G; by default what others leave. A larger model is read"
        " from its file as needed; of a mixture of experts those that are used most are kept. CPU only.",
    ),
    option(
        "--deterministic",
        group=SPEED,
        is_flag=True,
        help="The same request gets the same bits whatever runs beside it. Prompts are read more slowly. CPU only.",
    ),
    option("--prefetch", group=SPEED, is_flag=True, help="Read the weights into memory before anything runs."),
    option(
        "--mlock",
        group=SPEED,
        is_flag=True,
        help="Keep the weights in memory; the system may have to permit it.",
    ),
    option(
        "-ngl",
        "--gpu-layers",
        other_names=("--n-gpu-layers",),
        type=str,
        hidden=True,
        expose_value=False,
        callback=_about_layers,
    ),
)

_SHARED_CONTEXTS = 2  # that the KV cache holds for many requests

_SPECULATIVE = option(
    "--speculative",
    group=SPEED,
    is_flag=True,
    help="Guess several tokens at once, where a text repeats itself or the model has a predictor. Used only where it is"
    " measured to be faster.",
)

SPARSITY_BIAS = option(
    "--sparsity-bias",
    group=SPARSITY,
    type=Number(),
    metavar="X",
    help="Shift the predictor's thresholds: above 0, fewer neurons are computed.  [default: 0]",
)


def model_options(function: Callable[..., Any], model: click.ParamType | None = None) -> Callable[..., Any]:
    """Add the MODEL argument, of the type `model`, and the options of `open_model`."""
    ffn = _ffn_option("auto", "dense", "exact", "sparse")
    return apply((_model_argument(model), *_MODEL, ffn, _PREDICTOR, *_EXECUTION, _SPECULATIVE), function)


def measuring_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the same for a measurement, which can run both paths of the FFN, and --sparsity-bias. No --predictor."""
    options: tuple[Decorator, ...] = (
        _model_argument(),
        *_MODEL,
        _ffn_option("auto", "dense", "exact", "sparse", "both"),
        *_EXECUTION,
        SPARSITY_BIAS,
    )
    return apply(options, function)


def predictor_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --predictor, for `open_model`."""
    return _PREDICTOR(function)


def system_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --system."""
    return option(
        "-sys",
        "--system",
        other_names=("--system-prompt",),
        metavar="TEXT",
        help="The system prompt; by default the model's own.",
    )(function)


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add -v and -q."""
    options: tuple[Decorator, ...] = (
        option("-v", "--verbose", is_flag=True, help="Say more, on standard error."),
        option("-q", "--quiet", is_flag=True, help="Say nothing but answers and errors."),
    )
    return apply(options, function)


def open_model(options: dict[str, Any], context: int | None = None, sequences: int = 1) -> LLM:
    """Load the model that the options name, or the demo model. `context` counts where --context was not given.

    A name on a hub is downloaded and converted the first time.

    `sequences`: how many of that length are to fit at once.

    With --ffn both, the model is one that can run sparse.
    """
    from svdengine.errors import RequestError
    from svdengine.files.advising_executor import memory_use
    from svdengine.loading import load
    from svdengine.scheduling.sampling import check_sparsity_bias, merge_params
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
        memory=options["memory"],
        kv_dtype=options["kv_dtype"],
        speculative=options.get("speculative", False),
        prefill_rows=options.get("prefill_rows") or PREFILL_ROWS,
        mlock=options["mlock"],
        prefetch=options["prefetch"],
        deterministic=options["deterministic"],
    )
    if options["memory"] is not None:
        click.echo(memory_use(llm.executor), err=True)
    if options["model"] is None:
        from svdengine.commands.demo_model import SAMPLING

        llm.default_params = merge_params(llm.default_params, SAMPLING)
    block_size = llm.executor.block_size
    if llm.executor.block_count < sequences * blocks_for(llm.context, block_size):
        llm.close()
        raise RequestError(
            f"--kv-memory holds {llm.executor.block_count * block_size} tokens, fewer than {sequences} sequences of"
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
    return option(
        "--prefill-rows",
        group=SPEED,
        type=click.IntRange(1, 4096),
        metavar="N",
        help="Prompt tokens that a step reads while other requests decode. More read prompts faster; fewer keep the"
        " others from waiting.  [default: 64]",
    )(function)


def kv_save_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --kv-save, for `kept_kv`."""
    return option(
        "--kv-save",
        group=SPEED,
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
        return existing_file(model)
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


def _model_argument(model: click.ParamType | None = None) -> Decorator:
    return click.argument("model", required=False, type=model or ModelArgument(), metavar="[MODEL]")


def _ffn_option(*choices: str) -> Decorator:
    return option(
        "--ffn",
        group=SPARSITY,
        type=click.Choice(choices),
        default="auto",
        show_default=True,
        help="Compute all FFN neurons, all but exact zeros (the same text, faster), or those that the predictor calls"
        " active; auto takes what is faster.",
    )


def apply(decorators: tuple[Decorator, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """Add options, which help shows in their order."""
    for decorator in reversed(decorators):
        function = decorator(function)
    return function
