"""How good a predictor is on held-out tokens of one layer, before thresholds (ranking) and after (what is computed)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.ffn_layer import FfnLayer, Neurons, exact_gates
from svdengine.kernels.predictor import LayerPredictor, scores

Array = NDArray[np.float32]
Scorer = Callable[[Array], Array]  # FFN inputs (n, d) -> scores (n, f)


@dataclass(frozen=True)
class Ranking:
    """How well scores order the neurons, whatever the thresholds."""

    auroc: float  # of score against active, per neuron, averaged over neurons that are sometimes active
    energy_at_quarter: float  # share of energy in the best-scored 25 % of (token, neuron) pairs


@dataclass(frozen=True)
class Selection:
    """What is computed, and what is lost by it."""

    recall: float  # share of active neurons that are predicted
    precision: float  # share of predicted neurons that are active
    predicted_density: float  # share of neurons whose gate is read
    active_density: float  # share of neurons that are active
    computed_density: float  # share of neurons that are predicted and active
    relative_error: float  # share of a token's output energy that is missed, mean over tokens


def scorer_of(predictor: LayerPredictor) -> Scorer:
    """The scores of a stored predictor, in the arithmetic of executors."""
    return partial(scores, predictor)


def sign_scorer(layer: FfnLayer) -> Scorer:
    """SparseInfer (arXiv:2411.12692): how many signs of x and of a gate's row agree, less how many do not."""
    signs = np.where(layer.gate < 0, np.float32(-1), np.float32(1))
    return lambda x: np.where(x < 0, np.float32(-1), np.float32(1)) @ signs.T


def oracle_scorer(layer: FfnLayer) -> Scorer:
    """The gates themselves: the best that any predictor of the gate can do."""
    return partial(exact_gates, layer)


def random_scorer(layer: FfnLayer, seed: int = 0) -> Scorer:
    """Scores that know nothing."""
    random = np.random.default_rng(seed)
    return lambda x: random.standard_normal((len(x), len(layer.gate)), np.float32)


def rank(found: Array, neurons: Neurons) -> Ranking:
    """Measure scores (n, f) against what the neurons did."""
    return Ranking(mean_auroc(found, neurons.active), energy_kept(found, neurons.energy, 0.25))


def select(predicted: NDArray[np.bool_], neurons: Neurons) -> Selection:
    """Measure a choice of neurons (n, f) against what they did. What has nothing to count is 1."""
    hits = int((predicted & neurons.active).sum())
    chosen, active, pairs = int(predicted.sum()), int(neurons.active.sum()), predicted.size
    missed = float(neurons.energy[~predicted].sum(dtype=np.float64))
    return Selection(
        recall=hits / active if active else 1.0,
        precision=hits / chosen if chosen else 1.0,
        predicted_density=chosen / pairs,
        active_density=active / pairs,
        computed_density=hits / pairs,
        relative_error=missed / len(predicted),
    )


def mean_auroc(found: Array, active: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of each neuron's scores (n, f), averaged over neurons that have both classes.

    By ranks (Mann and Whitney 1947): the share of (active, inactive) pairs of tokens that the scores order rightly,
    equal scores counting half. NaN where no neuron has both classes.
    """
    areas = []
    for s, truth in zip(np.ascontiguousarray(found.T), np.ascontiguousarray(active.T), strict=True):
        positives, negatives = s[truth], np.sort(s[~truth])
        if len(positives) and len(negatives):
            below = (
                np.searchsorted(negatives, positives, "left").sum()
                + np.searchsorted(negatives, positives, "right").sum()
            )
            areas.append(below / (2.0 * len(positives) * len(negatives)))
    return float(np.mean(areas)) if areas else float("nan")


def energy_kept(found: Array, energy: Array, share: float) -> float:
    """Share of all energy (n, f) in the given share of pairs that have the highest scores (n, f)."""
    count = max(1, round(share * found.size))
    best = np.argpartition(found.ravel(), found.size - count)[found.size - count :]
    total = float(energy.sum(dtype=np.float64))
    return float(energy.ravel()[best].sum(dtype=np.float64)) / total if total else 1.0
