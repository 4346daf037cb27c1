"""The conditional FFN by our own kernels (ops/README.md), one row at a time.

Four launches a row, no host in between: lists and their lengths stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svdengine.kernels.ascend.custom_ops import CustomOps
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.model import (
    HalfMatrix,
    Matrix,
    QuantisedMatrix,
    SparseRows,
    takes_quantised,
    to_half,
)
from svdengine.kernels.ascend.operators import multiply
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.ascend.tiling import COUNT_INTS, LANES, MAX_BLOCKS, check_shape, list_capacity, padded
from svdengine.kernels.formats import dequantize, padded_columns
from svdengine.kernels.lowbit import BLOCK, dequantize_lowbit
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models import ModelConfig

_PREDICTED, _ACTIVE = 0, 1  # lists that are counted


@dataclass(frozen=True)
class PlacedLayer:
    """One layer of a predictor (kernels/predictor.py) on the device. One without factors has one of zeros."""

    rank: int
    a: Tensor  # (ffn, padded rank) float16
    b: HalfMatrix  # (rank, hidden)
    rest: Matrix | None  # Q (ffn, hidden), widened to 8 bits, which the toolkit's product takes
    minus_threshold: Tensor  # (ffn,) float32: where the kernels' sums start
    unit: Tensor  # (ffn,) float32
    relu: bool


@dataclass(frozen=True)
class PlacedPredictor:
    """A predictor on the device."""

    layers: tuple[PlacedLayer, ...]
    z: Tensor  # (rows * largest rank,) float16: B x
    rest: Tensor | None  # (rows * ffn,) float16: Q x, where a layer has a Q

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All memory that it has."""
        parts = [(p.a, p.b.rows, p.minus_threshold, p.unit, *_parts(p.rest)) for p in self.layers]
        both = (self.z,) if self.rest is None else (self.z, self.rest)
        return (*both, *(tensor for part in parts for tensor in part))


@dataclass(frozen=True)
class NeuronList:
    """A list of neurons in segments, one for each block that wrote it."""

    producers: int
    capacity: int
    indices: Tensor  # (producers, capacity) int32


@dataclass(frozen=True)
class SparseState:
    """Memory of the kernels, and how many blocks they run in."""

    ops: CustomOps
    blocks: int  # vector cores
    predicted: NeuronList
    every: NeuronList  # all neurons: what is read where nothing predicts
    every_counts: Tensor  # (1, COUNT_INTS) int32
    active: NeuronList
    values: Tensor  # (blocks, capacity) float32: gates of the active neurons
    partials: Tensor  # (blocks, padded hidden) float32
    counts: Tensor  # (rows, layers, 2 lists, blocks, COUNT_INTS) int32


def why_not(config: ModelConfig, predictor: Predictor | None, blocks: int) -> str | None:
    """One line on why the kernels cannot run this model's FFN with this predictor, or None."""
    ranks = [max(layer.rank, 1) for layer in predictor.layers] if predictor is not None else [1]
    try:
        check_shape(config.hidden_size, max(ranks), min(blocks, MAX_BLOCKS))
    except ValueError as error:
        return str(error)
    return None


def place_predictor(device: AscendDevice, config: ModelConfig, predictor: Predictor, rows: int) -> PlacedPredictor:
    """Copy a predictor to the device in float16, for steps of up to `rows` rows."""
    layers = tuple(_place_layer(device, config, layer) for layer in predictor.layers)
    most = max(layer.rank for layer in layers)
    rest = None
    if any(layer.rest is not None for layer in layers):
        rest = device.empty((rows * config.ffn_size,), np.float16)
    return PlacedPredictor(layers, device.empty((rows * most,), np.float16), rest)


