"""Predictor scores (kernels/predictor.py): integer products of stored rows with rounded activations (rounding.py)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.chosen import CHOSEN, OWNER, suffix
from svdengine.kernels.cuda.compact import ballot, count_neurons, list_masked
from svdengine.kernels.cuda.integer_dot import dot_16, dot_bytes
from svdengine.kernels.cuda.intrinsics import (
    FULL,
    MOST_WARPS,
    Kernel,
    as_float,
    dp4a,
    jit,
    kernel,
    lane_index,
    ldg64,
    ldg128,
    warp_index,
    warp_sum,
)
from svdengine.kernels.cuda.rounding import ROUND_THREADS, store_coarse, store_fine
from svdengine.kernels.cuda.rows import matrix_parameters
from svdengine.kernels.formats import WeightFormat

LANES = 8  # that share a row of the second factor and of the residual, which are short
SCORE_THREADS = 256
SCORE_ROWS = SCORE_THREADS // LANES  # neurons of a block
PROJECT_THREADS = 1024  # a warp for each of the 32 hidden values that share a scale
_ZERO, _HALF, _NONE = np.float32(0), np.float32(0.5), np.int32(0)
_NIBBLES, _PAIRS, _BITS = np.uint32(0x0F0F0F0F), np.uint32(0x03030303), np.uint32(0x01010101)
_SPREAD = np.uint32(0x00204081)  # times four bits: bit k goes to bit 8 k


@kernel(
    "float32* x, uint8* fine_codes, float32* fine_values, uint8* coarse_codes, float32* coarse_values,"
    "int32 columns, int32 padded, int32 stride"
)
def round_rows(x, fine_codes, fine_values, coarse_codes, coarse_values, columns, padded, stride):
    """Round rows (blockIdx.y) of x to 16 and to 8 bits. All have rows of `stride` items; a warp has 32 columns."""
    column = cuda.blockIdx.x * ROUND_THREADS + cuda.threadIdx.x
    at = cuda.blockIdx.y * stride
    if column >= padded:  # whole warps: padded is a multiple of 32
        return
    value = x[at + column] if column < columns else _ZERO
    store_fine(value, fine_codes, fine_values, at, padded, column)
    store_coarse(value, coarse_codes, coarse_values, at, padded, column)


@jit(device=True)
def dot_masked(w, shift, mask, x, at, total):
    """total + the codes under the mask in every byte, `shift` bits up, times the 8-bit values in four words."""
    codes = (w[0] >> shift) & mask, (w[1] >> shift) & mask, (w[2] >> shift) & mask, (w[3] >> shift) & mask
    return dot_bytes(codes, x, at, total)


@jit(device=True)
def factor_q8(words, scale, low, row, r, padded, x, at, lane, lanes):
    """One lane's share of row r, q8, times a rounded row of 16 bits that begins at word `at` of x."""
    count = padded >> 4
    total = _ZERO
    for j in range(lane, count, lanes):
        both = dot_16(ldg128(words, r * (4 * count) + 4 * j), x, at + 8 * j)
        step = as_float(x[at + (padded >> 1) + (j - (j & 1))])
        total += np.float32(both) * (step * np.float32(scale[r * (padded >> 5) + (j >> 1)]))
    return total


@jit(device=True)
def factor_q4(words, scale, low, row, r, padded, x, at, lane, lanes):
    """As `factor_q8`, of a row in q4. A lane has half of two groups, and takes off half of their minima's part."""
    count, groups = padded >> 5, padded >> 5
    total = _ZERO
    for j in range(lane, count, lanes):
        w = ldg128(words, r * (4 * count) + 4 * j)
        group = j >> 1 << 1
        codes = at + 16 * group + 8 * (j & 1)
        below = w[0] & _NIBBLES, w[1] & _NIBBLES, w[2] & _NIBBLES, w[3] & _NIBBLES
        four = np.uint32(4)
        above = (
            (w[0] >> four) & _NIBBLES,
            (w[1] >> four) & _NIBBLES,
            (w[2] >> four) & _NIBBLES,
            (w[3] >> four) & _NIBBLES,
        )
        values, scales = ldg128(x, at + (padded >> 1) + 2 * group), r * groups + group  # steps and sums
        product = np.float32(dot_16(below, x, codes)) * (as_float(values[0]) * np.float32(scale[scales]))
        product += np.float32(dot_16(above, x, codes + 16)) * (as_float(values[2]) * np.float32(scale[scales + 1]))
        minimum = as_float(values[1]) * np.float32(low[scales]) + as_float(values[3]) * np.float32(low[scales + 1])
        total += row[2 * r] * product - (_HALF * row[2 * r + 1]) * minimum
    return total


@jit(device=True)
def no_factor(words, scale, low, row, r, padded, x, at, lane, lanes):
    """Of a predictor without factors."""
    return _ZERO


