"""How good a predictor is on held-out tokens of one layer, before thresholds (ranking) and after (what is computed)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numba
import numpy as np
from numpy.typing import NDArray

from svdengine.converters.ffn_layer import FfnLayer, Neurons, exact_gates
from svdengine.converters.parallel import over_parts
from svdengine.converters.thresholds import sort_rows
from svdengine.kernels.predictor import LayerPredictor, scores

Array = NDArray[np.float32]
_NEURONS = 64  # that are ranked at once

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

    def count(part: slice) -> tuple[int, int, int, float]:
        chosen, active = predicted.T[part], neurons.active.T[part]
        missed = np.where(chosen, np.float32(0), neurons.energy.T[part]).sum(dtype=np.float64)
        return int((chosen & active).sum()), int(chosen.sum()), int(active.sum()), float(missed)

    counts = zip(*over_parts(count, predicted.shape[1], size=_NEURONS), strict=True)
    hits, chosen, active, missed = (sum(values) for values in counts)
    pairs = predicted.size
    return Selection(
        recall=hits / active if active else 1.0,
        precision=hits / chosen if chosen else 1.0,
        predicted_density=chosen / pairs,
        active_density=active / pairs,
        computed_density=hits / pairs,
        relative_error=missed / len(predicted),
    )


def pooled(parts: Sequence[tuple[int, Selection]]) -> Selection | None:
    """One selection of those of several FFN blocks of the same size, each with how many tokens reached it.

    It is what `select` would find for all their pairs of token and neuron together: what is reached often counts more.
    None where no token reached any.
    """
    total = sum(rows for rows, _ in parts)
    if not total:
        return None

    def mean(field: str) -> float:
        return sum(rows * float(getattr(selection, field)) for rows, selection in parts) / total

    predicted, active, computed = mean("predicted_density"), mean("active_density"), mean("computed_density")
    return Selection(
        recall=computed / active if active else 1.0,
        precision=computed / predicted if predicted else 1.0,
        predicted_density=predicted,
        active_density=active,
        computed_density=computed,
        relative_error=mean("relative_error"),
    )


def mean_auroc(found: Array, active: NDArray[np.bool_]) -> float:
    """Area under the ROC curve of each neuron's scores (n, f), averaged over neurons that have both classes.

    By ranks (Mann and Whitney 1947): the share of (active, inactive) pairs of tokens that the scores order rightly,
    equal scores counting half. NaN where no neuron has both classes.
    """

    def areas(part: slice) -> NDArray[np.float64]:
        own = np.ascontiguousarray(found.T[part], np.float32)
        truth = np.ascontiguousarray(active.T[part])
        by_score, in_order = np.empty_like(own), np.empty_like(truth)
        sort_rows(own, by_score, own, truth, np.empty_like(own), in_order)
        return _areas(by_score, in_order)

    every = np.concatenate(over_parts(areas, found.shape[1], size=_NEURONS))
    known = every[~np.isnan(every)]
    return float(known.mean()) if len(known) else float("nan")


@numba.njit(nogil=True, cache=True)
def _areas(scores, active):  # type: ignore[no-untyped-def]
    """Area of each row, (f,), of scores that ascend along n; NaN for a row of one class."""
    f, n = scores.shape
    areas = np.empty(f)
    for i in range(f):
        negatives, positives, below, start = 0, 0, 0.0, 0
        while start < n:  # from one run of equal scores to the next
            end, others = start + 1, 1 - active[i, start]
            while end < n and scores[i, end] == scores[i, start]:
                others += 1 - active[i, end]
                end += 1
            here = end - start - others
            below += here * (negatives + 0.5 * others)
            negatives, positives, start = negatives + others, positives + here, end
        areas[i] = below / (positives * negatives) if positives and negatives else np.nan
    return areas


def energy_kept(found: Array, energy: Array, share: float) -> float:
    """Share of all energy (n, f) in the given share of pairs that have the highest scores (n, f)."""
    count = max(1, round(share * found.size))
    best = np.argpartition(found.ravel(), found.size - count)[found.size - count :]
    total = float(energy.sum(dtype=np.float64))
    return float(energy.ravel()[best].sum(dtype=np.float64)) / total if total else 1.0
