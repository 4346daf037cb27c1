"""The conditional FFN of several rows: each computes its own list of neurons, and a weight is read once for all.

The rows' lists are merged into one, with a mask a neuron that says which rows listed it. Threads share the merged list
for gate and up, and the columns for down, so that every sum runs over a row's own neurons in ascending order: what a
row gets does not depend on the rows beside it, nor on the number of threads.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.elementwise import clear_padding
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, COLUMNS, ROWS
from svdengine.kernels.cpu.model import DOWN, FACTOR_A, FACTOR_B, GATE, LAYER_MATRICES, UP
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.read_ahead import ask_for_rows
from svdengine.kernels.cpu.rows import add_rows
from svdengine.kernels.cpu.score import list_positive
from svdengine.kernels.cpu.score_panels import NEURONS
from svdengine.kernels.cpu.sharing import NEURON_UNIT, share
from svdengine.kernels.cpu.simd import load_int, load_real, store_int, store_real
from svdengine.kernels.cpu.sparse import (
    count_neurons,
    gate_listed,
    project,
    score_neurons,
    start_sum,
    up_listed,
    weigh_listed,
)
from svdengine.kernels.cpu.sync import barrier
from svdengine.kernels.cpu.workspace import GAP, LISTED, MODE, PREDICT

CHUNK = 64  # neurons of the merged list at once: their rows wait in the second-level cache
GROUP = 32  # rows whose lists are merged at once: the bits of a mask
COLUMN_UNIT = 64  # columns are shared out in multiples of it
_ZERO = np.float32(0)


@piece
def sparse_batch(model, work, inputs, layer, normed, n, member, threads, sync):
    """ffn_add = the conditional FFN of n rows, by all threads; complete when it returns."""
    for first in range(0, n, GROUP):
        count = min(GROUP, n - first)
        if inputs.sizes[MODE] == PREDICT:
            project_rows(model, work, layer, first, count, member, threads, sync)
            listed = merge_lists(model, work, inputs, layer, first, count, member, threads)
        else:
            listed = list_every_neuron(model, work, inputs, layer, count, member, threads)
        if model.sub_norms:
            clear_unscaled(model, work, first, count, member, threads)
        inputs.counts[member, LISTED] = listed
        barrier(sync, threads)
        total = join_lists(model, work, inputs, member, threads)
        barrier(sync, threads)
        activate_listed(model, work, inputs, layer, normed, first, count, total, member, threads)
        barrier(sync, threads)
        add_down(model, work, layer, first, count, total, member, threads)
        barrier(sync, threads)


@jit
def project_rows(model, work, layer, first, count, member, threads, sync):
    """z = B x of the predictor for `count` rows, quantised."""
    base = layer * LAYER_MATRICES
    rank, columns = model.matrices[base + FACTOR_B, ROWS], model.matrices[base + FACTOR_A, COLUMNS]
    if rank == 0:
        return
    a, b = share(rank, 4, member, threads)
    for row in range(first, first + count):
        project(model, layer, work.hidden_q + row * work.hidden_q_stride, work.z + row * work.z_stride, a, b)
    barrier(sync, threads)
    a, b = share(count, 1, member, threads)
    for row in range(first + a, first + b):
        z = work.z + row * work.z_stride
        clear_padding(z, rank, columns)
        quantize_groups(z, work.z_q + row * work.z_q_stride, columns, 0, columns)
    barrier(sync, threads)


@jit
def merge_lists(model, work, inputs, layer, first, count, member, threads):
    """List this member's neurons that any of `count` rows predicts active, with their masks. Returns how many."""
    begin, end = share(model.ffn, NEURON_UNIT, member, threads)
    scratch = work.scratch + member * work.scratch_stride
    listed, masks = scratch + 4 * 2 * NEURONS, scratch + 4 * 4 * NEURONS
    neurons, merged = work.neurons + 4 * begin, work.up + 4 * begin
    found, predicted = 0, 0
    for i in range(begin, end, NEURONS):
        for lane in range(NEURONS):
            store_int(masks + 4 * lane, 0)
        for row in range(count):
            at = first + row
            score = score_neurons(
                model, layer, work.hidden_q + at * work.hidden_q_stride, work.z_q + at * work.z_q_stride,
                inputs.sparsity_bias[inputs.sequences[at]], i, scratch,
            )  # fmt: skip
            positive = list_positive(score, i, listed)
            predicted += positive
            for k in range(positive):
                mask = masks + 4 * (load_int(listed + 4 * k) - i)
                store_int(mask, load_int(mask) | (1 << row))
        for lane in range(NEURONS):
            mask = load_int(masks + 4 * lane)
            if mask != 0:
                store_int(neurons + 4 * found, i + lane)
                store_int(merged + 4 * found, mask)
                found += 1
    count_neurons(inputs.counts, member, layer, predicted, 0, count * (end - begin))
    return found


