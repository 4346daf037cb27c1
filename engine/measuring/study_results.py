"""What a study of predictors found: of each layer and of each of its experts, on held-out tokens of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdengine.converters.predictor_quality import Selection

OWN = "this model's"


@dataclass(frozen=True)
class BlockStudy:
    """One FFN block, on the held-out tokens that reach it: a layer's only FFN, an expert, or a part of a wide FFN."""

    expert: int | None  # its number in the layer; None: all tokens reach it
    rows: int  # held-out tokens that reach it
    auroc: dict[str, float]  # name of a predictor -> its AUROC, NaN where no neuron is active on some tokens only
    active_density: float  # share of neurons whose gate is not zero
    selections: dict[str, Selection]  # by predictor; empty where no token reaches it
    read: dict[str, float]  # bytes that a token reads that reaches it, by predictor
    exact: tuple[str, ...]  # predictors that leave it out: all gates are computed, and only exact zeros are skipped


@dataclass(frozen=True)
class LayerStudy:
    """One layer: every predictor's ranking, and what the model's own one and others with thresholds select.

    With experts everything is weighted by the tokens that reach each, which is the work that a layer does. AUROC is
    then that of the experts that are compared: those that most tokens reach, and that the first predictor scores.
    """

    layer: int
    auroc: dict[str, float]  # name of a predictor -> its AUROC, NaN where no neuron is active on some tokens only
    compared: bool  # whether those that are made to compare with are among them
    compared_blocks: int  # of the layer's, whose AUROC this is
    active_density: float  # share of neurons whose gate is not zero
    selections: dict[str, Selection]  # by predictor
    read: dict[str, float]  # bytes of the layer's FFNs and its predictor that a token reads, by predictor
    dense_bytes: float  # the same where every neuron is computed
    exact_bytes: float  # where only exact zeros are skipped
    blocks: tuple[BlockStudy, ...]


@dataclass(frozen=True)
class NeuronScores:
    """Scores of one neuron by the model's own predictor, which computes it where they are above 0."""

    layer: int
    expert: int | None  # None: the layer's only FFN
    neuron: int
    active: tuple[float, ...]  # on tokens for which the neuron is active
    inactive: tuple[float, ...]


@dataclass(frozen=True)
class PredictorStudy:
    """All layers, and one neuron of the middle one."""

    layers: tuple[LayerStudy, ...]
    neuron: NeuronScores | None  # None: the model has no predictor
    fit_tokens: int
    held_out_tokens: int


def mean_aurocs(study: PredictorStudy) -> dict[str, float]:
    """Each predictor's AUROC, averaged over those layers in which all were measured and that have one."""
    means = {}
    for name in predictor_names(study):
        found = [x.auroc[name] for x in study.layers if x.compared and math.isfinite(x.auroc.get(name, math.nan))]
        means[name] = sum(found) / len(found) if found else math.nan
    return means


def exact_experts(layer: LayerStudy, name: str) -> int:
    """Of how many of a layer's experts a predictor computes all gates."""
    return sum(name in block.exact for block in layer.blocks)


def predictor_names(study: PredictorStudy) -> list[str]:
    """All that were ranked in some layer, in order: those with thresholds, and those that were made to compare with."""
    longest = max(study.layers, key=lambda layer: len(layer.auroc))
    return list(longest.auroc)
