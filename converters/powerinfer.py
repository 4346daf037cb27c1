"""Predictors that were trained for PowerInfer (arXiv:2312.12456): a network of one hidden layer for each FFN.

    s = fc2 relu(fc1 p)        neuron i is computed where s_i is at least the threshold

They lie in a model's GGUF file as blk.N.fc1.weight (h, d) and blk.N.fc2.weight (f, h), without biases, with the
threshold in powerinfer.sparse_threshold, 0 where that is missing. A file from PowerInfer's converter begins with PWRI
in place of GGUF. This is what PowerInfer's convert.py writes, and its llama.cpp and ggml.c read.

p is the residual stream before the FFN's norm, while our predictors read x, after it. For an RMSNorm with weights w,
x = p / rms(p) * w, and a positive factor passes through a ReLU, so that

    fc2 relu(fc1 diag(1 / w) x) = s / rms(p)

has the sign of s: at threshold 0 exactly PowerInfer's neurons are chosen. Another threshold would be a different one
for each token. Of a LayerNorm's input x does not show the mean, so its models are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.gguf_file import GgufFile, read_gguf
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile
from svdengine.kernels.formats import quantize
from svdengine.kernels.predictor import FactorFormat, LayerPredictor, largest_rank, scores
from svdengine.models.config import ModelConfig

POWERINFER = "powerinfer"  # the kind's name
MAGIC = b"PWRI"
THRESHOLD_FIELD = "powerinfer.sparse_threshold"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Network:
    """A layer's trained predictor in terms of x, the FFN's input after its norm."""

    first: Array  # (h, d) fc1 diag(1 / w)
    second: Array  # (f, h) fc2
    bias: Array | None = None  # (f,) which only predictors of the paper have (converters/predictor_folder.py)
    relu: bool = True  # which these have not

    def scores(self, x: Array) -> Array:
        """Scores (n, f) of FFN inputs x (n, d), in float32."""
        hidden = x @ self.first.T
        found = (np.maximum(hidden, 0) if self.relu else hidden) @ self.second.T
        return np.asarray(found if self.bias is None else found + self.bias, np.float32)


@dataclass(frozen=True)
class PowerInferFile:
    """The predictors in a GGUF file, which fit the model."""

    gguf: GgufFile
    threshold: float
    norm_weights: Array  # (layers, d) of the norm before each FFN

    @property
    def path(self) -> Path:
        """The file."""
        return self.gguf.path

    def readings(self, layer: int) -> tuple[Network, ...]:
        """What a layer's predictor may mean: one thing."""
        return (self.read_layer(layer),)

    def read_layer(self, layer: int) -> Network:
        """One layer's predictor. Raises ConversionError when it holds NaN, or reads what the model's norm removes."""
        fc1, fc2 = (self._read(tensor_name(layer, matrix)) for matrix in (1, 2))
        return Network(before_norm(fc1, self.norm_weights[layer], f"{self.path}: the predictor of layer {layer}"), fc2)

    def _read(self, name: str) -> Array:
        matrix = self.gguf.read(name)
        if not np.isfinite(matrix).all():
            raise ConversionError(f"{self.gguf.path}: tensor {name!r} holds NaN or infinity")
        return matrix


def before_norm(fc1: Array, weights: Array, name: str) -> Array:
    """fc1 (h, d) of what enters a norm with `weights` (d,), in terms of what leaves it: fc1 diag(1 / w).

    Raises ConversionError, with `name`, when it reads what the norm removes.
    """
    dead = weights == 0
    if fc1[:, dead].any():
        channel = int(np.flatnonzero(fc1.any(0) & dead)[0])
        raise ConversionError(f"{name} reads channel {channel}, which the model's norm multiplies by 0")
    return np.asarray(fc1 / np.where(dead, np.float32(1), weights), np.float32)


def tensor_name(layer: int, matrix: int) -> str:
    """The name of a layer's fc1 or fc2."""
    return f"blk.{layer}.fc{matrix}.weight"


