"""The sparsity predictor: which FFN neurons of a token are worth computing, from a cheap score.

    s = A act(B x) + Q x - (threshold + sparsity_bias * unit)        neuron i is predicted active when s_i > 0

B (r, d) and A (f, r) are factors, Q (f, d) a low-bit residual; either may be missing. act is the identity, which makes
A B a matrix of low rank, or ReLU, which makes a trained network of one hidden layer (converters/powerinfer.py); only
the latter may have a rank above d. `unit` is one standard deviation of each neuron's gate, or of its score where that
is in other units, so that one number, the sparsity bias, raises all calibrated thresholds at run time: positive is
sparser. x is the FFN's input after its norm, rounded with a scale per group of 32: to 16 bits for q8 factors, to 8 for
q4 factors and for Q, and act(B x) likewise before A. Thresholds are calibrated in this arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.formats import (
    FORMATS,
    STORED_DTYPES,
    Parts,
    WeightFormat,
    dequantize,
    gather_parts,
    padded_columns,
    stored_parts,
)
from svdengine.kernels.lowbit import BLOCK, dequantize_lowbit

PREFIX = "predictor."
FactorFormat = Literal["q8", "q4"]
_ROWS = 256  # of activations that are rounded at once, which keeps them in the cache


@dataclass(frozen=True)
class LayerPredictor:
    """The predictor of one FFN block: a layer's FFN, or an expert.

    Parts are stored arrays by suffix, as kernels/formats.py and lowbit.py say.
    """

    rank: int  # r, the width of the hidden layer where there is one; 0: no factors
    factor_format: FactorFormat
    residual_bits: int  # of Q: 0 (none), 1 or 2
    a: Parts  # (f, r)
    b: Parts  # (r, d)
    q: Parts  # (f, d)
    threshold: NDArray[np.float32]  # (f,)
    unit: NDArray[np.float32]  # (f,)
    relu: bool = False  # between B and A
    frequency: NDArray[np.float16] | None = None  # (f,) share of held-out calibration tokens that predict each neuron


@dataclass(frozen=True)
class Predictor:
    """The predictor of a model, and how it was made.

    A row of the table in `about` may say which share of tokens reach its block: of experts these count as often.
    """

    layers: tuple[LayerPredictor, ...]  # of each FFN block (ModelConfig.ffn_blocks)
    about: Mapping[str, Any]  # JSON: kind, calibrator, budget, fingerprint of the model, statistics of each layer

    @property
    def densities(self) -> tuple[float, float]:
        """Shares of neurons that are predicted, and predicted and active, as calibration measured them.

        Where it did not, shares that are typical of models of the ReLU family.
        """
        return self._mean("predicted_density", 0.25), self._mean("computed_density", 0.15)

    def _mean(self, name: str, otherwise: float) -> float:
        table = self.about.get("table")
        rows = [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []
        known = [(_share(row.get("reached", 1.0)), _share(row.get(name))) for row in rows]
        weights = [(weight, share) for weight, share in known if weight is not None and share is not None]
        total = sum(weight for weight, _ in weights)
        return sum(weight * share for weight, share in weights) / total if total else otherwise

    @property
    def scores_nothing(self) -> bool:
        """Whether every gate of every block is computed: only exact zeros are skipped, and nothing is missed."""
        return not any(layer.rank or layer.residual_bits for layer in self.layers)


def _share(value: Any) -> float | None:
    return value if isinstance(value, float) and 0 <= value <= 1 else None


def largest_rank(hidden_size: int, ffn_size: int, relu: bool) -> int:
    """The largest rank that a predictor may have, which executors make room for."""
    return max(hidden_size, ffn_size) if relu else hidden_size


def quantize_activations(x: NDArray[np.float32], bits: int = 16) -> NDArray[np.float32]:
    """x (n, d) float32 rounded to 8 or 16 bits with a scale for each 32 columns, as executors have it."""
    n, d = x.shape
    padded = np.zeros((n, padded_columns(d)), np.float32)
    padded[:, :d] = x
    for start in range(0, n, _ROWS):
        groups = padded[start : start + _ROWS].reshape(-1, 32)
        scale = np.maximum(groups.max(-1, keepdims=True), -groups.min(-1, keepdims=True))
        scale /= np.float32(127 if bits == 8 else 127 * 256)
        groups *= np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        np.rint(groups, out=groups)
        groups *= scale
    return padded[:, :d]


def scores(
    layer: LayerPredictor, x: NDArray[np.float32], sparsity_bias: float | np.float32 | NDArray[np.float32] = 0.0
) -> NDArray[np.float32]:
    """Scores (n, f) float32 of FFN inputs x (n, d) float32; where positive, a neuron is predicted active.

    `sparsity_bias` is one for all rows, or (n, 1). The scores of one neuron lie together in memory.
    """
    x = np.asarray(x, np.float32)
    bias = np.asarray(sparsity_bias, np.float32).reshape(1, -1)
    s = -(layer.threshold[:, None] + bias * layer.unit[:, None])  # (f, n) or (f, 1)
    if layer.rank:
        bits = FORMATS[layer.factor_format].activation_bits
        z = quantize_activations(x, bits) @ dequantize(layer.b, layer.factor_format, x.shape[1]).T
        z = np.maximum(z, 0) if layer.relu else z
        s = _added(s, dequantize(layer.a, layer.factor_format, layer.rank) @ quantize_activations(z, bits).T)
    if layer.residual_bits:
        rows = dequantize_lowbit(layer.q, layer.residual_bits, x.shape[1])
        s = _added(s, rows @ quantize_activations(x, 8).T)
    return np.broadcast_to(s, (len(s), len(x))).T


def _added(s: NDArray[np.float32], product: NDArray[np.float32]) -> NDArray[np.float32]:
    product += s
    return product


def layer_arrays(index: int, layer: LayerPredictor) -> dict[str, NDArray]:
    """The arrays of a layer by the names they have in a file: predictor.3.A, predictor.3.A.scale, ..."""
    arrays: dict[str, NDArray] = {}
    for name, parts in (("A", layer.a), ("B", layer.b), ("Q", layer.q)):
        for suffix, array in parts.items():
            arrays[f"{PREFIX}{index}.{name}{suffix}"] = array
    arrays[f"{PREFIX}{index}.threshold"], arrays[f"{PREFIX}{index}.unit"] = layer.threshold, layer.unit
    if layer.frequency is not None:
        arrays[f"{PREFIX}{index}.frequency"] = layer.frequency
    return arrays


def describe(predictor: Predictor) -> str:
    """The JSON that goes beside the arrays as metadata `predictor`."""
    return json.dumps({**predictor.about, "layers": [_describe_layer(layer) for layer in predictor.layers]})


def _describe_layer(layer: LayerPredictor) -> dict[str, Any]:
    layout = {"rank": layer.rank, "factors": layer.factor_format, "residual_bits": layer.residual_bits}
    return {**layout, "relu": True} if layer.relu else layout


def predictor_from_arrays(
    arrays: Mapping[str, NDArray], description: str, layer_count: int, ffn_size: int, hidden_size: int
) -> Predictor:
    """Rebuild a predictor from a file's arrays and its metadata. Raises ValueError on anything that does not fit."""
    about = json.loads(description)
    layouts = about.get("layers") if isinstance(about, dict) else None
    if not isinstance(layouts, list) or len(layouts) != layer_count:
        raise ValueError(f"the predictor does not describe {layer_count} layers")
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    shapes = []
    for index, layout in enumerate(layouts):
        rank, factors, bits, relu = _layout(layout, hidden_size, ffn_size)
        shapes.append((rank, factors, bits, relu))
        stored = _stored(rank, factors, bits, ffn_size, hidden_size)
        stored[_threshold_name(arrays, f"{PREFIX}{index}.")] = ((ffn_size,), "F32")
        expected |= {f"{PREFIX}{index}.{name}": value for name, value in stored.items()}
        frequency = f"{PREFIX}{index}.frequency"
        if frequency in arrays:  # files of earlier versions have none
            expected[frequency] = ((ffn_size,), "F16")
    _check_arrays(arrays, expected)
    extra = {name for name in arrays if name.startswith(PREFIX)} - expected.keys()
    if extra:
        raise ValueError(f"unexpected predictor tensor {min(extra)}")
    layers = tuple(_layer(arrays, f"{PREFIX}{i}.", *shape) for i, shape in enumerate(shapes))
    return Predictor(layers, about)


