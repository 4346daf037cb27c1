"""The FFN of one row, in decode: a layer's only one, or those of the experts that the row chose, as if they were one.

Threads meet once for all experts, not for each. A neuron-major down is summed by each thread over its own neurons: what
the row gets then is in several parts, one a thread. An expert's weight goes into its neurons' values, before down.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.elementwise import clear_padding, scale_part
from svdengine.kernels.cpu.ffn_hidden import ffn_hidden
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, COLUMNS, ROWS
from svdengine.kernels.cpu.model import DOWN, FACTOR_A, FACTOR_B, LAYER_MATRICES
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.rows import add_rows, list_range
from svdengine.kernels.cpu.sharing import NEURON_UNIT, claim, counter_of, matmul_together, share
from svdengine.kernels.cpu.simd import load_int, load_real
from svdengine.kernels.cpu.sparse import (
    activate_part,
    count_neurons,
    list_neurons,
    project,
    start_sum,
    up_listed,
    weigh_listed,
)
from svdengine.kernels.cpu.sparse_batch import clear_unscaled
from svdengine.kernels.cpu.sync import barrier
from svdengine.kernels.cpu.workspace import DOWN_STAGE, GAP, LISTED, MODE, PREDICT, UP_STAGE

_ONE = np.float32(1)


@jit
def block_of(first, chosen, k):
    """The k-th FFN block of a row: its k-th expert, or without a list the k-th of the layer."""
    return first + (k if chosen == 0 else load_int(chosen + 4 * k))


@jit
def weight_of(weights, k):
    """What the k-th block's output is multiplied by."""
    return _ONE if weights == 0 else load_real(weights + 4 * k)


@piece
def dense_row(model, work, inputs, first_block, chosen, weights, count, normed, member, threads, sync):
    """ffn_add = the FFN of one row in `count` blocks, all neurons of them. Returns how many parts it is in.

    chosen: address of their numbers after `first_block`, or 0 for the first ones; weights: of float32, or 0 for ones.
    """
    scratch = work.scratch + member * work.scratch_stride
    if model.transposed_down:
        out = work.ffn_add + member * work.hidden_stride
        for k in range(count):
            block = block_of(first_block, chosen, k)
            down = model.matrices[block * LAYER_MATRICES + DOWN]
            if k == 0:
                start_sum(out, down[BIAS_VECTOR], model.hidden_stride, member == 0)
            first, last = part_of(model.ffn, k, member, threads)
            neurons = work.neurons + k * work.neurons_stride + 4 * first
            list_range(neurons, first, last)
            ffn_hidden(model, work, block, normed, 1, k, weight_of(weights, k), member, first, last)
            add_rows(
                down, neurons, last - first, work.gate + k * work.ffn_stride + 4 * first, work.ffn_stride, 1,
                out, work.hidden_stride, work.sums + member * work.hidden_stride, work.hidden_stride,
                0, down[COLUMNS], scratch,
            )  # fmt: skip
        barrier(sync, threads)
        return threads
    for k in range(count):
        block, turn = block_of(first_block, chosen, k), 0
        counter = counter_of(inputs, block, UP_STAGE)
        first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
        while first < last:
            ffn_hidden(model, work, block, normed, 1, k, weight_of(weights, k), member, first, last)
            turn += 1
            first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    barrier(sync, threads)
    for k in range(count):
        block = block_of(first_block, chosen, k)
        matmul_together(
            model.matrices[block * LAYER_MATRICES + DOWN],
            work.gate + k * work.ffn_stride, work.ffn_stride, work.ffn_q + k * work.ffn_q_stride, work.ffn_q_stride,
            1, work.ffn_add + k * work.hidden_stride, work.hidden_stride, model.hidden, scratch, work.invariant,
            member, threads, counter_of(inputs, block, DOWN_STAGE),
        )  # fmt: skip
    barrier(sync, threads)
    return count