@jit
def list_every_neuron(model, work, inputs, layer, count, member, threads):
    """List all of this member's neurons for every row: only exact zeros are skipped then. Returns how many."""
    begin, end = share(model.ffn, NEURON_UNIT, member, threads)
    for i in range(begin, end):
        store_int(work.neurons + 4 * i, i)
        store_int(work.up + 4 * i, (1 << count) - 1)
    count_neurons(inputs.counts, member, layer, count * (end - begin), 0, count * (end - begin))
    return end - begin


@jit
def clear_unscaled(model, work, first, count, member, threads):
    """Zeros in this member's neurons of `count` rows of work.unscaled, where active ones are written later."""
    begin, end = share(model.ffn, NEURON_UNIT, member, threads)
    end = model.ffn_stride if end == model.ffn else end
    for row in range(first, first + count):
        for i in range(begin, end):
            store_real(work.unscaled + row * work.ffn_stride + 4 * i, _ZERO)


@jit
def merged_list(work):
    """Addresses of the merged list and of its masks, after all members' parts were joined."""
    return work.neurons + work.neurons_stride, work.up + work.ffn_stride


@jit
def join_lists(model, work, inputs, member, threads):
    """Copy this member's part to its place in the merged list. Returns the length of that."""
    start, total = 0, 0
    for other in range(threads):
        if other < member:
            start += inputs.counts[other, LISTED]
        total += inputs.counts[other, LISTED]
    begin, _ = share(model.ffn, NEURON_UNIT, member, threads)
    neurons, masks = merged_list(work)
    for k in range(inputs.counts[member, LISTED]):
        store_int(neurons + 4 * (start + k), load_int(work.neurons + 4 * (begin + k)))
        store_int(masks + 4 * (start + k), load_int(work.up + 4 * (begin + k)))
    return total


@jit
def activate_listed(model, work, inputs, layer, normed, first, count, total, member, threads):
    """work.gate[row, k] = gate * up of the k-th neuron of the merged list, or 0, for this member's part of the list.

    A chunk's weights stay in the cache while one row after the other takes what it listed of them.
    """
    neurons, masks = merged_list(work)
    scratch = work.scratch + member * work.scratch_stride
    own, active, hidden, four = scratch, scratch + 4 * CHUNK, scratch + 8 * CHUNK, scratch + 12 * CHUNK
    begin, end = share(total, NEURON_UNIT, member, threads)
    gap = inputs.sizes[GAP]
    if gap > 0:
        for kind in (GATE, UP, DOWN) if model.gated else (UP, UP, DOWN):
            matrix = model.matrices[layer * LAYER_MATRICES + kind]
            ask_for_rows(matrix, neurons + 4 * begin, end - begin, gap)
    computed = 0
    for start in range(begin, end, CHUNK):
        size = min(CHUNK, end - start)
        for row in range(count):
            listed = 0
            for k in range(start, start + size):
                if (load_int(masks + 4 * k) >> row) & 1:
                    store_int(own + 4 * listed, load_int(neurons + 4 * k))
                    listed += 1
            x = normed + (first + row) * work.hidden_stride
            quantized = work.hidden_q + (first + row) * work.hidden_q_stride
            found = gate_listed(model, layer, x, quantized, own, listed, active, hidden, four)
            if model.gated:
                up_listed(model, layer, x, quantized, active, found, hidden, four)
            if model.sub_norms:
                weigh_listed(model, layer, active, found, hidden, work.unscaled + (first + row) * work.ffn_stride)
            spread(neurons, start, size, active, hidden, found, work.gate + (first + row) * work.ffn_stride)
            computed += found
    count_neurons(inputs.counts, member, layer, 0, computed, 0)


@jit
def spread(neurons, start, size, active, hidden, found, out):
    """out[k] = hidden of the neuron at k of the merged list, or 0 where it is not active; k: start..start + size."""
    k = 0
    for i in range(start, start + size):
        value = _ZERO
        if k < found and load_int(active + 4 * k) == load_int(neurons + 4 * i):
            value = load_real(hidden + 4 * k)
            k += 1
        store_real(out + 4 * i, value)


@jit
def add_down(model, work, layer, first, count, total, member, threads):
    """This member's columns of ffn_add: the bias of down, and its rows times what the neurons gave."""
    down = model.matrices[layer * LAYER_MATRICES + DOWN]
    neurons, _ = merged_list(work)
    scratch = work.scratch + member * work.scratch_stride
    begin, end = share(down[COLUMNS], COLUMN_UNIT, member, threads)
    if begin == end:
        return
    out, sums = work.ffn_add + first * work.hidden_stride, work.sums + first * work.hidden_stride
    for row in range(count):
        start_sum(out + row * work.hidden_stride + 4 * begin, down[BIAS_VECTOR] + 4 * begin, end - begin, True)
    add_rows(
        down, neurons, total, work.gate + first * work.ffn_stride, work.ffn_stride, count,
        out, work.hidden_stride, sums, work.hidden_stride, begin, end, scratch,
    )  # fmt: skip
