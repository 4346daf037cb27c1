"""What a predictor says of itself, as a table: how it was made, and how good it was in each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from svdengine.kernels.predictor import Predictor, layer_predictor_bytes
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import Place, place_of

_MEASURES = (
    "auroc",
    "recall",
    "precision",
    "predicted_density",
    "active_density",
    "computed_density",
    "relative_error",
)

# Heading, field of a row, and how it is written.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("rank", "rank", "{}".format),
    ("bits", "bits", "{}".format),
    ("AUROC", "auroc", "{:.3f}".format),
    ("recall", "recall", "{:.3f}".format),
    ("predicted", "predicted_density", "{:.1%}".format),
    ("active", "active_density", "{:.1%}".format),
    ("rel. error", "relative_error", "{:.1e}".format),
    ("KB", "bytes", lambda size: f"{size / 1e3:.1f}"),
)

# Of a mixture, its experts of which all gates are computed.
_EXACT: tuple[tuple[str, str, Callable[[Any], str]], ...] = (("no pred.", "no_predictor", "{}".format),)

_BEST = ("rank", "bits", "scoring", "read")  # of the predictor that reads least of an expert

# Of a kind of held-out text: heading, field, and how it is written.
_COSTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("tokens", "tokens", "{}".format),
    ("perplexity", "perplexity", "{:.2f}".format),
    ("rise", "perplexity_rise", "{:+.2%}".format),
    ("KL, nats", "kl", "{:.5f}".format),
    ("same", "agreement", "{:.1%}".format),
)


def predictor_report(predictor: Predictor, config: ModelConfig | None = None) -> dict[str, Any]:
    """A description in plain JSON types. `about` may come from any file: what is not as expected is left out.

    It has a row for each FFN block: a layer, or with experts each of a layer's. Without `config`, the model's, each
    block counts as a layer.
    """
    about = predictor.about
    noted = about.get("table")
    rows = noted if isinstance(noted, list) and len(noted) == len(predictor.layers) else [{}] * len(predictor.layers)
    layers = []
    for index, (layer, row) in enumerate(zip(predictor.layers, rows, strict=True)):
        measured = row if isinstance(row, dict) else {}
        place = Place(index) if config is None else place_of(config, "up", index)
        layers.append(
            {
                "layer": place.layer,
                **({"expert": place.expert} if place.expert is not None else {}),
                "rank": layer.rank,
                "relu": layer.relu,
                "bits": layer.residual_bits,
                "factors": layer.factor_format,
                "bytes": layer_predictor_bytes(layer),
                **({"exact": not layer.rank and not layer.residual_bits} if place.expert is not None else {}),
                "reached": _number(measured.get("reached")),
                **{name: _number(measured.get(name)) for name in _MEASURES},
            }
        )
    whole = [_folded(list(rows)) for _, rows in groupby(layers, key=lambda row: row["layer"])]
    counted = [row["exact"] for row in whole]
    return {
        "kind": _text(about.get("kind")),
        "thresholds": _text(about.get("thresholds")),
        "ablation": _text(about["ablation"]) if "ablation" in about else None,
        "budget": _numbers(about.get("budget")),
        "outcome": _numbers(about.get("outcome")),
        "kinds": _kinds(about.get("kinds")),
        "tokens": _number(about.get("tokens")),
        **({"choice": _choice(about["choice"])} if isinstance(about.get("choice"), dict) else {}),
        "layers": layers,
        "totals": {
            "bytes": sum(layer["bytes"] for layer in layers),
            **({"no_predictor": _of(*map(sum, zip(*counted, strict=True)))} if any(n for _, n in counted) else {}),
            **{name: _mean([layer[name] for layer in whole]) for name in _MEASURES},
        },
    }


def predictor_lines(report: Mapping[str, Any]) -> list[str]:
    """The report as text. A layer with experts has one line too: their means by the tokens that reach each."""
    none = "none" if report["thresholds"] == "trained" else "unknown"
    budget = ", ".join(f"{name} {value:g}" for name, value in report["budget"].items()) or none
    ablation = f", ablation {report['ablation']}" if report["ablation"] not in (None, "full") else ""
    lines = [f"predictor: {report['kind']}; thresholds: {report['thresholds']}{ablation}; budget: {budget}"]
    if report["outcome"]:
        lines.append("outcome: " + ", ".join(f"{name} {value:.4g}" for name, value in report["outcome"].items()))
    if report["kinds"]:
        lines += ["", _line("held out", [heading for heading, *_ in _COSTS], 18)]
        lines += [_line(kind, _cells(row, _COSTS), 18) for kind, row in report["kinds"].items()]
    if "choice" in report and (told := choice_line(report["choice"])):
        lines += ["", told]
    more = _EXACT if "no_predictor" in report["totals"] else ()
    columns = (*_COLUMNS[:-1], *more, _COLUMNS[-1])
    lines += ["", _line("layer", [heading for heading, *_ in columns])]
    whole = {layer: _folded(list(rows)) for layer, rows in groupby(report["layers"], key=lambda row: row["layer"])}
    lines += [_line(str(layer), _cells(row, columns)) for layer, row in whole.items()]
    lines.append(_line("total", _cells({**report["totals"], "rank": None, "bits": None}, columns)))
    return lines


def _folded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of those of a layer's blocks: these count as often as tokens reach them."""
    experts = [row for row in rows if "exact" in row]
    exact = sum(row["exact"] for row in experts), len(experts)
    counted = {"no_predictor": _of(*exact) if experts else None, "exact": exact}
    if len(rows) == 1:
        return {**rows[0], **counted}
    scored = [row for row in rows if not row.get("exact")] or rows
    spans = {name: sorted({row[name] for row in scored}) for name in ("rank", "bits")}
    return {
        **{name: f"{found[0]}-{found[-1]}" if len(found) > 1 else found[0] for name, found in spans.items()},
        **counted,
        "bytes": sum(row["bytes"] for row in rows),
        **{name: _mean([row[name] for row in rows], [_weight(row, name) for row in rows]) for name in _MEASURES},
    }


