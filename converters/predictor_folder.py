"""Predictors as PowerInfer and the paper keep them: a folder with model_0.pt, model_1.pt ..., a file for each layer.

Such a file is what torch.save makes of a small network's state: fc1.weight (r, d), fc2.weight (f, r), and perhaps
fc2.bias (f). There are two kinds:

- The paper's (arXiv:2603.14110) have a bias and no ReLU, s = fc2 fc1 x + bias, read the FFN's input x, after its norm,
  and compute neuron i where s_i > 0: exactly our predictors of the kind svd.
- PowerInfer's (arXiv:2312.12456) have a ReLU and no bias, as converters/powerinfer.py says, and read the residual
  stream p before the norm. The paper's authors compared theirs with such ones that read x, and their files look the
  same. So both readings are offered, and the one that tells better which neurons are active is taken.

Export writes either kind. A predictor without ReLU becomes one with it by v = relu(v) - relu(-v). PowerInfer has no
thresholds, and its scores grow with the size of p. So a threshold t is written as t times an estimate of rms(p) that
such a network can make: the sum of |g p| over random directions g, times a constant. For g of independent normal
numbers its mean is rms(p), and its deviation sqrt(pi / 2 - 1) / sqrt(number of directions): 6.7 % for 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from svdengine.converters.checkpoint import StoredTensor, read_json, read_stored
from svdengine.converters.powerinfer import Array, Network, before_norm, check_norm
from svdengine.converters.torch_file import read_torch_file
from svdengine.converters.torch_writer import write_torch_file
from svdengine.errors import ConversionError, quoted
from svdengine.files.model_file import ModelFile
from svdengine.kernels.formats import dequantize, from_bfloat16
from svdengine.kernels.predictor import LayerPredictor, Predictor, largest_rank
from svdengine.models.config import ModelConfig

Layout = Literal["paper", "powerinfer"]

DIRECTIONS = 128  # random ones, that estimate rms(p)
_NAMES = ("fc1.weight", "fc2.weight", "fc2.bias")
_FLOATS = ("F32", "F16", "BF16", "F64")
_LARGEST = float(np.finfo(np.float16).max) / 2


@dataclass(frozen=True)
class PredictorFolder:
    """The predictors of a folder, which fit the model; nothing of them is read yet."""

    path: Path
    layers: tuple[dict[str, StoredTensor], ...]
    norm_weights: Array | None  # (layers, d) of the RMSNorm before each FFN; None: it cannot be undone

    def readings(self, layer: int) -> tuple[Network, ...]:
        """What a layer's predictor may mean: one of the paper's one thing, one of PowerInfer's two."""
        tensors = self.layers[layer]
        first, second = (self._read(layer, name) for name in _NAMES[:2])
        if "fc2.bias" in tensors:
            return (Network(first, second, self._read(layer, "fc2.bias"), relu=False),)
        if self.norm_weights is None:
            return (Network(first, second),)
        stream = before_norm(first, self.norm_weights[layer], f"{self.path}: the predictor of layer {layer}")
        return (Network(stream, second), Network(first, second))

    def _read(self, layer: int, name: str) -> Array:
        tensor = self.layers[layer][name]
        array = read_stored(tensor, f"tensor {quoted(name)}")
        array = from_bfloat16(array) if tensor.dtype == "BF16" else np.asarray(array, np.float32)
        if not np.isfinite(array).all():
            raise ConversionError(f"{tensor.file}: tensor {quoted(name)} holds NaN or infinity")
        return array


def file_name(layer: int) -> str:
    """The file of a layer's predictor."""
    return f"model_{layer}.pt"


def open_predictor_folder(path: Path, model_file: ModelFile, trained_thresholds: bool = False) -> PredictorFolder:
    """The predictors in the folder `path`, checked against the model.

    Raises ConversionError when they are not all there, are those of another model, or cannot be used with its norm, or
    when `trained_thresholds` are wanted and config.json names another threshold than 0.
    """
    config = model_file.config
    if not (path / file_name(0)).exists():
        raise ConversionError(f"{path}: holds no predictors: expected {file_name(0)} and so on, a file for each layer")
    beyond = path / file_name(config.layer_count)
    if beyond.exists():
        raise ConversionError(f"{beyond}: the model has {config.layer_count} layers: made for another model?")
    layers = tuple(_read_file(path / file_name(layer), config) for layer in range(config.layer_count))
    weights = None
    if not all("fc2.bias" in tensors for tensors in layers):
        check_norm(config)
        weights = np.asarray(model_file.arrays["ffn_norm.weight"], np.float32)
    threshold = read_json(path / "config.json", optional=True).get("sparse_threshold") or 0
    if trained_thresholds and threshold != 0:
        raise ConversionError(
            f"{path / 'config.json'}: sparse_threshold is {quoted(str(threshold))}; only 0 means the same before and"
            " after the model's norm: choose --thresholds error, recall or uniform"
        )
    return PredictorFolder(path, layers, weights)


