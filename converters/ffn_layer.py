"""One layer's FFN as calibration sees it: exact gates, and what each neuron adds to the output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.parallel import over_parts
from svdengine.errors import ConversionError
from svdengine.files.model_file import ModelFile
from svdengine.kernels.formats import FORMATS, dequantize, gather_parts
from svdengine.kernels.predictor import quantize_activations
from svdengine.kernels.reference import activate, linear
from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]

_NEURONS = 64  # whose values on all tokens are worked on at once, which keeps them in the cache
_ROWS = 1024  # tokens whose inputs are rounded at once


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

    def read_bytes(self, predicted: float, computed: float) -> float:
        """Stored bytes that a token reads where gates of a share of the neurons, and the rest of another, are read."""
        gate, up, down = self.row_bytes
        return len(self.gate) * (predicted * gate + computed * (up + down))


@dataclass(frozen=True)
class Neurons:
    """What the neurons of a layer do on n tokens. What one neuron does lies together in memory."""

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
    raw, up = _products(layer, x)
    active = np.empty(raw.shape, np.bool_)
    energy = up if up is not None else np.empty_like(raw)
    shift = (layer.offset - layer.gate_bias)[:, None]

    def run(part: slice) -> NDArray[np.float64]:
        h, active[part] = _hidden(layer, raw, up, part)
        h *= layer.down_norm[part, None]
        np.square(h, out=energy[part])
        raw[part] += shift[part]
        return energy[part].sum(0, dtype=np.float64)

    total = np.sum(over_parts(run, len(raw), size=_NEURONS), 0)
    inverse = np.divide(1, total, out=np.zeros_like(total), where=total > 0).astype(np.float32)

    def share(part: slice) -> None:
        energy[part] *= inverse

    over_parts(share, len(raw), size=_NEURONS)
    return Neurons(raw.T, active.T, energy.T)


def missed_penalties(layer: FfnLayer, x: Array, kind: str) -> Array:
    """What it costs to miss each neuron on FFN inputs x (n, d), in the paper's three ways: (n, f).

    gate: |act(gate)|; gate-up: |h|; full: |h| times the length of the neuron's row of down_T.
    """
    raw, up = _products(layer, x)
    if kind == "gate":
        return np.abs(activate(layer.config.activation, raw, layer.config.activation_threshold)).T
    h = np.abs(_hidden(layer, raw, up, slice(None))[0])
    return (h * layer.down_norm[:, None] if kind == "full" else h).T


def _products(layer: FfnLayer, x: Array) -> tuple[Array, Array | None]:
    """Pre-activations and what up gives, each (f, n): what one neuron does lies together."""
    x = _inputs(layer, x)
    raw = layer.gate @ x.T
    raw += layer.gate_bias[:, None]
    if layer.up is None:
        return raw, None
    up = layer.up @ x.T
    up += layer.up_bias[:, None]
    return raw, up


def _hidden(layer: FfnLayer, raw: Array, up: Array | None, part: slice) -> tuple[Array, NDArray[np.bool_]]:
    """Hidden values h and activity of a part of the neurons, in new arrays (neurons, n)."""
    config = layer.config
    h = activate(config.activation, raw[part], config.activation_threshold)
    active = h > 0
    if up is not None:
        h *= np.maximum(up[part], 0) if config.activation == "drelu" else up[part]
    return h, active


def _inputs(layer: FfnLayer, x: Array) -> Array:
    """x as executors multiply it with the gate."""
    x = np.asarray(x, np.float32)
    if layer.input_bits == 32:
        return x
    rounded = np.empty_like(x)

    def fill(part: slice) -> None:
        rounded[part] = quantize_activations(x[part], layer.input_bits)

    over_parts(fill, len(x), size=_ROWS)
    return rounded


def _row_bytes(model_file: ModelFile, name: str) -> int:
    return sum(part.shape[-1] * part.itemsize for part in gather_parts(model_file.arrays, name).values())
