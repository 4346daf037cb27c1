"""Choose each layer's kind, rank and bits: whatever makes a token read the fewest bytes at the same error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.ffn_layer import FfnLayer, Neurons
from svdengine.converters.predictors import PREDICTOR_KINDS, Basis, build_predictor, check_shape, find_basis
from svdengine.converters.statistics import LayerStatistics
from svdengine.converters.thresholds import calibrate_thresholds, make_sample
from svdengine.kernels.predictor import FactorFormat, LayerPredictor, layer_predictor_bytes, scores
from svdengine.models.config import ModelConfig

AUTO = "auto"
TYPICAL_ERROR = 1e-4  # of a layer, at which candidates are compared: about a tenth of a percent of perplexity
_ROWS = 2048  # of the sample that candidates are tried on
_SVD_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)  # of d: the ranks that are tried
_MIXED_SHARES = (1 / 32, 1 / 16, 1 / 8)

Tokens = tuple[NDArray[np.float32], Neurons]  # FFN inputs (n, d), and what the neurons do on them


@dataclass(frozen=True)
class PredictorShape:
    """What fixes the size of a predictor."""

    kind: str
    rank: int
    bits: int


def candidate_shapes(kind: str, rank: int | None, bits: int | None, config: ModelConfig) -> list[PredictorShape]:
    """The shapes that a kind may have; `rank` and `bits` fix what they are given for.

    Raises ValueError on an unknown kind, or on a rank or bits that it cannot have.
    """
    d = config.hidden_size
    kinds = (*(k for k in PREDICTOR_KINDS if k != "svd-naive"),) if kind == AUTO else (kind,)
    shapes = []
    for one in kinds:
        shares = _MIXED_SHARES if one == "svd+lowbit" else _SVD_SHARES
        ranks = [0] if one == "lowbit" else [rank] if rank is not None else _ranks(shares, config)
        widths = [0] if one in ("svd", "svd-naive") else [bits] if bits is not None else [1, 2]
        shapes += [PredictorShape(one, r, b) for r in ranks for b in widths]
    for shape in shapes or [PredictorShape(kind, rank or 0, bits or 0)]:
        check_shape(shape.kind, shape.rank, shape.bits, min(d, config.ffn_size))
    return shapes


def build_candidate(
    shape: PredictorShape,
    layer: FfnLayer,
    statistics: LayerStatistics,
    factor_format: FactorFormat,
    basis: Basis | None = None,
) -> LayerPredictor:
    """The predictor of a shape, before calibration."""
    return build_predictor(shape.kind, layer, statistics, shape.rank, shape.bits, factor_format, basis)


def choose_shape(
    shapes: Sequence[PredictorShape],
    layer: FfnLayer,
    statistics: LayerStatistics,
    fit: Tokens,
    held_out: Tokens,
    factor_format: FactorFormat,
) -> PredictorShape:
    """The shape with the fewest modelled bytes a token at the typical error, in this layer."""
    fit, held_out = first_rows(fit), first_rows(held_out)
    bases = {
        kind: find_basis(kind, layer.gate, statistics, max(s.rank for s in shapes if s.kind == kind))
        for kind in {s.kind for s in shapes if s.rank}
    }
    traffic = []
    for shape in shapes:
        predictor = build_candidate(shape, layer, statistics, factor_format, bases.get(shape.kind))
        traffic.append(modelled_bytes(predictor, layer, fit, held_out, TYPICAL_ERROR))
    return shapes[int(np.argmin(traffic))]


def modelled_bytes(predictor: LayerPredictor, layer: FfnLayer, fit: Tokens, held_out: Tokens, error: float) -> float:
    """Bytes that one token reads in this layer's FFN, with the thresholds that lose the share `error` of its energy."""
    samples = [make_sample(scores(predictor, x), truth) for x, truth in (fit, held_out)]
    table = calibrate_thresholds("error", samples[0], samples[1], layer.row_bytes)
    level, levels = table.level_of_error(error), np.arange(len(table.error))
    predicted, computed = (float(np.interp(level, levels, share)) for share in (table.predicted, table.computed))
    return layer_predictor_bytes(predictor) + layer.read_bytes(predicted, computed)


def _ranks(shares: Sequence[float], config: ModelConfig) -> list[int]:
    """Multiples of 64, which factors are padded to, nearest to the shares of d; all of d in a narrower model."""
    d, most = config.hidden_size, min(config.hidden_size, config.ffn_size)
    return sorted({min(max(64 * round(share * d / 64), 64), most) for share in shares})


def first_rows(tokens: Tokens) -> Tokens:
    """As many tokens as candidates are tried on."""
    x, truth = tokens
    return x[:_ROWS], Neurons(truth.gates[:_ROWS], truth.active[:_ROWS], truth.energy[:_ROWS])
