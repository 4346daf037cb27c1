"""A report on a model's sparsity as one HTML file: charts, tables and nothing that is fetched from elsewhere."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from svdengine import __version__
from svdengine.kernels.predictor import Predictor
from svdengine.measuring.evaluation import Measurements
from svdengine.measuring.memory_traffic import ffn_bytes, parameter_count
from svdengine.measuring.predictor_table import predictor_report
from svdengine.measuring.report_figures import Figure, figures, unshifted
from svdengine.measuring.study_results import mean_aurocs
from svdengine.measuring.task_scores import TaskScore

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.models.config import ModelConfig


_TABLES_ELSEWHERE = ("neuron", "recall", "error")  # figures whose numbers another one shows, or that are too many
_MOST_ROWS = 400  # of a table in the page; longer ones are only in the files beside it


@dataclass(frozen=True)
class Report:
    """What a report shows; parts that were not measured are left out."""

    title: str
    facts: tuple[tuple[str, str], ...]  # of the model, its predictors, the text and the machine
    found: Measurements  # its sparse scores at several biases, in ascending order
    figures: tuple[Figure, ...]


def make_report(llm: LLM, found: Measurements, predictors: Mapping[str, Predictor], text: tuple[str, str]) -> Report:
    """A report about a loaded model. `text`: the name of what was measured on, and the text itself."""
    config, file = llm.config, llm.model_file
    formats = "/".join(sorted(set(file.formats.values())))
    facts = [
        ("model", f"{config.family}, {parameter_count(config) / 1e6:.0f} M parameters in {formats}"),
        ("FFN", f"{config.layer_count} layers of {_shown_ffn(config)}, {config.activation}"),
        *(_predictor_fact(name, predictor, ffn_bytes(file)) for name, predictor in predictors.items()),
    ]
    name, content = text
    data = content.encode("utf-8", "replace")
    digest = hashlib.sha256(data).hexdigest()[:12]
    facts.append(("text", f"{name}, {len(data):,} bytes, SHA-256 {digest}"))
    facts.append(("made", f"svdengine {__version__}, {time.strftime('%Y-%m-%d')}, {_machine(llm)}"))
    return Report(file.path.name, tuple(facts), found, tuple(figures(found)))


def _predictor_fact(name: str, predictor: Predictor, all_bytes: int) -> tuple[str, str]:
    noted = predictor_report(predictor)
    budget = ", ".join(f"{what} {value:g}" for what, value in noted["budget"].items())
    size = noted["totals"]["bytes"]
    return (
        name if name.startswith("this") else f"predictor {name}",
        f"{noted['kind']}, thresholds by {noted['thresholds']}{f', {budget}' if budget else ''};"
        f" {size / 1e6:.1f} MB, {100 * size / all_bytes:.1f} % of the FFN's weights",
    )


def _machine(llm: LLM) -> str:
    from svdengine.measuring.machine import describe_machine

    machine = describe_machine(measure=False)
    where = f"{machine.cpu}, {machine.isa}, {machine.cores} cores" if llm.executor.name == "cpu" else machine.cpu
    return f"Python {platform.python_version()}, {llm.executor.name}: {where}"


def report_files(report: Report, stem: str) -> dict[str, str]:
    """What is written beside the page, by name: all numbers as JSON, and those of each figure as CSV."""
    record = {"title": report.title, "facts": dict(report.facts), "measured": _plain(asdict(report.found))}
    found = {f"{stem}.json": json.dumps(record, indent=1) + "\n"}
    for figure in report.figures:
        target = io.StringIO()
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow([column.name for column in figure.columns])
        writer.writerows(figure.rows)
        found[f"{stem}.{figure.name}.csv"] = target.getvalue()
    return found


def _plain(value: Any) -> Any:
    """A value of JSON, which has no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _shown_ffn(config: ModelConfig) -> str:
    if not config.expert_count:
        return f"{config.ffn_size} neurons"
    shared = f", and {config.shared_blocks * config.ffn_size} that all tokens have" if config.shared_blocks else ""
    return f"{config.expert_count} experts of {config.ffn_size} neurons, {config.active_experts} a token{shared}"


def render_report(report: Report) -> str:
    """The report, as HTML."""
    parts = [f"<h1>{escape(report.title)}</h1>", _tiles(report.found), _facts(report.facts)]
    parts += [_section(figure) for figure in report.figures]
    if report.found.tasks:
        parts.append(_task_section(report.found.tasks))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_style()}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _style() -> str:
    return files("svdengine.measuring").joinpath("report.css").read_text(encoding="utf-8")


def _tiles(report: Measurements) -> str:
    """The figures that matter most, large."""
    tiles = []
    zero = unshifted(report.comparison)
    if report.comparison is not None and zero is not None:
        rise = 100 * (zero.score.perplexity / report.comparison.dense.perplexity - 1)
        share = 100 * zero.bytes_per_token / report.comparison.dense_bytes_per_token
        tiles += [
            (f"{rise:+.2f} %", "perplexity, against dense"),
            (f"{100 * zero.agreement:.1f} %", "same likeliest token"),
            (f"{share:.0f} %", "of dense weight bytes a token"),
            (f"{100 * zero.active_density:.1f} %", "of neurons computed"),
        ]
        if zero.tokens_per_second is not None and report.comparison.dense_tokens_per_second:
            times = zero.tokens_per_second / report.comparison.dense_tokens_per_second
            tiles.append((f"{times:.2f}", "times the speed of dense"))
    if report.study is not None and report.study.layers[0].selections:
        first = next(iter(report.study.layers[0].selections))
        area = mean_aurocs(report.study).get(first)
        if area is not None and math.isfinite(area):
            tiles.append((f"{area:.3f}", "AUROC, mean of layers"))
    items = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<section class="tiles">{items}</section>' if tiles else ""


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{rows}</dl>"


def _task_section(tasks: Sequence[TaskScore]) -> str:
    head = ("task", "path", "right", "of", "accuracy", "by likelihood per byte")
    rows = [
        (
            t.task,
            t.ffn,
            str(t.correct),
            str(t.count),
            f"{100 * t.accuracy:.2f} %",
            f"{100 * t.accuracy_normalized:.2f} %" if t.accuracy_normalized is not None else "",
        )
        for t in tasks
    ]
    return f'<section class="wide"><h2>Tasks</h2><div class="scroll">{_rows(head, rows)}</div></section>'


def _section(figure: Figure) -> str:
    """A chart, and a table that opens on demand, where the numbers are few and no other figure has them."""
    table = ""
    if figure.rows and figure.name not in _TABLES_ELSEWHERE and len(figure.rows) <= _MOST_ROWS:
        rows = _rows([column.name for column in figure.columns], figure.cells())
        table = f'<details><summary>Table</summary><div class="scroll">{rows}</div></details>'
    return (
        f"<section><h2>{escape(figure.title)}</h2><p>{escape(figure.text)}</p><figure>{figure.chart}</figure>{table}"
        "</section>"
    )


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
