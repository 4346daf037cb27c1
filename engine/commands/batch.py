"""svdengine batch: answer a file of requests."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import click

from svdengine.commands.arguments import check_writable
from svdengine.commands.help_pages import Command, option
from svdengine.commands.options import model_label, model_options, open_shared_model, prefill_rows_option
from svdengine.commands.sampling_options import context_shift_option, sampling_fields, sampling_options

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


EXAMPLES = (
    "svdengine batch questions.jsonl smollm2.svdp -o answers.jsonl",
    "svdengine batch questions.jsonl smollm2.svdp -o answers.jsonl --parallel 16 --temperature 0",
)


@click.command("batch", cls=Command, examples=EXAMPLES)
@click.argument("requests", type=_FILE, metavar="IN.jsonl")
@model_options
@option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.jsonl")
@option("--parallel", type=click.IntRange(1, 256), default=8, show_default=True, help="Lines at a time.")
@option("--special", is_flag=True, help="Control tokens that are written in a prompt are tokens, not text.")
@prefill_rows_option
@sampling_options
@context_shift_option
def command(requests: Path, output: Path, parallel: int, special: bool, **options: Any) -> None:
    """Answer the requests in IN.jsonl with MODEL, a .svdp file or a name on a hub.

    A line is an object with "messages" or "prompt" and other fields as `svdengine serve` takes them, or a line of
    OpenAI's batch files. The answers come in the order of the lines, with an error on the answer of a line that cannot
    be run. After an interruption the same command goes on where it stopped. Sampling options are for lines that do not
    give their own.
    """
    from svdengine.server.batch_run import BatchRun, finished_lines, read_lines
    from svdengine.server.body import encode_json

    check_writable(output)
    finished = finished_lines(requests, output)
    total = sum(1 for _ in read_lines(requests))
    if finished:
        click.echo(f"{finished} of {total} lines were answered before", err=True)
    defaults = sampling_fields(options)
    if options["context_shift"]:
        defaults["context_shift"] = True
    failed = 0
    with open_shared_model(options) as llm, output.open("ab") as file:
        results = BatchRun(llm, model_label(options), defaults, parallel, special=special).results(
            islice(read_lines(requests), finished, None)
        )
        with click.progressbar(length=total, file=sys.stderr, label="answered", show_pos=True) as bar:
            bar.update(finished)
            for result in results:
                file.write(encode_json(result) + b"\n")
                file.flush()
                failed += result["error"] is not None
                bar.update(1)
    if failed:
        click.echo(f"{failed} lines could not be answered; their answers say why", err=True)
