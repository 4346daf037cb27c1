"""Putting a predictor where compiled code reads it: q8 factors and residuals in panels (score.py), others as stored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.formats.dispatch import check_codes
from svdengine.kernels.cpu.matrix import (
    BIAS_VECTOR,
    RESIDUALS,
    fields_of,
    matrix_fields,
)
from svdengine.kernels.cpu.model import FACTOR_A, FACTOR_B, LAYER_MATRICES, RESIDUAL, Model
from svdengine.kernels.cpu.score import factor_panels, residual_panels
from svdengine.kernels.formats import STORED_DTYPES, padded_columns, stored_parts
from svdengine.kernels.lowbit import BLOCK
from svdengine.kernels.predictor import LayerPredictor, Predictor, largest_rank

_NEVER = np.float32(-1e30)  # the threshold of neurons that only fill up a panel


def place_predictor(model: Model, predictor: Predictor | None) -> list[NDArray]:
    """Put a predictor in place, or take it out. Returns the arrays that must outlive it.

    Raises ValueError when it does not fit the model.
    """
    keep: list[NDArray] = []
    if predictor is not None and len(predictor.layers) != model.layers:
        raise ValueError(f"the predictor has {len(predictor.layers)} layers, the model {model.layers}")
    for layer in range(model.layers):
        matrices = model.matrices[layer * LAYER_MATRICES : (layer + 1) * LAYER_MATRICES]
        matrices[[FACTOR_A, FACTOR_B, RESIDUAL]] = 0
        if predictor is not None:
            _place_layer(model, layer, matrices, predictor.layers[layer], keep)
            check_codes(matrices)
    return keep


def _place_layer(
    model: Model, layer: int, matrices: NDArray[np.int64], predictor: LayerPredictor, keep: list[NDArray]
) -> None:
    f, d, rank, factors = model.ffn, model.hidden, predictor.rank, predictor.factor_format
    if predictor.bias.shape != (f,) or predictor.unit.shape != (f,):
        raise ValueError(f"layer {layer} of the predictor is not made for {f} neurons")
    most = largest_rank(d, f, predictor.relu)
    if not 0 <= rank <= most:
        raise ValueError(f"layer {layer} of the predictor has rank {rank}, which must lie in 0..{most}")
    model.predictor_bias[layer] = _NEVER
    model.predictor_bias[layer, :f], model.predictor_unit[layer, :f] = predictor.bias, predictor.unit
    model.predictor_relu[layer] = predictor.relu
    if rank:
        parts = _checked(predictor.a, stored_parts(factors, f, rank))
        if factors == "q8":
            parts = {"": factor_panels(parts[""], parts[".scale"])}
        matrices[FACTOR_A, :BIAS_VECTOR] = matrix_fields(parts, factors, f, rank)[0]
        keep += parts.values()
        parts = _checked(predictor.b, stored_parts(factors, rank, d))
        matrices[FACTOR_B, :BIAS_VECTOR] = matrix_fields(parts, factors, rank, d)[0]
        keep += parts.values()
    if predictor.residual_bits:
        bits, c = predictor.residual_bits, padded_columns(d)
        parts = _checked(predictor.q, {"": ((f, c * bits // 8), "U8"), ".scale": ((f, c // BLOCK), "F16")})
        panels = residual_panels(parts[""], parts[".scale"], bits)
        matrices[RESIDUAL, :BIAS_VECTOR] = fields_of({"": panels}, RESIDUALS[bits], f, d)[0]
        keep.append(panels)


def _checked(parts: Mapping[str, NDArray], expected: Mapping[str, tuple[tuple[int, int], str]]) -> dict[str, NDArray]:
    """The parts, contiguous. Raises ValueError when one is missing or of another shape or type."""
    found = {}
    for suffix, (shape, dtype) in expected.items():
        array = parts.get(suffix)
        if array is None or array.shape != shape or array.dtype != STORED_DTYPES[dtype]:
            what = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"found {what} for a part of the predictor, expected {dtype} {shape}")
        found[suffix] = np.ascontiguousarray(array)
    return found
