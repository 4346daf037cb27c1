"""Putting a predictor where compiled code reads it: q8 factors and residuals in panels (score.py), others as stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.matrix import BIAS_VECTOR, PART_FIELDS, RESIDUALS, check_codes, fields_of, matrix_fields
from svdengine.kernels.cpu.model import DOWN, FACTOR_A, FACTOR_B, GATE, LAYER_MATRICES, RESIDUAL, UP, Model
from svdengine.kernels.cpu.score_panels import factor_panels, residual_panels
from svdengine.kernels.formats import Parts
from svdengine.kernels.predictor import LayerPredictor, Predictor

_BLOCK = {"gate": GATE, "up": UP, "down": DOWN, "down_T": DOWN}
_NEVER = np.float32(1e30)  # the threshold of neurons that only fill up a panel


def place_predictor(model: Model, predictor: Predictor | None) -> list[NDArray]:
    """Put a predictor that fits the model in place, or take it out. Returns the arrays that must outlive it."""
    keep: list[NDArray] = []
    for layer in range(model.blocks):
        matrices = model.matrices[layer * LAYER_MATRICES : (layer + 1) * LAYER_MATRICES]
        matrices[[FACTOR_A, FACTOR_B, RESIDUAL]] = 0
        if predictor is not None:
            _place_layer(model, layer, matrices, predictor.layers[layer], keep)
            check_codes(matrices)
    return keep


def place_block(model: Model, block: int, arrays: Mapping[str, NDArray]) -> None:
    """Read the matrices of an FFN block in other arrays, stored parts by name, which hold the same and outlive it."""
    for name, array in arrays.items():
        matrix, dot, part = name.partition(".")
        model.matrices[block * LAYER_MATRICES + _BLOCK[matrix], PART_FIELDS[dot + part]] = array.ctypes.data


def _place_layer(
    model: Model, layer: int, matrices: NDArray[np.int64], predictor: LayerPredictor, keep: list[NDArray]
) -> None:
    f, d, rank, factors = model.ffn, model.hidden, predictor.rank, predictor.factor_format
    model.predictor_minus_threshold[layer] = -_NEVER
    model.predictor_minus_threshold[layer, :f] = -predictor.threshold
    model.predictor_unit[layer, :f] = predictor.unit
    model.predictor_relu[layer] = predictor.relu
    if rank:
        a = {"": factor_panels(predictor.a[""], predictor.a[".scale"])} if factors == "q8" else predictor.a
        matrices[FACTOR_A, :BIAS_VECTOR] = matrix_fields(_kept(a, keep), factors, f, rank)[0]
        matrices[FACTOR_B, :BIAS_VECTOR] = matrix_fields(_kept(predictor.b, keep), factors, rank, d)[0]
    if predictor.residual_bits:
        bits = predictor.residual_bits
        panels = {"": residual_panels(predictor.q[""], predictor.q[".scale"], bits)}
        matrices[RESIDUAL, :BIAS_VECTOR] = fields_of(_kept(panels, keep), RESIDUALS[bits], f, d)[0]


def _kept(parts: Mapping[str, NDArray], keep: list[NDArray]) -> Parts:
    """The parts, contiguous, which `keep` holds from now on."""
    contiguous = {suffix: np.ascontiguousarray(part) for suffix, part in parts.items()}
    keep.extend(contiguous.values())
    return contiguous
