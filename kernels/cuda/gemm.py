"""Products for any number of rows: own kernels for few, the vendor's library on float16 weights for many.

One row is bound by memory (gemv.py), and so are some dozens on tensor cores (batch_products.py), which read weights as
they are stored. The library wants float16: other formats are widened to a copy for each product, five times as many
bytes or more as there are weights. That pays where a step has so many rows that our kernels are bound by instructions:
parts of long prompts, and no decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.batch_products import MOST_COLUMNS, multiply_batch
from svdengine.kernels.cuda.batch_sums import sum_batch, takes_sums
from svdengine.kernels.cuda.device import Array, Device, Gemm
from svdengine.kernels.cuda.elementwise import add_parts
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.gemv import multiply, multiply_transposed
from svdengine.kernels.cuda.intrinsics import Kernel, f2h, kernel
from svdengine.kernels.cuda.model import Matrix
from svdengine.kernels.cuda.rounding import round_rows_to, takes_integers
from svdengine.kernels.cuda.rows import matrix_parameters
from svdengine.kernels.formats import WeightFormat
from svdengine.models import ModelConfig

# Rows of activations from which the library is used, where it is: our kernels of float32 have no tensor cores, and
# float16 needs no copy.
LIBRARY_ROWS: Mapping[str, int] = MappingProxyType({"f32": 32, "f16": 64})
_OTHERS = 128
# The same where columns are outputs, which take more instructions; of floats only without tensor cores.
TRANSPOSED_LIBRARY_ROWS: Mapping[str, int] = MappingProxyType({"f32": 32, "f16": 32, "bf16": 32})
_TRANSPOSED_OTHERS = 64
OWN_ROWS = (1, 2, 3, 5, 9)  # from which our kernels are others
THREADS = 256
_FFN = ("gate", "up", "down", "down_T")  # what may lie partly in host memory
_LARGEST = np.float32(65504)  # that float16 holds


@dataclass(frozen=True)
class HalfCopies:
    """Room for float16 copies of a matrix and of activations, which the library multiplies."""

    weights: Array  # float16
    x: Array  # float16


@cache
def widen_kernel(weight_format: WeightFormat) -> Kernel:
    """to (rows, stride) float16 of a matrix, two weights a thread. Grid: (rows, blocks of pairs)."""
    weight = kernels_of(weight_format).weight

    @kernel(matrix_parameters(weight_format) + ", uint32* to, int32 stride", name=f"widen_{weight_format}")
    def widen(words, scale, low, row, to, stride):
        r, pair = cuda.blockIdx.x, cuda.blockIdx.y * THREADS + cuda.threadIdx.x
        if 2 * pair < stride:
            first = weight(words, scale, low, row, r, 2 * pair, stride)
            second = weight(words, scale, low, row, r, 2 * pair + 1, stride)
            to[(r * stride >> 1) + pair] = f2h(first, second)

    return widen


@kernel("float32* x, uint32* to, int32 x_stride, int32 stride")
def narrow(x, to, x_stride, stride):
    """to (n, stride) float16 of x (n, x_stride), cut to what float16 holds. Grid: (blocks of pairs, n)."""
    r, pair = cuda.blockIdx.y, cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if 2 * pair < stride:
        first = max(-_LARGEST, min(_LARGEST, x[r * x_stride + 2 * pair]))
        second = max(-_LARGEST, min(_LARGEST, x[r * x_stride + 2 * pair + 1]))
        to[(r * stride >> 1) + pair] = f2h(first, second)


def library_rows(weight_format: WeightFormat, split: bool, transposed: bool = False) -> int:
    """Rows from which the library multiplies.

    Our kernels for more rows than a block has read weights several times. Those of a `split` matrix come from host
    memory, and no cache has them.
    """
    if transposed:
        rows = TRANSPOSED_LIBRARY_ROWS.get(weight_format, _TRANSPOSED_OTHERS)
    else:
        rows = LIBRARY_ROWS.get(weight_format, _OTHERS)
    return min(rows, MOST_COLUMNS + 1) if split else rows


def first_library_rows(config: ModelConfig, formats: Mapping[str, WeightFormat], split: bool) -> int:
    """Rows from which some product of a model is the library's. `split`: whether FFN matrices are."""
    found = [_OTHERS]
    for name, stored in formats.items():
        of_experts = config.expert_count and name in _FFN  # which are no work of the library
        if not of_experts and name != "position_embedding" and (name != "embedding" or config.tied_embeddings):
            found.append(library_rows(stored, split and name in _FFN, transposed=name == "down_T"))
    return min(found)


