"""Putting a predictor where compiled code reads it: q8 factors and residuals in panels (score.py), others as stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.model import (
    BIAS_VECTOR,
    COLUMNS,
    DATA,
    FACTOR_A,
    FACTOR_B,
    FORMAT,
    LAYER_MATRICES,
    MIN,
    Q1,
    Q2,
    RESIDUAL,
    ROW,
    ROWS,
    SCALE,
    Model,
)
from svdengine.kernels.cpu.score import factor_panels, residual_panels
from svdengine.kernels.formats import WEIGHT_FORMATS, padded_columns
from svdengine.kernels.predictor import LayerPredictor, Predictor

_NEVER = np.float32(1e30)  # the threshold of neurons that only fill up a panel
_FIELDS = {"": DATA, ".scale": SCALE, ".min": MIN, ".row": ROW}


def place_predictor(model: Model, predictor: Predictor | None) -> list[NDArray]:
    """Put a predictor that fits the model in place, or take it out. Returns the arrays that must outlive it."""
    keep: list[NDArray] = []
    for layer in range(model.layers):
        matrices = model.matrices[layer * LAYER_MATRICES : (layer + 1) * LAYER_MATRICES]
        matrices[[FACTOR_A, FACTOR_B, RESIDUAL]] = 0
        if predictor is not None:
            _place_layer(model, layer, matrices, predictor.layers[layer], keep)
    return keep


def _place_layer(
    model: Model, layer: int, matrices: NDArray[np.int64], predictor: LayerPredictor, keep: list[NDArray]
) -> None:
    f, d, rank, factors = model.ffn, model.hidden, predictor.rank, predictor.factor_format
    model.predictor_minus_threshold[layer] = -_NEVER
    model.predictor_minus_threshold[layer, :f] = -predictor.threshold
    model.predictor_unit[layer, :f] = predictor.unit
    model.predictor_relu[layer] = predictor.relu
    if rank:
        code = WEIGHT_FORMATS.index(factors)
        parts = predictor.a
        if factors == "q8":
            parts = {"": factor_panels(parts[""], parts[".scale"])}
        matrices[FACTOR_A, :BIAS_VECTOR] = _fields(parts, code, f, rank, keep)
        matrices[FACTOR_B, :BIAS_VECTOR] = _fields(predictor.b, code, rank, d, keep)
    if predictor.residual_bits:
        bits = predictor.residual_bits
        panels = residual_panels(predictor.q[""], predictor.q[".scale"], bits)
        matrices[RESIDUAL, :BIAS_VECTOR] = _fields({"": panels}, Q2 if bits == 2 else Q1, f, d, keep)


def _fields(parts: Mapping[str, NDArray], code: int, rows: int, columns: int, keep: list[NDArray]) -> NDArray[np.int64]:
    """(BIAS_VECTOR,) addresses and sizes of one matrix."""
    fields = np.zeros(BIAS_VECTOR, np.int64)
    fields[FORMAT], fields[ROWS], fields[COLUMNS] = code, rows, padded_columns(columns)
    for suffix, part in parts.items():
        array = np.ascontiguousarray(part)
        keep.append(array)
        fields[_FIELDS[suffix]] = array.ctypes.data
    return fields
