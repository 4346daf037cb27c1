"""What a conversion will come to, told from the config alone, before any of the work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svdengine.converters.calibration import find_shapes
from svdengine.converters.calibration_size import calibration_size
from svdengine.converters.predictor_choice import PredictorShape
from svdengine.files.model_writer import weight_bytes
from svdengine.files.predictor_file import why_not_sparse
from svdengine.kernels.formats import WeightFormat, format_named, padded_columns
from svdengine.kernels.lowbit import BLOCK
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs
from svdengine.scheduling.block_pool import context_limit, kv_pool_bytes_per_token

_PROGRAM_BYTES = 200 << 20  # Python, its libraries, the compiled kernels and a step's workspace
_PREDICTOR_BITS = 2.2  # a weight of the gate, of the default predictor: two bits, and scales
_ABOUT_PREDICTOR = 4096  # bytes of a layer's share of header and description

# Seconds of one core, for each parameter and for each product of a fit: of a model with 135 M parameters, which writes
# some of its text itself, and of Llama-2-7B's shape (BENCHMARKS.md, "Calibrating a 7B model").
_SMALL = (9e-7, 1.5e-9)
_LARGE = (1.4e-7, 1.1e-10)


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes, times in seconds."""

    parameters: int
    file_bytes: int  # with the predictor
    memory_bytes: int  # to run it with a KV cache of one default context
    sparse: bool
    why: str  # it runs sparse, or does not
    calibration_seconds: float | None  # roughly; None: there is nothing to calibrate


def forecast(
    config: ModelConfig,
    dtype: WeightFormat,
    embedding_dtype: WeightFormat | None = None,
    down_dtype: WeightFormat | None = None,
    *,
    predictor: bool = True,
    cores: int = 1,
    bits: float | None = None,
    size: int | None = None,
) -> Forecast:
    """What a model of this config becomes; `predictor`: one is made where the model has zeros to skip.

    bits: of a weight, on average, and size: of the whole file, where formats are chosen for either.
    """
    weights = weight_bytes(config, dtype, embedding_dtype, down_dtype)
    parameters = sum(math.prod(spec.shape) for spec in tensor_specs(config))
    if bits is not None:
        weights = min(weights, int(parameters * bits / 8))
    made = predictor and config.sparse_ffn
    gates = config.ffn_blocks * config.ffn_size * config.hidden_size
    file_bytes = weights + (int(gates * _PREDICTOR_BITS / 8) if made else 0)
    file_bytes = min(file_bytes, size or file_bytes)
    kv_bytes = context_limit(config, None) * kv_pool_bytes_per_token(config)
    return Forecast(
        parameters=parameters,
        file_bytes=file_bytes,
        memory_bytes=file_bytes + kv_bytes + _PROGRAM_BYTES,
        sparse=config.sparse_ffn,
        why=f"its FFNs have the activation {config.activation}" if config.sparse_ffn else why_not_sparse(config),
        calibration_seconds=calibration_seconds(config, cores) if made else None,
    )


def predictor_bytes(config: ModelConfig, kind: str, rank: int | None, thresholds: str) -> int:
    """Bytes that a predictor of this kind takes in a file, at most, as `convert` makes it.

    Raises ConversionError on one that there cannot be.
    """
    rows, columns = config.ffn_size, config.hidden_size

    def layer(shape: PredictorShape) -> int:
        factors = format_named("q8")
        size = rows * (4 + 4 + 2)  # threshold, unit, frequency
        if shape.rank:
            size += factors.stored_bytes(rows, shape.rank) + factors.stored_bytes(shape.rank, columns)
        if shape.bits:
            padded = padded_columns(columns)
            size += rows * (padded * shape.bits // 8 + padded // BLOCK * 2)
        return size

    shapes = find_shapes(config, kind, rank, 2, thresholds)
    return config.ffn_blocks * (max(map(layer, shapes)) + _ABOUT_PREDICTOR)


def calibration_seconds(config: ModelConfig, cores: int) -> float:
    """Roughly how long the default calibration takes.

    A small model writes some of the text and reads all of it a few times, a large one reads less; each layer's fit
    multiplies its gate with the covariance of the inputs.
    """
    per_parameter, per_product = _SMALL if calibration_size(config).written else _LARGE
    parameters = sum(math.prod(spec.shape) for spec in tensor_specs(config))
    fits = config.ffn_blocks * config.ffn_size * config.hidden_size**2
    return (parameters * per_parameter + fits * per_product) / cores
