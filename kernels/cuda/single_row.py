"""Products with one row of activations, as decode has them, each with what follows it in the same launch.

A small kernel takes less time than the gap before it. So q, k and v go into the cache as their heads are done; what is
added to the residual stream is normed by the last block that adds; and gates and ups are activated, and rounded, where
they are computed. A warp has a row of weights, as in kernels/cuda/gemv.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.device import Array
from svdengine.kernels.cuda.elementwise import ACTIVATIONS, activate, up_product
from svdengine.kernels.cuda.formats.table import KERNELS
from svdengine.kernels.cuda.intrinsics import Kernel, kernel, lane_index, warp_index, warp_sum
from svdengine.kernels.cuda.kv_cache import KvDtype
from svdengine.kernels.cuda.model import LayerWeights, Matrix
from svdengine.kernels.cuda.norm import ROUNDED, Following, normalize_row
from svdengine.kernels.cuda.rope import place_head
from svdengine.kernels.cuda.rounding import store_fine
from svdengine.kernels.cuda.rows import matrix_parameters, row_product
from svdengine.kernels.cuda.state import State
from svdengine.kernels.formats import WeightFormat, padded_columns

HEAD_THREADS = 128  # four rows of a head
THREADS = 256
GROUP = 32  # neurons of a block, which share a scale where they are rounded
_ZERO = np.float32(0)


@cache
def heads_kernel(weight_format: WeightFormat, dtype: KvDtype) -> Kernel:
    """q, k and v of a row, with their norms and rotation, k and v into the cache. Grid: (heads, blocks of a head)."""
    dot = row_product(weight_format)
    item = "float16" if dtype == "f16" else "float32"

    @kernel(
        f"{matrix_parameters(weight_format)}, float32* bias, uint32* x, int32* tickets, float32* qkv, {item}* keys,"
        f"{item}* values, int32* positions, int32* sequences, int32* tables, float32* cos, float32* sin,"
        "float32* q_norm, float32* k_norm, int32 heads, int32 kv_heads, int32 head_dim, int32 stride,"
        "int32 head_stride, int32 blocks, float32 eps, float32 factor, int32 normed, int32 rotated",
        name=f"heads_{weight_format}_{dtype}",
        launch_bounds=(HEAD_THREADS, 4),
    )
    def heads_of_row(
        words, scale, low, row, bias, x, tickets, qkv, keys, values, positions, sequences, tables, cos, sin,
        q_norm, k_norm, heads, kv_heads, head_dim, stride, head_stride, blocks, eps, factor, normed, rotated,
    ):  # fmt: skip
        head, lane = cuda.blockIdx.x, lane_index()
        i = cuda.blockIdx.y * (cuda.blockDim.x >> 5) + warp_index()
        if i < head_dim:
            r = head * head_dim + i
            total = warp_sum(dot(words, r, scale, low, row, r, stride, x, 0, lane))
            if lane == 0:
                qkv[r] = total + bias[r]
        if is_last_block(tickets, head, cuda.gridDim.y) and warp_index() == 0:
            place_head(
                qkv, 0, head, positions[0], sequences[0] * blocks, keys, values, tables, cos, sin, q_norm, k_norm,
                heads, kv_heads, head_dim, head_stride, eps, factor, normed, rotated,
            )  # fmt: skip

    return heads_of_row


@cache
def normed_kernel(weight_format: WeightFormat) -> Kernel:
    """y += factor * (matrix x + bias), then out = norm(y). Grid: (blocks of rows,)."""
    dot = row_product(weight_format)

    @kernel(
        f"{matrix_parameters(weight_format)}, float32* bias, uint32* x, float32* y, int32* tickets, float32* weight,"
        f"float32* norm_bias, float32* out, {ROUNDED}, int32 rows, int32 stride, int32 padded, float32 eps,"
        "float32 factor, int32 centred, int32 rounded",
        name=f"normed_{weight_format}",
        launch_bounds=(THREADS, 2),
    )
    def normed_sum(
        words, scale, low, row, bias, x, y, tickets, weight, norm_bias, out,
        fine_codes, fine_values, coarse_codes, coarse_values, rows, stride, padded, eps, factor, centred, rounded,
    ):  # fmt: skip
        r, lane = cuda.blockIdx.x * (cuda.blockDim.x >> 5) + warp_index(), lane_index()
        if r < rows:
            total = warp_sum(dot(words, r, scale, low, row, r, stride, x, 0, lane))
            if lane == 0:
                y[r] += factor * (total + bias[r])
        if is_last_block(tickets, 0, cuda.gridDim.x):
            normalize_row(
                y, 0, weight, norm_bias, out, 0, fine_codes, fine_values, coarse_codes, coarse_values,
                rows, padded, eps, np.float32(1), centred, 0, rounded,
            )  # fmt: skip

    return normed_sum


@cache
def activated_kernel(weight_format: WeightFormat) -> Kernel:
    """hidden = act(gate x) * (up x), or act(gate x) without `gated`. Grid: (blocks of 32 neurons, padding too,)."""
    dot = row_product(weight_format)

    @kernel(
        f"{matrix_parameters(weight_format, 'g_')}, float32* g_bias, {matrix_parameters(weight_format, 'u_')},"
        "float32* u_bias, uint32* x, float32* hidden, uint8* codes, float32* values, int32 neurons, int32 stride,"
        "int32 padded, int32 kind, float32 threshold, int32 gated, int32 rounded",
        name=f"activated_{weight_format}",
        launch_bounds=(THREADS, 2),
    )
    def activated(
        g_words, g_scale, g_low, g_row, g_bias, u_words, u_scale, u_low, u_row, u_bias, x, hidden, codes, values,
        neurons, stride, padded, kind, threshold, gated, rounded,
    ):  # fmt: skip
        """With `rounded`, hidden is rounded to 16 bits too, as down reads it: codes and values of `padded` columns."""
        group = cuda.shared.array(GROUP, types.float32)
        first, lane = cuda.blockIdx.x * GROUP, lane_index()
        for k in range(warp_index(), GROUP, cuda.blockDim.x >> 5):
            r = first + k
            value = _ZERO  # of neurons that only fill up a row
            if r < neurons:
                value = warp_sum(dot(g_words, r, g_scale, g_low, g_row, r, stride, x, 0, lane)) + g_bias[r]
                value = activate(value, kind, threshold)
                if gated != 0:
                    up = warp_sum(dot(u_words, r, u_scale, u_low, u_row, r, stride, x, 0, lane)) + u_bias[r]
                    value = up_product(value, up, kind)
            if lane == 0:
                group[k] = value
        cuda.syncthreads()
        if warp_index() == 0:
            hidden[first + lane] = group[lane]
            if rounded != 0:
                store_fine(group[lane], codes, values, 0, padded, first + lane)

    return activated


def multiply_heads(state: State, index: int, layer: LayerWeights, x: Array) -> None:
    """work.qkv of the first row, ready for attention, and its keys and values in the cache of layer `index`.

    x: the normed row, rounded where the matrix takes it so. The three matrices are one (`LayerWeights.qkv`). Not of
    models whose heads have a norm together.
    """
    config, work, cache = state.model.config, state.work, state.cache
    matrix, head_dim = layer.qkv[0].matrix, config.head_dim
    grid = (config.head_count + 2 * config.kv_head_count, -(-head_dim // (HEAD_THREADS // 32)))
    state.device.launch(
        heads_kernel(matrix.format, cache.dtype), grid, HEAD_THREADS, *_parts(matrix), x, work.tickets, work.qkv,
        cache.keys[index], cache.values[index], work.positions, work.sequences, work.block_tables,
        layer.cos, layer.sin, layer.q_norm, layer.k_norm, config.head_count, config.kv_head_count, head_dim,
        matrix.stride, cache.head_stride, work.sizes.blocks, config.norm_eps, config.attention_scale,
        int(config.qk_norm), int(layer.rotated),
    )  # fmt: skip


def multiply_and_normalize(state: State, matrix: Matrix, x: Array, following: Following) -> None:
    """The first row of work.x += residual_scale * (matrix x + bias); then the norm that follows."""
    config, work, norm = state.model.config, state.work, following.norm
    state.device.launch(
        normed_kernel(matrix.format), (-(-matrix.rows // (THREADS // 32)),), THREADS, *_parts(matrix), x, work.x,
        work.tickets, norm.weight, norm.bias, following.out, work.fine, work.fine, work.coarse, work.coarse,
        matrix.rows, matrix.stride, padded_columns(matrix.rows) if following.rounded else matrix.rows, config.norm_eps,
        config.residual_scale, int(config.norm == "layer"), int(following.rounded),
    )  # fmt: skip


def multiply_and_activate(state: State, layer: LayerWeights, x: Array, *, rounded: bool) -> None:
    """work.hidden of the first row; with `rounded` in work.rounded too, as a matrix that takes integers reads it."""
    config, work = state.model.config, state.work
    gate, padded = layer.up if layer.gate is None else layer.gate, work.sizes.ffn
    state.device.launch(
        activated_kernel(gate.format), (padded // GROUP,), THREADS, *_parts(gate), *_parts(layer.up), x, work.hidden,
        work.rounded, work.rounded, config.ffn_size, gate.stride, padded, ACTIVATIONS.index(config.activation),
        config.activation_threshold, int(layer.gate is not None), int(rounded),
    )  # fmt: skip


def _parts(matrix: Matrix) -> tuple[Array, ...]:
    """A matrix with its bias, as kernels take it."""
    return matrix.words, matrix.scale, matrix.low, matrix.row, matrix.bias


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats and both types of cache."""
    for name in KERNELS:
        yield from (heads_kernel(name, "f16"), heads_kernel(name, "f32"), normed_kernel(name), activated_kernel(name))
