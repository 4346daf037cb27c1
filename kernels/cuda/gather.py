"""The listed neurons of an FFN: exact gates, ups where the gate is active, and the sum of their rows of down.

A warp computes a listed neuron's gate and, only where it is active, at once its up. Parts of the list are then cut down
to their active neurons in shared memory and add rows of down, each to a sum of its own, which are added in order later:
the result does not depend on how threads are scheduled. Grids are sized for the longest lists; lengths stay here.

Of a layer that is split (kernels/cuda/memory_split.py) the words of neurons from `hot` on lie in host memory, `cold`,
and are read over the bus where they lie. Kernels for such layers are compiled apart: others know nothing of it. So are
those for mixtures of experts (kernels/cuda/chosen.py), in which each pair of a row and a block has a list of its own,
and `pitch` is how many rows a matrix has from a block to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.chosen import CHOSEN, OWNER, suffix
from svdengine.kernels.cuda.compact import ballot, below
from svdengine.kernels.cuda.elementwise import FATRELU, RELU2, up_product
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.intrinsics import (
    Kernel,
    add_atomic,
    jit,
    kernel,
    lane_index,
    stg128,
    warp_index,
    warp_sum,
)
from svdengine.kernels.cuda.rows import HELD_ROW, neuron_matrix_parameters, row_product
from svdengine.kernels.cuda.workspace import ACTIVE
from svdengine.kernels.formats import WeightFormat

WARPS = 8
GATHER_THREADS = 32 * WARPS
DOWN_THREADS = 128
_ZERO = np.float32(0)
_SOME: tuple[WeightFormat, ...] = ("f32", "q4")


@jit(device=True)
def activate_gate(x, kind, threshold):
    """ReLU and its relatives (for dReLU, of one of its two factors); other activations have no inactive neurons."""
    if kind == FATRELU:
        return x if x > threshold else _ZERO
    x = max(x, _ZERO)
    return x * x if kind == RELU2 else x


@jit(device=True)
def first_of_warp():
    """The first listed neuron of a warp. Neighbours go to different blocks, so that short lists use all."""
    return cuda.blockIdx.x + warp_index() * cuda.gridDim.x


@cache
def gate_kernel(name: WeightFormat, split: bool, experts: bool = False) -> Kernel:
    """gates and hidden = act(gate x) of the listed neurons."""
    dot, held_row, owner = row_product(name), HELD_ROW[split], OWNER[experts]

    @kernel(
        f"{neuron_matrix_parameters(name)}, float32* bias, uint32* x, int32* neurons, int32* lengths, float32* gates,"
        f"float32* hidden, {CHOSEN}, int32 pitch, int32 hot, int32 kind, float32 threshold, int32 stride,"
        "int32 x_stride, int32 list_stride",
        f"gate_{name}{suffix(split, experts)}",
        launch_bounds=(GATHER_THREADS, 2),
    )
    def gate(
        words, scale, low, row, cold, bias, x, neurons, lengths, gates, hidden, chosen, weights, per_row, pitch,
        hot, kind, threshold, stride, x_stride, list_stride,
    ):  # fmt: skip
        """gates and hidden = act(gate x) of the listed neurons of a row (blockIdx.y)."""
        of_x, block, weight = owner(chosen, weights, per_row, cuda.blockIdx.y)
        at, x_at, base = cuda.blockIdx.y * list_stride, of_x * x_stride, block * pitch
        lane = lane_index()
        for k in range(first_of_warp(), lengths[cuda.blockIdx.y], cuda.gridDim.x * WARPS):
            neuron = neurons[at + k]
            r = base + neuron
            source, held = held_row(words, cold, hot, r)
            g = warp_sum(dot(source, held, scale, low, row, r, stride, x, x_at, lane)) + bias[r]
            g = activate_gate(g, kind, threshold)
            if lane == 0:
                gates[at + neuron] = g
                hidden[at + neuron] = g * weight

    return gate


@cache
def up_kernel(name: WeightFormat, split: bool, experts: bool = False) -> Kernel:
    """hidden = gate * (up x) of the listed neurons whose gate is active."""
    dot, held_row, owner = row_product(name), HELD_ROW[split], OWNER[experts]

    @kernel(
        f"{neuron_matrix_parameters(name)}, float32* bias, uint32* x, int32* neurons, int32* lengths, float32* gates,"
        f"float32* hidden, {CHOSEN}, int32 pitch, int32 hot, int32 kind, int32 stride, int32 x_stride,"
        "int32 list_stride",
        f"up_{name}{suffix(split, experts)}",
        launch_bounds=(GATHER_THREADS, 2),
    )
    def up(
        words, scale, low, row, cold, bias, x, neurons, lengths, gates, hidden, chosen, weights, per_row, pitch,
        hot, kind, stride, x_stride, list_stride,
    ):  # fmt: skip
        """hidden = gate * (up x) of the listed neurons whose gate is active; after `gate`, of another format."""
        of_x, block, weight = owner(chosen, weights, per_row, cuda.blockIdx.y)
        at, x_at, base = cuda.blockIdx.y * list_stride, of_x * x_stride, block * pitch
        lane = lane_index()
        for k in range(first_of_warp(), lengths[cuda.blockIdx.y], cuda.gridDim.x * WARPS):
            neuron = neurons[at + k]
            g = gates[at + neuron]
            if g > _ZERO:
                r = base + neuron
                source, held = held_row(words, cold, hot, r)
                u = warp_sum(dot(source, held, scale, low, row, r, stride, x, x_at, lane)) + bias[r]
                if lane == 0:
                    hidden[at + neuron] = up_product(g, u, kind) * weight

    return up


@cache
def gate_up_kernel(name: WeightFormat, split: bool, experts: bool = False) -> Kernel:
    """The work of `gate_kernel` and `up_kernel` for a gate and an up of the same format."""
    dot, held_row, owner = row_product(name), HELD_ROW[split], OWNER[experts]

    @kernel(
        f"{neuron_matrix_parameters(name, 'g_')}, float32* g_bias,"
        f"{neuron_matrix_parameters(name, 'u_')}, float32* u_bias,"
        f"uint32* x, int32* neurons, int32* lengths, float32* gates, float32* hidden, {CHOSEN}, int32 pitch, int32 hot,"
        "int32 kind, float32 threshold, int32 stride, int32 x_stride, int32 list_stride",
        f"gate_up_{name}{suffix(split, experts)}",
        launch_bounds=(GATHER_THREADS, 2),
    )
    def gate_up(
        g_words, g_scale, g_low, g_row, g_cold, g_bias, u_words, u_scale, u_low, u_row, u_cold, u_bias, x,
        neurons, lengths, gates, hidden, chosen, weights, per_row, pitch, hot, kind, threshold, stride, x_stride,
        list_stride,
    ):  # fmt: skip
        """`gate` and `up` in one: the up row of a neuron is read as soon as its gate is known to be active."""
        of_x, block, weight = owner(chosen, weights, per_row, cuda.blockIdx.y)
        at, x_at, base = cuda.blockIdx.y * list_stride, of_x * x_stride, block * pitch
        lane = lane_index()
        for k in range(first_of_warp(), lengths[cuda.blockIdx.y], cuda.gridDim.x * WARPS):
            neuron = neurons[at + k]
            r = base + neuron
            source, held = held_row(g_words, g_cold, hot, r)
            g = warp_sum(dot(source, held, g_scale, g_low, g_row, r, stride, x, x_at, lane)) + g_bias[r]
            g = activate_gate(g, kind, threshold)
            h = _ZERO
            if g > _ZERO:  # all lanes have the same sum
                source, held = held_row(u_words, u_cold, hot, r)
                u = warp_sum(dot(source, held, u_scale, u_low, u_row, r, stride, x, x_at, lane)) + u_bias[r]
                h = up_product(g, u, kind) * weight
            if lane == 0:
                gates[at + neuron] = g
                hidden[at + neuron] = h

    return gate_up


@jit(device=True)
def active_of(neurons, gates, hidden, at, base, k, last, lane, found, values):
    """Put the active ones of 32 listed neurons from k close together in shared memory; returns how many.

    at: where the row begins in gates and hidden, which are by neuron; base: the row of down of neuron 0.
    """
    neuron = np.int32(0)
    inside = k + lane < last
    if inside:
        neuron = neurons[k + lane]
        inside = gates[at + neuron] > _ZERO
    mask = ballot(inside)
    if inside:
        to = below(mask, lane)
        found[to] = base + neuron
        values[to] = hidden[at + neuron]
    return np.int32(cuda.popc(mask))


@cache
def down_kernel(name: WeightFormat, split: bool, experts: bool = False) -> Kernel:
    """partial = sums of hidden times rows of down over parts of the lists."""
    kernels, held_row, owner = kernels_of(name), HELD_ROW[split], OWNER[experts]
    load, add, column_of, nothing = kernels.load_chunk, kernels.add_chunk, kernels.column_of, kernels.nothing
    columns, chunk_words, fours = kernels.chunk_columns, kernels.chunk_words, kernels.chunk_columns // 4
    finish = kernels.finish

    @kernel(
        f"{neuron_matrix_parameters(name)}, int32* neurons, int32* lengths, float32* gates, float32* hidden,"
        f"float32* partial, int64* counts, {CHOSEN}, int32 pitch, int32 hot, int32 stride, int32 list_stride",
        f"down_{name}{suffix(split, experts)}",
        launch_bounds=(DOWN_THREADS, 4),
    )
    def down(
        words, scale, low, row, cold, neurons, lengths, gates, hidden, partial, counts, chosen, weights, per_row, pitch,
        hot, stride, list_stride,
    ):  # fmt: skip
        """The sum of hidden times down's rows, of one part (blockIdx.y of gridDim.y) of the list of a row (blockIdx.z).

        partial: (rows, parts, stride). Each thread has a chunk of columns; blockIdx.x numbers the blocks of them, of
        which the first counts active neurons into `counts`, (COUNTS,) of the layer.
        """
        found = cuda.shared.array(32, types.int32)
        values = cuda.shared.array(32, types.float32)
        size_found = cuda.shared.array(1, types.int32)
        lane, parts = lane_index(), cuda.gridDim.y
        j, count = cuda.blockIdx.x * DOWN_THREADS + cuda.threadIdx.x, stride // columns
        _, block, _ = owner(chosen, weights, per_row, cuda.blockIdx.z)
        at, base = cuda.blockIdx.z * list_stride, block * pitch
        length = lengths[cuda.blockIdx.z]
        size = (length + parts - 1) // parts
        first = at + min(cuda.blockIdx.y * size, length)
        last = at + min((cuda.blockIdx.y + 1) * size, length)
        total, row_words = nothing, chunk_words * count
        for k in range(first, last, 32):
            if warp_index() == 0:
                kept = active_of(neurons, gates, hidden, at, base, k, last, lane, found, values)
                if lane == 0:
                    size_found[0] = kept
                    if cuda.blockIdx.x == 0:
                        add_atomic(counts, ACTIVE, kept)
            cuda.syncthreads()
            kept = size_found[0]
            if j < count:
                for i in range(0, kept - 3, 4):  # four loads are on their way at once
                    r0, r1, r2, r3 = found[i], found[i + 1], found[i + 2], found[i + 3]
                    s0, h0 = held_row(words, cold, hot, r0)
                    s1, h1 = held_row(words, cold, hot, r1)
                    s2, h2 = held_row(words, cold, hot, r2)
                    s3, h3 = held_row(words, cold, hot, r3)
                    w0 = load(s0, h0 * row_words, j)
                    w1 = load(s1, h1 * row_words, j)
                    w2 = load(s2, h2 * row_words, j)
                    w3 = load(s3, h3 * row_words, j)
                    total = add(total, values[i], w0, scale, low, row, r0, stride, j)
                    total = add(total, values[i + 1], w1, scale, low, row, r1, stride, j)
                    total = add(total, values[i + 2], w2, scale, low, row, r2, stride, j)
                    total = add(total, values[i + 3], w3, scale, low, row, r3, stride, j)
                for i in range(kept >> 2 << 2, kept):
                    source, held = held_row(words, cold, hot, found[i])
                    w = load(source, held * row_words, j)
                    total = add(total, values[i], w, scale, low, row, found[i], stride, j)
            cuda.syncthreads()
        if j < count:
            out, found_sums = (cuda.blockIdx.z * parts + cuda.blockIdx.y) * stride, finish(total)
            for k in range(fours):
                t = found_sums[k]
                stg128(partial, out + column_of(j, k), t[0], t[1], t[2], t[3])

    return down


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats, of layers that are split, of others, and of mixtures of experts.

    Of these, gates and ups apart are rare, and some stand for all.
    """
    for make in (gate_kernel, up_kernel, gate_up_kernel, down_kernel):
        yield from (make(name, split) for name in KERNELS for split in (False, True))
    yield from (make(name, False, True) for make in (gate_up_kernel, down_kernel) for name in KERNELS)
    yield from (make(name, False, True) for make in (gate_kernel, up_kernel) for name in _SOME)
