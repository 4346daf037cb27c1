"""The model on the device: matrices as their stored words, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.formats.kernels import MATRIX_PARTS
from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.memory_split import LayerSplit, hot_outputs
from svdengine.kernels.formats import (
    Parts,
    WeightFormat,
    check_stored,
    dequantize,
    format_named,
    gather_parts,
    padded_columns,
)
from svdengine.kernels.rope import rope_tables
from svdengine.models import ModelConfig, Rope, tensor_specs


@dataclass(frozen=True)
class Matrix:
    """A matrix in its stored format (kernels/formats.py), flat. Parts that the format lacks are one zero.

    kernels/cuda/formats says as what types the parts are read.
    """

    format: WeightFormat
    rows: int
    columns: int
    stride: int  # columns as stored: padded to 64
    words: Array  # the stored rows up to `hot`
    scale: Array  # `.scale`
    low: Array  # `.min`
    row: Array  # `.row`
    bias: Array  # (rows,) float32; zeros where the model has none
    hot: (
        int  # rows whose words lie on the device: all of them, unless the layer is split (kernels/cuda/memory_split.py)
    )
    cold: Array  # uint32: the words of the other rows, in host memory; where there are none, `words` again

    @property
    def is_split(self) -> bool:
        """Whether some rows lie in host memory."""
        return self.hot < self.rows

    @property
    def parts(self) -> tuple[Array, Array, Array, Array]:
        """It as kernels take it."""
        return self.words, self.scale, self.low, self.row

    def pieces(self) -> tuple[tuple[int, Matrix], ...]:
        """The parts that lie in one place each, with their first rows. They share the memory."""
        if not self.is_split:
            return ((0, self),)
        cold = replace(self.rows_from(self.hot, self.rows - self.hot), words=self.cold, cold=self.cold)
        return (*([(0, self.rows_from(0, self.hot))] if self.hot else []), (self.hot, cold))

    def rows_from(self, first: int, count: int) -> Matrix:
        """A part of the matrix: `count` rows from `first`. It shares the memory.

        The bias is that of the part where rows are outputs, and of no use where columns are.
        """
        names, arrays = {suffix: name for name, suffix in MATRIX_PARTS.items()}, {}
        for part in format_named(self.format).parts:
            array = getattr(self, names[part.suffix])
            items = part.row_bytes(self.stride) // array.dtype.itemsize
            arrays[names[part.suffix]] = array[first * items : (first + count) * items]
        bias = self.bias[first : first + count]
        return replace(self, rows=count, hot=count, bias=bias, cold=arrays["words"], **arrays)


@dataclass(frozen=True)
class Projection:
    """A matrix whose product goes to columns from `offset` of a buffer's rows."""

    matrix: Matrix
    offset: int


@dataclass(frozen=True)
class Norm:
    """Weight and bias of a norm, (columns,) float32; the bias is zeros where there is none."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Blocks:
    """The FFN blocks of a layer of a mixture of experts, whose matrices lie one below the other."""

    count: int
    per_row: int  # that a token has
    pitch: int  # rows of gate and of up from a block to the next: each block's gate and up are neighbours
    router: Matrix | None  # None: all tokens have all of them


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights; of a mixture of experts gate, up and down of all blocks."""

    attention_norm: Norm
    ffn_norm: Norm | None  # None where attention and FFN share a norm
    attention_post_norm: Norm | None  # of what attention gives
    ffn_post_norm: Norm | None  # of what the FFN gives
    attention_sub_norm: Norm | None  # of what o reads
    ffn_sub_norm: Norm | None  # of what down reads, in the order of its rows
    qkv: tuple[Projection, ...]  # into Workspace.qkv; one where q, k and v have the same format
    q_norm: Array  # (head_dim,) float32, one zero where there is none
    k_norm: Array
    joint_norms: tuple[Norm, ...]  # of all heads of q together, and of k, where they are normed so
    o: Matrix
    gate_up: tuple[Projection, ...]  # into Workspace.gate_up
    gate: Matrix | None  # rows of gate_up
    up: Matrix
    down: Matrix  # (hidden, ffn), or (ffn, hidden) where Model.transposed_down; its bias is (hidden,) either way
    window: int  # a token sees itself and the window - 1 before it
    cos: Array  # (context, head_dim / 2) float32, one zero where there is no rope; layers share it
    sin: Array
    rotated: bool  # whether there is rope
    order: NDArray[np.intp] | None  # the model's neuron of each row, on the host; None: rows are in the model's order
    blocks: Blocks | None  # None: the layer has one FFN


