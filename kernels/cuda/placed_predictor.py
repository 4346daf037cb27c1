"""A predictor on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.joined_predictors import joined_layers
from svdengine.kernels.cuda.model import Matrix, as_words, place_matrix
from svdengine.kernels.predictor import FactorFormat, LayerPredictor, Predictor
from svdengine.models import ModelConfig


@dataclass(frozen=True)
class PlacedLayer:
    """One layer of a predictor (kernels/predictor.py) on the device; of a mixture of experts those of all blocks.

    They lie one below the other: ffn and rank stand for those of a block.
    """

    rank: int  # 0: no factors
    factor_format: FactorFormat
    residual_bits: int  # 0: no residual
    a: Matrix | None  # (ffn, rank)
    b: Matrix | None  # (rank, hidden)
    q_words: Array  # uint32: (ffn, padded hidden * bits / 32), as kernels/lowbit.py packs them
    q_scale: Array  # (ffn, padded hidden / 64) float16
    minus_threshold: Array  # (ffn,) float32: where the kernels' sums start
    unit: Array  # (ffn,) float32
    relu: bool


PlacedPredictor = tuple[PlacedLayer, ...]  # a predictor on the device, or nothing


def place_predictor(
    device: Device, config: ModelConfig, predictor: Predictor | None, orders: Sequence[NDArray[np.intp] | None] = ()
) -> PlacedPredictor:
    """Copy a predictor that fits to the device, its neurons in the `orders` of the layers' rows, or in the model's.

    Raises DeviceError for predictors of experts that are of several kinds (joined_predictors.py).
    """
    if predictor is None:
        return ()
    layers = zip(joined_layers(config, predictor), orders or [None] * config.layer_count, strict=True)
    return tuple(_place_layer(device, config, layer, order) for layer, order in layers)


def _place_layer(
    device: Device, config: ModelConfig, layer: LayerPredictor, order: NDArray[np.intp] | None
) -> PlacedLayer:
    rank, bits, nothing = layer.rank, layer.residual_bits, device.zeros(1, np.uint32)

    def ordered(array: NDArray) -> NDArray:
        return array if order is None else array[order]

    def factor(parts: Mapping[str, NDArray], columns: int) -> Matrix:
        return place_matrix(device, [parts], layer.factor_format, columns, device.zeros(len(parts[""]), np.float32))

    return PlacedLayer(
        rank,
        layer.factor_format,
        bits,
        factor({suffix: ordered(part) for suffix, part in layer.a.items()}, rank) if rank else None,
        factor(layer.b, config.hidden_size) if rank else None,
        device.upload(as_words(ordered(layer.q[""]))) if bits else nothing,
        device.upload(ordered(layer.q[".scale"])) if bits else nothing,
        device.upload(ordered(-np.asarray(layer.threshold, np.float32))),
        device.upload(ordered(np.asarray(layer.unit, np.float32))),
        layer.relu,
    )
