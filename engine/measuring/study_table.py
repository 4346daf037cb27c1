"""What a study of predictors found, in plain JSON types, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from svdengine.measuring.study_results import LayerStudy, PredictorStudy, exact_experts, mean_aurocs

_SHARES = ("recall", "precision", "predicted_density", "computed_density", "active_density")
_HEADINGS = ("recall", "precision", "predicted", "computed", "active")


def study_record(study: PredictorStudy) -> dict[str, Any]:
    """Layer by layer: AUROC of all predictors, and what those with thresholds select and read; and the mean AUROC."""
    return {"layers": [_layer_record(x) for x in study.layers], "mean": _finite(mean_aurocs(study))}


def study_lines(record: Mapping[str, Any]) -> Iterator[str]:
    """The record as text: AUROC of each predictor in each layer, then a table for each of those with thresholds."""
    names, layers = list(record["mean"]), record["layers"]
    for number, name in enumerate(names, 1):
        yield f"[{number}] {name}"
    yield f"{'AUROC':<7}" + "".join(f"{f'[{number}]':>8}" for number in range(1, len(names) + 1))
    for title, row in [*((str(x["layer"]), x["auroc"]) for x in layers), ("mean", record["mean"])]:
        yield f"{title:<7}" + "".join("       -" if row.get(name) is None else f"{row[name]:>8.3f}" for name in names)
    for name in layers[0]["selections"]:
        yield ""
        yield from _selection_lines(name, layers)


def _layer_record(layer: LayerStudy) -> dict[str, Any]:
    selections = {
        name: {**asdict(chosen), "bytes": layer.read[name], "exact_experts": exact_experts(layer, name)}
        for name, chosen in layer.selections.items()
    }
    experts = [{**asdict(b), "auroc": _finite(b.auroc)} for b in layer.blocks if b.expert is not None]
    return {
        "layer": layer.layer,
        "active_density": layer.active_density,
        "auroc": _finite(layer.auroc),
        "selections": selections,
        "exact_bytes": layer.exact_bytes,
        "dense_bytes": layer.dense_bytes,
        **({"experts": experts} if experts else {}),
    }


def _selection_lines(name: str, layers: list[dict[str, Any]]) -> Iterator[str]:
    """What a predictor selects in each layer, and what a token reads with it: beside it, with exact zeros skipped."""
    experts = any("experts" in layer for layer in layers)
    headings = [*_HEADINGS, "rel. error", "KB/token", "exact KB", *(["no predictor"] if experts else [])]
    yield f"{name}{', experts as often as tokens choose them' if experts else ''}"
    yield f"{'layer':<7}" + "".join(f"{heading:>{_width(heading)}}" for heading in headings)
    for layer in layers:
        chosen = layer["selections"][name]
        cells = [f"{100 * chosen[field]:.1f} %" for field in _SHARES]
        cells += [
            f"{chosen['relative_error']:.1e}",
            f"{chosen['bytes'] / 1e3:.1f}",
            f"{layer['exact_bytes'] / 1e3:.1f}",
        ]
        if experts:
            cells.append(f"{chosen['exact_experts']} of {len(layer.get('experts', ()))}" if "experts" in layer else "-")
        yield f"{layer['layer']:<7}" + "".join(f"{c:>{_width(h)}}" for c, h in zip(cells, headings, strict=True))
    own = sum(layer["selections"][name]["bytes"] for layer in layers)
    exact = sum(layer["exact_bytes"] for layer in layers)
    dense = sum(layer["dense_bytes"] for layer in layers)
    yield (
        f"FFNs of all layers: {own / 1e6:.2f} MB a token, {exact / 1e6:.2f} where only exact zeros are skipped,"
        f" {dense / 1e6:.2f} dense"
    )


def _width(heading: str) -> int:
    return max(11, len(heading) + 2)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
