"""svdengine eval: the quality of a model on texts and tasks, and what sparse execution takes from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.options import measuring_options, open_model, read_text

if TYPE_CHECKING:
    from svdengine.llm import LLM


@click.command("eval")
@measuring_options
@click.option("--perplexity", "text_file", type=click.Path(path_type=Path), metavar="FILE", help="Score this text.")
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens scored at a time.")
@click.option("--tasks", "task_file", type=click.Path(path_type=Path), metavar="FILE", help="Tasks, one JSON a line.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(text_file: Path | None, window: int, task_file: Path | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL, a .svdp file: perplexity on a UTF-8 text, and the share of tasks that it gets right.

    \b
    A task is one line of JSON, of either kind:
      {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
      {"prompt": "What is 6 times 7?", "match": 42, "chat": true, "max_tokens": 100}

    --ffn both runs dense and sparse, and says how often they agree on the likeliest next token and how far their
    distributions are apart. With --json, `perplexity` is then that of the sparse path, and `dense` holds the other.
    """
    from svdengine.tasks import read_tasks

    if text_file is None and task_file is None:
        raise click.UsageError("there is nothing to measure: give --perplexity FILE or --tasks FILE")
    text = read_text(text_file) if text_file is not None else None
    tasks = read_tasks(task_file) if task_file is not None else []
    record: dict[str, Any] = {}
    with open_model(options) as llm:
        if text is not None:
            record |= _score_text(llm, text, window, options)
        if tasks:
            record |= _score_tasks(llm, tasks, options)
    click.echo(json.dumps(record) if as_json else "\n".join(_lines(record)))


def _score_text(llm: LLM, text: str, window: int, options: dict[str, Any]) -> dict[str, Any]:
    from svdengine.evaluation import compare_paths
    from svdengine.perplexity import measure_perplexity

    progress = _progress if sys.stderr.isatty() else None
    bias = options["sparsity_bias"] or 0.0
    if options["ffn"] != "both":
        return {"ffn": llm.ffn, **asdict(measure_perplexity(llm, text, window, progress, bias))}
    found = compare_paths(llm, text, window, (bias,), progress)
    sparse = asdict(found.sparse[0])
    dense = {**asdict(found.dense), "bytes_per_token": found.dense_bytes_per_token}
    return {"ffn": "both", **sparse.pop("score"), **sparse, "dense": dense}


def _score_tasks(llm: LLM, tasks: list[Any], options: dict[str, Any]) -> dict[str, Any]:
    from svdengine.task_scores import score_tasks

    paths = ("dense", "sparse") if options["ffn"] == "both" else (llm.ffn,)
    progress = _tasks_progress if sys.stderr.isatty() else None
    scores, pairs = score_tasks(llm, tasks, paths, options["sparsity_bias"] or 0.0, progress)
    return {"tasks": [asdict(score) for score in scores], "paired": [asdict(pair) for pair in pairs]}


def _lines(record: dict[str, Any]) -> Iterator[str]:
    if "dense" in record:
        rise = 100 * (record["perplexity"] / record["dense"]["perplexity"] - 1)
        yield "dense:  " + _perplexity_line(record["dense"])
        yield "sparse: " + _perplexity_line(record)
        yield (
            f"sparse against dense: perplexity {rise:+.2f} %, same likeliest token "
            f"{100 * record['agreement']:.2f} %, mean KL divergence {record['mean_kl']:.5f} nats"
        )
        yield (
            f"neurons: {100 * record['predicted_density']:.1f} % predicted, {100 * record['active_density']:.1f} % "
            f"computed; {record['bytes_per_token'] / 1e6:.1f} MB of weights a token, dense "
            f"{record['dense']['bytes_per_token'] / 1e6:.1f}"
        )
    elif "perplexity" in record:
        yield _perplexity_line(record)
    for score in record.get("tasks", ()):
        per_byte = score["accuracy_normalized"]
        more = f", by likelihood per byte {100 * per_byte:.2f} %" if per_byte is not None else ""
        yield (
            f"{score['task']}, {score['ffn']}: {100 * score['accuracy']:.2f} % right "
            f"({score['correct']} of {score['count']}){more}"
        )
    for pair in record.get("paired", ()):
        yield (
            f"{pair['task']}: {pair['both']} right on both paths, {pair['only_dense']} only dense, "
            f"{pair['only_sparse']} only sparse, {pair['neither']} on neither"
        )


def _perplexity_line(score: dict[str, Any]) -> str:
    return (
        f"perplexity {score['perplexity']:.4f} over {score['tokens']} tokens in {score['windows']} windows, "
        f"{score['bits_per_byte']:.4f} bits per byte"
    )


def _progress(done: int, total: int, perplexity: float) -> None:
    end = "\n" if done == total else ""
    click.echo(f"\r{done}/{total} windows, perplexity so far {perplexity:.4f}  {end}", err=True, nl=False)


def _tasks_progress(done: int, total: int) -> None:
    click.echo(f"\r{done}/{total} tasks" + ("\n" if done == total else ""), err=True, nl=False)
