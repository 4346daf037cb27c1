"""svdengine generate: complete prompts and print the completions."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.help_pages import Command, option
from svdengine.commands.options import model_options, open_model, printable, read_text, system_option
from svdengine.commands.sampling_options import context_shift_option, grammar_options, sampling_fields, sampling_options

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.scheduling.completion import Completion


EXAMPLES = (
    'svdengine generate smollm2.svdp -p "Once upon a time" -n 100',
    "svdengine generate smollm2.svdp --chat --json-schema @person.json < question.txt",
)


@click.command("generate", cls=Command, examples=EXAMPLES)
@model_options
@option("-p", "--prompt", multiple=True, metavar="TEXT", help="A prompt. Repeatable: they run together.")
@option("-f", "--file", "files", multiple=True, type=click.Path(path_type=Path), help="A file that is a prompt.")
@option(
    "--special",
    is_flag=True,
    help="Control tokens that are written in the prompt, such as <|im_start|>, are tokens. By default they are text,"
    " which is safe with texts that others wrote.",
)
@option("--chat", "as_chat", is_flag=True, help="The prompt is a message: apply the model's chat template.")
@system_option
@option("--json", "as_json", is_flag=True, help="Print one JSON object a completion.")
@option("--logprobs", type=int, metavar="N", help="With --json, log-probabilities of the N likeliest tokens.")
@sampling_options
@context_shift_option
@grammar_options
def command(
    prompt: tuple[str, ...],
    files: tuple[Path, ...],
    special: bool,
    as_chat: bool,
    system: str | None,
    as_json: bool,
    logprobs: int | None,
    **options: Any,
) -> None:
    """Complete prompts with MODEL, a .svdp file or a name on a hub; without -p and -f, the text of standard input."""
    from svdengine.errors import RequestError
    from svdengine.scheduling.sampling import merge_params

    if system is not None and not as_chat:
        raise click.UsageError("--system needs --chat")
    if special and as_chat:
        raise click.UsageError("--special is for prompts without --chat: the chat template writes its own tokens")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs needs --json")
    prompts = _prompts(prompt, files)
    if not all(prompts):
        raise RequestError("the prompt is empty")
    fields = sampling_fields(options)
    if logprobs is not None:
        fields["logprobs"] = logprobs
    with open_model(options) as llm:
        params = merge_params(llm.default_params, fields)
        shift = options["context_shift"]
        if as_chat:
            streams = [llm.stream_chat(_messages(p, system), params, context_shift=shift) for p in prompts]
        else:
            streams = [llm.stream(p, params, special=special, context_shift=shift) for p in prompts]
        for number, (text, stream) in enumerate(zip(prompts, streams, strict=True), 1):
            if as_json:
                for _ in stream:
                    pass
                click.echo(json.dumps(_record(llm, text, stream.completion), ensure_ascii=False))
                continue
            if len(prompts) > 1:
                click.secho(f"[{number}]", err=True, dim=True)
            for piece in stream:
                click.echo(printable(piece), nl=False)
            click.echo()


def _prompts(prompt: tuple[str, ...], files: tuple[Path, ...]) -> list[str]:
    from svdengine.errors import RequestError

    prompts = [*prompt, *(read_text(path).removesuffix("\n") for path in files)]
    if prompts:
        return prompts
    if sys.stdin.isatty():
        raise click.UsageError("give a prompt with -p TEXT or -f FILE, or on standard input")
    text = sys.stdin.read()
    if not text.strip():
        raise RequestError("the prompt on standard input is empty")
    return [text.removesuffix("\n")]


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _record(llm: LLM, prompt: str, completion: Completion) -> dict[str, Any]:
    """The completion's fields under their own names, with the prompt before them."""
    record = {"prompt": prompt, **asdict(completion)}
    if completion.logprobs is None:
        del record["logprobs"]
        return record
    for entry in record["logprobs"]:
        entry["text"] = llm.tokenizer.token_text(entry["token"])
        entry["top"] = [{"token": t, "text": llm.tokenizer.token_text(t), "logprob": p} for t, p in entry["top"]]
    return record