def _read_file(path: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """A layer's tensors, checked to be those of a predictor of this model."""
    if not path.exists():
        raise ConversionError(f"{path}: missing; a predictor has a file for each layer")
    tensors = read_torch_file(path)
    strange = next((name for name in tensors if name not in _NAMES), None)
    missing = next((name for name in _NAMES[:2] if name not in tensors), None)
    if strange is not None or missing is not None:
        what = f"found {quoted(strange)}" if strange is not None else f"lacks {quoted(str(missing))}"
        raise ConversionError(f"{path}: {what}; a predictor has fc1.weight, fc2.weight, and perhaps fc2.bias")
    d, f, first = config.hidden_size, config.ffn_size, tensors["fc1.weight"].shape
    most = largest_rank(d, f, relu="fc2.bias" not in tensors)
    rank = first[0] if len(first) == 2 and first[1] == d and 1 <= first[0] <= most else None
    if rank is None:
        raise ConversionError(
            f"{path}: fc1.weight has shape {first}, expected at most {most} rows of {d}: made for another model?"
        )
    for name, shape in (("fc2.weight", (f, rank)), ("fc2.bias", (f,))):
        if name in tensors and tensors[name].shape != shape:
            raise ConversionError(
                f"{path}: {name} has shape {tensors[name].shape}, expected {shape}: made for another model?"
            )
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ConversionError(f"{path}: {name} is {tensor.dtype}, expected one of {', '.join(_FLOATS)}")
    return tensors


def export_predictor(
    folder: Path,
    model_file: ModelFile,
    predictor: Predictor,
    layout: Layout,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a predictor as `folder`/model_N.pt in float16, for the paper's code or for PowerInfer.

    Raises ConversionError, before anything is written, when the layout cannot hold the predictor, the folder holds one
    already or cannot be made.
    """
    for index, layer in enumerate(predictor.layers):
        _check_layer(layer, index, layout)
    if layout == "powerinfer":
        check_norm(model_file.config)
    if any(folder.glob("model_*.pt")):
        raise ConversionError(f"{folder}: holds predictors already; choose another folder")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConversionError(f"{folder}: {error.strerror or error}") from error
    weights = np.asarray(model_file.arrays["ffn_norm.weight"], np.float32) if layout == "powerinfer" else None
    for index, layer in enumerate(predictor.layers):
        network = _network(layer, model_file.config.hidden_size)
        if weights is not None:
            network = _homogeneous(network, weights[index])
        write_torch_file(folder / file_name(index), _in_float16(network))
        if progress is not None:
            progress(index + 1, len(predictor.layers))


def _check_layer(layer: LayerPredictor, index: int, layout: Layout) -> None:
    where = f"layer {index} of the predictor"
    if layer.residual_bits or not layer.rank:
        raise ConversionError(
            f"{where} has a low-bit part, which {file_name(index)} cannot hold: make one of low rank, with"
            " svdengine calibrate --predictor svd"
        )
    if layer.relu and layout == "paper":
        raise ConversionError(f"{where} has a ReLU, which the paper's have not: choose --layout powerinfer")


def _network(layer: LayerPredictor, hidden_size: int) -> Network:
    """A layer's predictor in float32. Scores are divided by the neuron's unit, so that float16 holds them well."""
    unit = layer.unit.astype(np.float32)
    first = dequantize(layer.b, layer.factor_format, hidden_size)
    second = dequantize(layer.a, layer.factor_format, layer.rank) / unit[:, None]
    bias = -layer.threshold / unit
    trained = layer.relu and float(np.abs(layer.threshold).max()) < 1e-30
    return Network(first, second, None if trained else bias, layer.relu)


def _homogeneous(network: Network, weights: Array) -> Network:
    """The same choice of neurons as a network with ReLU and without bias of what enters the norm with `weights`."""
    first, second = network.first * weights, network.second
    if not network.relu:
        first, second = np.concatenate([first, -first]), np.concatenate([second, -second], 1)
    if network.bias is not None:
        d = first.shape[1]
        directions = np.random.default_rng(0).standard_normal((DIRECTIONS, d), np.float32) / np.float32(math.sqrt(d))
        # The mean of |g p| is sqrt(2 / pi) rms(p); brought to the size of the other rows.
        size = float(np.sqrt(np.mean(np.square(first)) * d)) or 1.0
        each = network.bias * np.float32(math.sqrt(math.pi / 2) / DIRECTIONS / size)
        first = np.concatenate([first, directions * np.float32(size), -directions * np.float32(size)])
        second = np.concatenate([second, np.repeat(each[:, None], 2 * DIRECTIONS, 1)], 1)
    return Network(first, second)


def _in_float16(network: Network) -> dict[str, np.ndarray]:
    """The tensors of a file. All scores of a neuron may be multiplied by a positive number, so what is too large is."""
    first, second = network.first, network.second
    bias = np.zeros(len(second), np.float32) if network.bias is None else network.bias
    shrink = np.float32(1 / max(1, np.abs(first).max() / _LARGEST))
    first, bias = first * shrink, bias * shrink
    scale = 1 / np.maximum(1, np.maximum(np.abs(second).max(1), np.abs(bias)) / _LARGEST)
    tensors = {"fc1.weight": first, "fc2.weight": second * scale[:, None]}
    if not network.relu:
        tensors["fc2.bias"] = bias * scale
    return {name: array.astype(np.float16) for name, array in tensors.items()}
