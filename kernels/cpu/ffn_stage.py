"""The FFN stage of a layer, dense or conditional."""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.elementwise import activate_row, clear_padding, copy_row, weigh_row
from svdengine.kernels.cpu.gemm import gemm_transposed
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, COLUMNS, ROWS
from svdengine.kernels.cpu.model import DOWN, FACTOR_A, FACTOR_B, GATE, LAYER_MATRICES, UP
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.rows import add_rows, list_range
from svdengine.kernels.cpu.sharing import NEURON_UNIT, claim, counter_of, matmul, matmul_together, share
from svdengine.kernels.cpu.sparse import (
    activate_part,
    count_neurons,
    list_neurons,
    project,
    start_sum,
    up_listed,
    weigh_listed,
)
from svdengine.kernels.cpu.sparse_batch import COLUMN_UNIT, clear_unscaled, sparse_batch
from svdengine.kernels.cpu.sync import barrier
from svdengine.kernels.cpu.workspace import DENSE, DOWN_STAGE, GAP, KEPT, LISTED, MODE, PREDICT, UP_STAGE

SUMMED = 16  # rows of a step for which rows of a neuron-major down are summed; more take a product of panels


@jit
def ffn_hidden(model, work, layer, normed, n, member, threads, first, last):
    """act(gate) * up of neurons first..last, and its quantised form for a down that reads all of it."""
    own = member if n == 1 else 0
    x = normed + own * work.hidden_stride
    quantized = work.hidden_q + own * work.hidden_q_stride
    scratch = work.scratch + member * work.scratch_stride
    base = layer * LAYER_MATRICES
    if model.gated:
        matmul(
            model.matrices[base + GATE], x, work.hidden_stride, quantized, work.hidden_q_stride,
            n, work.gate, work.ffn_stride, first, last, scratch, work.invariant,
        )  # fmt: skip
    matmul(
        model.matrices[base + UP], x, work.hidden_stride, quantized, work.hidden_q_stride,
        n, work.up, work.ffn_stride, first, last, scratch, work.invariant,
    )  # fmt: skip
    padded = model.ffn_stride if last == model.ffn else last
    for row in range(n):
        gate = work.gate + row * work.ffn_stride
        up = work.up + row * work.ffn_stride
        threshold = np.float32(model.threshold)
        activate_row(gate, up, gate, model.activation, threshold, model.gated, first, padded)
        if model.sub_norms:
            # The norm's weights now, and one over its root of a mean square when the FFN's sum is added.
            weight = model.ffn_sub_norm[layer, 0].ctypes.data
            weigh_row(gate, weight, work.unscaled + row * work.ffn_stride, first, padded)
        if model.quantized and not model.transposed_down:
            quantize_groups(gate, work.ffn_q + row * work.ffn_q_stride, model.ffn_stride, first, padded)


@piece
def ffn(model, work, inputs, layer, normed, n, member, threads, sync):
    """ffn_add = FFN(normed), dense. Returns in how many parts decode leaves the result."""
    matrix = model.matrices[layer * LAYER_MATRICES + DOWN]
    scratch = work.scratch + member * work.scratch_stride
    if model.transposed_down and n == 1 and not work.invariant:
        # A neuron's row goes straight from its owner into the owner's partial sum.
        first, last = share(model.ffn, NEURON_UNIT, member, threads)
        ffn_hidden(model, work, layer, normed, n, member, threads, first, last)
        out = work.ffn_add + member * work.hidden_stride
        start_sum(out, matrix[BIAS_VECTOR], model.hidden_stride, member == 0)
        neurons = work.neurons + 4 * first
        list_range(neurons, first, last)
        add_rows(
            matrix, neurons, last - first, work.gate + 4 * first, work.ffn_stride, 1, out, work.hidden_stride,
            work.sums + member * work.hidden_stride, work.hidden_stride, 0, matrix[COLUMNS], scratch,
        )  # fmt: skip
        barrier(sync, threads)
        return threads
    turn = 0
    counter = counter_of(inputs, layer, UP_STAGE)
    first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    while first < last:
        ffn_hidden(model, work, layer, normed, n, member, threads, first, last)
        turn += 1
        first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    by_rows = model.transposed_down and (n <= SUMMED or work.invariant)
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
    return 1