@jit(device=True)
def residual_2(words, scale, r, padded, x, at, lane, lanes):
    """One lane's share of row r of a residual of 2 bits times a rounded row of 8 bits."""
    blocks, scales = padded >> 6, at + (padded >> 1)
    total = _ZERO
    for j in range(lane, blocks, lanes):
        w = ldg128(words, r * (4 * blocks) + 4 * j)
        first = dot_masked(w, np.uint32(0), _PAIRS, x, at + 16 * j, _NONE)
        first = dot_masked(w, np.uint32(2), _PAIRS, x, at + 16 * j + 4, first)
        second = dot_masked(w, np.uint32(4), _PAIRS, x, at + 16 * j + 8, _NONE)
        second = dot_masked(w, np.uint32(6), _PAIRS, x, at + 16 * j + 12, second)
        values = ldg128(x, scales + 4 * j)  # steps and sums
        product = np.float32(first) * as_float(values[0]) + np.float32(second) * as_float(values[2])
        product -= np.float32(1.5) * (as_float(values[1]) + as_float(values[3]))
        total += np.float32(scale[r * blocks + j]) * product
    return total


@jit(device=True)
def dot_bits(word, x, at):
    """The 32 bits of a word times the 8-bit values in eight words from `at`."""
    total = _NONE
    for k in range(2):
        a = ldg128(x, at + 4 * k)
        for i in range(4):
            four = np.uint32(word >> np.uint32(16 * k + 4 * i)) & np.uint32(15)
            total = dp4a(np.uint32(four * _SPREAD) & _BITS, a[i], total)
    return total


@jit(device=True)
def residual_1(words, scale, r, padded, x, at, lane, lanes):
    """As `residual_2`, of 1 bit."""
    blocks, scales = padded >> 6, at + (padded >> 1)
    total = _ZERO
    for j in range(lane, blocks, lanes):
        w = ldg64(words, r * (2 * blocks) + 2 * j)
        first, second = dot_bits(w[0], x, at + 16 * j), dot_bits(w[1], x, at + 16 * j + 8)
        values = ldg128(x, scales + 4 * j)  # steps and sums
        product = np.float32(first) * as_float(values[0]) + np.float32(second) * as_float(values[2])
        product -= np.float32(0.5) * (as_float(values[1]) + as_float(values[3]))
        total += np.float32(scale[r * blocks + j]) * product
    return total


@jit(device=True)
def no_residual(words, scale, r, padded, x, at, lane, lanes):
    """Of a predictor without residual."""
    return _ZERO


FACTORS = {"": no_factor, "q8": factor_q8, "q4": factor_q4}
RESIDUALS = {0: no_residual, 1: residual_1, 2: residual_2}


def _project(name, dot, experts=False):
    owner = OWNER[experts]

    @kernel(
        f"{matrix_parameters(name)}, uint32* x, uint8* codes, float32* values, {CHOSEN},"
        "int32 rank, int32 relu, int32 padded, int32 stride, int32 z_stride",
        f"project_{name}{suffix(False, experts)}",
        launch_bounds=PROJECT_THREADS,
    )
    def project(
        words, scale, low, row, x, codes, values, chosen, weights, per_row, rank, relu, padded, stride, z_stride
    ):  # fmt: skip
        """z = B x of 32 hidden values (blockIdx.x) of a row (blockIdx.y), or its ReLU, rounded for the second factor.

        x: rows of `stride` words, rounded, of `padded` columns; codes, values: the same rows of z, of `z_stride` words.
        """
        group = cuda.shared.array(32, types.float32)
        of_x, block, _ = owner(chosen, weights, per_row, cuda.blockIdx.y)
        r, lane = cuda.blockIdx.x * 32 + warp_index(), lane_index()
        z = _ZERO  # of rows that only fill up a group
        if r < rank:
            z = warp_sum(dot(words, scale, low, row, block * rank + r, padded, x, of_x * stride, lane, 32))
        if lane == 0:
            group[warp_index()] = max(z, _ZERO) if relu != 0 else z
        cuda.syncthreads()
        if warp_index() == 0:
            columns = ((rank + 63) >> 6) << 6
            store_fine(group[lane], codes, values, cuda.blockIdx.y * z_stride, columns, cuda.blockIdx.x * 32 + lane)

    return project