@dataclass(frozen=True)
class Model:
    """A model on the device."""

    config: ModelConfig
    layers: tuple[LayerWeights, ...]
    embedding: Matrix
    positions: Array  # (max_position, hidden) float32, one zero where there are none
    output_norm: Norm
    lm_head: Matrix

    @property
    def transposed_down(self) -> bool:
        """Whether down is stored as one row a neuron."""
        return self.config.sparse_ffn


_WINDOW = 1 << 30  # wider than any context


def build_model(
    device: Device,
    config: ModelConfig,
    arrays: Mapping[str, NDArray],
    formats: Mapping[str, WeightFormat],
    context: int,
    splits: Sequence[LayerSplit] = (),
) -> Model:
    """Copy a model to the device, and what `splits`, of each layer, leave out to host memory that it can read.

    `arrays` are stored parts by name, layers stacked; `formats` has the format of each matrix. Raises ValueError when
    an array's shape or type is not what the config says: kernels check nothing.
    """
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for spec in specs.values():
        check_stored(spec, arrays, formats)
    build = _Builder(device, config, arrays, formats, context, splits)
    layers = tuple(build.layer(i) for i in range(config.layer_count))
    embedding = build.matrix(["embedding"], None)
    lm_head = embedding if config.tied_embeddings else build.matrix(["lm_head"], None)
    return Model(
        config,
        layers,
        embedding,
        build.positions(),
        build.norm("output_norm", None),
        lm_head,
    )