def _of(exact: int, experts: int) -> str:
    return f"{exact} of {experts}"


def _weight(row: Mapping[str, Any], name: str) -> float:
    """How much a block's figure counts in its layer's: recall is a share of active neurons, precision of predicted."""
    told = row["reached"]
    reached = 1.0 if told is None or not 0 <= told <= 1 else told
    of = {"recall": "active_density", "precision": "predicted_density"}.get(name)
    return reached * (1.0 if of is None or row[of] is None else row[of])


def _choice(choice: Mapping[str, Any]) -> dict[str, Any]:
    """What was found of experts before their predictors were made."""
    best = choice.get("best")
    known = best if isinstance(best, dict) else {}
    return {
        "exact": choice.get("exact") is True,
        "best": {
            "kind": _text(known.get("kind")),
            "factors": _text(known.get("factors")),
            **{n: _number(known.get(n)) for n in _BEST},
        },
        **{name: _number(choice.get(name)) for name in ("tried", "exact_bytes", "dense_bytes", "gate_bytes")},
    }


def choice_line(choice: Mapping[str, Any]) -> str:
    """Why experts have the predictor that they have, or none. Nothing where that is not known."""
    best, sizes = choice["best"], [choice[name] for name in ("exact_bytes", "dense_bytes", "gate_bytes", "tried")]
    if None in sizes or any(best[name] is None for name in _BEST):
        return ""
    exact, dense, gate, tried = sizes
    bits = "1 bit" if best["bits"] == 1 else f"{best['bits']} bits"
    shape = f"{best['kind']} of " + (f"rank {best['rank']} in {best['factors']}" if best["rank"] else bits)
    found = (
        f"with {shape} a token reads {best['read'] / 1e3:.0f} KB of an expert, {exact / 1e3:.0f} where only exact zeros"
        f" are skipped, {dense / 1e3:.0f} dense (mean of {tried} experts)"
    )
    if not choice["exact"]:
        return f"experts: {found}"
    return (
        f"experts: no predictor pays. At best, {found}: it reads {best['scoring'] / 1e3:.0f} KB itself, and saves"
        f" too little of a gate of {gate / 1e3:.0f} KB. Gates are all computed, exact zeros skipped; nothing is lost"
    )


def _cells(row: Mapping[str, Any], columns: tuple[tuple[str, str, Callable[[Any], str]], ...] = _COLUMNS) -> list[str]:
    return ["-" if row[name] is None else form(row[name]) for _, name, form in columns]


def _line(first: str, cells: list[str], width: int = 6) -> str:
    return f"{first:<{width}}" + "".join(f"{cell:>11}" for cell in cells)


def _kinds(value: Any) -> dict[str, dict[str, float | int | None]]:
    """What the predictor costs on each kind of held-out text."""
    kinds = value.items() if isinstance(value, dict) else ()
    return {
        _text(kind): {name: _number(costs.get(name)) for _, name, _ in _COSTS}
        for kind, costs in kinds
        if isinstance(costs, dict)
    }


def _number(value: Any) -> float | int | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def _numbers(value: Any) -> dict[str, float]:
    found = value.items() if isinstance(value, dict) else ()
    return {_text(name): number for name, entry in found if (number := _number(entry)) is not None}


def _text(value: Any) -> str:
    """A name from a file, safe to print."""
    text = value if isinstance(value, str) else "unknown"
    return "".join(c if c.isprintable() else "?" for c in text)[:60]


def _mean(values: list[Any], weights: list[float] | None = None) -> float | None:
    pairs = zip(values, weights or [1.0] * len(values), strict=True)
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(weight * value for value, weight in known) / total if total else None
