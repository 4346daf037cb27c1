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
from svdengine.kernels.formats import WEIGHT_FORMATS, padded_columns, stored_parts
from svdengine.kernels.lowbit import BLOCK
from svdengine.kernels.predictor import LayerPredictor, Predictor, largest_rank

_NEVER = np.float32(1e30)  # the threshold of neurons that only fill up a panel
_FIELDS = {"": DATA, ".scale": SCALE, ".min": MIN, ".row": ROW}
_DTYPES = {"I8": np.int8, "U8": np.uint8, "F16": np.float16, "F32": np.float32}


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
    return keep


def _place_layer(
    model: Model, layer: int, matrices: NDArray[np.int64], predictor: LayerPredictor, keep: list[NDArray]
) -> None:
    f, d, rank, factors = model.ffn, model.hidden, predictor.rank, predictor.factor_format
    if predictor.threshold.shape != (f,) or predictor.unit.shape != (f,):
        raise ValueError(f"layer {layer} of the predictor is not made for {f} neurons")
    most = largest_rank(d, f, predictor.relu)
    if not 0 <= rank <= most:
        raise ValueError(f"layer {layer} of the predictor has rank {rank}, which must lie in 0..{most}")
    model.predictor_minus_threshold[layer] = -_NEVER
    model.predictor_minus_threshold[layer, :f] = -predictor.threshold
    model.predictor_unit[layer, :f] = predictor.unit
    model.predictor_relu[layer] = predictor.relu
    if rank:
        code = WEIGHT_FORMATS.index(factors)
        parts = _checked(predictor.a, stored_parts(factors, f, rank))
        if factors == "q8":
            parts = {"": factor_panels(parts[""], parts[".scale"])}
        matrices[FACTOR_A, :BIAS_VECTOR] = _fields(parts, code, f, rank, keep)
        parts = _checked(predictor.b, stored_parts(factors, rank, d))
        matrices[FACTOR_B, :BIAS_VECTOR] = _fields(parts, code, rank, d, keep)
    if predictor.residual_bits:
        bits, c = predictor.residual_bits, padded_columns(d)
        parts = _checked(predictor.q, {"": ((f, c * bits // 8), "U8"), ".scale": ((f, c // BLOCK), "F16")})
        panels = residual_panels(parts[""], parts[".scale"], bits)
        matrices[RESIDUAL, :BIAS_VECTOR] = _fields({"": panels}, Q2 if bits == 2 else Q1, f, d, keep)


def _checked(parts: Mapping[str, NDArray], expected: Mapping[str, tuple[tuple[int, int], str]]) -> dict[str, NDArray]:
    """The parts, contiguous. Raises ValueError when one is missing or of another shape or type."""
    found = {}
    for suffix, (shape, dtype) in expected.items():
        array = parts.get(suffix)
        if array is None or array.shape != shape or array.dtype != _DTYPES[dtype]:
            what = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"found {what} for a part of the predictor, expected {dtype} {shape}")
        found[suffix] = np.ascontiguousarray(array)
    return found


def _fields(parts: Mapping[str, NDArray], code: int, rows: int, columns: int, keep: list[NDArray]) -> NDArray[np.int64]:
    """(BIAS_VECTOR,) addresses and sizes of one matrix."""
    fields = np.zeros(BIAS_VECTOR, np.int64)
    fields[FORMAT], fields[ROWS], fields[COLUMNS] = code, rows, padded_columns(columns)
    for suffix, array in parts.items():
        keep.append(array)
        fields[_FIELDS[suffix]] = array.ctypes.data
    return fields
