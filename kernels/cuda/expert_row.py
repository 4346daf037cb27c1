"""The FFN of one row of a mixture of experts, as decode has it: products with the blocks that it has, two launches.

They are those of kernels/cuda/single_row.py, of several blocks at once. A block's weight goes into its neurons' values,
so that what down makes of all of them is one sum, as over the columns of one long row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.device import Array
from svdengine.kernels.cuda.elementwise import ACTIVATIONS, activate, up_product
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.intrinsics import Kernel, jit, kernel, lane_index, warp_index, warp_sum
from svdengine.kernels.cuda.model import Blocks, LayerWeights
from svdengine.kernels.cuda.norm import ROUNDED, Following, normalize_row
from svdengine.kernels.cuda.rounding import store_fine
from svdengine.kernels.cuda.rows import matrix_parameters, row_product
from svdengine.kernels.cuda.state import State
from svdengine.kernels.formats import WeightFormat, padded_columns

THREADS = 256
GROUP = 32  # neurons of a block of threads, which share a scale where they are rounded
_ZERO = np.float32(0)


@cache
def activated_experts_kernel(weight_format: WeightFormat) -> Kernel:
    """hidden of each pair = its weight * act(gate x) * (up x). Grid: (blocks of 32 neurons, padding too, pairs)."""
    dot = row_product(weight_format)

    @kernel(
        f"{matrix_parameters(weight_format, 'g_')}, {matrix_parameters(weight_format, 'u_')}, uint32* x,"
        "float32* hidden, uint8* codes, float32* values, int32* chosen, float32* weights, int32 pitch, int32 neurons,"
        "int32 stride, int32 padded, int32 kind, float32 threshold, int32 gated, int32 rounded",
        name=f"activated_{weight_format}_experts",
        launch_bounds=(THREADS, 2),
    )
    def activated_experts(
        g_words, g_scale, g_low, g_row, u_words, u_scale, u_low, u_row, x, hidden, codes, values, chosen, weights,
        pitch, neurons, stride, padded, kind, threshold, gated, rounded,
    ):  # fmt: skip
        """With `rounded`, hidden is rounded to 16 bits too, as down reads it: codes and values of `padded` columns."""
        group = cuda.shared.array(GROUP, types.float32)
        first, pair, lane = cuda.blockIdx.x * GROUP, cuda.blockIdx.y, lane_index()
        base, weight = chosen[pair] * pitch, weights[pair]
        for k in range(warp_index(), GROUP, cuda.blockDim.x >> 5):
            r = base + first + k
            value = _ZERO  # of neurons that only fill up a row
            if first + k < neurons:
                value = warp_sum(dot(g_words, r, g_scale, g_low, g_row, r, stride, x, 0, lane))
                value = activate(value, kind, threshold) * weight
                if gated != 0:
                    up = warp_sum(dot(u_words, r, u_scale, u_low, u_row, r, stride, x, 0, lane))
                    value = up_product(value, up, kind)
            if lane == 0:
                group[k] = value
        cuda.syncthreads()
        if warp_index() == 0:
            hidden[pair * padded + first + lane] = group[lane]
            if rounded != 0:
                store_fine(group[lane], codes, values, pair * padded, padded, first + lane)

    return activated_experts


@cache
def joined_product(weight_format: WeightFormat) -> Any:
    """dot(words, scale, low, row, chosen, pairs, rows, r, stride, x, lane): one lane's share of a sum over pairs.

    Row r of each pair's block, which has `rows` rows, times the pair's row of x, `stride` items each: as if all were
    one long row, so that blocks with few columns have as many loads on their way as others.
    """
    kernels = kernels_of(weight_format)
    load, chunk = kernels.load_chunk, kernels.dot_chunk
    columns, chunk_words = kernels.chunk_columns, kernels.chunk_words
    by_four, by_two = kernels.listed_at_once == 4, kernels.listed_at_once == 2

    @jit(device=True)
    def place(chosen, rows, r, count, c):
        """Of chunk c of all: its row, the pair, and which chunk of the row it is."""
        pair = np.int32(np.uint32(c) // np.uint32(count))
        return chosen[pair] * rows + r, pair, np.int32(c - pair * count)

    @jit(device=True)
    def dot(words, scale, low, row, chosen, pairs, rows, r, stride, x, lane):
        count = np.int32(stride // columns)
        row_words, end = chunk_words * count, np.int32(pairs * count)
        total, c = _ZERO, lane
        while by_four and c + 96 < end:
            r0, p0, j0 = place(chosen, rows, r, count, c)
            r1, p1, j1 = place(chosen, rows, r, count, c + 32)
            r2, p2, j2 = place(chosen, rows, r, count, c + 64)
            r3, p3, j3 = place(chosen, rows, r, count, c + 96)
            w0 = load(words, r0 * row_words, j0)
            w1 = load(words, r1 * row_words, j1)
            w2 = load(words, r2 * row_words, j2)
            w3 = load(words, r3 * row_words, j3)
            total += chunk(w0, scale, low, row, r0, stride, x, p0 * stride, j0)
            total += chunk(w1, scale, low, row, r1, stride, x, p1 * stride, j1)
            total += chunk(w2, scale, low, row, r2, stride, x, p2 * stride, j2)
            total += chunk(w3, scale, low, row, r3, stride, x, p3 * stride, j3)
            c = np.int32(c + 128)
        while by_two and c + 32 < end:
            r0, p0, j0 = place(chosen, rows, r, count, c)
            r1, p1, j1 = place(chosen, rows, r, count, c + 32)
            w0 = load(words, r0 * row_words, j0)
            w1 = load(words, r1 * row_words, j1)
            total += chunk(w0, scale, low, row, r0, stride, x, p0 * stride, j0)
            total += chunk(w1, scale, low, row, r1, stride, x, p1 * stride, j1)
            c = np.int32(c + 64)
        while c < end:
            r0, p0, j0 = place(chosen, rows, r, count, c)
            total += chunk(load(words, r0 * row_words, j0), scale, low, row, r0, stride, x, p0 * stride, j0)
            c = np.int32(c + 32)
        return total

    return dot


@cache
def normed_experts_kernel(weight_format: WeightFormat) -> Kernel:
    """y += factor * the sum over pairs of down times hidden, then out = norm(y). Grid: (blocks of rows,)."""
    dot = joined_product(weight_format)

    @kernel(
        f"{matrix_parameters(weight_format)}, uint32* x, int32* chosen, float32* y, int32* tickets, float32* weight,"
        f"float32* norm_bias, float32* out, {ROUNDED}, int32 pairs, int32 rows, int32 stride, int32 padded,"
        "float32 eps, float32 factor, int32 normed, int32 centred, int32 rounded",
        name=f"normed_{weight_format}_experts",
        launch_bounds=(THREADS, 2),
    )
    def normed_experts(
        words, scale, low, row, x, chosen, y, tickets, weight, norm_bias, out,
        fine_codes, fine_values, coarse_codes, coarse_values, pairs, rows, stride, padded, eps, factor, normed,
        centred, rounded,
    ):  # fmt: skip
        r, lane = cuda.blockIdx.x * (cuda.blockDim.x >> 5) + warp_index(), lane_index()
        if r < rows:
            total = warp_sum(dot(words, scale, low, row, chosen, pairs, rows, r, stride, x, lane))
            if lane == 0:
                y[r] += factor * total
        if normed != 0 and is_last_block(tickets, 0, cuda.gridDim.x):
            normalize_row(
                y, 0, weight, norm_bias, out, 0, fine_codes, fine_values, coarse_codes, coarse_values,
                rows, padded, eps, np.float32(1), centred, 0, rounded,
            )  # fmt: skip

    return normed_experts


def activate_experts(state: State, layer: LayerWeights, blocks: Blocks, x: Array, *, rounded: bool) -> None:
    """work.hidden of the first row's pairs; with `rounded` in work.rounded too, as a matrix of integers reads it."""
    config, work = state.model.config, state.work
    gate, padded = layer.up if layer.gate is None else layer.gate, work.sizes.ffn
    state.device.launch(
        activated_experts_kernel(gate.format), (padded // GROUP, blocks.per_row), THREADS, *gate.parts, *layer.up.parts,
        x, work.hidden, work.rounded, work.rounded, work.blocks, work.weights, blocks.pitch, config.ffn_size,
        gate.stride, padded, ACTIVATIONS.index(config.activation), config.activation_threshold,
        int(layer.gate is not None), int(rounded),
    )  # fmt: skip


def add_experts(state: State, layer: LayerWeights, blocks: Blocks, x: Array, following: Following | None) -> None:
    """The first row of work.x += residual_scale * the sum of its blocks' downs times x, its pairs' rows.

    Then the norm that follows, if one does.
    """
    config, work, down = state.model.config, state.work, layer.down
    rows = config.hidden_size
    norm, out = (layer.attention_norm, work.normed) if following is None else (following.norm, following.out)
    rounded = following is not None and following.rounded
    state.device.launch(
        normed_experts_kernel(down.format), (-(-rows // (THREADS // 32)),), THREADS, *down.parts, x, work.blocks,
        work.x, work.tickets, norm.weight, norm.bias, out, work.fine, work.fine, work.coarse, work.coarse,
        blocks.per_row, rows, down.stride, padded_columns(rows) if rounded else rows, config.norm_eps,
        config.residual_scale, int(following is not None), int(config.norm == "layer"), int(rounded),
    )  # fmt: skip


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats."""
    for name in KERNELS:
        yield from (activated_experts_kernel(name), normed_experts_kernel(name))
