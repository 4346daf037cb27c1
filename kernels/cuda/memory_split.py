"""What lies in the GPU's memory and what in the host's, decided before anything is copied.

Everything lies on the GPU where it fits. Where it does not, the words of some FFN neurons' rows stay in page-locked
host memory, which kernels read over the bus where they lie: those of the neurons that are predicted least often, so
that a token reads as little over the bus as the GPU's memory allows (the split of PowerInfer, arXiv:2312.12456).
Scales, biases and the predictor are small, are read in small pieces, and stay on the GPU.

Of a mixture of experts it is the experts of whole layers: a token reads only those of them that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.joined_predictors import joined_bytes
from svdengine.kernels.formats import PART_SUFFIXES
from svdengine.kernels.predictor import Predictor, layer_arrays
from svdengine.models import ModelConfig, tensor_specs

RESERVE = 256 << 20  # bytes that are left to the driver, the library and recorded graphs
_GRANULE = 2 << 20  # bytes that the driver gives at least; small arrays share them
_FFN = ("gate", "up", "down_T", "down")
_GIB = 2.0**30


@dataclass(frozen=True)
class LayerSplit:
    """Where the neurons of a layer lie: the first `hot` in this order on the GPU, the others in host memory.

    Of a mixture of experts they are those of each expert, and lie all in one place.
    """

    order: NDArray[np.intp]  # (f,) the model's neurons, the most frequent first
    hot: int


@dataclass(frozen=True)
class MemorySplit:
    """Bytes that a model takes, by where they lie and what for."""

    weights: int  # on the GPU, with the predictor
    cache: int  # KV blocks, on the GPU
    buffers: int  # of steps, on the GPU
    host: int  # weights in host memory
    splits: tuple[LayerSplit, ...]  # of each layer; none where all weights lie on the GPU

    @property
    def device(self) -> int:
        """Bytes on the GPU."""
        return self.weights + self.cache + self.buffers

    def describe(self) -> str:
        """One line on where the weights lie."""
        line = f"{self.weights / _GIB:.2f} GiB of weights on the GPU"
        if not self.splits:
            return line
        shares = [split.hot / len(split.order) for split in self.splits]
        return (
            f"{line}, {self.host / _GIB:.2f} GiB in host memory:"
            f" {100 * sum(shares) / len(shares):.0f} % of the FFN neurons are on the GPU"
        )


def split_memory(
    config: ModelConfig,
    arrays: Mapping[str, NDArray],
    predictor: Predictor | None,
    *,
    cache: int,
    buffers: int,
    available: int,
    host_available: int | None = None,
) -> MemorySplit:
    """Where a model of stored `arrays` lies that may take `available` bytes on the GPU, KV cache and buffers included.

    host_available: bytes of host memory that may be used; None: any. Raises DeviceError, with how much is missing.
    """
    names = [spec.name + suffix for spec in tensor_specs(config) for suffix in PART_SUFFIXES]
    weights = sum(arrays[name].nbytes for name in names if name in arrays) + _predictor_bytes(config, predictor)
    rows = sum(arrays[name].nbytes for name in _FFN if name in arrays)
    beside = buffers + RESERVE + _unused(config, arrays, predictor, cache)
    room = available - (weights - rows) - cache - beside
    if room < 0:
        raise DeviceError(
            f"the model needs {(available - room) / _GIB:.2f} GiB on the GPU without any FFN rows"
            f" ({(weights - rows) / _GIB:.2f} weights, {cache / _GIB:.2f} KV cache, {beside / _GIB:.2f} buffers),"
            f" {-room / _GIB:.2f} GiB more than it may take; use a smaller context, a smaller weight format,"
            " or --device cpu"
        )
    if rows <= room:
        return MemorySplit(weights, cache, buffers, 0, ())
    if config.expert_count:
        splits = split_mixture(config, rows, room)
        held = sum(len(config.blocks_of(i)) * rows // config.ffn_blocks for i, split in enumerate(splits) if split.hot)
    else:
        layer = rows // config.layer_count
        splits = split_layers(_frequencies(config, predictor), room * config.ffn_size // layer)
        held = sum(_hot_bytes(config, arrays, split.hot) for split in splits)
    if host_available is not None and rows - held > host_available:
        raise DeviceError(
            f"{(rows - held) / _GIB:.2f} GiB of weights do not fit into the GPU's memory, and the host's has"
            f" {host_available / _GIB:.2f} GiB; use a smaller weight format or --device cpu"
        )
    return MemorySplit(weights - (rows - held), cache, buffers, rows - held, splits)


def split_mixture(config: ModelConfig, rows: int, room: int) -> tuple[LayerSplit, ...]:
    """The first layers' experts on the GPU, as far as there is room for those of `rows` bytes in all layers."""
    order, splits = np.arange(config.ffn_size), []
    for layer in range(config.layer_count):
        room -= len(config.blocks_of(layer)) * rows // config.ffn_blocks
        splits.append(LayerSplit(order, config.ffn_size if room >= 0 else 0))
    return tuple(splits)


