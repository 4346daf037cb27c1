"""svdengine eval: the quality of a model on texts and tasks, and what sparse execution takes from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.arguments import check_writable
from svdengine.commands.help_pages import SPARSITY, Command, option
from svdengine.commands.options import measuring_options, open_model, read_text
from svdengine.commands.progress import StageProgress

if TYPE_CHECKING:
    from svdengine.kernels.executor import FfnMode
    from svdengine.kernels.predictor import Predictor
    from svdengine.llm import LLM
    from svdengine.measuring.evaluation import Measurements
    from svdengine.measuring.task_scores import Outcome
    from svdengine.measuring.tasks import Task

WINDOW = 512  # tokens that are scored at a time
REPORT_BIASES = (-0.2, 0.0, 0.1, 0.2, 0.3, 0.4)  # of the report's curve of error against speed


EXAMPLES = (
    "svdengine eval smollm2.svdp --perplexity book.txt",
    "svdengine eval relu.svdp --perplexity book.txt --report r.html --predictor a.st --predictor b.st",
)


@click.command("eval", cls=Command, examples=EXAMPLES)
@measuring_options
@option(
    "--predictor",
    "predictor_files",
    group=SPARSITY,
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A predictor from `svdengine calibrate`; by default the model's own. Repeatable: a report compares them.",
)
@option("--perplexity", "text_file", type=click.Path(path_type=Path), metavar="FILE", help="Score this text.")
@option(
    "--window",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens scored at a time.  [default: 512, or the context where that is smaller]",
)
@option(
    "--tasks",
    "task_files",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Tasks, one JSON a line, or one of arithmetic, choices, code. May be repeated.",
)
@option("--run-code", is_flag=True, help="Run the programs that the model writes for tasks of code.")
@option(
    "--against",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="MODEL2",
    help="Score the tasks with this model too, and compare them task by task.",
)
@option("--predictors", is_flag=True, help="Compare predictors, layer by layer, on the text of --perplexity.")
@option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write an HTML report: predictors, densities, and error against speed, on the text of --perplexity.",
)
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    text_file: Path | None,
    window: int | None,
    task_files: tuple[Path, ...],
    run_code: bool,
    against: Path | None,
    predictors: bool,
    report: Path | None,
    predictor_files: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL, a .svdp file or a name on a hub: perplexity on a text, and the share of tasks it gets right.

    \b
    A task is one line of JSON, of one of three kinds:
      {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
      {"prompt": "What is 6 times 7?", "match": 42, "chat": true, "max_tokens": 100}
      {"prompt": "Write f(n), which returns n + 1.", "tests": "assert f(1) == 2", "chat": true}

    --ffn both runs dense and sparse, and says how often they agree on the likeliest next token and how far their
    distributions are apart. With --json, `perplexity` is then that of the sparse path, and `dense` holds the other.
    """
    from svdengine.files.predictor_file import require_relu_family

    if text_file is None and not task_files:
        raise click.UsageError("there is nothing to measure: give --perplexity FILE or --tasks FILE")
    if (predictors or report is not None) and text_file is None:
        raise click.UsageError("--predictors and --report need a text: --perplexity FILE")
    if against is not None and (not task_files or options["ffn"] == "both"):
        raise click.UsageError("--against compares the tasks of --tasks, and does not go together with --ffn both")
    if len(predictor_files) > 1 and report is None:
        raise click.UsageError("several predictors are compared in a report: give --report FILE")
    options["report"] = report
    options["predictor"] = predictor_files[0] if predictor_files else None
    if report is not None:
        check_writable(report)
    text = read_text(text_file) if text_file is not None else ""
    tasks = _tasks(task_files, run_code)
    with open_model(options) as llm:
        window = window or min(WINDOW, llm.context)
        if report is not None and llm.predictor is not None:
            options["ffn"] = "both"
        if predictors or report is not None:
            require_relu_family(llm.model_file)
        named = _predictors(llm, predictor_files)
        found = _measure(llm, text, window, tasks, options, named if predictors or report is not None else None)
        if report is not None:
            _measure_curve(llm, text, window, named, found)
            _write_report(llm, report, found, named, (text_file.name if text_file is not None else "", text))
    if against is not None:
        _compare(found, tasks, against, options)
    record = _record(found)
    click.echo(json.dumps(record) if as_json else "\n".join(_lines(record)))


def _tasks(files: Sequence[Path], run_code: bool) -> list[Task]:
    from svdengine.measuring.tasks import CodeTask, read_tasks

    tasks = [task for file in files for task in read_tasks(file)]
    if not run_code and any(isinstance(task, CodeTask) for task in tasks):
        raise click.UsageError(
            "these tasks run programs that the model writes, in a process with limits; allow it with --run-code"
        )
    return tasks


def _compare(found: Measurements, tasks: list[Task], against: Path, options: dict[str, Any]) -> None:
    """Score the tasks with another model too. The predictor of --predictor is not its own."""
    from svdengine.measuring.task_scores import pair, score

    with open_model({**options, "model": against, "predictor": None}) as other:
        answered = _answers(other, tasks, options)[other.ffn]
        found.tasks += score(tasks, answered, f"{other.ffn} {against.name}")
    found.pairs += pair(tasks, (found.ffn, found.answers), (against.name, answered))