@jit(device=True)
def positive_bits(value, found):
    """The bits of a block's 32 neurons whose scores are positive, in every thread; a score lies in every eighth lane.

    found: int32 in shared memory, one for each warp; it must not be written again before the block has met.
    """
    bits = ballot(value > _ZERO)
    # Four neurons a warp: their bits stand at lanes 0, 8, 16 and 24.
    if lane_index() == 0:
        found[warp_index()] = np.int32((bits & 1) | (bits >> 7 & 2) | (bits >> 14 & 4) | (bits >> 21 & 8))
    cuda.syncthreads()
    mask = np.uint32(0)
    for warp in range(SCORE_ROWS // 4):
        mask = np.uint32(mask | np.uint32(np.uint32(found[warp]) << np.uint32(4 * warp)))
    return mask


@cache
def neuron_score(factors: str, bits: int) -> Any:
    """score(...) of the neuron that this thread's eight lanes share: A z + Q x - threshold - shift * unit.

    The first lane has it; others have 0, and all have past the last neuron.
    """
    dot, residual = FACTORS[factors], RESIDUALS[bits]

    @jit(device=True)
    def score_of(
        a_words, a_scale, a_low, a_row, q_words, q_scale, minus_threshold, unit, z, x, shift,
        r, neurons, ranks, columns, z_at, x_at,
    ):  # fmt: skip
        lane = cuda.threadIdx.x & 7
        neuron = min(r, neurons - 1)  # every lane takes part in the sums
        total = dot(a_words, a_scale, a_low, a_row, neuron, ranks, z, z_at, lane, LANES)
        total += residual(q_words, q_scale, neuron, columns, x, x_at, lane, LANES)
        total += cuda.shfl_xor_sync(FULL, total, 4)
        total += cuda.shfl_xor_sync(FULL, total, 2)
        total += cuda.shfl_xor_sync(FULL, total, 1)
        return total + (minus_threshold[neuron] - shift * unit[neuron]) if lane == 0 and r < neurons else _ZERO

    return score_of


@cache
def score_kernel(name: str, bits: int, experts: bool = False) -> Kernel:
    """Scores of neurons, and a list of those that are positive. Grid: (blocks of 32 neurons, rows)."""
    score_of, owner = neuron_score(name, bits), OWNER[experts]

    @kernel(
        f"{predictor_parameters(name)}, float32* scores, uint32* masks, int32* tickets,"
        f"int32* listed, int32* lengths, int64* counts, {CHOSEN}, int32 neurons, int32 ranks, int32 columns,"
        "int32 z_stride, int32 x_stride, int32 score_stride, int32 mask_stride",
        f"score_{name or 'none'}_{bits}{suffix(False, experts)}",
    )
    def score(
        a_words, a_scale, a_low, a_row, q_words, q_scale, minus_threshold, unit, z, x, shift, scores, masks, tickets,
        listed, lengths, counts, chosen, weights, per_row, neurons, ranks, columns, z_stride, x_stride, score_stride,
        mask_stride,
    ):  # fmt: skip
        """Scores of 32 neurons (blockIdx.x) of a row (blockIdx.y).

        z, x: rounded rows of `ranks` and `columns` columns, padded; shift: the sparsity bias of each row. The last of a
        row's blocks to be done lists the neurons with positive scores: see `list_masked`.
        """
        found = cuda.shared.array(MOST_WARPS, types.int32)
        r, batch_row = cuda.blockIdx.x * SCORE_ROWS + (cuda.threadIdx.x >> 3), cuda.blockIdx.y
        of_x, block, _ = owner(chosen, weights, per_row, batch_row)
        base = block * neurons
        value = score_of(
            a_words, a_scale, a_low, a_row, q_words, q_scale, minus_threshold, unit, z, x, shift[of_x],
            base + r, base + neurons, ranks, columns, batch_row * z_stride, of_x * x_stride,
        )  # fmt: skip
        if cuda.threadIdx.x & 7 == 0 and r < neurons:
            scores[batch_row * score_stride + r] = value
        mask = positive_bits(value, found)
        if cuda.threadIdx.x == 0:
            masks[batch_row * mask_stride + cuda.blockIdx.x] = mask
        if is_last_block(tickets, batch_row, cuda.gridDim.x):
            length = list_masked(
                masks, batch_row * mask_stride, cuda.gridDim.x, listed, batch_row * score_stride, found
            )  # fmt: skip
            if cuda.threadIdx.x == 0:
                lengths[batch_row] = length
                count_neurons(counts, length, neurons)

    return score


def predictor_parameters(factors: str) -> str:
    """The parameters of a kernel that are a layer of a predictor, and what it reads."""
    stored: WeightFormat = "q4" if factors == "q4" else "q8"
    return (
        f"{matrix_parameters(stored, 'a_')}, uint32* q_words, float16* q_scale, float32* minus_threshold,"
        "float32* unit, uint32* z, uint32* x, float32* shift"
    )


# By format, and whether the model is a mixture of experts.
PROJECT = {
    (name, experts): _project(name, dot, experts)
    for name, dot in (("q8", factor_q8), ("q4", factor_q4))
    for experts in (False, True)
}


def every_kernel() -> Iterator[Kernel]:
    """Every kind of predictor, and of mixtures of experts some."""
    yield from (score_kernel(factors, bits) for factors in FACTORS for bits in RESIDUALS)
    yield from (score_kernel("q8", 2, True), score_kernel("", 1, True))
