"""The conditional FFN of a few rows: score neurons, list those predicted active, and compute only these.

The stages are those of kernels/cpu/sparse.py. Each row has its own list; in a mixture of experts each pair of a row and
a block that it has (kernels/cuda/chosen.py), and `pairs` counts either. Six launches at most, and three where a norm
has rounded what is read and gate and up have one format. No host in between: the lists stay on the device.
"""

from __future__ import annotations

from typing import Literal

from svdengine.kernels.cuda.compact import COMPACT_THREADS, list_every
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.elementwise import ACTIVATIONS
from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.gather import (
    DOWN_THREADS,
    GATHER_THREADS,
    WARPS,
    down_kernel,
    gate_kernel,
    gate_up_kernel,
    up_kernel,
)
from svdengine.kernels.cuda.model import LayerWeights, Matrix, Model
from svdengine.kernels.cuda.norm import THREADS as NORM_THREADS
from svdengine.kernels.cuda.norm import normalize_listed
from svdengine.kernels.cuda.placed_predictor import PlacedLayer
from svdengine.kernels.cuda.predicted import predicted_kernel
from svdengine.kernels.cuda.rounding import rounded_for, takes_integers
from svdengine.kernels.cuda.score import (
    PROJECT,
    PROJECT_THREADS,
    ROUND_THREADS,
    SCORE_ROWS,
    SCORE_THREADS,
    round_rows,
    score_kernel,
)
from svdengine.kernels.cuda.workspace import COUNTS, Workspace, parts_of
from svdengine.kernels.formats import padded_columns

MOST_GATHER_BLOCKS = 512  # of a row: some for each multiprocessor; warps take listed neurons in turns


