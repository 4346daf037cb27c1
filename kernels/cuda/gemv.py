"""Products of matrices in any weight format with one row of activations, or a few: memory's speed is the bound.

`multiply` takes matrices whose rows make outputs: a warp reads some rows, a chunk a lane at a time, for up to TILE rows
of activations, where there are no tiles for tensor cores (batch_products.py). `multiply_transposed` takes those whose
columns do (down, stored as one row a neuron): a thread keeps the sums of a chunk's columns, and blocks and their warps
share out the neurons (batch_sums.py does so for more rows). kernels/cuda/formats says what a chunk is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.chosen import GROUPS, TILE_OF, suffix
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.intrinsics import Kernel, jit, kernel, lane_index, warp_index, warp_sum
from svdengine.kernels.cuda.model import Matrix
from svdengine.kernels.cuda.rows import matrix_parameters
from svdengine.kernels.cuda.workspace import parts_of
from svdengine.kernels.formats import WeightFormat

THREADS = 128
TILE = 4  # rows of activations that share a read of the weights
_WARPS = THREADS // 32
SHARERS = 8  # warps of a block that share the neurons of a part
_MOST_SHARERS = 8
LEAST_NEURONS = 32  # of a part: four for each of its warps, whose loads are on their way at once
_MANY = 8192  # rows of a matrix from which warps take several each, and there is still work for all


@cache
def gemv_kernel(weight_format: WeightFormat, per_warp: int, tile: int, experts: bool = False) -> Kernel:
    """y (n, ...) = or += factor * (W x + bias), for x (n, ...); `per_warp` rows of W and `tile` rows of x a warp.

    Grid: (blocks of rows of W * tiles of x,). The tiles that read the same weights are neighbours, so that all but the
    first find them in the GPU's cache. experts: rows of x are sorted pairs (kernels/cuda/chosen.py), and `rows` those
    of an FFN block.
    """
    kernels, count, tile_of = kernels_of(weight_format), per_warp * tile, TILE_OF[experts]
    load, chunk = kernels.load_chunk, kernels.dot_chunk
    columns, chunk_words = kernels.chunk_columns, kernels.chunk_words
    blocks = 3 if weight_format == "f32" else 4  # of a multiprocessor; the compiler unrolls short chunks further
    # Chunks of a row whose loads are on their way at once; rows that a warp has side by side are so as they are.
    four, two = per_warp == 1 and kernels.at_once == 4, per_warp == 1 and kernels.at_once == 2

    @kernel(
        matrix_parameters(weight_format) + ", float32* bias, uint32* x, float32* y, int32 rows, int32 stride,"
        f" int32 n, int32 x_stride, int32 y_stride, float32 factor, int32 add, {GROUPS}",
        name=f"gemv_{weight_format}_{per_warp}x{tile}{suffix(False, experts)}",
        launch_bounds=(THREADS, blocks),
        fastmath=True,
    )
    def gemv(words, scale, low, row, bias, x, y, rows, stride, n, x_stride, y_stride, factor, add, groups, slots):
        sums = cuda.local.array(count, types.float32)
        for k in range(count):
            sums[k] = np.float32(0)
        chunks = stride // columns
        which, block, b, end = tile_of(groups, slots, n, tile, np.uint32(cuda.blockIdx.x))
        first = (which * _WARPS + warp_index()) * per_warp
        if first >= rows or (experts and b >= end):
            return
        of_block = block * rows
        r, j = of_block + first, lane_index()
        base = r * (chunk_words * chunks)
        while four and j + 96 < chunks:
            w0 = load(words, base, j)
            w1 = load(words, base, j + 32)
            w2 = load(words, base, j + 64)
            w3 = load(words, base, j + 96)
            for t in range(tile):
                at = min(b + t, end - 1) * x_stride  # past the end the last row again, whose product is not written
                sums[t] += chunk(w0, scale, low, row, r, stride, x, at, j)
                sums[t] += chunk(w1, scale, low, row, r, stride, x, at, j + 32)
                sums[t] += chunk(w2, scale, low, row, r, stride, x, at, j + 64)
                sums[t] += chunk(w3, scale, low, row, r, stride, x, at, j + 96)
            j += 128
        while two and j + 32 < chunks:
            w0 = load(words, base, j)
            w1 = load(words, base, j + 32)
            for t in range(tile):
                at = min(b + t, end - 1) * x_stride
                sums[t] += chunk(w0, scale, low, row, r, stride, x, at, j)
                sums[t] += chunk(w1, scale, low, row, r, stride, x, at, j + 32)
            j += 64
        while j < chunks:
            for k in range(per_warp):
                r = of_block + min(first + k, rows - 1)
                w = load(words, r * (chunk_words * chunks), j)
                for t in range(tile):
                    at = min(b + t, end - 1) * x_stride
                    sums[k * tile + t] += chunk(w, scale, low, row, r, stride, x, at, j)
            j += 32
        for k in range(per_warp):
            for t in range(tile):
                total = warp_sum(sums[k * tile + t])
                if lane_index() == 0 and first + k < rows and b + t < end:
                    at = (b + t) * y_stride + first + k
                    total = factor * (total + bias[of_block + first + k])
                    y[at] = y[at] + total if add else total

    return gemv


@cache
def transposed_kernel(weight_format: WeightFormat, tile: int, experts: bool = False) -> Kernel:
    """partial (n, parts, stride) of sums over neurons of hidden (n, ...) times their rows; `tile` rows of n a thread.

    The warps of a block read the same 32 chunks of columns of different neurons, and add up what they have in the end.
    Grid: (blocks of chunks of columns * tiles of n, parts). The tiles that read the same weights are neighbours.
    experts: as in `gemv_kernel`, with `neurons` of a block.
    """
    kernels, tile_of = kernels_of(weight_format), TILE_OF[experts]
    load, add, column_of, nothing = kernels.load_chunk, kernels.add_chunk, kernels.column_of, kernels.nothing
    columns, chunk_words = kernels.chunk_columns, kernels.chunk_words
    finish, fours, width = kernels.finish, columns // 4, columns + 1  # odd, against bank conflicts
    room = _MOST_SHARERS * 32 * width
    # Loads of a thread that are on their way at once; the more sums it has, the fewer fit in registers beside them.
    four, two = columns <= 16 and tile * columns <= 32, columns <= 16 or tile == 1

    @jit(device=True)
    def add_row(sums, hidden, hidden_stride, n, b, w, scale, low, row, base, r, stride, j):
        """Add neuron r, whose chunk j is w, to the sums of each row of the tile; base: the matrix's row of neuron 0."""
        of_w = base + r
        s0 = add(sums[0], hidden[b * hidden_stride + r], w, scale, low, row, of_w, stride, j)
        # Past the end the last row is added again, and its sum not written.
        s1, s2, s3 = sums[1], sums[2], sums[3]
        if tile > 1:
            s1 = add(s1, hidden[min(b + 1, n - 1) * hidden_stride + r], w, scale, low, row, of_w, stride, j)
        if tile > 2:
            s2 = add(s2, hidden[min(b + 2, n - 1) * hidden_stride + r], w, scale, low, row, of_w, stride, j)
            s3 = add(s3, hidden[min(b + 3, n - 1) * hidden_stride + r], w, scale, low, row, of_w, stride, j)
        return s0, s1, s2, s3

    @kernel(
        matrix_parameters(weight_format) + ", float32* hidden, float32* partial, int32 neurons, int32 columns_used,"
        f" int32 stride, int32 n, int32 hidden_stride, {GROUPS}",
        name=f"gemv_transposed_{weight_format}_{tile}{suffix(False, experts)}",
        launch_bounds=(32 * _MOST_SHARERS, 2),
        fastmath=True,
    )
    def transposed(
        words, scale, low, row, hidden, partial, neurons, columns_used, stride, n, hidden_stride, groups, slots
    ):  # fmt: skip
        shared = cuda.shared.array(room, types.float32)
        lane, warp, warps, chunks = lane_index(), warp_index(), cuda.blockDim.x >> 5, stride // columns
        which, block, b, end = tile_of(groups, slots, n, tile, np.uint32(cuda.blockIdx.x))
        if experts and b >= end:
            return
        first_chunk, base = which * 32, block * neurons
        j = min(first_chunk + lane, chunks - 1)  # past the end the last chunk is read again
        part, parts = cuda.blockIdx.y, cuda.gridDim.y
        share = (neurons + parts - 1) // parts
        r, last = part * share + warp, min(neurons, (part + 1) * share)
        row_words = chunk_words * chunks
        start = base * row_words
        sums = nothing, nothing, nothing, nothing
        while four and r + 3 * warps < last:
            r1, r2, r3 = r + warps, r + 2 * warps, r + 3 * warps
            w0 = load(words, start + r * row_words, j)
            w1 = load(words, start + r1 * row_words, j)
            w2 = load(words, start + r2 * row_words, j)
            w3 = load(words, start + r3 * row_words, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w0, scale, low, row, base, r, stride, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w1, scale, low, row, base, r1, stride, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w2, scale, low, row, base, r2, stride, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w3, scale, low, row, base, r3, stride, j)
            r += 4 * warps
        while two and r + warps < last:
            w0 = load(words, start + r * row_words, j)
            w1 = load(words, start + (r + warps) * row_words, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w0, scale, low, row, base, r, stride, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w1, scale, low, row, base, r + warps, stride, j)
            r += 2 * warps
        while r < last:
            w = load(words, start + r * row_words, j)
            sums = add_row(sums, hidden, hidden_stride, end, b, w, scale, low, row, base, r, stride, j)
            r += warps

        whole = finish(sums[0]), finish(sums[1]), finish(sums[2]), finish(sums[3])
        for t in range(min(tile, end - b)):
            cuda.syncthreads()  # so that the row before has been read
            for k in range(fours):
                for i in range(4):
                    shared[cuda.threadIdx.x * width + 4 * k + i] = whole[t][k][i]
            cuda.syncthreads()
            for item in range(cuda.threadIdx.x, 32 * columns, cuda.blockDim.x):
                chunk, k = item // columns, item % columns
                total = np.float32(0)
                for w in range(warps):
                    total += shared[(32 * w + chunk) * width + k]
                j = first_chunk + chunk
                column = column_of(j, k >> 2) + (k & 3)
                if j < chunks and column < columns_used:
                    partial[((b + t) * parts + part) * stride + column] = total

    return transposed


