"""Pairs of rows and FFN blocks (kernels/cuda/chosen.py), sorted by block, so that a block multiplies all its rows.

A pair keeps its order among those of its block, and what a row gets is added up in the order of its blocks: neither
depends on how threads are scheduled, nor on the rows beside it.
"""

from __future__ import annotations

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.chosen import GROUP, row_of
from svdengine.kernels.cuda.compact import ballot, below
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.elementwise import activated
from svdengine.kernels.cuda.intrinsics import FULL, MOST_WARPS, jit, kernel, lane_index, warp_index
from svdengine.kernels.cuda.workspace import Workspace

THREADS = 256
Groups = tuple[Array, int]  # a list of tiles, and for how many it has room
_NONE, _ZERO = np.int32(0), np.float32(0)
_COUNTS = 2 * MOST_WARPS


@jit(device=True)
def cut_into_tiles(starts, groups, at, blocks, width, slots, lane):
    """Tiles of up to `width` pairs of a block each, from item `at` of groups on, of which there are `slots`; by a warp.

    starts: (blocks + 1,), where the pairs of each block begin. Tiles that are not in use are empty.
    """
    before = _NONE
    for first in range(0, blocks, 32):
        block = first + lane
        begin = starts[min(block, blocks)]
        end = starts[min(block + 1, blocks)]
        count = np.int32((end - begin + width - 1) // width)
        place = count  # and of the lanes below
        for k in range(5):
            below_lane = cuda.shfl_up_sync(FULL, place, 1 << k)
            place = np.int32(place + (below_lane if lane >= 1 << k else 0))
        total = cuda.shfl_sync(FULL, place, 31)
        for i in range(count):
            to = at + GROUP * (before + place - count + i)
            groups[to] = np.int32(block)
            groups[to + 1] = np.int32(begin + i * width)
            groups[to + 2] = np.int32(min(begin + (i + 1) * width, end))
        before = np.int32(before + total)
    for i in range(before + lane, slots, 32):
        groups[at + GROUP * i + 1] = _NONE
        groups[at + GROUP * i + 2] = _NONE


@kernel(
    "int32* chosen, int32* order, int32* places, int32* starts, int32* groups, int32* tickets, int32 pairs,"
    "int32 width, int32 slots, int32 second_width, int32 second_slots"
)
def group_pairs(chosen, order, places, starts, groups, tickets, pairs, width, slots, second_width, second_slots):
    """Sort the pairs by the block that each has `chosen`, and cut those of a block into tiles. Grid: (blocks,).

    order: the pairs, sorted; places: where each of them is; groups: tiles of `width` pairs, and behind them others of
    `second_width`. The pairs of a row have different blocks.
    """
    counts = cuda.shared.array(_COUNTS, types.int32)
    block, lane, warp, warps = cuda.blockIdx.x, lane_index(), warp_index(), cuda.blockDim.x >> 5
    stretch = (pairs + 32 * warps - 1) // (32 * warps) * 32  # pairs of a warp
    first, last = warp * stretch, min((warp + 1) * stretch, pairs)
    less, equal = _NONE, _NONE
    for p in range(first, last, 32):
        own = chosen[p + lane] if p + lane < last else np.int32(1 << 30)
        less = np.int32(less + cuda.popc(ballot(own < block)))
        equal = np.int32(equal + cuda.popc(ballot(own == block)))
    if lane == 0:
        counts[warp] = less
        counts[MOST_WARPS + warp] = equal
    cuda.syncthreads()
    start, before = _NONE, _NONE
    for w in range(warps):
        start = np.int32(start + counts[w])
        before = np.int32(before + (counts[MOST_WARPS + w] if w < warp else 0))
    if cuda.threadIdx.x == 0:
        starts[block] = start
        if block == 0:
            starts[cuda.gridDim.x] = pairs
    before = np.int32(before + start)
    for p in range(first, last, 32):
        own = p + lane < last and chosen[min(p + lane, last - 1)] == block
        mask = ballot(own)
        if own:
            place = before + below(mask, lane)
            order[place] = np.int32(p + lane)
            places[p + lane] = np.int32(place)
        before = np.int32(before + cuda.popc(mask))
    if is_last_block(tickets, 0, cuda.gridDim.x):
        if warp == 0:
            cut_into_tiles(starts, groups, 0, cuda.gridDim.x, width, slots, lane)
        if warp == min(1, warps - 1):
            cut_into_tiles(starts, groups, GROUP * slots, cuda.gridDim.x, second_width, second_slots, lane)


@kernel("uint32* x, int32* order, uint32* to, int32 per_row, int32 words, int32 stride")
def gather_rows(x, order, to, per_row, words, stride):
    """to: the row of x of each sorted pair (blockIdx.y), `words` of `stride` words, which both have."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < words:
        to[cuda.blockIdx.y * stride + i] = x[row_of(order[cuda.blockIdx.y], per_row) * stride + i]


@kernel(
    "float32* gate_up, float32* hidden, int32* order, float32* weights, int32 ffn, int32 from_stride, int32 to_stride,"
    " int32 kind, int32 gated, float32 threshold"
)
def activate_pairs(gate_up, hidden, order, weights, ffn, from_stride, to_stride, kind, gated, threshold):
    """hidden of sorted pairs (blockIdx.y), as `activate_rows` has it, times the weight of each."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i >= ffn:
        return
    pair = cuda.blockIdx.y
    value = activated(gate_up, pair * from_stride + i, ffn, kind, gated, threshold)
    hidden[pair * to_stride + i] = value * weights[order[pair]]


@kernel(
    "float32* partial, int32* places, float32* x, int32 columns, int32 stride, int32 parts, int32 per_row,"
    " float32 factor"
)
def add_pairs(partial, places, x, columns, stride, parts, per_row, factor):
    """x (n, stride) += factor * the parts of all pairs of each row (blockIdx.y): partial is (pairs, parts, stride)."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i >= columns:
        return
    row, total = cuda.blockIdx.y, _ZERO
    for k in range(per_row):
        at = places[row * per_row + k] * parts
        for part in range(parts):
            total += partial[(at + part) * stride + i]
    x[row * stride + i] += factor * total


def slots_of(pairs: int, blocks: int, width: int) -> int:
    """Tiles of `width` pairs that there are at most."""
    return pairs // width + min(blocks, pairs)


def group(
    device: Device, work: Workspace, n: int, per_row: int, blocks: int, widths: tuple[int, int]
) -> tuple[Groups, Groups]:
    """Sort the pairs of n rows, and cut those of a block into tiles of each width: two lists of tiles."""
    if n == 1:  # the router has done it: each pair is alone, whatever the width
        return (work.groups, per_row), (work.groups, per_row)
    pairs = n * per_row
    first, second = (slots_of(pairs, blocks, width) for width in widths)
    device.launch(
        group_pairs, (blocks,), THREADS, work.blocks, work.order, work.places, work.starts, work.groups, work.tickets,
        pairs, widths[0], first, widths[1], second,
    )  # fmt: skip
    return (work.groups, first), (work.groups[GROUP * first :], second)
