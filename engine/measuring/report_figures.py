"""The figures of a report: a chart, and the numbers that it is drawn from, as a table and for other programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from svdengine.measuring.evaluation import Measurements, PathComparison, SparseScore
from svdengine.measuring.study_results import (
    BlockStudy,
    PredictorStudy,
    exact_experts,
    mean_aurocs,
    predictor_names,
)
from svdengine.measuring.svg_chart import Series, histogram, line_chart, share_map

Value = float | int | str | None


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and how a value of it is written for people."""

    name: str
    form: str = "{}"
    times: float = 1.0  # that a number is shown


@dataclass(frozen=True)
class Figure:
    """A chart with its text and numbers. `name` is that of its file."""

    name: str
    title: str
    text: str
    chart: str  # SVG and legend
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[Value, ...], ...] = ()

    def cells(self) -> list[list[str]]:
        """The rows as people read them; what is not known is empty."""
        return [[_cell(c, v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]


def figures(found: Measurements) -> Iterator[Figure]:
    """Those of what was measured."""
    comparisons = found.comparisons or ({"": found.comparison} if found.comparison is not None else {})
    if comparisons:
        yield speed_figure(comparisons)
    if found.study is not None:
        yield from ranking_figure(found.study)
        yield from neuron_figure(found.study)
        yield from selection_figures(found.study)
        yield cost_figure(found.study)
        yield from expert_figure(found.study)


def speed_figure(comparisons: dict[str, PathComparison]) -> Figure:
    """Error against speed: tokens a second where they were measured, else bytes a token."""
    first = next(iter(comparisons.values()))
    timed = first.dense_tokens_per_second is not None
    series, rows = [], []
    for name, comparison in comparisons.items():
        points = tuple((_speed(s, timed), _rise(s, comparison)) for s in comparison.sparse)
        series.append(Series(name or "sparse", points, labels=tuple(map(bias_text, comparison.sparse))))
        rows += [(name, s.sparsity_bias, *_numbers(s, comparison)) for s in comparison.sparse]
    dense = first.dense_tokens_per_second if timed else first.dense_bytes_per_token / 1e6
    series.append(Series("dense", ((float(dense or 0), 0.0),), labels=("dense",)))
    rows.append(
        (
            *("dense", None, first.dense.perplexity, 0.0, None, None, None, None),
            *(first.dense_tokens_per_second, first.dense_bytes_per_token),
        )
    )
    across = "tokens/s, decoding" if timed else "MB of weights read for a token"
    return Figure(
        "speed",
        "Error against speed",
        "Each point is one sparsity bias, which shifts every threshold at run time; 0 is as calibrated. The rise of"
        f" perplexity is measured on {first.dense.tokens} tokens, the speed by decoding plain text here.",
        line_chart(series, across, "perplexity rise, %"),
        (
            Column("predictor"),
            Column("bias", "{:+g}"),
            Column("perplexity", "{:.2f}"),
            Column("rise", "{:+.2f} %"),
            Column("same token", "{:.1f} %", 100),
            Column("KL (nats)", "{:.4f}"),
            Column("predicted", "{:.1f} %", 100),
            Column("computed", "{:.1f} %", 100),
            Column("tokens/s", "{:.1f}"),
            Column("MB/token", "{:.1f}", 1e-6),
        ),
        tuple(rows),
    )


def ranking_figure(study: PredictorStudy) -> Iterator[Figure]:
    """AUROC by layer, as the paper's Figures 4 and 5 have it."""
    names = predictor_names(study)
    series = [
        Series(
            name,
            tuple((x.layer, x.auroc[name]) for x in study.layers if name in x.auroc),
            dashed=name in ("random", "oracle"),
        )
        for name in names
    ]
    drawn = [value for one in series if one.name != "random" for _, value in one.points if math.isfinite(value)]
    if not drawn:
        return
    low = max(0.0, math.floor(20 * min(drawn)) / 20 - 0.01)
    shown = [one for one in series if one.name != "random" or low < 0.5]
    means = mean_aurocs(study)
    rows = [(str(x.layer), *(_known(x.auroc.get(name, math.nan)) for name in names)) for x in study.layers]
    some = sum(x.compared for x in study.layers)
    where = "" if some == len(study.layers) else f" Others than the model's are made in {some} of the layers."
    where += _compared_text(study)
    rows.append(("mean", *(_known(means[name]) for name in names)))
    yield Figure(
        "ranking",
        "Ranking of neurons",
        "How well scores tell a neuron's active tokens from the others: 1 is the oracle, 0.5 chance. Fitted to "
        f"{study.fit_tokens} tokens and measured on {study.held_out_tokens} others; the mean over neurons.{where}",
        line_chart(shown, "layer", "AUROC", y_range=(low, 1.005), y_format="{:.3g}".format),
        (Column("layer"), *(Column(name, "{:.3f}") for name in names)),
        tuple(rows),
    )


def neuron_figure(study: PredictorStudy) -> Iterator[Figure]:
    """Scores of one neuron."""
    neuron = study.neuron
    if neuron is None or not (neuron.active or neuron.inactive):
        return
    expert = "" if neuron.expert is None else f" expert {neuron.expert} in"
    missed = sum(score <= 0 for score in neuron.active)
    extra = sum(score > 0 for score in neuron.inactive)
    groups = [("inactive", neuron.inactive), ("active", neuron.active)]
    yield Figure(
        "neuron",
        "Scores of one neuron",
        f"Neuron {neuron.neuron} of{expert} layer {neuron.layer}, by the first predictor. Of {len(neuron.active)} "
        f"tokens on which it is active, {missed} are missed; on {extra} of {len(neuron.inactive)} others its gate is "
        "read for nothing, and found to be zero.",
        histogram(groups, "predicted score", 0.0, "computed from here on"),
        (Column("group"), Column("score", "{:.4f}")),
        tuple((name, score) for name, scores in groups for score in scores),
    )


def selection_figures(study: PredictorStudy) -> Iterator[Figure]:
    """Density, recall and error by layer, of every predictor that has thresholds."""
    names = list(study.layers[0].selections)
    if not names:
        return
    some = len(names) > 1
    density, recall, error = [], [], []
    for name in names:
        chosen = [(x.layer, x.selections[name]) for x in study.layers]
        of = f"{name}: " if some else ""
        density.append(Series(f"{of}predicted, gates read", tuple((i, 100 * s.predicted_density) for i, s in chosen)))
        density.append(Series(f"{of}computed", tuple((i, 100 * s.computed_density) for i, s in chosen)))
        recall.append(Series(name, tuple((i, 100 * s.recall) for i, s in chosen)))
        error.append(Series(name, tuple((i, _power(s.relative_error)) for i, s in chosen)))
    active = tuple((x.layer, 100 * x.active_density) for x in study.layers)
    density.append(Series("active in truth", active, dashed=True))
    top = max(value for one in density for _, value in one.points)
    shares = (Column(what, "{:.1f} %", 100) for what in ("predicted", "computed", "active", "recall", "precision"))
    columns = (Column("layer"), Column("predictor"), *shares, Column("relative error", "{:.2e}"))
    rows = tuple(
        (
            *(x.layer, name, s.predicted_density, s.computed_density, x.active_density),
            *(s.recall, s.precision, s.relative_error),
        )
        for x in study.layers
        for name, s in x.selections.items()
    )
    chart = line_chart(density, "layer", "% of neurons", y_range=(0.0, 1.08 * top or 1.0))
    text = "Shares of each layer's neurons: predicted, of these computed, and active in truth."
    text += _weights_text(study)
    yield Figure("density", "Density", text, chart, columns, rows)
    chart = line_chart(recall, "layer", "recall, %")
    text = "The share of active neurons that are predicted. Those that are missed are mostly the weakest."
    text += _exact_text(study)
    yield Figure("recall", "Recall", text, chart, columns, rows)
    if any(math.isfinite(value) for one in error for _, value in one.points):
        chart = line_chart(error, "layer", "relative error, %", y_format=lambda v: f"{100 * 10**v:.2g}")
        text = "The share of the FFN output's energy that missed neurons would have added; a logarithmic scale."
        yield Figure("error", "Error", text, chart, columns, rows)


def cost_figure(study: PredictorStudy) -> Figure:
    """What a token reads of each layer's FFNs: dense, with exact zeros skipped, and with each predictor."""
    names = list(study.layers[0].selections)

    def line(name: str, values: list[float], dashed: bool = False) -> Series:
        points = zip((x.layer for x in study.layers), values, strict=True)
        return Series(name, tuple((layer, value / 1e3) for layer, value in points), dashed=dashed)

    series = [line(name, [x.read[name] for x in study.layers]) for name in names]
    series.append(line("exact: zeros skipped, no predictor", [x.exact_bytes for x in study.layers]))
    series.append(line("dense", [x.dense_bytes for x in study.layers], dashed=True))
    top = max(value for one in series for _, value in one.points)
    sizes = [[*(x.read[name] for name in names), x.exact_bytes, x.dense_bytes] for x in study.layers]
    totals = [sum(column) for column in zip(*sizes, strict=True)]
    titles = [*(str(x.layer) for x in study.layers), "all"]
    rows = tuple((title, *values) for title, values in zip(titles, [*sizes, totals], strict=True))
    paying = [name for name, total in zip(names, totals, strict=False) if total < totals[-2]]
    told = (
        "" if len(paying) == len(names) else f" Only {', '.join(paying)} reads less." if paying else " Here none does."
    )
    return Figure(
        "bytes",
        "Bytes of the FFNs",
        "What a token that is decoded alone reads of each layer's FFN weights, and of the predictor. A predictor pays"
        f" where that is less than what exact zeros leave.{told}",
        line_chart(series, "layer", "KB a token", y_range=(0.0, 1.08 * top)),
        (Column("layer"), *(Column(f"{n} KB", "{:.1f}", 1e-3) for n in (*names, "exact", "dense"))),
        rows,
    )


def expert_figure(study: PredictorStudy) -> Iterator[Figure]:
    """How often each expert was chosen, of a mixture."""
    layers = [x for x in study.layers if any(b.expert is not None for b in x.blocks)]
    if not layers:
        return
    names = list(study.layers[0].selections)
    first, tokens = (names[0] if names else ""), study.held_out_tokens
    experts = {x.layer: [b for b in x.blocks if b.expert is not None] for x in layers}
    grid = [(x.layer, [(b.rows / tokens, first in b.exact) for b in experts[x.layer]]) for x in layers]
    shares = sorted(share for _, row in grid for share, _ in row)
    never = sum(share == 0 for share in shares)
    text = (
        f"The share of {tokens} held-out tokens that each expert was chosen for: the darker, the more; at most"
        f" {100 * shares[-1]:.0f} %, the median {100 * shares[len(shares) // 2]:.1f} %."
        f" {never} of {len(shares)} were never chosen."
    )
    if any(exact for _, row in grid for _, exact in row):
        text += " A dot marks those without a predictor, of which all gates are computed."
    yield Figure(
        "experts",
        "Experts",
        text,
        share_map(grid, "expert", "layer"),
        (
            *(Column("layer"), Column("expert"), Column("tokens"), Column("share", "{:.2f} %", 100)),
            *(Column("predictor"), Column("exact"), Column("AUROC", "{:.3f}"), Column("recall", "{:.1f} %", 100)),
            *(Column("predicted", "{:.1f} %", 100), Column("computed", "{:.1f} %", 100)),
            *(Column("active", "{:.1f} %", 100), Column("relative error", "{:.2e}"), Column("KB", "{:.1f}", 1e-3)),
        ),
        tuple(
            _expert_row(x.layer, block, name, tokens)
            for x in layers
            for block in experts[x.layer]
            for name in names or [""]
        ),
    )


def _expert_row(layer: int, block: BlockStudy, name: str, tokens: int) -> tuple[Value, ...]:
    chosen = block.selections.get(name)
    measured: tuple[Value, ...] = (None,) * 6
    if chosen is not None:
        measured = (
            *(chosen.recall, chosen.predicted_density, chosen.computed_density),
            *(chosen.active_density, chosen.relative_error, block.read[name]),
        )
    area, exact = _known(block.auroc.get(name, math.nan)), "exact" if name in block.exact else ""
    return (layer, block.expert, block.rows, block.rows / tokens, name, exact, area, *measured)


def _has_experts(study: PredictorStudy) -> bool:
    return any(len(x.blocks) > 1 for x in study.layers)


def _weights_text(study: PredictorStudy) -> str:
    """What a layer's figure means in a mixture."""
    return " Experts count as often as tokens choose them." if _has_experts(study) else ""


def _compared_text(study: PredictorStudy) -> str:
    if not _has_experts(study):
        return ""
    most = max(x.compared_blocks for x in study.layers)
    return f" Of each layer it is that of the experts that most tokens choose, {most} at most, as often as these do."


def _exact_text(study: PredictorStudy) -> str:
    """How many experts have no predictor."""
    if not _has_experts(study):
        return ""
    told = []
    for name in study.layers[0].selections:
        count, all_of = sum(exact_experts(x, name) for x in study.layers), sum(len(x.blocks) for x in study.layers)
        of = f"with {name} " if len(study.layers[0].selections) > 1 else ""
        told.append(f" {of}{count} of {all_of} experts have no predictor: these miss none." if count else "")
    return "".join(told)


def unshifted(comparison: PathComparison | None) -> SparseScore | None:
    """The score as calibrated."""
    scores = comparison.sparse if comparison is not None else ()
    return min(scores, key=lambda score: abs(score.sparsity_bias), default=None)


def bias_text(score: SparseScore) -> str:
    """A bias as it is written at a point."""
    return f"{score.sparsity_bias:+g}" if score.sparsity_bias else "0"


def _speed(score: SparseScore, timed: bool) -> float:
    return (score.tokens_per_second or math.nan) if timed else score.bytes_per_token / 1e6


def _rise(score: SparseScore, comparison: PathComparison) -> float:
    return 100 * (score.score.perplexity / comparison.dense.perplexity - 1)


def _numbers(s: SparseScore, comparison: PathComparison) -> tuple[Value, ...]:
    return (
        *(s.score.perplexity, _rise(s, comparison), s.agreement, s.mean_kl),
        *(s.predicted_density, s.active_density, s.tokens_per_second, s.bytes_per_token),
    )


def _power(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(column: Column, value: Value) -> str:
    if value is None:
        return ""
    return (
        str(value)
        if isinstance(value, str)
        else column.form.format(value if column.times == 1.0 else value * column.times)
    )
