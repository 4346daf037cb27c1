"""The predictors of a layer's FFN blocks as one, for mixtures of experts: one below the other, all of one shape.

Calibration chooses rank and bits for each expert, and kernels want the same in all of a layer. So ranks are filled up
with zeros, and residuals of fewer bits written in those of more, which have the same levels: scores stay what they
were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.formats import STORED_DTYPES, Parts, WeightFormat, padded_columns, stored_parts
from svdengine.kernels.lowbit import BLOCK, pack_lowbit
from svdengine.kernels.predictor import FactorFormat, LayerPredictor, Predictor
from svdengine.models import ModelConfig


def joined_layers(config: ModelConfig, predictor: Predictor) -> tuple[LayerPredictor, ...]:
    """One predictor a layer, with ffn_size neurons, and as many hidden values, for each of its blocks.

    Raises DeviceError where experts of a layer have predictors that cannot be written alike: with and without ReLU, or
    with factors of two formats.
    """
    if not config.expert_count:
        return predictor.layers
    found = []
    for layer in range(config.layer_count):
        blocks = config.blocks_of(layer)
        try:
            found.append(joined(predictor.layers[blocks.start : blocks.stop], config.hidden_size))
        except ValueError as error:
            raise DeviceError(f"layer {layer} of the predictor: {error}") from error
    return tuple(found)


def joined(blocks: Sequence[LayerPredictor], hidden_size: int) -> LayerPredictor:
    """The predictors of blocks one below the other. Raises ValueError where they cannot be written alike."""
    kinds = {(block.factor_format, block.relu) for block in blocks if block.rank}
    if len(kinds) > 1:
        raise ValueError(
            f"its experts have factors of {len(kinds)} kinds, {_named(kinds)}; expected one. Calibrate them together,"
            " or use --device cpu"
        )
    factor_format, relu = next(iter(kinds), (blocks[0].factor_format, False))
    rank, bits = max(block.rank for block in blocks), max(block.residual_bits for block in blocks)
    f = len(blocks[0].threshold)
    return LayerPredictor(
        rank=rank,
        factor_format=factor_format,
        residual_bits=bits,
        a=_stacked([_filled(block.a, factor_format, f, rank) for block in blocks]) if rank else {},
        b=_stacked([_filled(block.b, factor_format, rank, hidden_size) for block in blocks]) if rank else {},
        q=_stacked([_in_bits(block, bits, f, hidden_size) for block in blocks]) if bits else {},
        threshold=np.concatenate([block.threshold for block in blocks]),
        unit=np.concatenate([block.unit for block in blocks]),
        relu=relu,
    )


def joined_bytes(config: ModelConfig, predictor: Predictor) -> int:
    """Bytes that the predictors take when they are written alike, at most."""
    total = 0
    for layer in range(config.layer_count):
        blocks = config.blocks_of(layer)
        found = predictor.layers[blocks.start : blocks.stop]
        rank, bits = max(block.rank for block in found), max(block.residual_bits for block in found)
        for factor in {block.factor_format for block in found if block.rank}:
            for rows, columns in ((config.ffn_size, rank), (rank, config.hidden_size)):
                parts = stored_parts(factor, rows, columns)
                total += len(found) * sum(_bytes(shape, dtype) for shape, dtype in parts.values())
        columns = padded_columns(config.hidden_size)
        total += len(found) * config.ffn_size * (8 + (columns * bits // 8 + 2 * (columns // BLOCK) if bits else 0))
    return total


def _bytes(shape: tuple[int, int], dtype: str) -> int:
    return shape[0] * shape[1] * np.dtype(STORED_DTYPES[dtype]).itemsize


def _named(kinds: set[tuple[FactorFormat, bool]]) -> str:
    return " and ".join(sorted(f"{name} with{'' if relu else 'out'} ReLU" for name, relu in kinds))


def _stacked(blocks: Sequence[Parts]) -> Parts:
    return {suffix: np.concatenate([parts[suffix] for parts in blocks]) for suffix in blocks[0]}


def _filled(parts: Parts, weight_format: WeightFormat, rows: int, columns: int) -> Parts:
    """A factor in a (rows, columns) matrix that is zero elsewhere."""
    filled: Parts = {}
    for suffix, (shape, dtype) in stored_parts(weight_format, rows, columns).items():
        filled[suffix] = np.zeros(shape, STORED_DTYPES[dtype])
        if suffix in parts:
            found = parts[suffix]
            filled[suffix][: found.shape[0], : found.shape[1]] = found
    return filled


def _in_bits(block: LayerPredictor, bits: int, f: int, hidden_size: int) -> Parts:
    """A residual in so many bits, not fewer than it has."""
    if block.residual_bits == bits:
        return block.q
    columns = padded_columns(hidden_size)
    if not block.residual_bits:
        scale: NDArray[np.float16] = np.zeros((f, columns // BLOCK), np.float16)
        return pack_lowbit(np.zeros((f, columns), np.uint8), scale, bits)
    code = np.unpackbits(block.q[""], axis=1, bitorder="little")  # levels -0.5 and 0.5: the middle ones of two bits
    return pack_lowbit(code + np.uint8(1), block.q[".scale"], bits)