@piece
def sparse_together(model, work, inputs, layer, normed, member, threads, sync):
    """The conditional FFN of one row by all threads; each leaves a part of ffn_add. Returns how many parts."""
    base = layer * LAYER_MATRICES
    x = normed + member * work.hidden_stride
    quantized = work.hidden_q + member * work.hidden_q_stride
    first, last = share(model.ffn, NEURON_UNIT, member, threads)
    count = last - first
    scratch = work.scratch + member * work.scratch_stride
    if inputs.sizes[MODE] == PREDICT:
        rank, columns = model.matrices[base + FACTOR_B, ROWS], model.matrices[base + FACTOR_A, COLUMNS]
        z_quantized = work.z_q + member * work.z_q_stride
        if rank > 0:
            a, b = share(rank, 4, member, threads)
            project(model, layer, quantized, work.z, a, b)
            barrier(sync, threads)
            clear_padding(work.z, rank, columns)
            quantize_groups(work.z, z_quantized, columns, 0, columns)
        neurons = work.neurons + 4 * first
        shift = inputs.sparsity_bias[inputs.sequences[0]]
        count = list_neurons(model, layer, quantized, z_quantized, shift, neurons, first, last, scratch)
    else:
        list_range(work.neurons + 4 * first, first, last)
    if model.sub_norms:
        clear_unscaled(model, work, 0, 1, member, threads)
    inputs.counts[member, LISTED] = count
    barrier(sync, threads)
    total = 0
    for other in range(threads):
        total += inputs.counts[other, LISTED]
    first, last = share(total, NEURON_UNIT, member, threads)
    active, hidden, found, start = work.up + 4 * first, work.gate + 4 * first, 0, 0
    for other in range(threads):
        listed = inputs.counts[other, LISTED]
        a, b = max(first, start) - start, min(last, start + listed) - start
        if a < b:
            at = work.neurons + 4 * (share(model.ffn, NEURON_UNIT, other, threads)[0] + a)
            found += activate_part(
                model, layer, x, quantized, at, b - a, inputs.sizes[GAP],
                active + 4 * found, hidden + 4 * found, scratch,
            )  # fmt: skip
        start += listed
    if model.gated:
        up_listed(model, layer, x, quantized, active, found, hidden, scratch)
    if model.sub_norms:
        weigh_listed(model, layer, active, found, hidden, work.unscaled)
    down, out = model.matrices[base + DOWN], work.ffn_add + member * work.hidden_stride
    start_sum(out, down[BIAS_VECTOR], model.hidden_stride, member == 0)
    add_rows(
        down, active, found, hidden, work.ffn_stride, 1, out, work.hidden_stride,
        work.sums + member * work.hidden_stride, work.hidden_stride, 0, down[COLUMNS], scratch,
    )  # fmt: skip
    count_neurons(inputs.counts, member, layer, count, found, model.ffn if member == 0 else 0)
    barrier(sync, threads)
    return threads


@jit
def any_ffn(model, work, inputs, layer, normed, n, member, threads, sync):
    """ffn_add = FFN(normed) of n rows, as the step's mode says. Returns in how many parts decode leaves the result."""
    if inputs.sizes[MODE] == DENSE:
        return ffn(model, work, inputs, layer, normed, n, member, threads, sync)
    if n == 1:
        if not work.invariant:
            return sparse_together(model, work, inputs, layer, normed, member, threads, sync)
        barrier(sync, threads)  # everyone reads what the first member made for itself
    sparse_batch(model, work, inputs, layer, normed, n, member, threads, sync)
    return 1


@jit
def keep_ffn_inputs(model, work, inputs, layer, normed, n, member, threads):
    """Copy the FFN's inputs to where the caller finds them, when it asked for them."""
    kept = inputs.sizes[KEPT]  # (layers, n, hidden_stride)
    if kept != 0 and n > 1:
        first, last = share(n, 1, member, threads)
        for row in range(first, last):
            to = kept + (layer * n + row) * work.hidden_stride
            copy_row(normed + row * work.hidden_stride, to, model.hidden_stride)
