"""The FFN stage of a layer, dense or conditional."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.elementwise import copy_row
from svdengine.kernels.cpu.ffn_hidden import ffn_hidden
from svdengine.kernels.cpu.gemm import gemm_transposed
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, COLUMNS
from svdengine.kernels.cpu.model import DOWN, LAYER_MATRICES
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.row_ffn import dense_row, sparse_row
from svdengine.kernels.cpu.rows import add_rows, list_range
from svdengine.kernels.cpu.sharing import NEURON_UNIT, claim, counter_of, matmul_together, share
from svdengine.kernels.cpu.sparse import start_sum
from svdengine.kernels.cpu.sparse_batch import COLUMN_UNIT, sparse_batch
from svdengine.kernels.cpu.sync import barrier
from svdengine.kernels.cpu.workspace import DENSE, DOWN_STAGE, KEPT, MODE, UP_STAGE

# Rows of a neuron-major down are summed, without those whose weight is 0, for up to SUMMED rows of a step, and for more
# where each thread has at least WIDE columns: else taking numbers from lists costs more than a product of panels.
SUMMED, WIDE = 24, 1024


@piece
def ffn(model, work, inputs, layer, normed, n, member, threads, sync):
    """ffn_add = FFN(normed), dense."""
    matrix = model.matrices[layer * LAYER_MATRICES + DOWN]
    scratch = work.scratch + member * work.scratch_stride
    turn = 0
    counter = counter_of(inputs, layer, UP_STAGE)
    first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    while first < last:
        ffn_hidden(model, work, layer, normed, n, 0, np.float32(1), member, first, last)
        turn += 1
        first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    by_rows = model.transposed_down and (n <= SUMMED or work.invariant or model.hidden >= WIDE * threads)
    if by_rows:
        first, last = share(model.ffn, NEURON_UNIT, member, threads)
        list_range(work.neurons + 4 * first, first, last)
    barrier(sync, threads)
    if by_rows:
        first, last = share(matrix[COLUMNS], COLUMN_UNIT, member, threads)
        for row in range(n):
            out = work.ffn_add + row * work.hidden_stride
            start_sum(out + 4 * first, matrix[BIAS_VECTOR] + 4 * first, last - first, True)
        add_rows(
            matrix, work.neurons, model.ffn, work.gate, work.ffn_stride, n, work.ffn_add, work.hidden_stride,
            work.sums, work.hidden_stride, first, last, scratch,
        )  # fmt: skip
    elif model.transposed_down:
        first, last = share(model.hidden, 16, member, threads)
        gemm_transposed(
            matrix, matrix[BIAS_VECTOR], work.gate, work.ffn_stride, n, work.ffn_add, work.hidden_stride,
            model.ffn_stride, first, last, scratch,
        )  # fmt: skip
    else:
        matmul_together(
            matrix, work.gate, work.ffn_stride, work.ffn_q, work.ffn_q_stride,
            n, work.ffn_add, work.hidden_stride, model.hidden, scratch, work.invariant,
            member, threads, counter_of(inputs, layer, DOWN_STAGE),
        )  # fmt: skip
    barrier(sync, threads)


@jit
def any_ffn(model, work, inputs, layer, normed, n, member, threads, sync):
    """ffn_add = FFN(normed) of n rows, as the step's mode says. Returns in how many parts decode leaves the result."""
    if n == 1 and not work.invariant:
        return ffn_of_row(model, work, inputs, layer, 0, 0, 1, normed, member, threads, sync)
    if inputs.sizes[MODE] == DENSE:
        ffn(model, work, inputs, layer, normed, n, member, threads, sync)
        return 1
    if n == 1:
        barrier(sync, threads)  # everyone reads what the first member made for itself
    sparse_batch(model, work, inputs, layer, normed, n, member, threads, sync)
    return 1


@jit
def ffn_of_row(model, work, inputs, first, chosen, weights, count, normed, member, threads, sync):
    """`dense_row` or `sparse_row`, as the step's mode says."""
    if inputs.sizes[MODE] == DENSE:
        return dense_row(model, work, inputs, first, chosen, weights, count, normed, member, threads, sync)
    return sparse_row(model, work, inputs, first, chosen, weights, count, normed, member, threads, sync)


@jit
def keep_ffn_inputs(model, work, inputs, layer, normed, n, member, threads):
    """Copy the FFN's inputs to where the caller finds them, when it asked for them."""
    kept = inputs.sizes[KEPT]  # (layers, n, hidden_stride)
    if kept != 0 and n > 1:
        first, last = share(n, 1, member, threads)
        for row in range(first, last):
            to = kept + (layer * n + row) * work.hidden_stride
            copy_row(normed + row * work.hidden_stride, to, model.hidden_stride)
