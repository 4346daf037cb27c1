"""The predictor of one layer exactly as the paper makes it (arXiv:2603.14110), and its ablations.

S is the Cholesky factor of the inputs' second moment, S S^T = X^T X, in float64. Of the singular value decomposition
U s V^T = W S, A = U_r s_r carries the singular values, and B = V_r^T S^-1 is solved back through S. No mean is taken
off, and no neuron is weighted. The first half of the tokens gives the second moment, the second half the thresholds
(converters/greedy_thresholds.py). Only the storage is ours: factors of 8 bits instead of float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.ffn_layer import FfnLayer, Neurons, missed_penalties, run_neurons
from svdengine.converters.greedy_thresholds import constant_threshold, greedy_thresholds
from svdengine.converters.predictors import gate_deviation
from svdengine.converters.statistics import LayerStatistics
from svdengine.converters.thresholds import make_sample
from svdengine.errors import ConversionError
from svdengine.kernels.formats import quantize
from svdengine.kernels.predictor import FactorFormat, LayerPredictor, scores

# naive: SVD of W alone, no thresholds; whitening: no thresholds; constant: one threshold a layer. The others say what a
# missed token costs: |act(gate)|, |act(gate) up|, or that times the norm of the neuron's down column, as in the paper.
Ablation = Literal["naive", "whitening", "constant", "gate", "gate-up", "full"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)

SHARE = 0.5  # s: the wanted share of the inactive neurons that is predicted inactive
_FIRST_LAYERS, _FIRST_LESS = 2, 0.1  # how many take a smaller share, and by how much

Array = NDArray[np.float32]


@dataclass(frozen=True)
class PaperOptions:
    """How the paper's predictor is made. Raises ConversionError for what cannot be."""

    share: float = SHARE
    ablation: Ablation = "full"
    factor_format: FactorFormat = "q8"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConversionError(f"s is a share above 0 and at most 1, found {self.share}")
        if self.ablation not in ABLATIONS:
            raise ConversionError(f"unknown ablation {self.ablation!r}; there are {', '.join(ABLATIONS)}")


def build_paper_predictor(
    index: int, layer: FfnLayer, x: Array, rank: int, options: PaperOptions, statistics: LayerStatistics
) -> LayerPredictor:
    """The calibrated predictor of layer `index` from its FFN inputs x (n, d), of which each half has its use.

    Raises ConversionError when there are too few tokens for a second moment that can be factored.
    """
    half = len(x) // 2
    a, b = paper_factors(layer.gate, None if options.ablation == "naive" else x[:half], rank, index)
    parts = quantize(a.astype(np.float32), options.factor_format), quantize(b.astype(np.float32), options.factor_format)
    unit, zeros = gate_deviation(layer.gate, statistics), np.zeros(len(layer.gate), np.float32)
    predictor = LayerPredictor(rank, options.factor_format, 0, *parts, {}, zeros, unit)
    threshold = _thresholds(index, layer, x[half:], predictor, options)
    return LayerPredictor(rank, options.factor_format, 0, *parts, {}, threshold, unit)


def paper_factors(
    gate: Array, x: Array | None, rank: int, index: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A (f, rank) and B (rank, d) in float64 for a gate (f, d) and inputs x (n, d); without x, of the gate alone."""
    w = gate.astype(np.float64)
    if x is None:
        u, s, v = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank] * s[:rank], v[:rank]
    rows = x.astype(np.float64)
    try:
        root = np.linalg.cholesky(rows.T @ rows)
    except np.linalg.LinAlgError as error:
        raise ConversionError(
            f"layer {index}: the second moment of {len(x)} tokens has no Cholesky factor, which the paper's whitening"
            f" needs: that takes more than {gate.shape[1]} tokens in half of the calibration text, with every column of"
            " the FFN's input in use; give more text, raise --tokens, or use --ablation naive"
        ) from error
    del rows
    u, s, v = np.linalg.svd(w @ root, full_matrices=False)
    return u[:, :rank] * s[:rank], np.linalg.solve(root.T, v[:rank].T).T


def _thresholds(index: int, layer: FfnLayer, x: Array, predictor: LayerPredictor, options: PaperOptions) -> Array:
    if options.ablation in ("naive", "whitening"):
        return -layer.offset.astype(np.float32)
    truth = run_neurons(layer, x)
    less = _FIRST_LESS if index < _FIRST_LAYERS else 0.0
    share = max(0.0, options.share - less) * float(1 - truth.active.mean(dtype=np.float64))
    if options.ablation == "constant":
        return constant_threshold(scores(predictor, x).T, share)
    penalties = missed_penalties(layer, x, options.ablation)
    sample = make_sample(scores(predictor, x), Neurons(truth.gates, truth.active, penalties))
    return greedy_thresholds(sample.scores, sample.energy, share)