def allocate_sparse(device: AscendDevice, config: ModelConfig, ops: CustomOps, rows: int) -> SparseState:
    """Memory for sparse steps of up to `rows` rows."""
    blocks, f = min(device.vector_cores, MAX_BLOCKS), config.ffn_size
    capacity, all_of = list_capacity(f, blocks), list_capacity(f, 1)
    capacity += LANES if device.soc.whole_copies else 0  # what is written behind a list's end stays in its segment
    every = np.zeros((1, all_of), np.int32)
    every[0, :f] = np.arange(f)
    counts = np.zeros((1, COUNT_INTS), np.int32)
    counts[0, 0] = f
    return SparseState(
        ops=ops,
        blocks=blocks,
        predicted=NeuronList(blocks, capacity, device.empty((blocks, capacity), np.int32)),
        every=NeuronList(1, all_of, device.upload(every)),
        every_counts=device.upload(counts),
        active=NeuronList(blocks, capacity, device.empty((blocks, capacity), np.int32)),
        values=device.empty((blocks, capacity), np.float32),
        partials=device.empty((blocks, padded(config.hidden_size)), np.float32),
        counts=device.zeros((rows, config.layer_count, 2, blocks, COUNT_INTS), np.int32),
    )


def sparse_ffn(
    device: AscendDevice,
    config: ModelConfig,
    state: SparseState,
    weights: SparseRows,
    predictor: PlacedPredictor | None,
    layer: int,
    x: Tensor,
    sparsity_bias: Tensor,
    y: Tensor,
) -> None:
    """y (n, hidden) = the FFN of rows x (n, hidden), with down's bias.

    Computed are the neurons that the predictor names with each row's sparsity bias (n,) float32; without a predictor
    all gates are, and what is skipped are the rows of up and down whose gate is zero. Counts go to state.counts.
    """
    n = x.shape[0]
    predicted, predicted_counts = state.every, state.every_counts
    if predictor is not None:
        placed = predictor.layers[layer]
        z, rest = make_hidden(device, config, predictor, layer, x)
    for row in range(n):
        active_counts = counts_of(state, row, layer, _ACTIVE)
        if predictor is not None:
            predicted, predicted_counts = state.predicted, counts_of(state, row, layer, _PREDICTED)
            shift, own = sparsity_bias.rows(row, 1), None if rest is None else rest.rows(row, 1)
            run_score(device, state, placed, z.rows(row, 1), own, shift, predicted_counts, config.ffn_size)
        run_gate(device, config, state, weights, x.rows(row, 1), predicted, predicted_counts, active_counts)
        run_up_down(device, config, state, weights, x.rows(row, 1), active_counts)
        run_sum(device, config, state, weights, y.rows(row, 1))


