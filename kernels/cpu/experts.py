"""Mixtures of experts: the router's choice for each row, and the FFNs of the experts that were chosen, one by one.

An expert is an FFN block: matrices and predictor of its own, beside those of the others, which the stage of a layer's
only FFN runs. In decode those that the row chose run as one FFN (row_ffn.py). Of several rows those that chose an
expert are gathered in buffers of their own, and the stage runs them as if the step had no others; what it gives is
added to their residual streams. Experts run in ascending order, so that a row's sum does not depend on the rows
beside it.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.elementwise import add_row, clear_padding, copy_row, sigmoid
from svdengine.kernels.cpu.ffn_stage import any_ffn, ffn_of_row
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import ROWS
from svdengine.kernels.cpu.model import DOWN, GATE, LAYER_MATRICES, ROUTER, SIGMOID, SOFTMAX
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.read_ahead import ask_for_matrix, ask_for_scales
from svdengine.kernels.cpu.record_type import record_at
from svdengine.kernels.cpu.sharing import matmul, ready, rows_of, share
from svdengine.kernels.cpu.simd import (
    exp_f32,
    load_f32,
    load_int,
    load_real,
    splat_f32,
    store_f32,
    store_int,
    store_real,
)
from svdengine.kernels.cpu.sync import barrier
from svdengine.kernels.cpu.workspace import (
    AHEAD,
    BLOCK_COUNTS,
    CHOSEN,
    FIRST_BLOCK,
    KEPT_EXPERTS,
    MODE,
    PREDICT,
    SLOTS,
    Inputs,
    Workspace,
)

workspace_at, inputs_at = record_at(Workspace), record_at(Inputs)
_ZERO = np.float32(0)


@piece
def route(model, work, layer, x, n, member, threads):
    """work.router = what a layer's router makes of rows x (n, hidden), of which decode has a copy a thread.

    Complete after a barrier. Nothing in a layer without experts.
    """
    matrix = model.matrices[layer * LAYER_MATRICES + ROUTER]
    first, last = share(matrix[ROWS], 16, member, threads)
    if first < last:
        at = x + (member if n == 1 else 0) * work.hidden_stride
        scratch = work.scratch + member * work.scratch_stride
        matmul(
            matrix, at, work.hidden_stride, at, 0, n, work.router, work.router_stride, first, last, scratch,
            work.invariant,
        )  # fmt: skip


@piece
def choose_experts(model, work, inputs, layer, n, member, threads):
    """Choose and count the experts of each row by work.router; ask for their pages where these may lie on storage.

    Complete after a barrier; in decode every thread has a copy.
    """
    if model.matrices[layer * LAYER_MATRICES + ROUTER, ROWS] == 0:
        return
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        products = work.router + (0 if n == 1 else row) * work.router_stride
        at = row * work.chosen_stride
        choose(model, products, work.chosen + at, work.weights + at, work.scratch + member * work.scratch_stride)
        if inputs.sizes[KEPT_EXPERTS] != 0 and n > 1:
            for k in range(model.chosen_blocks):
                to = inputs.sizes[KEPT_EXPERTS] + 4 * ((layer * n + row) * model.chosen_blocks + k)
                store_int(to, load_int(work.chosen + at + 4 * k))
        for k in range(model.chosen_blocks):
            block = model.first_blocks[layer] + load_int(work.chosen + at + 4 * k)
            if n > 1 or k % threads == member:
                inputs.counts[member, FIRST_BLOCK + block * BLOCK_COUNTS + CHOSEN] += 1
                if inputs.sizes[AHEAD] != 0:
                    ask_for_block(model, block, inputs.sizes[MODE])


@jit
def ask_for_block(model, block, mode):
    """Ask for an FFN block; for its scales alone where a predictor is to say which rows are read.

    Where only exact zeros are skipped, for all: a page holds several rows, of which seldom none is needed.
    """
    for kind in range(GATE, DOWN + 1):
        matrix = model.matrices[block * LAYER_MATRICES + kind]
        if matrix[ROWS] != 0:
            if mode == PREDICT:
                ask_for_scales(matrix)
            else:
                ask_for_matrix(matrix)


@piece
def experts(model, work, inputs, layer, normed, n, member, threads, sync):
    """x += residual_scale * what a layer's FFN blocks make of `normed`, for the experts that were chosen."""
    first, last = model.first_blocks[layer], model.first_blocks[layer + 1]
    routed = model.matrices[layer * LAYER_MATRICES + ROUTER, ROWS] != 0
    if n == 1 and not work.invariant:
        at = member * work.chosen_stride
        count = model.chosen_blocks if routed else last - first
        for k in range(0, count, SLOTS):
            chosen, weights = (work.chosen + at + 4 * k, work.weights + at + 4 * k) if routed else (0, 0)
            start, some = first if routed else first + k, min(SLOTS, count - k)
            if k > 0:
                barrier(sync, threads)  # these write where others may still read
            parts = ffn_of_row(model, work, inputs, start, chosen, weights, some, normed, member, threads, sync)
            add_parts(model, work, member, work.ffn_add, parts, np.float32(1))
        return
    if routed and n > 1:
        for block in range(first, last):
            run_group(model, work, inputs, block, block - first, normed, n, member, threads, sync)
        return
    at = member * work.chosen_stride
    for k in range(model.chosen_blocks if routed else last - first):
        block = first + (load_int(work.chosen + at + 4 * k) if routed else k)
        weight = load_real(work.weights + at + 4 * k) if routed else np.float32(1)
        run_all(model, work, inputs, block, normed, n, weight, member, threads, sync)