def split_layers(frequencies: NDArray[np.float32], count: int) -> tuple[LayerSplit, ...]:
    """Choose the `count` most frequent neurons of all layers, for frequencies (layers, f).

    All neurons take the same bytes, so these are the ones that leave the fewest to be read over the bus. Of equally
    frequent ones each layer gets as many.
    """
    layers = len(frequencies)
    ranked = np.argsort(-frequencies.T.reshape(-1), kind="stable")[: max(count, 0)]
    hot = np.bincount(ranked % layers, minlength=layers)
    orders = np.argsort(-frequencies, axis=1, kind="stable")
    return tuple(LayerSplit(order, int(h)) for order, h in zip(orders, hot, strict=True))


def hot_outputs(config: ModelConfig, hot: int) -> int:
    """Rows on the GPU of a `down` whose rows are outputs, beside `hot` neurons of gate and up."""
    return config.hidden_size * hot // config.ffn_size


def _hot_bytes(config: ModelConfig, arrays: Mapping[str, NDArray], hot: int) -> int:
    """Bytes of a layer's FFN rows on the GPU."""
    total = 0
    for name in _FFN:
        if name in arrays:
            row_bytes = arrays[name].nbytes // (config.layer_count * arrays[name].shape[1])
            total += row_bytes * (hot_outputs(config, hot) if name == "down" else hot)
    return total


def _frequencies(config: ModelConfig, predictor: Predictor | None) -> NDArray[np.float32]:
    """How often each neuron is predicted (layers, f), as calibration noted it; all alike where it did not."""
    found = np.zeros((config.layer_count, config.ffn_size), np.float32)
    for row, layer in zip(found, predictor.layers if predictor is not None else (), strict=False):
        if layer.frequency is not None and layer.frequency.shape == row.shape:
            row[:] = layer.frequency
    return found


def _unused(config: ModelConfig, arrays: Mapping[str, NDArray], predictor: Predictor | None, cache: int) -> int:
    """Bytes that the driver gives and no array fills, at most: over hundreds of arrays they add up."""
    sizes, any_size = [cache // (2 * config.layer_count)] * (2 * config.layer_count), 0
    for spec in tensor_specs(config):
        count = config.layer_count if spec.stacked else 1
        for suffix in PART_SUFFIXES:
            array = arrays.get(spec.name + suffix)
            size = array.nbytes // count if array is not None else 0
            if spec.name + suffix in _FFN:  # any number of its rows
                any_size += count if size > _GRANULE // 2 else 0
            else:
                sizes += [size] * count
    if config.expert_count:  # which lie together, a layer's in a dozen arrays
        sizes += [_GRANULE + 1] * (12 * config.layer_count if predictor is not None else 0)
    else:
        for index, layer in enumerate(predictor.layers if predictor is not None else ()):
            sizes += [array.nbytes for array in layer_arrays(index, layer).values()]
    return any_size * _GRANULE + sum(-size % _GRANULE for size in sizes if size > _GRANULE // 2)


def _predictor_bytes(config: ModelConfig, predictor: Predictor | None) -> int:
    if predictor is not None and config.expert_count:
        return joined_bytes(config, predictor)
    layers = enumerate(predictor.layers) if predictor is not None else ()
    return sum(array.nbytes for index, layer in layers for array in layer_arrays(index, layer).values())