class _Builder:
    """Copies tensors of a model to the device."""

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        arrays: Mapping[str, NDArray],
        formats: Mapping[str, WeightFormat],
        context: int,
        splits: Sequence[LayerSplit],
    ) -> None:
        self.device, self.config, self.arrays, self.formats, self.splits = device, config, arrays, formats, splits
        self.nothing = device.zeros(1, np.float32)
        self.context = context
        self.angles: dict[Rope | None, tuple[Array, Array]] = {None: (self.nothing, self.nothing)}

    def layer(self, index: int) -> LayerWeights:
        """All weights of a layer."""
        config = self.config
        gate_up, down, order = self.ffn(index)
        blocks, f = self.blocks(index, gate_up), config.ffn_size
        halves = [m for p in gate_up for m in _halves(p.matrix, blocks.count * f if blocks else f, f)]
        windowed = config.sliding_window and index in config.sliding_window_layers
        cos, sin = self.rope(config.rope_of(index))
        return LayerWeights(
            attention_norm=self.norm("attention_norm", index),
            ffn_norm=None if config.shared_norm else self.norm("ffn_norm", index),
            attention_post_norm=self.norm("attention_post_norm", index) if config.post_norms else None,
            ffn_post_norm=self.norm("ffn_post_norm", index) if config.post_norms else None,
            attention_sub_norm=self.norm("attention_sub_norm", index) if config.sub_norms else None,
            ffn_sub_norm=self.norm("ffn_sub_norm", index, order) if config.sub_norms else None,
            qkv=self.projections(["q", "k", "v"], index),
            q_norm=self.vector("q_norm.weight", index),
            k_norm=self.vector("k_norm.weight", index),
            joint_norms=tuple(self.norm(f"{n}_norm", index) for n in ("q", "k")) if config.qk_norm_joint else (),
            o=self.matrix(["o"], index),
            gate_up=gate_up,
            gate=halves[0] if config.gated else None,
            up=halves[-1],
            down=down,
            window=config.sliding_window if windowed else _WINDOW,
            cos=cos,
            sin=sin,
            rotated=config.rope_of(index) is not None,
            order=order,
            blocks=blocks,
        )

    def blocks(self, index: int, gate_up: Sequence[Projection]) -> Blocks | None:
        """The FFN blocks of a layer, in a mixture of experts."""
        config = self.config
        if not config.expert_count:
            return None
        count, routed = len(config.blocks_of(index)), index in config.expert_layers
        router = self.matrix(["router"], config.expert_layers.index(index)) if routed else None
        return Blocks(count, config.chosen_blocks if routed else count, gate_up[0].matrix.rows // count, router)

    def ffn(self, index: int) -> tuple[tuple[Projection, ...], Matrix, NDArray[np.intp] | None]:
        """Gate and up, down, and the order of the neurons' rows."""
        config = self.config
        names, down = ["gate", "up"] if config.gated else ["up"], "down_T" if config.sparse_ffn else "down"
        split = self.splits[index] if self.splits else None
        if config.expert_count:
            blocks, on_host = config.blocks_of(index), split is not None and not split.hot
            gates = self.projections(names, blocks, on_host=on_host)
            return gates, self.matrix([down], blocks, on_host=on_host), None
        if split is None or split.hot == config.ffn_size:
            return self.projections(names, index), self.matrix([down], index), None
        # Where down's columns are the neurons, all stay in the model's order.
        order = split.order if config.sparse_ffn else None
        gate_up = tuple(
            Projection(self.split_matrix(name, index, order, split.hot), i * config.ffn_size)
            for i, name in enumerate(names)
        )
        hot = split.hot if config.sparse_ffn else hot_outputs(config, split.hot)
        return gate_up, self.split_matrix(down, index, order, hot), order

    def projections(self, names: Sequence[str], layer: int | range, *, on_host: bool = False) -> tuple[Projection, ...]:
        """Matrices that read the same rows, joined where neighbours have the same format: one launch for all.

        layer: or the numbers of FFN blocks, each of which has its results where the others have theirs.
        """
        groups: list[list[str]] = []
        for name in names:
            if groups and self.formats[groups[-1][0]] == self.formats[name]:
                groups[-1].append(name)
            else:
                groups.append([name])
        made, offset = [], 0
        for group in groups:
            made.append(Projection(self.matrix(group, layer, on_host=on_host), offset))
            offset += made[-1].matrix.rows // (len(layer) if isinstance(layer, range) else 1)
        return tuple(made)

    def matrix(self, names: Sequence[str], layer: int | range | None, *, on_host: bool = False) -> Matrix:
        """Matrices of one format and width, one below the other; of FFN blocks those of the first, then of the next.

        on_host: the words of these stay in host memory.
        """
        columns = {spec.name: spec.shape[-1] for spec in tensor_specs(self.config)}[names[0]]
        if isinstance(layer, range):  # which have no biases
            parts = [self.parts(name, block) for block in layer for name in names]
            outputs = columns if names[0] == "down_T" else sum(len(p[""]) for p in parts)
            bias = self.device.zeros(outputs, np.float32)
            return place_matrix(self.device, parts, self.formats[names[0]], columns, bias, on_host=on_host)
        parts = [self.parts(name, layer) for name in names]
        # down.bias has an item for each output, and so has that of every other matrix but down_T one for each row.
        sizes = [columns if name == "down_T" else len(p[""]) for name, p in zip(names, parts, strict=True)]
        bias = np.zeros(sum(sizes), np.float32)
        for name, end, size in zip(names, np.cumsum(sizes), sizes, strict=True):
            source = f"{'down' if name == 'down_T' else name}.bias"
            if source in self.arrays:
                bias[end - size : end] = self.part(source, layer)
        return place_matrix(self.device, parts, self.formats[names[0]], columns, self.device.upload(bias))

    def split_matrix(self, name: str, layer: int, order: NDArray[np.intp] | None, hot: int) -> Matrix:
        """A matrix with its rows in some order, of which the words of those from `hot` on stay in host memory."""
        parts = self.parts(name, layer)
        columns = {spec.name: spec.shape[-1] for spec in tensor_specs(self.config)}[name]
        source = f"{'down' if name == 'down_T' else name}.bias"
        bias = np.zeros(columns if name == "down_T" else len(parts[""]), np.float32)
        if source in self.arrays:
            bias[:] = self.part(source, layer)
        if order is not None:
            parts = {suffix: part[order] for suffix, part in parts.items()}
            bias = bias if name == "down_T" else bias[order]
        rows = {**parts, "": parts[""][:hot]}
        matrix = place_matrix(self.device, [rows], self.formats[name], columns, self.device.upload(bias))
        cold = self.device.pin(as_words(parts[""][hot:]))
        return replace(matrix, rows=len(parts[""]), cold=cold)

    def rope(self, rope: Rope | None) -> tuple[Array, Array]:
        """The angles of a rotary embedding, copied to the device once."""
        if rope not in self.angles:
            cos, sin = rope_tables(self.config, np.arange(self.context), rope)
            self.angles[rope] = self.device.upload(cos), self.device.upload(sin)
        return self.angles[rope]

    def norm(self, name: str, layer: int | None, order: NDArray[np.intp] | None = None) -> Norm:
        """A norm's weight and bias, in some order."""
        weight = self.part(f"{name}.weight", layer)
        weight = weight if order is None else weight[order]
        has_bias = f"{name}.bias" in self.arrays
        bias = self.part(f"{name}.bias", layer) if has_bias else np.zeros_like(weight)
        return Norm(self.device.upload(weight), self.device.upload(bias))

    def vector(self, name: str, layer: int) -> Array:
        """A vector, or one zero where the model has none."""
        return self.device.upload(self.part(name, layer)) if name in self.arrays else self.nothing

    def positions(self) -> Array:
        """The table of learned positions in float32, or one zero."""
        if not self.config.learned_positions:
            return self.nothing
        name = "position_embedding"
        return self.device.upload(dequantize(self.parts(name, None), self.formats[name], self.config.hidden_size))

    def parts(self, name: str, layer: int | None) -> Parts:
        """The stored arrays of a matrix by suffix."""
        return {suffix: self.part(name + suffix, layer) for suffix in gather_parts(self.arrays, name)}

    def part(self, name: str, layer: int | None) -> NDArray:
        """An array, or its layer."""
        return self.arrays[name] if layer is None else self.arrays[name][layer]


def place_matrix(
    device: Device,
    parts: Sequence[Mapping[str, NDArray]],
    weight_format: WeightFormat,
    columns: int,
    bias: Array,
    *,
    on_host: bool = False,
) -> Matrix:
    """Stored parts of matrices, one below the other. Raises ValueError where CUDA has no kernels for the format.

    on_host: kernels read the words where they lie in host memory.
    """
    kernels = kernels_of(weight_format)

    def joined(suffix: str, dtype: Any) -> Array:
        if suffix not in parts[0]:
            return device.zeros(1, dtype)
        if on_host and not suffix:
            return device.pin(np.concatenate([_flat(p[suffix], dtype) for p in parts]))
        to, end = device.zeros(max(1, sum(p[suffix].nbytes for p in parts) // dtype.itemsize), dtype), 0
        for source in (_flat(p[suffix], dtype) for p in parts):
            if len(source):
                device.write(to[end : end + len(source)], source)
            end += len(source)
        return to

    rows = sum(len(p[""]) for p in parts)
    arrays = {name: joined(suffix, np.dtype(kernels.type_of(name))) for name, suffix in MATRIX_PARTS.items()}
    stride, cold = padded_columns(columns), arrays["words"]
    return Matrix(weight_format, rows, columns, stride, **arrays, bias=bias, hot=rows, cold=cold)


def _halves(matrix: Matrix, rows: int, f: int) -> tuple[Matrix, ...]:
    """Gate and up of all blocks' `rows` neurons, f of a block, where they lie one below the other in each block.

    They begin with those of the first one, and what is not theirs lies in between.
    """
    if matrix.rows == rows:
        return (matrix,)
    return matrix.rows_from(0, matrix.rows - f), matrix.rows_from(f, matrix.rows - f)


def as_words(array: NDArray) -> NDArray[np.uint32]:
    """The bytes of an array as 32-bit words, flat."""
    return _flat(array, np.uint32)


def _flat(array: NDArray, dtype: Any) -> NDArray:
    """The bytes of an array as items of a type."""
    return np.ascontiguousarray(array).reshape(-1).view(dtype)
