"""Scores, gates and ups of predicted neurons in one launch, which lists those that turn out to be active.

A block scores 32 neurons, as kernels/cuda/score.py does, and computes at once the gates of those with positive scores,
a warp each, and the ups where the gate is active (kernels/cuda/gather.py). The last of a row's blocks lists the active
neurons. So no list is written that another kernel has to wait for before it can read weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.chosen import CHOSEN, OWNER, suffix
from svdengine.kernels.cuda.compact import ballot, below, count_neurons, list_masked
from svdengine.kernels.cuda.elementwise import up_product
from svdengine.kernels.cuda.formats.table import KERNELS
from svdengine.kernels.cuda.gather import activate_gate
from svdengine.kernels.cuda.intrinsics import (
    MOST_WARPS,
    Kernel,
    jit,
    kernel,
    lane_index,
    warp_index,
    warp_sum,
)
from svdengine.kernels.cuda.rows import HELD_ROW, neuron_matrix_parameters, row_product
from svdengine.kernels.cuda.score import (
    SCORE_ROWS,
    SCORE_THREADS,
    neuron_score,
    positive_bits,
    predictor_parameters,
)
from svdengine.kernels.formats import WeightFormat

_ZERO, _NONE = np.float32(0), np.int32(0)


@jit(device=True)
def bit_number(mask, k):
    """The place of the bit that has k others below it; by a whole warp."""
    lane = lane_index()
    own = np.uint32(mask >> np.uint32(lane)) & np.uint32(1)
    chosen = ballot(own != 0 and below(mask, lane) == k)
    return np.int32(cuda.popc(np.uint32(chosen - np.uint32(1))))


@cache
def predicted_kernel(
    factors: str, bits: int, weight_format: WeightFormat, split: bool, experts: bool = False
) -> Kernel:
    """Gates and hidden values of the predicted neurons, and a list of the active ones.

    factors, bits: of the predictor, as in kernels/cuda/score.py; split: whether neurons from `hot` on lie in host
    memory; experts: whether rows are pairs of a mixture (kernels/cuda/chosen.py). Grid: (blocks of 32 neurons, rows).
    """
    score_of, dot, held_row = neuron_score(factors, bits), row_product(weight_format), HELD_ROW[split]
    owner = OWNER[experts]

    @kernel(
        f"{predictor_parameters(factors)},"
        f"{neuron_matrix_parameters(weight_format, 'g_')}, float32* g_bias,"
        f"{neuron_matrix_parameters(weight_format, 'u_')}, float32* u_bias,"
        "uint32* gate_x, uint32* masks, int32* tickets, int32* listed, int32* lengths, float32* gates, float32* hidden,"
        f"int64* counts, {CHOSEN}, int32 pitch, int32 gated, int32 hot, int32 kind, float32 least, int32 neurons,"
        "int32 ranks, int32 columns,"
        "int32 z_stride, int32 x_stride, int32 stride, int32 list_stride, int32 mask_stride",
        f"predicted_{factors or 'none'}_{bits}_{weight_format}{suffix(split, experts)}",
        launch_bounds=(SCORE_THREADS, 2),
    )
    def predicted(
        a_words, a_scale, a_low, a_row, q_words, q_scale, minus_threshold, unit, z, x, shift,
        g_words, g_scale, g_low, g_row, g_cold, g_bias, u_words, u_scale, u_low, u_row, u_cold, u_bias,
        gate_x, masks, tickets, listed, lengths, gates, hidden, counts, chosen, weights, per_row, pitch, gated, hot,
        kind, least, neurons, ranks, columns, z_stride, x_stride, stride, list_stride, mask_stride,
    ):  # fmt: skip
        """gates and hidden, by neuron, of a row (blockIdx.y), and the list of those that are active.

        z, x, shift: see `score`; gate_x: what gates and ups are multiplied with, rows of `x_stride` words too. least:
        the activation's threshold. Without `gated` there is no up, and the gate is the hidden value.
        """
        found = cuda.shared.array(MOST_WARPS, types.int32)
        active = cuda.shared.array(SCORE_ROWS, types.int32)
        first, row, lane = cuda.blockIdx.x * SCORE_ROWS, cuda.blockIdx.y, lane_index()
        of_x, block, weight = owner(chosen, weights, per_row, row)
        if cuda.threadIdx.x < SCORE_ROWS:
            active[cuda.threadIdx.x] = _NONE
        end = block * neurons + neurons  # behind the block's last row in the predictor
        value = score_of(
            a_words, a_scale, a_low, a_row, q_words, q_scale, minus_threshold, unit, z, x, shift[of_x],
            block * neurons + first + (cuda.threadIdx.x >> 3), end, ranks, columns, row * z_stride, of_x * x_stride,
        )  # fmt: skip
        mask = positive_bits(value, found)
        count = cuda.popc(mask)
        at, x_at, base = row * list_stride, of_x * x_stride, block * pitch + first
        for k in range(warp_index(), count, SCORE_ROWS // 4):
            place = bit_number(mask, k)
            neuron, r = first + place, base + place
            source, held = held_row(g_words, g_cold, hot, r)
            g = warp_sum(dot(source, held, g_scale, g_low, g_row, r, stride, gate_x, x_at, lane)) + g_bias[r]
            g = activate_gate(g, kind, least)
            if g > _ZERO:  # all lanes have the same sum
                h = g
                if gated != 0:
                    source, held = held_row(u_words, u_cold, hot, r)
                    u = warp_sum(dot(source, held, u_scale, u_low, u_row, r, stride, gate_x, x_at, lane))
                    h = up_product(g, u + u_bias[r], kind)
                if lane == 0:
                    gates[at + neuron] = g
                    hidden[at + neuron] = h * weight
                    active[place] = np.int32(1)
        cuda.syncthreads()
        if warp_index() == 0:
            mask = ballot(active[lane] != _NONE)
            if lane == 0:
                masks[row * mask_stride + cuda.blockIdx.x] = mask
                count_neurons(counts, count, min(SCORE_ROWS, neurons - first))
        if is_last_block(tickets, row, cuda.gridDim.x):
            length = list_masked(masks, row * mask_stride, cuda.gridDim.x, listed, at, found)
            if cuda.threadIdx.x == 0:
                lengths[row] = length

    return predicted


def every_kernel() -> Iterator[Kernel]:
    """Some of those that models may want: every format, and every kind of predictor."""
    for name in KERNELS:
        yield from (predicted_kernel("q8", 0, name, *kind) for kind in ((False,), (True,), (False, True)))
    yield from (predicted_kernel(factors, bits, "f16", False) for factors in ("", "q8", "q4") for bits in (1, 2))
    yield predicted_kernel("", 0, "f16", False)
    yield predicted_kernel("q4", 0, "f16", False)