def sparse_ffn(
    device: Device,
    model: Model,
    work: Workspace,
    layer: int,
    predictor: PlacedLayer | None,
    x: Array,
    n: int,
    *,
    rounded: bool = False,
) -> int:
    """work.partial (n, parts, hidden) = the FFN of rows x (n, hidden) without the bias of down; returns the parts.

    Those of all blocks of a row lie together.
    x is padded with zeros. Computed are the neurons that the predictor names with each row's sparsity bias; without a
    predictor all are listed, and only those whose gate is zero are skipped. Neurons are counted in work.counts.
    `rounded`: whether x lies in work.fine and work.coarse already.
    """
    weights, counts = model.layers[layer], work.counts[COUNTS * layer : COUNTS * (layer + 1)]
    per_row = 1 if weights.blocks is None else weights.blocks.per_row
    if predictor is not None and (weights.gate is None or weights.gate.format == weights.up.format):
        predict_active(device, model, work, weights, predictor, counts, x, n, rounded=rounded)
    else:
        if predictor is None:
            grid = (-(-model.config.ffn_size // COMPACT_THREADS), n * per_row)
            device.launch(
                list_every, grid, COMPACT_THREADS, work.neurons, work.lengths, counts, model.config.ffn_size,
                work.sizes.ffn,
            )  # fmt: skip
        else:
            score_rows(device, model, work, weights, predictor, counts, x, n, rounded=rounded)
        is_rounded = rounded or predictor is not None
        gate_listed(device, model, work, weights, x, n, rounded=work.fine if is_rounded else None)
    if weights.ffn_sub_norm is not None:
        device.launch(
            normalize_listed, (n,), NORM_THREADS, work.neurons, work.lengths, work.scores, work.hidden,
            weights.ffn_sub_norm.weight, model.config.ffn_size, work.sizes.ffn, model.config.norm_eps,
        )  # fmt: skip
    return per_row * add_down(device, model, work, weights, counts, n * per_row)


def predict_active(
    device: Device,
    model: Model,
    work: Workspace,
    layer: LayerWeights,
    predictor: PlacedLayer,
    counts: Array,
    x: Array,
    n: int,
    *,
    rounded: bool = False,
) -> None:
    """work.hidden of those neurons that are predicted and active, and in work.neurons which these are.

    Gate and up have one format.
    """
    config, sizes, up = model.config, work.sizes, layer.up
    gate = up if layer.gate is None else layer.gate
    experts, pairs, chosen, pitch = _pairs_of(work, layer, n)
    factors, scored = _hidden_values(device, model, work, layer, predictor, x, n, rounded=rounded)
    device.launch(
        predicted_kernel(factors, predictor.residual_bits, up.format, up.is_split, experts),
        (-(-config.ffn_size // SCORE_ROWS), pairs), SCORE_THREADS, *scored, *_parts(gate), *_parts(up),
        work.fine if takes_integers(up.format) else x, work.masks, work.tickets, work.neurons, work.lengths,
        work.scores, work.hidden, counts, *chosen, pitch, int(layer.gate is not None), up.hot,
        ACTIVATIONS.index(config.activation), config.activation_threshold, config.ffn_size,
        padded_columns(predictor.rank), up.stride, sizes.z, sizes.hidden, up.stride, sizes.ffn, sizes.ffn // 32,
    )  # fmt: skip


def score_rows(
    device: Device,
    model: Model,
    work: Workspace,
    layer: LayerWeights,
    predictor: PlacedLayer,
    counts: Array,
    x: Array,
    n: int,
    *,
    rounded: bool = False,
) -> None:
    """work.scores (n, ffn) of rows x, and in work.neurons those whose score is positive."""
    config, sizes = model.config, work.sizes
    experts, pairs, chosen, _ = _pairs_of(work, layer, n)
    factors, scored = _hidden_values(device, model, work, layer, predictor, x, n, rounded=rounded)
    device.launch(
        score_kernel(factors, predictor.residual_bits, experts), (-(-config.ffn_size // SCORE_ROWS), pairs),
        SCORE_THREADS, *scored, work.scores, work.masks, work.tickets, work.neurons, work.lengths, counts, *chosen,
        config.ffn_size, padded_columns(predictor.rank), padded_columns(config.hidden_size), sizes.z, sizes.hidden,
        sizes.ffn, sizes.ffn // 32,
    )  # fmt: skip


def _hidden_values(
    device: Device,
    model: Model,
    work: Workspace,
    layer: LayerWeights,
    predictor: PlacedLayer,
    x: Array,
    n: int,
    *,
    rounded: bool,
) -> tuple[Literal["", "q8", "q4"], tuple[Array, ...]]:
    """Make what scores are computed from: the format of the factors, and the arrays of `predictor_parameters`."""
    columns, sizes = padded_columns(model.config.hidden_size), work.sizes
    if not rounded:
        device.launch(
            round_rows, (-(-columns // ROUND_THREADS), n), ROUND_THREADS, x, work.fine, work.fine, work.coarse,
            work.coarse, model.config.hidden_size, columns, sizes.hidden,
        )  # fmt: skip
    rest = (
        predictor.q_words, predictor.q_scale, predictor.minus_threshold, predictor.unit,
        work.z_rounded, work.coarse, work.sparsity_bias,
    )  # fmt: skip
    if predictor.a is None or predictor.b is None:  # without factors the first four are not read
        return "", (predictor.q_words, predictor.q_scale, predictor.q_words, predictor.minus_threshold, *rest)
    b = predictor.b
    experts, pairs, chosen, _ = _pairs_of(work, layer, n)
    device.launch(
        PROJECT[predictor.factor_format, experts], (padded_columns(predictor.rank) // 32, pairs), PROJECT_THREADS,
        *b.parts, work.fine, work.z_rounded, work.z_rounded, *chosen,
        predictor.rank, int(predictor.relu), columns, sizes.hidden, sizes.z,
    )  # fmt: skip
    return predictor.factor_format, (*predictor.a.parts, *rest)


def gate_listed(
    device: Device, model: Model, work: Workspace, layer: LayerWeights, x: Array, n: int, rounded: Array | None = None
) -> None:
    """work.scores = the gates of the listed neurons, work.hidden = their hidden values, both by neuron.

    rounded: x rounded to 16 bits, where that has been done.
    """
    config, sizes = model.config, work.sizes
    kind, split, hot = ACTIVATIONS.index(config.activation), layer.up.is_split, layer.up.hot
    experts, pairs, chosen, pitch = _pairs_of(work, layer, n)
    grid = (min(-(-config.ffn_size // WARPS), MOST_GATHER_BLOCKS), pairs)
    gate = layer.up if layer.gate is None else layer.gate
    if rounded is None:
        rounded = rounded_for(device, [gate.format, layer.up.format], x, work.fine, sizes.hidden, n)
    lists = (work.neurons, work.lengths, work.scores, work.hidden)
    gate_x = rounded if takes_integers(gate.format) else x
    up_x = rounded if takes_integers(layer.up.format) else x
    if layer.gate is not None and layer.gate.format == layer.up.format:
        device.launch(
            gate_up_kernel(gate.format, split, experts), grid, GATHER_THREADS, *_parts(gate), *_parts(layer.up), gate_x,
            *lists, *chosen, pitch, hot, kind, config.activation_threshold, gate.stride, sizes.hidden, sizes.ffn,
        )  # fmt: skip
        return
    device.launch(
        gate_kernel(gate.format, split, experts), grid, GATHER_THREADS, *_parts(gate), gate_x, *lists,
        *chosen, pitch, hot, kind, config.activation_threshold, gate.stride, sizes.hidden, sizes.ffn,
    )  # fmt: skip
    if layer.gate is not None:
        up = layer.up
        device.launch(
            up_kernel(up.format, split, experts), grid, GATHER_THREADS, *_parts(up), up_x, *lists,
            *chosen, pitch, hot, kind, up.stride, sizes.hidden, sizes.ffn,
        )  # fmt: skip


def add_down(device: Device, model: Model, work: Workspace, layer: LayerWeights, counts: Array, pairs: int) -> int:
    """work.partial (pairs, parts, hidden) = sums over parts of the lists; returns the number of parts."""
    parts, down = parts_of(pairs), layer.down
    experts, _, chosen, _ = _pairs_of(work, layer, 1)
    blocks = -(-(down.stride // kernels_of(down.format).chunk_columns) // DOWN_THREADS)
    device.launch(
        down_kernel(down.format, down.is_split, experts), (blocks, parts, pairs), DOWN_THREADS, *down.parts, down.cold,
        work.neurons, work.lengths, work.scores, work.hidden, work.partial, counts, *chosen, model.config.ffn_size,
        down.hot, down.stride, work.sizes.ffn,
    )  # fmt: skip
    return parts


def _parts(matrix: Matrix) -> tuple[Array, ...]:
    """A matrix with its bias, as kernels take it."""
    return *matrix.parts, matrix.cold, matrix.bias


def _pairs_of(work: Workspace, layer: LayerWeights, n: int) -> tuple[bool, int, tuple[Array, Array, int], int]:
    """Whether the layer is of a mixture, how many pairs n rows are, what says which, and rows of gate from a block on.

    See kernels/cuda/chosen.py.
    """
    if layer.blocks is None:
        return False, n, (work.blocks, work.weights, 1), 0
    per_row = layer.blocks.per_row
    return True, n * per_row, (work.blocks, work.weights, per_row), layer.blocks.pitch
