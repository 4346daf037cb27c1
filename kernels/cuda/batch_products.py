"""Products of matrices in most weight formats with a few dozen rows of activations, on tensor cores.

A warp has some rows of the matrix and every fourth 64 columns of theirs, and multiplies them by up to TILES * 8 rows of
activations, which are rounded to 16 bits in groups of 32 (kernels/cuda/rounding.py) as in products with one row. What
it reads comes by asynchronous copies to memory of its own, several turns ahead: no warp waits for another before the
sums of a block's warps are added up. Weights are made operands in registers, group by group, as they are stored;
kernels/cuda/formats/tiles.py says how. Of formats that have levels, products of a group are exact, in int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.chosen import GROUPS, TILE_OF, suffix
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.formats.tiles import TILE_COLUMNS, TILE_ROWS, TileKernels, piece_place
from svdengine.kernels.cuda.intrinsics import Kernel, as_float, as_word, jit, kernel, lane_index, unrolled, warp_index
from svdengine.kernels.cuda.model import Matrix
from svdengine.kernels.cuda.rows import matrix_parameters
from svdengine.kernels.cuda.tensor_cores import (
    close_group,
    copy_async,
    load_matrices,
    load_words,
    store_words,
    waiting_for_all_but,
)
from svdengine.kernels.formats import FORMATS, WeightFormat

THREADS = 128
_WARPS = THREADS // 32
TILES = (1, 2)  # of 8 rows of activations that a block has
_X_ROWS = 8  # rows of activations in a product of tensor cores
_CODES = TILE_COLUMNS // 2  # words that activations of a tile's columns take
_CODE_PITCH = _CODES + 4  # between them in shared memory: an odd number of 16 bytes
_VALUES = 4  # steps and sums of a tile's two groups; and their steps and leasts
MOST_COLUMNS = TILES[-1] * _X_ROWS  # of a block; of more rows, blocks with the same weights are neighbours
_MOST_SHARED = 47 * 1024  # bytes of a block; some GPUs add one of their own
_MOST_TURNS = 4
_ZERO = np.float32(0)


@dataclass(frozen=True)
class Room:
    """How a warp's shared memory is laid out, in words: what turns copy, and behind that steps and leasts of one."""

    rows: int  # of the matrix
    columns: int  # rows of activations
    pitch: int  # of a row of weights
    turns: int  # for which there is room: all but the one that is computed are on their way

    @property
    def values(self) -> int:
        """Where in a turn the steps and sums of activations begin, behind weights and codes."""
        return self.rows * self.pitch + self.columns * _CODE_PITCH

    @property
    def turn(self) -> int:
        """All that a turn copies."""
        return self.values + self.columns * _VALUES

    @property
    def scales(self) -> int:
        """Where steps and leasts of the rows lie."""
        return self.turns * self.turn

    @property
    def words(self) -> int:
        """All of a warp."""
        return self.scales + self.rows * _VALUES


def room_of(weight_format: WeightFormat, tiles: int) -> Room:
    """The most turns that fit."""
    made = kernels_of(weight_format).tiles
    assert made is not None, f"there are no tiles of {weight_format}"
    pitch = FORMATS[weight_format].row_bytes(TILE_COLUMNS) // 4 + made.padding
    rooms = (Room(made.row_tiles * TILE_ROWS, tiles * _X_ROWS, pitch, turns) for turns in range(_MOST_TURNS, 1, -1))
    return next(room for room in rooms if 4 * _WARPS * room.words <= _MOST_SHARED)