def multiply(
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
    """y (n, y_stride) = factor * (matrix x + bias), or += with `add`; x: (n, x_stride) float32, padded with zeros.

    For a format that takes integers (rounding.py) they are rounded rows. Several rows, of a format with tiles, are
    the work of batch_products.py.
    """
    tile = min(n, 2) if n <= 2 else TILE
    per_warp = 4 if matrix.rows >= _MANY and tile == 1 else 1
    grid = (-(-matrix.rows // (_WARPS * per_warp)) * -(-n // tile),)
    device.launch(
        gemv_kernel(matrix.format, per_warp, tile), grid, THREADS,
        matrix.words, matrix.scale, matrix.low, matrix.row, matrix.bias, x, y, matrix.rows, matrix.stride,
        n, x_stride, y_stride, factor, int(add), y, 0,
    )  # fmt: skip


def multiply_transposed(
    device: Device, matrix: Matrix, hidden: Array, hidden_stride: int, partial: Array, n: int
) -> int:
    """partial (n, parts, matrix.stride) of matrix (neurons, columns) transposed times hidden (n, hidden_stride).

    Returns the number of parts, whose sum is the product without a bias.
    """
    kernels = kernels_of(matrix.format)
    tile = 1 if n == 1 else kernels.most_sums
    parts = min(parts_of(n), -(-matrix.rows // LEAST_NEURONS))
    chunks = matrix.stride // kernels.chunk_columns
    device.launch(
        transposed_kernel(matrix.format, tile), (-(-chunks // 32) * -(-n // tile), parts), 32 * SHARERS,
        matrix.words, matrix.scale, matrix.low, matrix.row, hidden, partial, matrix.rows, matrix.columns, matrix.stride,
        n, hidden_stride, partial, 0,
    )  # fmt: skip
    return parts


def every_kernel() -> Iterator[Kernel]:
    """All kernels that `multiply` and `multiply_transposed` may choose, for several rows where there are no tiles."""
    for name, kernels in KERNELS.items():
        shapes = ((1, 1), (4, 1), (1, 2), (1, TILE)) if kernels.tiles is None else ((1, 1), (4, 1))
        yield from (gemv_kernel(name, *shape) for shape in shapes)
        yield from (transposed_kernel(name, tile) for tile in (1, kernels.most_sums))