def check_predictor(predictor: Predictor, layer_count: int, ffn_size: int, hidden_size: int) -> None:
    """Raise ValueError when a predictor does not fit the sizes of a model."""
    if len(predictor.layers) != layer_count:
        raise ValueError(f"a predictor of {len(predictor.layers)} layers for a model of {layer_count}")
    for index, layer in enumerate(predictor.layers):
        where, most = f"layer {index} of the predictor", largest_rank(hidden_size, ffn_size, layer.relu)
        if len(layer.threshold) != ffn_size or len(layer.unit) != ffn_size:
            raise ValueError(f"{where} has {len(layer.threshold)} neurons, the model {ffn_size} neurons")
        if not 0 <= layer.rank <= most:
            raise ValueError(f"{where} has rank {layer.rank}, which must lie in 0..{most}")
        arrays = layer_arrays(index, layer)
        stored = _stored(layer.rank, layer.factor_format, layer.residual_bits, ffn_size, hidden_size)
        _check_arrays(arrays, {f"{PREFIX}{index}.{name}": value for name, value in stored.items()})


def _check_arrays(arrays: Mapping[str, NDArray], expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    for name, (shape, dtype) in expected.items():
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != np.dtype(STORED_DTYPES[dtype]):
            what = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise ValueError(f"{name}: found {what}, expected {dtype} {shape}")


def _layout(layout: Any, hidden_size: int, ffn_size: int) -> tuple[int, FactorFormat, int, bool]:
    """Rank, format of the factors, bits of the residual, and whether there is a ReLU: none where that is not said."""
    if not isinstance(layout, dict):
        raise ValueError("a layer of the predictor is not described by an object")
    rank, factors, bits = layout.get("rank"), layout.get("factors"), layout.get("residual_bits")
    relu = layout.get("relu", False)
    if type(relu) is not bool:
        raise ValueError(f"a predictor's relu must be true or false, found {relu!r}")
    least, most = int(relu), largest_rank(hidden_size, ffn_size, relu)
    if type(rank) is not int or not least <= rank <= most:
        raise ValueError(f"a predictor's rank must lie in {least}..{most}, found {rank!r}")
    if factors not in get_args(FactorFormat) or type(bits) is not int or bits not in (0, 1, 2):
        raise ValueError(f"found predictor factors {factors!r} with a residual of {bits!r} bits")
    return rank, cast(FactorFormat, factors), bits, relu


def _stored(rank: int, factors: WeightFormat, bits: int, f: int, d: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a layer's arrays, but for its thresholds."""
    stored: dict[str, tuple[tuple[int, ...], str]] = {"unit": ((f,), "F32")}
    if rank:
        for name, rows, columns in (("A", f, rank), ("B", rank, d)):
            stored |= {name + suffix: value for suffix, value in stored_parts(factors, rows, columns).items()}
    if bits:
        c = padded_columns(d)
        stored |= {"Q": ((f, c * bits // 8), "U8"), "Q.scale": ((f, c // BLOCK), "F16")}
    return stored


def _threshold_name(arrays: Mapping[str, NDArray], prefix: str) -> str:
    """What a layer's thresholds are called: earlier versions stored "bias", their negative. ValueError for both."""
    found = [name for name in ("threshold", "bias") if prefix + name in arrays]
    if len(found) == 1:
        return found[0]
    raise ValueError(
        f"found {'both' if found else 'neither'} {prefix}threshold {'and' if found else 'nor'} {prefix}bias, as earlier"
        " versions stored it; expected one of them"
    )


def _layer(
    arrays: Mapping[str, NDArray], prefix: str, rank: int, factors: FactorFormat, bits: int, relu: bool
) -> LayerPredictor:
    def parts(name: str) -> Parts:
        return gather_parts(arrays, prefix + name)

    name = _threshold_name(arrays, prefix)
    threshold = -arrays[prefix + name] if name == "bias" else arrays[prefix + name]
    unit, frequency = arrays[prefix + "unit"], arrays.get(prefix + "frequency")
    return LayerPredictor(rank, factors, bits, parts("A"), parts("B"), parts("Q"), threshold, unit, relu, frequency)


def predictor_bytes(predictor: Predictor) -> int:
    """Bytes that the scores of one token read, in all layers."""
    return sum(layer_predictor_bytes(layer) for layer in predictor.layers)


def layer_predictor_bytes(layer: LayerPredictor) -> int:
    """Bytes that the scores of one token read in one layer."""
    parts = [*layer.a.values(), *layer.b.values(), *layer.q.values(), layer.threshold]
    return sum(part.nbytes for part in parts)
