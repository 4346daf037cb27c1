"""Build the predictor of one layer from its gate weights and the statistics of its inputs, without training.

    svd         truncation-aware SVD of the gate (converters/low_rank.py)
    svd-naive   SVD of the gate alone, which knows nothing of the inputs
    lowbit      the gate in one or two bits a weight
    svd+lowbit  a low-rank part, and a low-bit copy of what it leaves

Thresholds start where a score estimates the gate itself. converters/thresholds.py moves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.ffn_layer import FfnLayer
from svdengine.converters.low_rank import leading_directions
from svdengine.converters.lowbit_fit import fit_lowbit
from svdengine.converters.statistics import LayerStatistics
from svdengine.kernels.formats import Parts, dequantize, quantize
from svdengine.kernels.lowbit import dequantize_lowbit
from svdengine.kernels.predictor import FactorFormat, LayerPredictor

PredictorKind = Literal["svd", "svd-naive", "lowbit", "svd+lowbit"]
PREDICTOR_KINDS: tuple[PredictorKind, ...] = get_args(PredictorKind)

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Basis:
    """Leading directions of a gate's outputs, from which predictors of any smaller rank are cut."""

    directions: Array  # (f, most rank) orthonormal
    weights: Array  # (f,) that the gate's rows were multiplied by


def check_shape(kind: str, rank: int, bits: int, hidden_size: int) -> None:
    """Raise ValueError when a predictor of this kind cannot have this rank and this many bits."""
    if kind not in PREDICTOR_KINDS:
        raise ValueError(f"unknown predictor {kind!r}; there are {', '.join(PREDICTOR_KINDS)}")
    low_rank, low_bit = kind != "lowbit", kind in ("lowbit", "svd+lowbit")
    if low_rank and not 1 <= rank <= hidden_size:
        raise ValueError(f"the rank of {kind} must lie in 1..{hidden_size}, found {rank}")
    if low_bit and bits not in (1, 2):
        raise ValueError(f"{kind} has 1 or 2 bits a weight, found {bits}")


def sampled_deviation(gates: Array) -> Array:
    """As `gate_deviation`, from gates (n, f) of sampled tokens: with many columns this costs far less."""
    return _above_zero(gates.std(0, dtype=np.float64).astype(np.float32))


def gate_deviation(gate: Array, statistics: LayerStatistics) -> Array:
    """Standard deviation of each neuron's pre-activation, (f,); where it would vanish, a small positive number."""
    covariance = statistics.covariance.astype(np.float32)
    variance = np.maximum(((gate @ covariance) * gate).sum(1), 0)
    return _above_zero(np.sqrt(variance))


def _above_zero(deviation: Array) -> Array:
    floor = 1e-4 * float(deviation.mean()) or 1e-6
    return np.maximum(deviation, np.float32(floor)).astype(np.float32)


def find_basis(kind: str, gate: Array, statistics: LayerStatistics, rank: int, deviation: Array | None = None) -> Basis:
    """The directions that a predictor of this kind and of at most this rank projects on.

    Rows are weighted by 1 / their standard deviation, so that every neuron's error counts alike in its own units.
    `deviation` is that of `gate_deviation`, where it is known.
    """
    if kind == "svd-naive":
        return Basis(leading_directions(gate, None, rank), np.ones(len(gate), np.float32))
    weights = np.float32(1) / (gate_deviation(gate, statistics) if deviation is None else deviation)
    return Basis(leading_directions(gate * weights[:, None], statistics.covariance, rank), weights)


def build_predictor(
    kind: str,
    layer: FfnLayer,
    statistics: LayerStatistics,
    rank: int,
    bits: int,
    factor_format: FactorFormat = "q8",
    basis: Basis | None = None,
) -> LayerPredictor:
    """A predictor before calibration. `basis` saves its computation, when it is known to at least this rank.

    Each part is fitted to what the stored parts before it leave, and the error that is left at the mean input goes
    into the thresholds. Raises ValueError when rank or bits make no sense for the kind.
    """
    gate = layer.gate
    check_shape(kind, rank, bits, gate.shape[1])
    rank = 0 if kind == "lowbit" else rank
    bits = bits if kind in ("lowbit", "svd+lowbit") else 0
    if rank and basis is None:
        basis = find_basis(kind, gate, statistics, rank)
    left = gate
    a: Parts = {}
    b: Parts = {}
    q: Parts = {}
    if rank and basis is not None:
        a, b = _factors(gate, basis, rank, factor_format)
        left = gate - dequantize(a, factor_format, rank) @ dequantize(b, factor_format, gate.shape[1])
    if bits:
        q = fit_lowbit(left, statistics.covariance, bits)
        left = left - dequantize_lowbit(q, bits, gate.shape[1])
    threshold = -layer.offset.astype(np.float32)
    if kind != "svd-naive":
        threshold = threshold - left @ statistics.mean.astype(np.float32)
    if rank and basis is not None and kind != "svd-naive":
        unit = np.float32(1) / basis.weights
    else:
        unit = gate_deviation(gate, statistics)
    return LayerPredictor(rank, factor_format, bits, a, b, q, threshold, unit)


def _factors(gate: Array, basis: Basis, rank: int, factor_format: FactorFormat) -> tuple[Parts, Parts]:
    """A = D^-1 U_r and B = U_r^T D W."""
    u = basis.directions[:, :rank]
    b = quantize(u.T @ (gate * basis.weights[:, None]), factor_format)
    return quantize(u / basis.weights[:, None], factor_format), b
