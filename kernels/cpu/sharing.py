"""How the threads of a team share the rows of a product, of a batch, and of the residual stream.

A step of one row (decode) keeps the residual stream in a private copy a thread: norms and quantisation are so short
that all threads do them rather than wait for one. A step of several rows shares the rows out instead.
"""

from __future__ import annotations

from svdengine.kernels.cpu.gemm import gemm
from svdengine.kernels.cpu.gemv import gemv, gemv_few, gemv_many
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, COLUMNS, FIRST_PANEL_CODE, FORMAT, ROWS
from svdengine.kernels.cpu.panel_product import multiply_panels
from svdengine.kernels.cpu.row_panels import can_interleave, multiply_in_panels
from svdengine.kernels.cpu.sync import barrier, fetch_add
from svdengine.kernels.cpu.workspace import STAGES

PIECE = 32768  # weights
FEW = 6  # rows of a step that are multiplied one by one: packing weights into panels would cost more
SEVERAL = 32  # rows of a step for which rows of weights are interleaved as they are stored, rather than unpacked
NEURON_UNIT = 16  # neurons are shared out in multiples of it


@jit
def share(count, unit, member, threads):
    """This member's part of `count` items, in multiples of `unit`."""
    units = (count + unit - 1) // unit
    first = units * member // threads * unit
    last = units * (member + 1) // threads * unit
    return min(first, count), min(last, count)


@jit
def claim(counter, count, columns, unit, member, threads, turn):
    """This member's next part of `count` rows, first and last, empty at the end; unit: divides all parts but the last.

    Three quarters are shared out beforehand, on turn 0; the rest goes in pieces to whoever is ready, since cores are
    not equally fast at every moment. A piece has at least PIECE weights: what is fetched ahead at its end is another
    member's. counter: address of a count that starts at 0.
    """
    if threads == 1:
        return (0, count) if turn == 0 else (0, 0)
    each = count // unit * 3 // 4 // threads * unit
    if turn == 0 and each > 0:
        return member * each, (member + 1) * each
    piece = max(PIECE // columns, count // 128) // unit * unit + unit
    first = each * threads + fetch_add(counter, 1) * piece
    return min(first, count), min(first + piece, count)


@jit
def rows_of(n, member, threads):
    """The rows of the residual stream that a member owns: first, last. In decode, its private copy."""
    if n == 1:
        return member, member + 1
    return share(n, 1, member, threads)


@jit
def ready(n, sync, threads):
    """Rows that other members made are complete; in decode every member made its own."""
    if n > 1:
        barrier(sync, threads)


@jit
def counter_of(inputs, layer, stage):
    """Address of the claims of one stage of a layer."""
    return inputs.claims.ctypes.data + 8 * (layer * STAGES + stage)


@jit
def matmul(matrix, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch, invariant):
    """out[:, first..last] = x times rows first..last of a matrix, plus its bias.

    One by one, rows get the same bits in any company, and from interleaved matrices always; panels that are made on
    the way, and those of `gemm`, add up in another order, which `invariant` forbids. first: a multiple of 16.
    """
    bias = matrix[BIAS_VECTOR]
    if matrix[FORMAT] >= FIRST_PANEL_CODE:
        multiply_panels(matrix, bias, quantized, quantized_stride, n, out, out_stride, first, last)
    elif n == 1:
        gemv(matrix, bias, x, quantized, out, first, last)
    elif n <= SEVERAL and not invariant and can_interleave(matrix):
        whole = first + (min(last, matrix[ROWS]) - first) // 16 * 16
        if first < whole:
            multiply_in_panels(matrix, bias, quantized, quantized_stride, n, out, out_stride, first, whole, scratch)
        if whole < last:
            gemv_few(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, whole, last)
    elif n <= FEW:
        gemv_few(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last)
    elif invariant:
        gemv_many(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last)
    else:
        gemm(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch)


@jit
def matmul_together(
    matrix, x, x_stride, quantized, quantized_stride, n, out, out_stride, count, scratch, invariant,
    member, threads, counter,
):  # fmt: skip
    """As `matmul`, for rows 0..count, which all members share."""
    turn = 0
    first, last = claim(counter, count, matrix[COLUMNS], 16, member, threads, turn)
    while first < last:
        matmul(matrix, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch, invariant)
        turn += 1
        first, last = claim(counter, count, matrix[COLUMNS], 16, member, threads, turn)