def open_powerinfer(path: Path, model_file: ModelFile, trained_thresholds: bool = False) -> PowerInferFile:
    """The trained predictors in the GGUF file `path`, checked against the model but not read yet.

    Raises ConversionError when the file has none or those of another model, when the model's norm does not let them
    be used, or when `trained_thresholds` are wanted and the file's threshold is not 0.
    """
    config = model_file.config
    check_norm(config)
    gguf = read_gguf(path, (b"GGUF", MAGIC))
    _check_layers(gguf, config)
    for layer in range(config.layer_count):
        _check_shapes(gguf, layer, config)
    threshold = gguf.fields.get(THRESHOLD_FIELD, 0.0)
    if type(threshold) not in (int, float) or not math.isfinite(threshold):
        raise ConversionError(f"{path}: {THRESHOLD_FIELD} must be a number, found {threshold!r}")
    if trained_thresholds and threshold != 0:
        raise ConversionError(
            f"{path}: {THRESHOLD_FIELD} is {threshold:g}; only 0 means the same before and after the model's norm:"
            " choose --thresholds error, recall or uniform"
        )
    return PowerInferFile(gguf, float(threshold), np.asarray(model_file.arrays["ffn_norm.weight"], np.float32))


def check_norm(config: ModelConfig) -> None:
    """Raise ConversionError for a model whose predictors cannot be expressed in the FFN's input after its norm."""
    if config.norm != "rms" or config.parallel:
        raise ConversionError(
            f"PowerInfer's predictors read what enters the FFN's norm, and a {config.family} model's norm cannot be"
            " undone; models with RMSNorm before each FFN can have them"
        )


def build_network(network: Network, x: Array, factor_format: FactorFormat, name: str) -> LayerPredictor:
    """A network as a predictor with the trained thresholds; its unit is the deviation of its scores on x (n, d).

    Without a bias the threshold is 0.

    Raises ConversionError, with `name`, when a weight is too large to be stored.
    """
    f, rank = network.second.shape
    try:
        a, b = quantize(network.second, factor_format), quantize(network.first, factor_format)
    except ValueError as error:
        raise ConversionError(f"{name}: {error}") from error
    # PowerInfer computes a neuron at the threshold, and we above 0: of no importance but where all scores are 0.
    bias = np.full(f, np.finfo(np.float32).tiny) if network.bias is None else network.bias
    predictor = LayerPredictor(rank, factor_format, 0, a, b, {}, -bias, np.ones(f, np.float32), network.relu)
    deviation = scores(predictor, x).std(0)
    floor = 1e-4 * float(deviation.mean()) or 1e-6
    unit = np.maximum(deviation, np.float32(floor)).astype(np.float32)
    return replace(predictor, unit=unit)


def _check_layers(gguf: GgufFile, config: ModelConfig) -> None:
    """All layers of the model must have both matrices, and no others may."""
    layers = {int(parts[1]) for parts in _predictor_names(gguf)}
    if not layers:
        raise ConversionError(
            f"{gguf.path}: holds no trained predictors ({tensor_name(0, 1)} and so on);"
            " PowerInfer's models have them, and svdengine.tools.train_mlp_predictors trains some"
        )
    if max(layers) >= config.layer_count or len(layers) != config.layer_count:
        raise ConversionError(
            f"{gguf.path}: has predictors for {len(layers)} layers up to number {max(layers)},"
            f" the model has {config.layer_count} layers"
        )
    for parts in _predictor_names(gguf):
        if parts[3] != "weight":
            raise ConversionError(f"{gguf.path}: found {'.'.join(parts)!r}; PowerInfer's predictors have no biases")


def _predictor_names(gguf: GgufFile) -> list[list[str]]:
    """Names of tensors of predictors, split at the dots: blk, layer, fc1 or fc2, weight or bias."""
    split = [name.split(".") for name in gguf.tensors]
    return [
        parts
        for parts in split
        if len(parts) == 4
        and parts[0] == "blk"
        and parts[1].isascii()
        and parts[1].isdecimal()
        and parts[2] in ("fc1", "fc2")
    ]


def _check_shapes(gguf: GgufFile, layer: int, config: ModelConfig) -> None:
    d, f = config.hidden_size, config.ffn_size
    names = [tensor_name(layer, matrix) for matrix in (1, 2)]
    for name in names:
        if name not in gguf.tensors:
            raise ConversionError(f"{gguf.path}: the tensor {name!r} is missing")
    first, second = (gguf.tensors[name].shape for name in names)
    most = largest_rank(d, f, relu=True)
    if len(first) != 2 or first[1] != d or not first[0] <= most:
        raise ConversionError(
            f"{gguf.path}: {names[0]!r} has shape {first}, expected at most {most} rows of {d}: made for another model?"
        )
    if second != (f, first[0]):
        raise ConversionError(
            f"{gguf.path}: {names[1]!r} has shape {second}, expected {(f, first[0])}: made for another model?"
        )
