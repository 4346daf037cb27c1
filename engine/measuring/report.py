"""A report on a model's sparsity as one HTML file: charts, tables and nothing that is fetched from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from svdengine.measuring.evaluation import Measurements, PathComparison, SparseScore
from svdengine.measuring.memory_traffic import ffn_bytes, parameter_count
from svdengine.measuring.predictor_study import OWN, PredictorStudy, mean_aurocs
from svdengine.measuring.predictor_table import predictor_report
from svdengine.measuring.svg_chart import Series, histogram, line_chart
from svdengine.measuring.task_scores import TaskScore

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.models.config import ModelConfig


@dataclass(frozen=True)
class Report:
    """What a report shows; parts that were not measured are left out."""

    title: str
    facts: tuple[tuple[str, str], ...]  # of the model and its predictor
    found: Measurements  # its sparse scores at several biases, in ascending order


def make_report(llm: LLM, found: Measurements) -> Report:
    """A report about a loaded model."""
    config, file = llm.config, llm.model_file
    formats = "/".join(sorted(set(file.formats.values())))
    facts = [
        ("model", f"{config.family}, {parameter_count(config) / 1e6:.0f} M parameters in {formats}"),
        ("FFN", f"{config.layer_count} layers of {_shown_ffn(config)}, {config.activation}"),
    ]
    if llm.predictor is not None:
        noted = predictor_report(llm.predictor)
        share = 100 * noted["totals"]["bytes"] / ffn_bytes(file)
        facts.append(("predictor", f"{noted['kind']}; thresholds by {noted['thresholds']}"))
        facts.append(("its size", f"{noted['totals']['bytes'] / 1e6:.1f} MB, {share:.1f} % of the FFN's weights"))
        budget = ", ".join(f"{name} {value:g}" for name, value in noted["budget"].items())
        facts += [("budget", budget)] if budget else []
    return Report(file.path.name, tuple(facts), found)


def _shown_ffn(config: ModelConfig) -> str:
    if not config.expert_count:
        return f"{config.ffn_size} neurons"
    return f"{config.expert_count} experts of {config.ffn_size} neurons, {config.active_experts} a token"


def render_report(report: Report) -> str:
    """The report, as HTML."""
    found = report.found
    parts = [f"<h1>{escape(report.title)}</h1>", _tiles(found), _facts(report.facts)]
    if found.comparison is not None:
        parts.append(_speed_section(found.comparison))
    if found.study is not None:
        parts += [_auroc_section(found.study), *_neuron_section(found.study), *_density_section(found.study)]
    if found.tasks:
        parts.append(_task_section(found.tasks))
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
    zero = _unshifted(report.comparison)
    if report.comparison is not None and zero is not None:
        rise = _rise(zero.score.perplexity, report.comparison)
        share = 100 * zero.bytes_per_token / report.comparison.dense_bytes_per_token
        tiles += [
            (f"{rise:+.2f} %", "perplexity, against dense"),
            (f"{100 * zero.agreement:.1f} %", "same likeliest token"),
            (f"{share:.0f} %", "of dense weight bytes a token"),
            (f"{100 * zero.active_density:.1f} %", "of neurons computed"),
        ]
    if report.study is not None and OWN in report.study.layers[0].auroc:
        tiles.append((f"{mean_aurocs(report.study)[OWN]:.3f}", "AUROC, mean of layers"))
    items = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    return f'<section class="tiles">{items}</section>' if tiles else ""


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{rows}</dl>"


def _speed_section(comparison: PathComparison) -> str:
    points = [(s.bytes_per_token / 1e6, _rise(s.score.perplexity, comparison)) for s in comparison.sparse]
    dense = comparison.dense_bytes_per_token / 1e6
    series = [
        Series("sparse, by sparsity bias", tuple(points), labels=tuple(_bias(s) for s in comparison.sparse)),
        Series("dense", ((dense, 0.0),), labels=("dense",)),
    ]
    chart = line_chart(series, "MB of weights read for a token", "perplexity rise, %")
    head = ("bias", "perplexity", "rise", "agreement", "KL, nats", "predicted", "computed", "MB/token")
    rows = [
        (
            _bias(s),
            f"{s.score.perplexity:.4f}",
            f"{_rise(s.score.perplexity, comparison):+.2f} %",
            f"{100 * s.agreement:.2f} %",
            f"{s.mean_kl:.5f}",
            f"{100 * s.predicted_density:.1f} %",
            f"{100 * s.active_density:.1f} %",
            f"{s.bytes_per_token / 1e6:.1f}",
        )
        for s in comparison.sparse
    ]
    rows.append(("dense", f"{comparison.dense.perplexity:.4f}", "", "", "", "", "", f"{dense:.1f}"))
    text = (
        f"Decoding is bound by the bytes that a token reads. Each point is one sparsity bias, which shifts every "
        f"threshold at run time; 0 is as calibrated. Measured on {comparison.dense.tokens} tokens."
    )
    return _section("Error against speed", text, chart, _table(head, rows))


def _auroc_section(study: PredictorStudy) -> str:
    names = list(study.layers[0].auroc)
    series = [
        Series(name, tuple((x.layer, x.auroc[name]) for x in study.layers), dashed=name in ("random", "oracle"))
        for name in names
    ]
    drawn = [value for one in series if one.name != "random" for _, value in one.points if math.isfinite(value)]
    if not drawn:
        return ""
    low = max(0.0, math.floor(20 * min(drawn)) / 20 - 0.01)
    shown = [one for one in series if one.name != "random" or low < 0.5]
    chart = line_chart(shown, "layer", "AUROC", y_range=(low, 1.005), y_format="{:.3g}".format)
    means = mean_aurocs(study)
    rows = [(str(x.layer), *(f"{x.auroc[name]:.3f}" for name in names)) for x in study.layers] + [
        ("mean", *(f"{means[name]:.3f}" for name in names))
    ]
    text = (
        f"How well scores tell a neuron's active tokens from the others: 1 is the oracle, 0.5 chance. Fitted to "
        f"{study.fit_tokens} tokens and measured on {study.held_out_tokens} others; the mean over neurons."
    )
    return _section("Ranking of neurons", text, chart, _table(("layer", *names), rows))


def _neuron_section(study: PredictorStudy) -> list[str]:
    neuron = study.neuron
    if neuron is None or not (neuron.active or neuron.inactive):
        return []
    chart = histogram(
        [("inactive", neuron.inactive), ("active", neuron.active)], "predicted score", 0.0, "computed from here on"
    )
    missed = sum(score <= 0 for score in neuron.active)
    extra = sum(score > 0 for score in neuron.inactive)
    text = (
        f"Neuron {neuron.neuron} of layer {neuron.layer}, by this model's predictor. Of {len(neuron.active)} tokens "
        f"on which it is active, {missed} are missed; on {extra} of {len(neuron.inactive)} others its gate is read "
        "for nothing, and found to be zero."
    )
    return [_section("Scores of one neuron", text, chart, "")]


def _density_section(study: PredictorStudy) -> list[str]:
    chosen = [(layer, layer.own) for layer in study.layers if layer.own is not None]
    if not chosen:
        return []
    series = [
        Series("predicted: gate rows read", tuple((x.layer, 100 * own.predicted_density) for x, own in chosen)),
        Series("computed: up and down rows read", tuple((x.layer, 100 * own.computed_density) for x, own in chosen)),
        Series("active in truth", tuple((x.layer, 100 * x.active_density) for x, _ in chosen), dashed=True),
    ]
    top = max(value for one in series for _, value in one.points)
    chart = line_chart(series, "layer", "% of neurons", y_range=(0.0, 1.08 * top or 1.0))
    head = ("layer", "predicted", "computed", "active", "recall", "precision", "relative error")
    rows = [
        (
            str(x.layer),
            f"{100 * own.predicted_density:.1f} %",
            f"{100 * own.computed_density:.1f} %",
            f"{100 * x.active_density:.1f} %",
            f"{100 * own.recall:.1f} %",
            f"{100 * own.precision:.1f} %",
            f"{own.relative_error:.2e}",
        )
        for x, own in chosen
    ]
    text = (
        "Shares of each layer's neurons. The relative error is the share of the FFN output's energy that missed "
        "neurons would have added."
    )
    return [_section("Density", text, chart, _table(head, rows))]


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


def _section(title: str, text: str, chart: str, table: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p><figure>{chart}</figure>{table}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that opens on demand."""
    return f'<details><summary>Table</summary><div class="scroll">{_rows(head, rows)}</div></details>'


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"


def _unshifted(comparison: PathComparison | None) -> SparseScore | None:
    """The score as calibrated."""
    scores = comparison.sparse if comparison is not None else ()
    return min(scores, key=lambda score: abs(score.sparsity_bias), default=None)


def _bias(score: SparseScore) -> str:
    return f"{score.sparsity_bias:+g}" if score.sparsity_bias else "0"


def _rise(perplexity: float, comparison: PathComparison) -> float:
    return 100 * (perplexity / comparison.dense.perplexity - 1)