def uses_library(copies: HalfCopies | None, matrix: Matrix, n: int, transposed: bool = False) -> bool:
    """Whether the library multiplies a matrix with n rows."""
    return copies is not None and n >= library_rows(matrix.format, matrix.is_split, transposed)


def takes_rounded(matrix: Matrix, n: int) -> bool:
    """Whether our kernel for n rows takes them rounded."""
    return takes_integers(matrix.format) or (n > 1 and kernels_of(matrix.format).tiles is not None)


def rounded_rows(
    device: Device, copies: HalfCopies | None, matrices: Iterable[Matrix], x: Array, to: Array, stride: int, n: int
) -> Array:
    """What `product` takes as `rounded` for some matrices: n rows of x (n, stride), rounded to `to` if need be."""
    if any(takes_rounded(matrix, n) for matrix in matrices if not uses_library(copies, matrix, n)):
        return round_rows_to(device, x, to, stride, n)
    return x


def product(
    device: Device,
    copies: HalfCopies | None,
    matrix: Matrix,
    x: Array,
    rounded: Array,
    x_stride: int,
    y: Array,
    y_stride: int,
    n: int,
    *,
    factor: float = 1.0,
    add: bool = False,
) -> None:
    """y (n, y_stride) = factor * (matrix x + bias), or += with `add`; x: (n, x_stride) float32, padded with zeros.

    rounded: what `rounded_rows` gave for x and this matrix.
    """
    if not uses_library(copies, matrix, n):
        rows = rounded if takes_rounded(matrix, n) else x
        ours = multiply_batch if n > 1 and kernels_of(matrix.format).tiles is not None else multiply
        for first, piece in matrix.pieces():
            ours(device, piece, rows, x_stride, y[first:], y_stride, n, factor=factor, add=add)
        return
    assert copies is not None
    weights, halves, stride = _operands(device, copies, matrix, x, x_stride, n, matrix.stride)
    sizes = (matrix.rows, matrix.stride, n)
    device.gemm(weights, halves, y, Gemm(*sizes, matrix.stride, stride, y_stride, False, factor, add))
    add_parts(device, y, 0, matrix.bias, y, matrix.rows, y_stride, n, factor)


def add_transposed_product(
    device: Device,
    copies: HalfCopies | None,
    matrix: Matrix,
    hidden: Array,
    hidden_stride: int,
    partial: Array,
    y: Array,
    n: int,
    factor: float,
) -> None:
    """y (n, matrix.stride) += factor * (matrix transposed times hidden + bias); hidden: (n, hidden_stride) float32."""
    columns, stride = matrix.columns, matrix.stride
    if not uses_library(copies, matrix, n, transposed=True):
        for first, piece in matrix.pieces():
            several = n > kernels_of(piece.format).most_sums and takes_sums(piece)
            ours = sum_batch if several else multiply_transposed
            parts = ours(device, piece, hidden[first:], hidden_stride, partial, n)
            add_parts(device, partial, parts, None if first else matrix.bias, y, columns, stride, n, factor)
        return
    assert copies is not None
    weights, halves, x_stride = _operands(device, copies, matrix, hidden, hidden_stride, n, hidden_stride)
    sizes = (columns, matrix.rows, n)
    device.gemm(weights, halves, y, Gemm(*sizes, stride, x_stride, stride, True, factor, True))
    add_parts(device, y, 0, matrix.bias, y, columns, stride, n, factor)


def _operands(
    device: Device, copies: HalfCopies, matrix: Matrix, x: Array, x_stride: int, n: int, columns: int
) -> tuple[Array, Array, int]:
    """Weights and activations of one type, and the activations' stride.

    What lies in host memory is read once: a split matrix is copied to float16, in whatever format it is.
    """
    as_stored = None if matrix.is_split else kernels_of(matrix.format).library_type
    if as_stored is np.float32:
        return matrix.words.view(np.float32), x, x_stride
    if as_stored is not None:
        weights = matrix.words.view(as_stored)
    else:
        weights = copies.weights
        for first, piece in matrix.pieces():
            device.launch(
                widen_kernel(piece.format), (piece.rows, -(-piece.stride // (2 * THREADS))), THREADS,
                piece.words, piece.scale, piece.low, piece.row, weights[first * piece.stride :], piece.stride,
            )  # fmt: skip
    device.launch(narrow, (-(-columns // (2 * THREADS)), n), THREADS, x, copies.x, x_stride, columns)
    return weights, copies.x, columns


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats."""
    yield from map(widen_kernel, KERNELS)
