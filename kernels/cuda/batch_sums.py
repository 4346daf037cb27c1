"""Sums of a neuron-major matrix's rows, weighted for a few dozen rows of activations, on tensor cores.

The matrix is down stored as one row a neuron, in a format whose groups have steps. A warp has 64 columns, and goes
through 16 neurons at a time. Levels of weights are exact in bfloat16. A step belongs to a neuron here, along which sums
go, so that it is multiplied into the activations, for each group of 32 columns anew; these products are split into two
bfloat16, which are 16 bits of them. Leasts are summed up apart, and taken off in the end.

What a warp reads comes by asynchronous copies to memory of its own, several turns ahead, as in batch_products.py. Warps
of a block share out the neurons of a part, and add up what they have; parts are added up afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.byte_pairs import split_pair
from svdengine.kernels.cuda.chosen import GROUPS, TILE_OF, suffix
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.formats.tiles import TILE_COLUMNS, TILE_ROWS, TileKernels, piece_place
from svdengine.kernels.cuda.intrinsics import (
    FULL,
    Kernel,
    as_float,
    as_word,
    jit,
    kernel,
    lane_index,
    unrolled,
    warp_index,
)
from svdengine.kernels.cuda.model import Matrix
from svdengine.kernels.cuda.rows import matrix_parameters
from svdengine.kernels.cuda.tensor_cores import (
    close_group,
    copy_async,
    copy_word_async,
    load_two,
    load_words,
    mma_bf16,
    store_words,
    waiting_for_all_but,
)
from svdengine.kernels.cuda.workspace import parts_of
from svdengine.kernels.formats import FORMATS, WeightFormat

THREADS = 128
_WARPS = THREADS // 32
TILES = (1, 2)  # of 8 rows of activations that a block has
_X_ROWS = 8
TURNS = 4  # for which there is room: all but the one that is computed are on their way
_HIDDEN_PITCH = 24  # words of a row of activations, of which 16 are copied: four rows' 8 bytes are in different banks
_SCALES = 4  # step and least of a neuron's two groups
LEAST_NEURONS = 64  # of a part
_ZERO = np.float32(0)


def takes_sums(matrix: Matrix) -> bool:
    """Whether there is a kernel here for a matrix."""
    made = kernels_of(matrix.format).tiles
    return made is not None and made.levels is not None and matrix.rows >= TILE_ROWS


@dataclass(frozen=True)
class Room:
    """A warp's shared memory, in words: what turns copy, and behind that steps and leasts of the neurons of one."""

    pitch: int  # of a neuron's 64 columns
    columns: int  # rows of activations

    @property
    def hidden(self) -> int:
        """Where in a turn the activations begin."""
        return TILE_ROWS * self.pitch

    @property
    def turn(self) -> int:
        """All that a turn copies."""
        return self.hidden + self.columns * _HIDDEN_PITCH

    @property
    def scales(self) -> int:
        """Where steps and leasts lie."""
        return TURNS * self.turn

    @property
    def words(self) -> int:
        """All of a warp."""
        return max(self.scales + TILE_ROWS * _SCALES, self.columns * (TILE_COLUMNS + 2))  # or its sums in the end


