"""The model on the device, layer by layer. Products read float16 weights, or q8 ones as they are stored.

q8 matrices stay in 8 bits where aclnnWeightQuantBatchMatmulV2 takes them; all other formats become float16 when they
are loaded. The FFN of a model whose neurons can be zero is float16 always: its rows are what our kernels read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.formats import GROUP, Parts, WeightFormat, check_stored, dequantize, gather_parts, padded_columns
from svdengine.kernels.rope import rope_tables
from svdengine.models import ModelConfig, tensor_specs

_MOST_QUANTISED = 65535  # rows and columns that the quantised product takes


@dataclass(frozen=True)
class HalfMatrix:
    """Rows of float16, without gaps: CANN copies a matrix with gaps at each product.

    Our kernels read rows that are padded with zeros to a multiple of 64 columns, of a copy where that is wider.
    """

    rows: Tensor  # (rows, columns)
    padded: Tensor | None = None  # (rows, padded columns), of what our kernels read


@dataclass(frozen=True)
class QuantisedMatrix:
    """Columns of int8 with a scale for each group: the form that the product is fastest with."""

    weights: Tensor  # (columns, rows) int8
    scales: Tensor  # (columns / group, rows) float16
    group: int = GROUP


Matrix = HalfMatrix | QuantisedMatrix


@dataclass(frozen=True)
class Projection:
    """A product and what is added to it."""

    matrix: Matrix
    bias: Tensor | None  # (rows,) float16


@dataclass(frozen=True)
class Projections:
    """Products of the same rows with several matrices."""

    parts: tuple[Projection, ...]
    joined: Projection | None  # all as one, of which the parts are rows; None where they are quantised


@dataclass(frozen=True)
class Norm:
    """Weight and bias (columns,) float16 of a norm; RMSNorm has no bias."""

    weight: Tensor
    bias: Tensor | None
    minus_mean: Tensor | None = None  # (columns, 1), whose product with a row is minus its mean (substitutes.py)


@dataclass(frozen=True)
class SparseRows:
    """What our kernels read of a layer's FFN: rows as in HalfMatrix, and biases in float32."""

    gate: Tensor  # (ffn, padded hidden); of a model without a gate, up
    up: Tensor | None
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights."""

    attention_norm: Norm
    ffn_norm: Norm | None  # None where attention and FFN share a norm
    qkv: Projections
    q_norm: Norm | None
    k_norm: Norm | None
    o: Projection
    gate_up: Projections  # gate and up, or up alone
    down: Projection  # its matrix is (ffn, hidden) where the model's neurons can be zero, else (hidden, ffn)
    sparse: SparseRows | None
    window: int  # a token sees itself and the window - 1 before it; 0: all


@dataclass(frozen=True)
class Model:
    """A model on the device."""

    config: ModelConfig
    layers: tuple[LayerWeights, ...]
    embedding: Tensor  # (vocabulary, hidden) float16
    positions: Tensor | None  # (max_position, hidden) float16
    output_norm: Norm
    lm_head: Matrix
    cos: Tensor | None  # (context, head_dim) float16: both halves are equal
    sin: Tensor | None
    turn: Tensor | None = None  # (head_dim, head_dim) float16: see substitutes.rotate; None where it is not needed


def stays_quantised(config: ModelConfig, name: str, formats: Mapping[str, WeightFormat]) -> bool:
    """Whether a matrix keeps its 8 bits on the device: "aclnnWeightQuantBatchMatmulV2" of CANN's documentation."""
    spec = {spec.name: spec for spec in tensor_specs(config)}[name]
    rows, columns = spec.shape[-2:]
    if formats[name] != "q8" or name in ("embedding", "position_embedding"):
        return False
    if _is_listed(config, name):
        return False
    return takes_quantised(rows, columns, GROUP)


def takes_quantised(rows: int, columns: int, group: int) -> bool:
    """Whether the quantised product takes a matrix with a scale for each so many columns."""
    return group < columns <= _MOST_QUANTISED and rows <= _MOST_QUANTISED