def _answers(llm: LLM, tasks: list[Task], options: dict[str, Any]) -> dict[FfnMode, list[Outcome]]:
    from svdengine.measuring.task_scores import answer_tasks

    paths: tuple[FfnMode, ...] = ("dense", "sparse") if options["ffn"] == "both" else (llm.ffn,)
    report = partial(StageProgress(), "tasks")
    return answer_tasks(llm, tasks, paths, options["sparsity_bias"] or 0.0, report)


def _measure(
    llm: LLM,
    text: str,
    window: int,
    tasks: list[Task],
    options: dict[str, Any],
    studied: Mapping[str, Predictor] | None,
) -> Measurements:
    """All that was asked for but the curve of a report. `studied`: predictors to study, besides those made for it."""
    from svdengine.measuring.evaluation import Measurements, compare_paths
    from svdengine.measuring.perplexity import measure_perplexity
    from svdengine.measuring.predictor_study import study_predictors
    from svdengine.measuring.task_scores import pair, score

    progress, bias, both = StageProgress(), options["sparsity_bias"] or 0.0, options["ffn"] == "both"

    def windows(done: int, total: int, perplexity: float) -> None:
        progress("windows", done, total, f", perplexity so far {perplexity:.4f}")

    found = Measurements(ffn="both" if both else llm.ffn, sparsity_bias=bias)
    if text and both and options["report"] is None:
        found.comparison = compare_paths(llm, text, window, [bias], windows)
    elif text and not both:
        found.perplexity = measure_perplexity(llm, text, window, windows, bias)
    if studied is not None:
        found.study = study_predictors(llm, text, progress, studied)
    if tasks:
        answers = _answers(llm, tasks, options)
        lines = [line for path, outcomes in answers.items() for line in score(tasks, outcomes, path)]
        found.tasks = sorted(lines, key=lambda line: line.task)
        found.answers = answers[next(iter(answers))]
        if both:
            found.pairs = pair(tasks, ("dense", answers["dense"]), ("sparse", answers["sparse"]))
    return found


def _predictors(llm: LLM, files: Sequence[Path]) -> dict[str, Predictor]:
    """What is compared, by name: the files that were given, or the model's own. Raises RequestError, ModelFileError."""
    from svdengine.files.predictor_file import find_predictor
    from svdengine.measuring.study_results import OWN

    if len(files) < 2:
        return {} if llm.predictor is None else {OWN if not files else files[0].stem: llm.predictor}
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    rest = [find_predictor(llm.model_file, file) for file in files[1:]]
    return {name: p for name, p in zip(names, [llm.predictor, *rest], strict=True) if p is not None}


def _measure_curve(llm: LLM, text: str, window: int, predictors: Mapping[str, Predictor], found: Measurements) -> None:
    """Error and speed at several biases, of each predictor."""
    from svdengine.measuring.evaluation import compare_predictors, with_rates

    if not predictors:
        return
    progress = StageProgress()

    def windows(done: int, total: int, perplexity: float) -> None:
        progress("windows at each bias", done, total, f", perplexity so far {perplexity:.4f}")

    biases = sorted({found.sparsity_bias, *REPORT_BIASES})
    compared = compare_predictors(llm, text, predictors, window, biases, windows)
    found.comparisons = with_rates(llm, predictors, compared)
    found.comparison = next(iter(found.comparisons.values()))


def _write_report(
    llm: LLM, path: Path, found: Measurements, predictors: Mapping[str, Predictor], text: tuple[str, str]
) -> None:
    from svdengine.measuring.report import make_report, render_report, report_files

    report = make_report(llm, found, predictors, text)
    path.write_text(render_report(report), encoding="utf-8")
    beside = report_files(report, path.stem)
    for name, content in beside.items():
        path.with_name(name).write_text(content, encoding="utf-8")
    click.echo(f"written to {path}, and its numbers beside it: {', '.join(beside)}", err=True)


def _record(found: Measurements) -> dict[str, Any]:
    """What is printed, in plain JSON types."""
    from svdengine.measuring.study_table import study_record

    record: dict[str, Any] = {"ffn": found.ffn}
    if found.perplexity is not None:
        record |= asdict(found.perplexity)
    if found.comparison is not None:
        sparse = asdict(next(s for s in found.comparison.sparse if s.sparsity_bias == found.sparsity_bias))
        dense = {**asdict(found.comparison.dense), "bytes_per_token": found.comparison.dense_bytes_per_token}
        record |= {**sparse.pop("score"), **sparse, "dense": dense}
    if found.tasks:
        record |= {"tasks": [asdict(score) for score in found.tasks], "paired": [asdict(pair) for pair in found.pairs]}
    if found.study is not None:
        record["predictors"] = study_record(found.study)
    return record


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
            f"{pair['task']}: {pair['both']} right in both, {pair['only_first']} only {pair['first']}, "
            f"{pair['only_second']} only {pair['second']}, {pair['neither']} in neither; McNemar p = {pair['p']:.3g}"
        )
    if "predictors" in record:
        from svdengine.measuring.study_table import study_lines

        yield from study_lines(record["predictors"])


def _perplexity_line(score: dict[str, Any]) -> str:
    return (
        f"perplexity {score['perplexity']:.4f} over {score['tokens']} tokens in {score['windows']} windows, "
        f"{score['bits_per_byte']:.4f} bits per byte"
    )