def make_hidden(
    device: AscendDevice, config: ModelConfig, predictor: PlacedPredictor, layer: int, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What the scores of rows x (n, hidden) are made of: B x (n, rank), and Q x (n, ffn) where the layer has a Q."""
    placed, n = predictor.layers[layer], x.shape[0]
    z = predictor.z.leading(n * placed.rank).reshape(n, placed.rank)
    multiply(device, placed.b, x, z)
    if placed.rest is None or predictor.rest is None:
        return z, None
    rest = predictor.rest.leading(n * config.ffn_size).reshape(n, config.ffn_size)
    multiply(device, placed.rest, x, rest)
    return z, rest


def counts_of(state: SparseState, row: int, layer: int, which: int) -> Tensor:
    """The count records (blocks, COUNT_INTS) of a list of one row in one layer."""
    _, layers, lists, blocks, _ = state.counts.shape
    records = state.counts.reshape(state.counts.size // COUNT_INTS, COUNT_INTS)
    return records.rows(((row * layers + layer) * lists + which) * blocks, blocks)


def run_score(
    device: AscendDevice,
    state: SparseState,
    predictor: PlacedLayer,
    z: Tensor,
    rest: Tensor | None,
    shift: Tensor,
    counts: Tensor,
    neurons: int,
) -> None:
    """state.predicted = the neurons whose score is positive, of one row's z and rest."""
    listed = state.predicted
    device.launch(
        state.ops.score, "svd_score", state.blocks, predictor.a, z, predictor.minus_threshold, predictor.unit, shift,
        rest, counts, listed.indices, neurons, predictor.rank, listed.capacity, int(predictor.relu),
    )  # fmt: skip


def run_gate(
    device: AscendDevice,
    config: ModelConfig,
    state: SparseState,
    weights: SparseRows,
    x: Tensor,
    predicted: NeuronList,
    predicted_counts: Tensor,
    counts: Tensor,
) -> None:
    """state.active = those of the predicted neurons whose gate is above zero, with their gates in state.values."""
    active = state.active
    device.launch(
        state.ops.gate, "svd_gate", state.blocks, weights.gate, x, weights.gate_bias, predicted_counts,
        predicted.indices, counts, active.indices, state.values, config.ffn_size, config.hidden_size,
        predicted.producers, predicted.capacity, active.capacity, float(config.activation_threshold),
        int(config.activation == "relu2"),
    )  # fmt: skip


def run_up_down(
    device: AscendDevice, config: ModelConfig, state: SparseState, weights: SparseRows, x: Tensor, counts: Tensor
) -> None:
    """state.partials = each block's part of the FFN's sum over the active neurons."""
    active = state.active
    device.launch(
        state.ops.up_down, "svd_up_down", state.blocks, weights.up, weights.down, x, weights.up_bias, counts,
        active.indices, state.values, state.partials, config.ffn_size, config.hidden_size, active.producers,
        active.capacity, int(config.activation == "drelu"),
    )  # fmt: skip


def run_sum(device: AscendDevice, config: ModelConfig, state: SparseState, weights: SparseRows, y: Tensor) -> None:
    """y (1, hidden) = the sum of the parts, and down's bias."""
    device.launch(
        state.ops.sum, "svd_sum", state.blocks, state.partials, weights.down_bias, y, state.blocks, config.hidden_size
    )


def _place_layer(device: AscendDevice, config: ModelConfig, layer: LayerPredictor) -> PlacedLayer:
    rank = max(layer.rank, 1)
    if layer.rank:
        a = to_half(dequantize(layer.a, layer.factor_format, rank), "A of the predictor")
        b = to_half(dequantize(layer.b, layer.factor_format, config.hidden_size), "B of the predictor")
    else:
        a, b = np.zeros((config.ffn_size, 1), np.float16), np.zeros((1, config.hidden_size), np.float16)
    return PlacedLayer(
        rank,
        device.upload(np.pad(a, ((0, 0), (0, padded_columns(rank) - rank)))),
        HalfMatrix(device.upload(b)),
        _place_rest(device, config, layer) if layer.residual_bits else None,
        device.upload(-np.asarray(layer.threshold, np.float32)),
        device.upload(np.asarray(layer.unit, np.float32)),
        layer.relu,
    )


def _place_rest(device: AscendDevice, config: ModelConfig, layer: LayerPredictor) -> Matrix:
    """Q as int8 whole numbers, -3 to 3, and half of its scales: half of a float16 FFN's up, read for every row.

    x stays in float16 here, where the definition rounds it to 8 bits (kernels/predictor.py): that is nearer to Q x, and
    of neurons whose scores nearly are zero others are chosen.
    """
    rows, columns = config.ffn_size, config.hidden_size
    if not takes_quantised(rows, columns, BLOCK):
        dense = dequantize_lowbit(layer.q, layer.residual_bits, columns)
        return HalfMatrix(device.upload(to_half(dense, "Q of the predictor")))
    ones = {**layer.q, ".scale": np.full_like(layer.q[".scale"], 2)}
    levels = dequantize_lowbit(ones, layer.residual_bits, columns).astype(np.int8)
    scales = (layer.q[".scale"] / np.float16(2)).astype(np.float16)
    return QuantisedMatrix(
        device.upload(np.ascontiguousarray(levels.T)), device.upload(np.ascontiguousarray(scales.T)), BLOCK
    )


def _parts(matrix: Matrix | None) -> tuple[Tensor, ...]:
    if matrix is None:
        return ()
    return (matrix.rows,) if isinstance(matrix, HalfMatrix) else (matrix.weights, matrix.scales)