def device_bytes(config: ModelConfig, formats: Mapping[str, WeightFormat]) -> int:
    """Bytes that the model takes on the device."""
    total = 0
    for spec in tensor_specs(config):
        if not spec.matrix:
            total += 2 * int(np.prod(spec.shape))
            continue
        layers, (rows, columns) = spec.shape[0] if spec.stacked else 1, spec.shape[-2:]
        if stays_quantised(config, spec.name, formats):
            total += layers * rows * (columns + 2 * -(-columns // GROUP))
        else:
            total += layers * rows * 2 * columns
            if _has_padded_copy(config, spec.name, columns):
                total += layers * rows * 2 * padded_columns(columns)
    return total


def build_model(
    device: AscendDevice,
    config: ModelConfig,
    arrays: Mapping[str, NDArray],
    formats: Mapping[str, WeightFormat],
    context: int,
) -> Model:
    """Copy a model to the device.

    `arrays` are stored parts by name, layers stacked; `formats` has the format of each matrix. Raises ValueError when
    an array's shape or type is not what the config says, DeviceError where a weight is too large for float16.
    """
    for spec in tensor_specs(config):
        check_stored(spec, arrays, formats)
    build = _Builder(device, config, arrays, formats)
    embedding = build.half("embedding", None)
    tied = config.tied_embeddings
    cos, sin = build.rope(context) if config.rope is not None else (None, None)
    return Model(
        config=config,
        layers=tuple(build.layer(i) for i in range(config.layer_count)),
        embedding=embedding.rows,
        positions=build.half("position_embedding", None).rows if config.learned_positions else None,
        output_norm=build.norm("output_norm", None),
        lm_head=embedding if tied else build.matrix("lm_head", None),
        cos=cos,
        sin=sin,
        turn=build.turn() if config.rope is not None else None,
    )


def to_half(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Values in float16. Raises DeviceError where one is too large for it."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise DeviceError(
            f"{name} holds a weight of {np.abs(values).max():.3g}, too large for float16, which is what runs on Ascend;"
            " use --device cpu"
        )
    return half


class _Builder:
    """Copies tensors of a model to the device."""

    def __init__(
        self,
        device: AscendDevice,
        config: ModelConfig,
        arrays: Mapping[str, NDArray],
        formats: Mapping[str, WeightFormat],
    ) -> None:
        self.device, self.config, self.arrays, self.formats = device, config, arrays, formats
        self.columns = {spec.name: spec.shape[-1] for spec in tensor_specs(config)}
        self.minus_mean: Tensor | None = None
        if config.norm == "layer" and not device.soc.has("aclnnLayerNorm"):
            self.minus_mean = device.upload(np.full((config.hidden_size, 1), -1 / config.hidden_size, np.float16))

    def layer(self, index: int) -> LayerWeights:
        """All weights of a layer."""
        config = self.config
        windowed = config.sliding_window and index in config.sliding_window_layers
        gate_up = self.projections(("gate", "up") if config.gated else ("up",), index)
        down = Projection(
            self.matrix("down_T" if config.sparse_ffn else "down", index), self.vector("down.bias", index)
        )
        return LayerWeights(
            attention_norm=self.norm("attention_norm", index),
            ffn_norm=None if config.shared_norm else self.norm("ffn_norm", index),
            qkv=self.projections(("q", "k", "v"), index),
            q_norm=self.norm("q_norm", index) if config.qk_norm else None,
            k_norm=self.norm("k_norm", index) if config.qk_norm else None,
            o=self.projection("o", index),
            gate_up=gate_up,
            down=down,
            sparse=self.sparse_rows(index, gate_up, down) if config.sparse_ffn else None,
            window=config.sliding_window if windowed else 0,
        )

    def sparse_rows(self, index: int, gate_up: Projections, down: Projection) -> SparseRows:
        """The FFN as our kernels take it: the same matrices, whole rows."""
        names = ("gate.bias", "up.bias") if self.config.gated else ("up.bias",)
        rows, biases = [_padded(part) for part in gate_up.parts], [self.float_vector(name, index) for name in names]
        return SparseRows(
            gate=rows[0],
            up=rows[1] if self.config.gated else None,
            down=_padded(down),
            gate_bias=biases[0],
            up_bias=biases[1] if self.config.gated else None,
            down_bias=self.float_vector("down.bias", index),
        )

    def projection(self, name: str, layer: int) -> Projection:
        """A matrix with its bias."""
        return Projection(self.matrix(name, layer), self.vector(f"{name}.bias", layer))

    def projections(self, names: Sequence[str], layer: int) -> Projections:
        """Matrices that read the same rows: where all are float16, one below the other in one storage."""
        if any(stays_quantised(self.config, name, self.formats) for name in names):
            return Projections(tuple(self.projection(name, layer) for name in names), None)
        dense = [self.half_rows(name, layer) for name in names]
        whole = self.upload_rows(names[0], np.concatenate(dense))
        bias = None
        if f"{names[0]}.bias" in self.arrays:
            biases = [to_half(self.part(f"{name}.bias", layer), name) for name in names]
            bias = self.device.upload(np.concatenate(biases))
        parts, first = [], 0
        for matrix in dense:
            count = len(matrix)
            part = None if bias is None else bias.rows(first, count)
            padded = None if whole.padded is None else whole.padded.rows(first, count)
            parts.append(Projection(HalfMatrix(whole.rows.rows(first, count), padded), part))
            first += count
        return Projections(tuple(parts), Projection(whole, bias))

    def matrix(self, name: str, layer: int | None) -> Matrix:
        """A matrix in the form that it has on the device."""
        if not stays_quantised(self.config, name, self.formats):
            return self.half(name, layer)
        parts, columns = self.parts(name, layer), self.columns[name]
        groups = -(-columns // GROUP)
        return QuantisedMatrix(
            self.device.upload(np.ascontiguousarray(parts[""][:, :columns].T)),
            self.device.upload(np.ascontiguousarray(parts[".scale"][:, :groups].T)),
        )

    def half(self, name: str, layer: int | None) -> HalfMatrix:
        """A matrix in float16, of any format."""
        return self.upload_rows(name, self.half_rows(name, layer))

    def half_rows(self, name: str, layer: int | None) -> NDArray[np.float16]:
        """Its rows on the host."""
        return to_half(dequantize(self.parts(name, layer), self.formats[name], self.columns[name]), name)

    def upload_rows(self, name: str, dense: NDArray[np.float16]) -> HalfMatrix:
        """Rows of matrices of one kind on the device, also as our kernels want them, where they read them."""
        rows, columns = self.device.upload(dense), dense.shape[1]
        if not _is_listed(self.config, name):
            return HalfMatrix(rows)
        if not _has_padded_copy(self.config, name, columns):
            return HalfMatrix(rows, rows)
        return HalfMatrix(rows, self.device.upload(np.pad(dense, ((0, 0), (0, padded_columns(columns) - columns)))))

    def norm(self, name: str, layer: int | None) -> Norm:
        """A norm's weight and bias."""
        weight = self.vector(f"{name}.weight", layer)
        assert weight is not None
        bias = self.vector(f"{name}.bias", layer)
        return Norm(weight, bias, self.minus_mean if bias is not None else None)

    def vector(self, name: str, layer: int | None) -> Tensor | None:
        """A vector in float16, or None where the model has none."""
        if name not in self.arrays:
            return None
        return self.device.upload(to_half(self.part(name, layer), name))

    def float_vector(self, name: str, layer: int) -> Tensor | None:
        """A vector in float32, or None where the model has none."""
        return self.device.upload(self.part(name, layer)) if name in self.arrays else None

    def rope(self, context: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, (context, head_dim) each."""
        cos, sin = rope_tables(self.config, np.arange(context))
        both = [np.concatenate([table, table], 1).astype(np.float16) for table in (cos, sin)]
        return self.device.upload(both[0]), self.device.upload(both[1])

    def turn(self) -> Tensor | None:
        """What swaps the halves of a head and negates the second, where the device needs it."""
        if self.device.soc.has("aclnnRotaryPositionEmbedding"):
            return None
        half = self.config.head_dim // 2
        matrix = np.roll(np.eye(2 * half, dtype=np.float16), half, 1)
        matrix[half:] *= -1  # row i is what item i adds to: items of the second half to the first, negated
        return self.device.upload(matrix)

    def parts(self, name: str, layer: int | None) -> Parts:
        """The stored arrays of a matrix by suffix."""
        return {suffix: self.part(name + suffix, layer) for suffix in gather_parts(self.arrays, name)}

    def part(self, name: str, layer: int | None) -> NDArray:
        """An array, or its layer."""
        return self.arrays[name] if layer is None else self.arrays[name][layer]


def _padded(projection: Projection) -> Tensor:
    """The rows of a float16 matrix with their padding."""
    assert isinstance(projection.matrix, HalfMatrix) and projection.matrix.padded is not None
    return projection.matrix.padded


def _is_listed(config: ModelConfig, name: str) -> bool:
    """Whether our kernels read rows of a matrix."""
    return config.sparse_ffn and name in ("gate", "up", "down_T")


def _has_padded_copy(config: ModelConfig, name: str, columns: int) -> bool:
    return _is_listed(config, name) and padded_columns(columns) != columns
