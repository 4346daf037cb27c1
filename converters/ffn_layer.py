"""One layer's FFN as calibration sees it: exact gates, and what each neuron adds to the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile
from svdengine.kernels.formats import FORMATS, dequantize, gather_parts
from svdengine.kernels.predictor import quantize_activations
from svdengine.kernels.reference import activate, linear
from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]


@dataclass(frozen=True)
class FfnLayer:
    """The weights of one layer's FFN in float32. Where the model is not gated, `gate` is its up matrix."""

    config: ModelConfig
    gate: Array  # (f, d): its sign decides whether a neuron is active
    gate_bias: Array  # (f,)
    up: Array | None  # (f, d); None: not gated
    up_bias: Array  # (f,)
    down_norm: Array  # (f,) length of each neuron's row of down_T, times the weight of the norm before it
    input_bits: int  # of x, as executors multiply it with the gate; 32: float32
    row_bytes: tuple[int, int, int]  # stored bytes of one row of gate, up (0: none) and down_T

    @property
    def offset(self) -> Array:
        """What is added to W x so that its sign says whether a neuron is active: (f,)."""
        threshold = self.config.activation_threshold if self.config.activation == "fatrelu" else 0.0
        return self.gate_bias - np.float32(threshold)


@dataclass(frozen=True)
class Neurons:
    """What the neurons of a layer do on n tokens."""

    gates: Array  # (n, f) what a score estimates: above 0 where the neuron is active
    active: NDArray[np.bool_]  # (n, f)
    energy: Array  # (n, f) (h_i)^2 ||W_down_T[i]||^2 as a share of the token's sum


def require_sparse(config: ModelConfig) -> None:
    """Raise ConversionError for a model whose neurons are never exactly zero."""
    if not config.sparse_ffn:
        raise ConversionError(
            f"the activation {config.activation} has no zeros that could be skipped; a predictor needs a model with"
            " relu, fatrelu, drelu or relu2"
        )


def read_ffn_layer(model_file: ModelFile, layer: int) -> FfnLayer:
    """Layer `layer` of a model file, dequantised. Raises ConversionError when its neurons are never zero."""
    config = model_file.config
    require_sparse(config)
    name = "gate" if config.gated else "up"
    zeros = np.zeros(config.ffn_size, np.float32)

    def bias(matrix: str) -> Array:
        found = model_file.arrays.get(f"{matrix}.bias")
        return zeros if found is None else np.asarray(found[layer], np.float32)

    down_norm = np.sqrt(np.square(layer_matrix(model_file, "down_T", layer, config.hidden_size)).sum(1))
    if config.sub_norms:  # of which the mean square scales all neurons alike
        down_norm *= np.abs(model_file.arrays["ffn_sub_norm.weight"][layer])
    return FfnLayer(
        config=config,
        gate=layer_matrix(model_file, name, layer, config.hidden_size),
        gate_bias=bias(name),
        up=layer_matrix(model_file, "up", layer, config.hidden_size) if config.gated else None,
        up_bias=bias("up"),
        down_norm=down_norm,
        input_bits=FORMATS[model_file.formats[name]].activation_bits,
        row_bytes=(
            _row_bytes(model_file, name),
            _row_bytes(model_file, "up") if config.gated else 0,
            _row_bytes(model_file, "down_T"),
        ),
    )


def layer_matrix(model_file: ModelFile, name: str, layer: int, columns: int) -> Array:
    """One layer of a stacked matrix, dequantised: (rows, columns)."""
    parts = {suffix: part[layer] for suffix, part in gather_parts(model_file.arrays, name).items()}
    return dequantize(parts, model_file.formats[name], columns)


def exact_gates(layer: FfnLayer, x: Array) -> Array:
    """What a score estimates, (n, f), for inputs x (n, d): above 0 where a neuron is active."""
    return linear(_inputs(layer, x), layer.gate, layer.offset)


def run_neurons(layer: FfnLayer, x: Array) -> Neurons:
    """Exact activity and energy of every neuron on FFN inputs x (n, d) float32."""
    raw, h, active = _run(layer, x)
    energy = np.square(h * layer.down_norm)
    total = energy.sum(1, keepdims=True)
    energy /= np.where(total > 0, total, np.float32(1))
    return Neurons(raw + (layer.offset - layer.gate_bias), active, energy)


def missed_penalties(layer: FfnLayer, x: Array, kind: str) -> Array:
    """What it costs to miss each neuron on FFN inputs x (n, d), in the paper's three ways: (n, f).

    gate: |act(gate)|; gate-up: |h|; full: |h| times the length of the neuron's row of down_T.
    """
    raw, h, _ = _run(layer, x)
    if kind == "gate":
        return np.abs(activate(layer.config.activation, raw, layer.config.activation_threshold))
    h = np.abs(h)
    return h * layer.down_norm if kind == "full" else h


def _run(layer: FfnLayer, x: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Pre-activations, hidden values h and activity of every neuron, each (n, f)."""
    config = layer.config
    x = _inputs(layer, x)
    raw = linear(x, layer.gate, layer.gate_bias)
    h = activate(config.activation, raw, config.activation_threshold)
    active = h > 0
    if layer.up is not None:
        up = linear(x, layer.up, layer.up_bias)
        h = h * (activate("relu", up) if config.activation == "drelu" else up)
    return raw, h, active


def _inputs(layer: FfnLayer, x: Array) -> Array:
    x = np.asarray(x, np.float32)
    return quantize_activations(x, layer.input_bits) if layer.input_bits < 32 else x


def _row_bytes(model_file: ModelFile, name: str) -> int:
    return sum(part.shape[-1] * part.itemsize for part in gather_parts(model_file.arrays, name).values())