def _copies(weight_format: WeightFormat, room: Room) -> Any:
    """fetch(to, ring, chunk, source): begin to copy a turn, a chunk of 64 columns, to word `to` of shared memory.

    source: what is multiplied, as the kernel calls it. Past the end the last rows are repeated.
    """
    tile_words = FORMATS[weight_format].row_bytes(TILE_COLUMNS) // 4
    pieces = tile_words // 4  # of a row of a tile
    at_once = 1 << (32 // pieces).bit_length() - 1  # rows of which a warp copies all pieces at once
    place, pitch, columns = piece_place(pieces), room.pitch, room.columns
    codes, values, some_lanes = room.rows * pitch, room.values, pieces * at_once

    @jit(device=True, forceinline=True)
    def copy_weights(i, to, ring, words, first, rows, row_words, offset):
        r = np.int32(np.uint32(lane_index()) // np.uint32(pieces))
        p = np.int32(lane_index() - r * pieces)
        source = min(first + r + i * at_once, rows - 1) * row_words + 4 * p
        # Rows `at_once` apart have their pieces in the same places.
        copy_async(ring, to + r * pitch + 4 * place(r, p) + i * at_once * pitch, words, source, offset)

    @jit(device=True, forceinline=True)
    def copy_codes(i, to, ring, x, b, n, x_stride, offset):
        r, p = np.int32(lane_index() >> 3), np.int32(lane_index() & 7)
        source = min(b + r + 4 * i, n - 1) * x_stride + 4 * p
        copy_async(ring, to + codes + r * _CODE_PITCH + 4 * p + i * 4 * _CODE_PITCH, x, source, offset)

    copy_all_weights, copy_all_codes = unrolled(copy_weights, room.rows // at_once), unrolled(copy_codes, columns // 4)

    @jit(device=True, forceinline=True)
    def fetch(to, ring, chunk, source):
        words, x, first, rows, row_words, b, n, x_stride, stride = source
        lane = lane_index()
        if some_lanes == 32 or lane < some_lanes:
            copy_all_weights(0, to, ring, words, first, rows, row_words, chunk * tile_words)
        copy_all_codes(0, to, ring, x, b, n, x_stride, chunk * _CODES)
        if lane < columns:
            at = min(b + lane, n - 1) * x_stride + (stride >> 1)
            copy_async(ring, to + values + _VALUES * lane, x, at, chunk * _VALUES)

    return fetch


def _sums(made: TileKernels, room: Room) -> Any:
    """multiply(at, ring, a, held, sums): add what a turn at word `at` of shared memory gives to a warp's sums.

    a: its weights as operands; held: steps and leasts of this lane's rows.
    """
    product, items, row_tiles, scaled, shifted = made.product, made.items, made.row_tiles, made.scaled, made.shifted
    codes, values = room.rows * room.pitch, room.values

    @jit(device=True, forceinline=True)
    def add_group(r, tile, group, b, left, left_sum, right, right_sum, a, held, sums):
        """Add what a group gives; left, right: the steps of this lane's two rows of x."""
        p = product(a, r * items, group, b)
        at, i = r * 2 * _VALUES + 2 * group, (tile * row_tiles + r) * 4
        if scaled:
            upper, lower = held[at], held[at + _VALUES]
            sums[i] += p[0] * (upper * left)
            sums[i + 1] += p[1] * (upper * right)
            sums[i + 2] += p[2] * (lower * left)
            sums[i + 3] += p[3] * (lower * right)
        else:
            sums[i] += p[0] * left
            sums[i + 1] += p[1] * right
            sums[i + 2] += p[2] * left
            sums[i + 3] += p[3] * right
        if shifted:
            upper, lower = held[at + 1], held[at + _VALUES + 1]
            sums[i] -= upper * left_sum
            sums[i + 1] -= upper * right_sum
            sums[i + 2] -= lower * left_sum
            sums[i + 3] -= lower * right_sum

    @jit(device=True, forceinline=True)
    def multiply_rows(r, tile, first, second, left, right, a, held, sums):
        add_group(
            r, tile, 0, first, as_float(left[0]), as_float(left[1]), as_float(right[0]), as_float(right[1]), a, held,
            sums,
        )  # fmt: skip
        add_group(
            r, tile, 1, second, as_float(left[2]), as_float(left[3]), as_float(right[2]), as_float(right[3]), a, held,
            sums,
        )  # fmt: skip

    multiply_all_rows = unrolled(multiply_rows, row_tiles)

    @jit(device=True, forceinline=True)
    def multiply_tile(tile, at, ring, a, held, sums):
        lane = lane_index()
        place = (lane & 7) * _CODE_PITCH + 8 * (lane >> 3 & 1) + 4 * (lane >> 4)  # see kernels/cuda/formats/tiles.py
        place += at + codes + tile * _X_ROWS * _CODE_PITCH
        first, second = load_matrices(ring, place), load_matrices(ring, place + _CODES // 2)
        row = at + values + tile * _X_ROWS * _VALUES + 2 * (lane & 3) * _VALUES
        left, right = load_words(ring, row), load_words(ring, row + _VALUES)
        multiply_all_rows(0, tile, first, second, left, right, a, held, sums)

    return unrolled(multiply_tile, room.columns // _X_ROWS)


@cache
def batch_kernel(weight_format: WeightFormat, tiles: int, experts: bool = False) -> Kernel:
    """y (n, ...) = or += factor * (W x + bias) for x (n, ...), rounded; `tiles` * 8 rows of x and some of W a block.

    Grid: (blocks of rows of W * tiles of x,). The tiles that read the same weights are neighbours, so that all but the
    first find them in the GPU's cache. experts: rows of x are sorted pairs (kernels/cuda/chosen.py), and `rows` those
    of an FFN block.
    """
    made, room, tile_of = kernels_of(weight_format).tiles, room_of(weight_format, tiles), TILE_OF[experts]
    assert made is not None
    fetch, multiply = _copies(weight_format, room), _sums(made, room)
    load_tile, scaled, units_of, scales_of = made.load, made.scaled, made.units, made.scales
    row_tiles, items, pitch, unit = made.row_tiles, made.items, room.pitch, np.float32(made.unit)
    held_rows, columns, turns, turn_words = room.rows, room.columns, room.turns, room.turn
    tile_words = FORMATS[weight_format].row_bytes(TILE_COLUMNS) // 4
    warp_words, scales, all_words = room.words, room.scales, _WARPS * room.words
    operand_items, sum_items, held_items = row_tiles * items, row_tiles * tiles * 4, row_tiles * 2 * _VALUES
    wait_for_turn = waiting_for_all_but(turns - 2)

    @jit(device=True, forceinline=True)
    def keep_scales(ring, to, found):
        """Note what this lane's row of the matrix has for the groups of a turn."""
        store_words(
            ring,
            to + lane_index() * _VALUES,
            as_word(found[0]),
            as_word(found[1]),
            as_word(found[2]),
            as_word(found[3]),
        )

    @jit(device=True, forceinline=True)
    def take_scales(ring, at, held):
        """What the rows have of which this lane has sums."""
        for r in range(2 * row_tiles):
            four = load_words(ring, at + ((lane_index() >> 2) + 8 * r) * _VALUES)
            for i in range(_VALUES):
                held[r * _VALUES + i] = as_float(four[i])

    @jit(device=True, forceinline=True)
    def first_turn(i, start, ring, chunk, chunks, source):
        """Begin to copy what the i-th turn computes."""
        if chunk + i * _WARPS < chunks:
            fetch(start + i * turn_words, ring, chunk + i * _WARPS, source)
        close_group()

    @jit(device=True, forceinline=True)
    def one_turn(i, start, ring, chunk, chunks, source, own, a, held, sums):
        """Compute a turn, whose copies lie in the i-th place, while those of the last but one before it are made."""
        mine, ahead = chunk + i * _WARPS, chunk + (i + turns - 1) * _WARPS
        if mine < chunks:
            wait_for_turn()
            cuda.syncwarp()  # all lanes' copies are there, and all have done with the turn before
            if ahead < chunks:
                to = start + (i + turns - 1) % turns * turn_words
                fetch(to, ring, ahead, source)
            close_group()
            at = start + i * turn_words
            for r in range(row_tiles):
                load_tile(ring, at + r * TILE_ROWS * pitch, a, r * items)
            if scaled:
                take_scales(ring, start + scales, held)
                scale, low, units, at_first = own
                later = min(np.int32(mine + _WARPS), np.int32(chunks - 1))
                following = scales_of(scale, low, units, at_first + 2 * later)
            multiply(0, at, ring, a, held, sums)
            if scaled:
                cuda.syncwarp()
                keep_scales(ring, start + scales, following)

    first_turns, all_turns = unrolled(first_turn, turns - 1), unrolled(one_turn, turns)

    @kernel(
        matrix_parameters(weight_format) + ", float32* bias, uint32* x, float32* y, int32 rows, int32 stride, int32 n,"
        f" int32 x_stride, int32 y_stride, float32 factor, int32 add, {GROUPS}",
        name=f"batch_{weight_format}_{tiles}{suffix(False, experts)}",
        launch_bounds=(THREADS, 4 if tiles == 1 else 3),
        fastmath=True,
    )
    def batch(words, scale, low, row, bias, x, y, rows, stride, n, x_stride, y_stride, factor, add, groups, slots):
        ring = cuda.shared.array(all_words, types.uint32, alignment=16)
        a, sums = cuda.local.array(operand_items, types.uint32), cuda.local.array(sum_items, types.float32)
        held = cuda.local.array(held_items, types.float32)
        for i in range(sum_items):
            sums[i] = _ZERO
        lane, warp = lane_index(), warp_index()
        which, block, b, end = tile_of(groups, slots, n, columns, np.uint32(cuda.blockIdx.x))
        if experts and b >= end:
            return
        base = np.int32(block * rows)
        first, rows = np.int32(base + which * held_rows), np.int32(base + rows)
        chunks = np.int32(stride // TILE_COLUMNS)
        row_words, start = chunks * tile_words, np.int32(warp * warp_words)
        source = words, x, first, rows, row_words, b, end, x_stride, stride
        r = min(first + lane, rows - 1)
        own = scale, low, units_of(row, r), r * (2 * chunks)  # the row whose steps and leasts this lane fetches
        first_turns(0, start, ring, warp, chunks, source)
        if scaled and warp < chunks:
            keep_scales(ring, start + scales, scales_of(scale, low, own[2], own[3] + 2 * warp))
        chunk = warp
        while chunk < chunks:
            all_turns(0, start, ring, chunk, chunks, source, own, a, held, sums)
            chunk = np.int32(chunk + turns * _WARPS)

        cuda.syncthreads()  # the sums take the place of what was copied
        for tile in range(tiles):
            for r in range(row_tiles):
                for i in range(4):
                    of_x, of_w = tile * _X_ROWS + 2 * (lane & 3) + (i & 1), 16 * r + 8 * (i >> 1) + (lane >> 2)
                    ring[(warp * columns + of_x) * held_rows + of_w] = as_word(sums[(tile * row_tiles + r) * 4 + i])
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, columns * held_rows, THREADS):
            of_x, of_w, total = i // held_rows, i % held_rows, _ZERO
            for w in range(_WARPS):
                total += as_float(ring[w * columns * held_rows + i])
            if b + of_x < end and first + of_w < rows:
                out = (b + of_x) * y_stride + first - base + of_w
                total = factor * (unit * total + bias[first + of_w])
                y[out] = y[out] + total if add else total

    return batch


def multiply_batch(
    device: Device,
    matrix: Matrix,
    x: Array,
    x_stride: int,
    y: Array,
    y_stride: int,
    n: int,
    *,
    factor: float = 1.0,
    add: bool = False,
) -> None:
    """y (n, y_stride) = factor * (matrix x + bias), or += with `add`; x: (n, x_stride), rounded (rounding.py)."""
    made = kernels_of(matrix.format).tiles
    assert made is not None, f"there are no tiles of {matrix.format}"
    tiles = next((tiles for tiles in TILES if n <= tiles * _X_ROWS), TILES[-1])
    blocks = -(-matrix.rows // (made.row_tiles * TILE_ROWS))
    device.launch(
        batch_kernel(matrix.format, tiles), (blocks * -(-n // (tiles * _X_ROWS)),), THREADS,
        matrix.words, matrix.scale, matrix.low, matrix.row, matrix.bias, x, y, matrix.rows, matrix.stride,
        n, x_stride, y_stride, factor, int(add), y, 0,
    )  # fmt: skip


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats that have tiles."""
    for name, kernels in KERNELS.items():
        if kernels.tiles is not None:
            yield from (batch_kernel(name, tiles) for tiles in TILES)
