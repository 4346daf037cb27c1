"""svdengine eval: the quality of a model on a text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from svdengine.commands.options import model_options, open_model, read_text


@click.command("eval")
@model_options
@click.option("--perplexity", "file", type=click.Path(path_type=Path), required=True, help="Score this UTF-8 text.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens scored at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(file: Path, window: int, as_json: bool, **options: Any) -> None:
    """Measure the perplexity of MODEL, a .svdp file, on a text."""
    from svdengine.perplexity import measure_perplexity

    text = read_text(file)
    with open_model(options) as llm:
        result = measure_perplexity(llm, text, window, _progress if sys.stderr.isatty() else None)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} windows, "
            f"{result.bits_per_byte:.4f} bits per byte"
        )


def _progress(done: int, total: int, perplexity: float) -> None:
    end = "\n" if done == total else ""
    click.echo(f"\r{done}/{total} windows, perplexity so far {perplexity:.4f}  {end}", err=True, nl=False)