@piece
def sparse_row(model, work, inputs, first_block, chosen, weights, count, normed, member, threads, sync):
    """As `dense_row`, of the neurons that are predicted, or that are not exactly zero, as the step's mode says.

    Threads share a list and not the neurons that it was made of. count: not over SLOTS.
    """
    x = normed + member * work.hidden_stride
    quantized = work.hidden_q + member * work.hidden_q_stride
    predict = inputs.sizes[MODE] == PREDICT
    if predict:
        project_blocks(model, work, first_block, chosen, count, quantized, member, threads)
        barrier(sync, threads)
        list_blocks(model, work, inputs, first_block, chosen, count, quantized, member, threads)
    if model.sub_norms:
        clear_unscaled(model, work, 0, 1, member, threads)
    if predict or model.sub_norms:
        barrier(sync, threads)
    for k in range(count):
        block = block_of(first_block, chosen, k)
        if k == 0:
            down = model.matrices[block * LAYER_MATRICES + DOWN]
            start_sum(work.ffn_add + member * work.hidden_stride, down[BIAS_VECTOR], model.hidden_stride, member == 0)
        total = 0
        if predict:
            for other in range(threads):
                total += inputs.counts[other, LISTED + k]
        else:
            total = model.ffn
        first, last = part_of(total, k, member, threads)
        active, hidden = work.up + k * work.ffn_stride + 4 * first, work.gate + k * work.ffn_stride + 4 * first
        found, start = 0, 0
        for other in range(threads):
            own_first, own_last = share(model.ffn, NEURON_UNIT, other, threads)
            neurons = work.neurons + k * work.neurons_stride + 4 * own_first
            listed = inputs.counts[other, LISTED + k] if predict else own_last - own_first
            a, b = max(first, start) - start, min(last, start + listed) - start
            if a < b:
                if not predict:
                    list_range(neurons + 4 * a, own_first + a, own_first + b)
                found += compute_gates(
                    model, work, inputs, block, x, quantized, neurons + 4 * a, b - a,
                    active + 4 * found, hidden + 4 * found, member,
                )  # fmt: skip
            start += listed
        add_active(model, work, block, x, quantized, active, found, hidden, weight_of(weights, k), member)
        count_neurons(inputs.counts, member, block, last - first, found, model.ffn if member == 0 else 0)
    barrier(sync, threads)
    return threads


@jit
def part_of(count, k, member, threads):
    """This member's part of the k-th block's list; who has the larger part changes from block to block."""
    return share(count, NEURON_UNIT, (member + k) % threads, threads)


@jit
def project_blocks(model, work, first_block, chosen, count, quantized, member, threads):
    """z = B x of the predictor of each block, this member's part; complete after a barrier."""
    for k in range(count):
        block = block_of(first_block, chosen, k)
        first, last = share(model.matrices[block * LAYER_MATRICES + FACTOR_B, ROWS], 4, member, threads)
        project(model, block, quantized, work.z + k * work.z_stride, first, last)


@jit
def list_blocks(model, work, inputs, first_block, chosen, count, quantized, member, threads):
    """List this member's neurons of each block that are predicted active."""
    first, last = share(model.ffn, NEURON_UNIT, member, threads)
    bias = inputs.sparsity_bias.ctypes.data + 4 * inputs.sequences[0]
    z_quantized = work.z_q + member * work.z_q_stride
    scratch = work.scratch + member * work.scratch_stride
    for k in range(count):
        block, z = block_of(first_block, chosen, k), work.z + k * work.z_stride
        base = block * LAYER_MATRICES
        rank, columns = model.matrices[base + FACTOR_B, ROWS], model.matrices[base + FACTOR_A, COLUMNS]
        if rank > 0:
            clear_padding(z, rank, columns)
            quantize_groups(z, z_quantized, columns, 0, columns)
        neurons = work.neurons + k * work.neurons_stride + 4 * first
        inputs.counts[member, LISTED + k] = list_neurons(
            model, block, quantized, z_quantized, bias, neurons, first, last, scratch
        )


@jit
def compute_gates(model, work, inputs, block, x, quantized, neurons, count, active, hidden, member):
    """`activate_part` with this member's scratch memory."""
    scratch = work.scratch + member * work.scratch_stride
    return activate_part(model, block, x, quantized, neurons, count, inputs.sizes[GAP], active, hidden, scratch)


@jit
def add_active(model, work, block, x, quantized, active, found, hidden, weight, member):
    """This member's part of ffn_add += weight * what active neurons give."""
    scratch, down = work.scratch + member * work.scratch_stride, model.matrices[block * LAYER_MATRICES + DOWN]
    if model.gated:
        up_listed(model, block, x, quantized, active, found, hidden, scratch)
    if model.sub_norms:
        weigh_listed(model, block, active, found, hidden, work.unscaled)
    scale_part(hidden, weight, found)
    add_rows(
        down, active, found, hidden, work.ffn_stride, 1,
        work.ffn_add + member * work.hidden_stride, work.hidden_stride,
        work.sums + member * work.hidden_stride, work.hidden_stride, 0, down[COLUMNS], scratch,
    )  # fmt: skip