def room_of(weight_format: WeightFormat, tiles: int) -> Room:
    """The room of a kernel."""
    return Room(FORMATS[weight_format].row_bytes(TILE_COLUMNS) // 4, tiles * _X_ROWS)


def _copies(room: Room) -> Any:
    """fetch(to, ring, first, source): begin to copy 16 neurons from `first`, or the last 16, and what they weigh.

    Neurons are numbered by rows of the matrix; `base` in source is the first of those that hidden has.
    """
    pitch, columns, codes = room.pitch, room.columns, room.hidden
    pieces = pitch // 4
    at_once = 1 << (32 // pieces).bit_length() - 1  # neurons of which a warp copies all pieces at once
    copied = min(at_once, TILE_ROWS)
    place, some_lanes = piece_place(pieces), pieces * copied

    @jit(device=True, forceinline=True)
    def copy_weights(i, to, ring, words, first, row_words, column_words):
        r = np.int32(np.uint32(lane_index()) // np.uint32(pieces))
        p = np.int32(lane_index() - r * pieces)
        at = np.int32(to + r * pitch + 4 * place(r, p) + i * copied * pitch)
        source = np.int32(r * row_words + column_words + 4 * p)  # 32 bits hold what lies in a matrix
        copy_async(ring, at, words, source, np.int32((first + i * copied) * row_words))

    @jit(device=True, forceinline=True)
    def copy_hidden(i, to, ring, hidden, first, b, n, hidden_stride):
        k, of_x = np.int32(lane_index() & 15), np.int32((lane_index() >> 4) + 2 * i)
        at = np.int32(to + codes + of_x * _HIDDEN_PITCH + k)
        copy_word_async(ring, at, hidden, np.int32(min(np.int32(b + of_x), np.int32(n - 1)) * hidden_stride + k), first)

    copy_all_weights, copy_all_hidden = unrolled(copy_weights, TILE_ROWS // copied), unrolled(copy_hidden, columns // 2)

    @jit(device=True, forceinline=True)
    def fetch(to, ring, first, source):
        words, hidden, most, row_words, column_words, b, n, hidden_stride, base = source
        first = min(np.int32(first), most)
        if some_lanes == 32 or lane_index() < some_lanes:
            copy_all_weights(0, to, ring, words, first, row_words, column_words)
        copy_all_hidden(0, to, ring, hidden, np.int32(first - base), b, n, hidden_stride)

    return fetch


def _sums(made: TileKernels, room: Room) -> Any:
    """add(at, ring, scales_at, u, a, scales, sums, lows): add what 16 neurons at word `at` give."""
    levels, as_numbers, shifted, codes = made.levels, made.as_numbers, made.shifted, room.hidden

    @jit(device=True, forceinline=True)
    def convert(i, u, a):
        """Word i of `u`, as operands of two tiles of 16 columns each: even ones, and odd ones."""
        even, odd = as_numbers(u[i])
        to = 8 * (i >> 2) + (i & 1) * 2 + (i >> 1 & 1)
        a[to], a[to + 4] = even, odd

    @jit(device=True, forceinline=True)
    def take_scales(i, ring, at, scales):
        """Steps and leasts of the i-th of this lane's four neurons."""
        four = load_words(ring, at + _SCALES * (2 * (lane_index() & 3) + (i & 1) + 8 * (i >> 1)))
        for k in range(_SCALES):
            scales[_SCALES * i + k] = as_float(four[k])

    @jit(device=True, forceinline=True)
    def add_columns(k, tile, group, high, low, a, sums):
        """Add to the sums of 16 columns, of every two one."""
        at, i = 8 * group + 4 * k, (tile * 4 + 2 * group + k) * 4
        c = mma_bf16(
            a[at], a[at + 1], a[at + 2], a[at + 3], high[0], high[1], sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
        )
        c = mma_bf16(a[at], a[at + 1], a[at + 2], a[at + 3], low[0], low[1], c[0], c[1], c[2], c[3])
        sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = c[0], c[1], c[2], c[3]

    @jit(device=True, forceinline=True)
    def add_group(group, tile, first, second, a, scales, sums, lows):
        """first, second: activations of this lane's neurons, two and two."""
        at = 2 * group
        near = split_pair(first[0] * scales[at], first[1] * scales[_SCALES + at])
        far = split_pair(second[0] * scales[2 * _SCALES + at], second[1] * scales[3 * _SCALES + at])
        high, low = (near[0], far[0]), (near[1], far[1])
        add_columns(0, tile, group, high, low, a, sums)
        add_columns(1, tile, group, high, low, a, sums)
        if shifted:
            least = first[0] * scales[at + 1] + first[1] * scales[_SCALES + at + 1]
            least += second[0] * scales[2 * _SCALES + at + 1] + second[1] * scales[3 * _SCALES + at + 1]
            lows[2 * tile + group] += least

    @jit(device=True, forceinline=True)
    def add_tile(tile, at, ring, a, scales, sums, lows):
        row = at + codes + (tile * _X_ROWS + (lane_index() >> 2)) * _HIDDEN_PITCH + 2 * (lane_index() & 3)
        first, second = load_two(ring, row), load_two(ring, row + 8)
        near, far = (as_float(first[0]), as_float(first[1])), (as_float(second[0]), as_float(second[1]))
        add_group(0, tile, near, far, a, scales, sums, lows)
        add_group(1, tile, near, far, a, scales, sums, lows)

    convert_all, take_all, add_all = (
        unrolled(convert, 8),
        unrolled(take_scales, 4),
        unrolled(add_tile, room.columns // 8),
    )

    @jit(device=True, forceinline=True)
    def add(at, ring, scales_at, u, a, scales, sums, lows):
        levels(ring, at, u)
        convert_all(0, u, a)
        take_all(0, ring, scales_at, scales)
        add_all(0, at, ring, a, scales, sums, lows)

    return add


@cache
def sums_kernel(weight_format: WeightFormat, tiles: int, experts: bool = False) -> Kernel:
    """partial (n, parts, stride) of sums over neurons of hidden (n, ...) times their rows.

    There are 16 neurons or more. `tiles` * 8 rows of n a block. Grid: (blocks of 64 columns * tiles of n, parts). The
    tiles that read the same weights are neighbours. experts: rows of hidden are sorted pairs (kernels/cuda/chosen.py),
    and `neurons` those of an FFN block.
    """
    made, room, tile_of = kernels_of(weight_format).tiles, room_of(weight_format, tiles), TILE_OF[experts]
    assert made is not None
    fetch, add = _copies(room), _sums(made, room)
    units_of, scales_of, second_unit = made.units, made.scales, np.float32(made.second_unit)
    columns, turn_words, warp_words, scales_at = room.columns, room.turn, room.words, room.scales
    all_words, sum_items, tile_words, wide = _WARPS * warp_words, tiles * 16, room.pitch, TILE_COLUMNS + 2
    wait_for_turn = waiting_for_all_but(TURNS - 2)
    at_once, low_items, scale_items = TILE_ROWS * _WARPS, 2 * tiles, 4 * _SCALES  # at_once: neurons of a block's turn

    @jit(device=True, forceinline=True)
    def scales_of_row(first, own):
        """Steps and leasts of this lane's neuron of those that are copied: nothing of those before `first`."""
        row, scale, low, most, groups, column = own
        r = np.int32(min(np.int32(first), most) + (lane_index() & 15))
        s = scales_of(scale, low, units_of(row, r), np.int32(r * groups + column))
        mask = np.uint32(np.int32(first - 1 - r) >> 31)  # so made, loads do not wait for a branch
        return as_word(s[0]) & mask, as_word(s[1]) & mask, as_word(s[2] * second_unit) & mask, as_word(s[3]) & mask

    @jit(device=True, forceinline=True)
    def keep_scales(ring, to, found):
        if lane_index() < TILE_ROWS:
            store_words(ring, to + lane_index() * _SCALES, found[0], found[1], found[2], found[3])

    @jit(device=True, forceinline=True)
    def first_turn(i, start, ring, first, last, source):
        """Begin to copy what the i-th turn computes."""
        if first + i * at_once < last:
            fetch(start + i * turn_words, ring, first + i * at_once, source)
        close_group()

    @jit(device=True, forceinline=True)
    def one_turn(i, start, ring, first, last, source, own, u, a, scales, sums, lows):
        """Compute a turn, whose copies lie in the i-th place, while those of the last but one before it are made."""
        mine, ahead = first + i * at_once, first + (i + TURNS - 1) * at_once
        if mine < last:
            wait_for_turn()
            cuda.syncwarp()  # all lanes' copies are there, and all have done with the turn before
            if ahead < last:
                fetch(start + (i + TURNS - 1) % TURNS * turn_words, ring, ahead, source)
            close_group()
            following = scales_of_row(mine + at_once, own)
            add(start + i * turn_words, ring, start + scales_at, u, a, scales, sums, lows)
            cuda.syncwarp()
            keep_scales(ring, start + scales_at, following)

    first_turns, all_turns = unrolled(first_turn, TURNS - 1), unrolled(one_turn, TURNS)

    @kernel(
        matrix_parameters(weight_format) + ", uint32* hidden, float32* partial, int32 neurons, int32 columns_used,"
        f" int32 stride, int32 n, int32 hidden_stride, {GROUPS}",
        name=f"batch_sums_{weight_format}_{tiles}{suffix(False, experts)}",
        launch_bounds=(THREADS, 4 if tiles == 1 else 3),
        fastmath=True,
    )
    def batch_sums(
        words, scale, low, row, hidden, partial, neurons, columns_used, stride, n, hidden_stride, groups, slots
    ):  # fmt: skip
        ring = cuda.shared.array(all_words, types.uint32, alignment=16)
        u, a = cuda.local.array(8, types.uint32), cuda.local.array(16, types.uint32)
        sums, lows = cuda.local.array(sum_items, types.float32), cuda.local.array(low_items, types.float32)
        scales = cuda.local.array(scale_items, types.float32)
        for i in range(sum_items):
            sums[i] = _ZERO
        for i in range(low_items):
            lows[i] = _ZERO
        lane, warp = lane_index(), warp_index()
        chunk, block, b, end = tile_of(groups, slots, n, columns, np.uint32(cuda.blockIdx.x))
        if experts and b >= end:
            return
        base = np.int32(block * neurons)
        part, parts = np.int32(cuda.blockIdx.y), np.int32(cuda.gridDim.y)
        share = np.int32((neurons + parts * TILE_ROWS - 1) // (parts * TILE_ROWS) * TILE_ROWS)
        last = np.int32(base + min(neurons, (part + 1) * share))
        first, start = np.int32(base + part * share + warp * TILE_ROWS), np.int32(warp * warp_words)
        most, chunks = np.int32(base + neurons - TILE_ROWS), np.int32(stride // TILE_COLUMNS)
        source = words, hidden, most, np.int32(chunks * tile_words), chunk * tile_words, b, end, hidden_stride, base
        own = row, scale, low, most, np.int32(2 * chunks), 2 * chunk
        first_turns(0, start, ring, first, last, source)
        if first < last:
            keep_scales(ring, start + scales_at, scales_of_row(first, own))
        while first < last:
            all_turns(0, start, ring, first, last, source, own, u, a, scales, sums, lows)
            first = np.int32(first + TURNS * at_once)

        cuda.syncthreads()  # the sums take the place of what was copied
        for tile in range(tiles):
            for k in range(4):  # groups, and of every two columns one
                for i in range(4):
                    of_x = tile * _X_ROWS + 2 * (lane & 3) + (i & 1)
                    column = 32 * (k >> 1) + 16 * (i >> 1) + 2 * (lane >> 2) + (k & 1)
                    ring[start + of_x * wide + column] = as_word(sums[(tile * 4 + k) * 4 + i])
            for group in range(2):
                least = lows[2 * tile + group]
                least += cuda.shfl_xor_sync(FULL, least, 1)
                least += cuda.shfl_xor_sync(FULL, least, 2)
                if lane & 3 == 0:
                    ring[start + (tile * _X_ROWS + (lane >> 2)) * wide + TILE_COLUMNS + group] = as_word(least)
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, columns * TILE_COLUMNS, THREADS):
            of_x, column, total = i // TILE_COLUMNS, i % TILE_COLUMNS, _ZERO
            for w in range(_WARPS):
                at = w * warp_words + of_x * wide
                total += as_float(ring[at + column]) - as_float(ring[at + TILE_COLUMNS + column // 32])
            if b + of_x < end and TILE_COLUMNS * chunk + column < columns_used:
                partial[((b + of_x) * parts + part) * stride + TILE_COLUMNS * chunk + column] = total

    return batch_sums


def sum_batch(device: Device, matrix: Matrix, hidden: Array, hidden_stride: int, partial: Array, n: int) -> int:
    """partial (n, parts, matrix.stride) of matrix (neurons, columns) transposed times hidden (n, hidden_stride).

    Returns the number of parts, whose sum is the product without a bias.
    """
    tiles = next((tiles for tiles in TILES if n <= tiles * _X_ROWS), TILES[-1])
    parts = min(parts_of(n), -(-matrix.rows // LEAST_NEURONS))
    blocks = matrix.stride // TILE_COLUMNS * -(-n // (tiles * _X_ROWS))
    device.launch(
        sums_kernel(matrix.format, tiles), (blocks, parts), THREADS,
        matrix.words, matrix.scale, matrix.low, matrix.row, hidden, partial, matrix.rows, matrix.columns, matrix.stride,
        n, hidden_stride, partial, 0,
    )  # fmt: skip
    return parts


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats that have them."""
    for name, kernels in KERNELS.items():
        if kernels.tiles is not None and kernels.tiles.levels is not None:
            yield from (sums_kernel(name, tiles) for tiles in TILES)