@jit
def greater(a, b):
    """Whether a is to be chosen before b, which has the lower number: what is not a number comes last."""
    return a > b or (b != b and a == a)


@jit
def choose(model, products, chosen, weights, scratch):
    """List a row's blocks, ascending, and what each one's output is multiplied by (kernels/router.py)."""
    marks, scores = scratch, scratch + 4 * model.router_columns
    for e in range(model.experts):
        store_int(marks + 4 * e, 0)
    largest = _ZERO
    for k in range(model.active_experts):
        best = -1
        for e in range(model.experts):
            free = load_int(marks + 4 * e) == 0
            if free and (best < 0 or greater(load_real(products + 4 * e), load_real(products + 4 * best))):
                best = e
        store_int(marks + 4 * best, 1)
        if k == 0:
            largest = load_real(products + 4 * best)
    for e in range(0, model.experts, 16):
        value = load_f32(products + 4 * e)
        score = sigmoid(value) if model.router == SIGMOID else exp_f32(value - splat_f32(largest))
        store_f32(scores + 4 * e, score)
    total, damage = _ZERO, _ZERO
    for e in range(model.experts):
        value = load_real(products + 4 * e)
        damage += value - value  # not a number where a product is none, or infinite: the exponential hides it
        if model.router == SOFTMAX or load_int(marks + 4 * e) != 0:
            total += load_real(scores + 4 * e)
    scale, found = np.float32(model.expert_scale), 0
    for e in range(model.experts):
        if load_int(marks + 4 * e) != 0:
            store_int(chosen + 4 * found, e)
            store_real(weights + 4 * found, load_real(scores + 4 * e) / total * scale + damage)
            found += 1
    gate = splat_f32(load_real(products + 4 * model.experts) if model.shared_gate else _ZERO)
    store_f32(scores, sigmoid(gate))
    for k in range(found, model.chosen_blocks):
        store_int(chosen + 4 * k, model.experts + k - found)
        store_real(weights + 4 * k, load_real(scores) if model.shared_gate else np.float32(1))


@jit
def run_all(model, work, inputs, block, normed, n, weight, member, threads, sync):
    """Add what a block makes of every row of the step; in decode, of the only one."""
    parts = any_ffn(model, work, inputs, block, normed, n, member, threads, sync)
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        add_parts(model, work, row, work.ffn_add + (0 if n == 1 else row) * work.hidden_stride, parts, weight)
    barrier(sync, threads)  # the next block writes where others may still read


@jit
def run_group(model, work, inputs, block, expert, normed, n, member, threads, sync):
    """Add what an expert makes of the rows that chose it. Every thread lists these for itself."""
    group, grouped = workspace_at(work.group), inputs_at(work.group_inputs)
    rows = work.group_rows + member * work.group_rows_stride
    weights = rows + work.group_rows_stride // 2
    count = list_rows(model, work, expert, n, rows, weights)
    if count == 0:
        return
    # One row alone is as in decode: every thread has a copy.
    first, last = rows_of(count, member, threads)
    for k in range(first, last):
        row = load_int(rows + 4 * (0 if count == 1 else k))
        copy_row(normed + row * work.hidden_stride, group.normed + k * work.hidden_stride, model.hidden_stride)
        quantized, to = work.hidden_q + row * work.hidden_q_stride, group.hidden_q + k * work.hidden_q_stride
        copy_row(quantized, to, work.hidden_q_stride // 4)
        grouped.sequences[0 if count == 1 else k] = inputs.sequences[row]
    ready(count, sync, threads)
    parts = any_ffn(model, group, grouped, block, group.normed, count, member, threads, sync)
    first, last = rows_of(n, member, threads)
    for k in range(count):
        row = load_int(rows + 4 * k)
        if first <= row < last:
            add_parts(model, work, row, group.ffn_add + k * work.hidden_stride, parts, load_real(weights + 4 * k))
    barrier(sync, threads)  # the next group takes the place of this one


@jit
def list_rows(model, work, expert, n, rows, weights):
    """List the rows of the step that chose an expert, and their weights. Returns how many."""
    count = 0
    for row in range(n):
        at = row * work.chosen_stride
        for k in range(model.chosen_blocks):
            if load_int(work.chosen + at + 4 * k) == expert:
                store_int(rows + 4 * count, row)
                store_real(weights + 4 * count, load_real(work.weights + at + 4 * k))
                count += 1
    return count


@jit
def add_parts(model, work, row, addend, parts, weight):
    """A row of x += residual_scale * weight * the sum of `parts` rows from `addend`."""
    x, scale = work.x + row * work.hidden_stride, np.float32(model.residual_scale) * weight
    for part in range(parts):
        add_row(x, addend + part * work.hidden_stride, scale, model.hidden_stride)
    clear_padding(x, model.hidden, model.hidden_stride)
