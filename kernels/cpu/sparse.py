"""The conditional FFN: score neurons, list those predicted active, and compute only these.

    P = neurons whose score is positive         scores: products with factors and low-bit rows (kernels/predictor.py)
    Q = neurons of P whose exact gate is not 0   the gate's rows of P are read, those of up and down only for Q

A list is cut into equal parts, one a thread, so that threads share the work and not the neurons. Without a predictor
P is every neuron: then only exact zeros are skipped and nothing is lost.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.formats.dispatch import dot_four, dot_one_row
from svdengine.kernels.cpu.gemv import STREAM_AHEAD
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import BIAS_VECTOR, COLUMNS, DATA, FORMAT, Q2, ROWS
from svdengine.kernels.cpu.model import (
    DOWN,
    DRELU,
    FACTOR_A,
    FACTOR_B,
    FATRELU,
    GATE,
    LAYER_MATRICES,
    RELU2,
    RESIDUAL,
    UP,
)
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.read_ahead import ask_for_rows
from svdengine.kernels.cpu.rows import AHEAD, fetch_first, listed
from svdengine.kernels.cpu.score import (
    add_factor_scores,
    add_residual_scores_1,
    add_residual_scores_2,
    list_positive,
)
from svdengine.kernels.cpu.score_panels import FACTOR_BYTES, NEURONS, RESIDUAL_BYTES
from svdengine.kernels.cpu.simd import (
    load_f32,
    load_int,
    load_real,
    splat_f32,
    store_f32,
    store_int,
    store_real,
    zero_f32,
)
from svdengine.kernels.cpu.workspace import ACTIVE, BLOCK_COUNTS, FIRST_BLOCK, PREDICTED, TOTAL
from svdengine.kernels.formats import FORMATS

RESIDUAL_BYTES_2, RESIDUAL_BYTES_1 = RESIDUAL_BYTES[2], RESIDUAL_BYTES[1]
_Q8 = FORMATS["q8"].code
_ZERO = np.float32(0)


@jit
def project(model, layer, quantized, z, first, last):
    """z[first..last] = B x of a layer's predictor, or its ReLU where the predictor has one."""
    matrix = model.matrices[layer * LAYER_MATRICES + FACTOR_B]
    relu = model.predictor_relu[layer]
    for row in range(first, last):
        value = dot_one_row(matrix, row, quantized, quantized, STREAM_AHEAD)
        store_real(z + 4 * row, _ZERO if relu and value < _ZERO else value)


@jit
def add_row_scores(total, factor, first, z, scratch):
    """total + A z of 16 neurons from `first`, for factors that are not in panels."""
    for lane in range(NEURONS):
        row = min(first + lane, factor[ROWS] - 1)
        store_real(scratch + 4 * lane, dot_one_row(factor, row, z, z, STREAM_AHEAD))
    return total + load_f32(scratch)


@jit
def score_neurons(model, layer, quantized, z, shift, first, scratch):
    """Scores of 16 neurons from `first`, a multiple of 16.

    quantized: the FFN's input; z: what `project` made, quantised. shift: the sparsity bias.
    """
    base = layer * LAYER_MATRICES
    a, q = model.matrices[base + FACTOR_A], model.matrices[base + RESIDUAL]
    start, unit = model.predictor_minus_threshold[layer].ctypes.data, model.predictor_unit[layer].ctypes.data
    groups, blocks = a[COLUMNS] // 32, q[COLUMNS] // 64
    panel = first // NEURONS
    score = load_f32(start + 4 * first) - load_f32(unit + 4 * first) * splat_f32(shift)
    if groups > 0:
        if a[FORMAT] == _Q8:
            score = add_factor_scores(score, a[DATA] + panel * groups * FACTOR_BYTES, groups, z)
        else:
            score = add_row_scores(score, a, first, z, scratch)
    if blocks > 0:
        if q[FORMAT] == Q2:
            score = add_residual_scores_2(score, q[DATA] + panel * blocks * RESIDUAL_BYTES_2, blocks, quantized)
        else:
            score = add_residual_scores_1(score, q[DATA] + panel * blocks * RESIDUAL_BYTES_1, blocks, quantized)
    return score


@piece
def list_neurons(model, layer, quantized, z, bias, neurons, first, last, scratch):
    """List the neurons of first..last whose score is positive; returns how many. first: a multiple of 16.

    bias: address of the sparsity bias. neurons: address of int32, with room for all of first..last and 16 more. The
    other arguments are those of `score_neurons`.
    """
    count, shift = 0, load_real(bias)
    for i in range(first, last, NEURONS):
        score = score_neurons(model, layer, quantized, z, shift, i, scratch)
        count += list_positive(score, i, neurons + 4 * count)
    return count


@jit
def activate_real(x, kind, threshold):
    """ReLU and its relatives on one number (for dReLU, on one of its two factors)."""
    if kind == FATRELU:
        return x if x > threshold else _ZERO
    if not x > _ZERO:
        return _ZERO
    return x * x if kind == RELU2 else x


@jit
def dot_listed(matrix, neurons, k, count, x, quantized, out):
    """out[0..4] = four rows from the k-th of a list times one activation row."""
    later = k + AHEAD
    dot_four(
        matrix,
        listed(neurons, k, count), listed(neurons, k + 1, count),
        listed(neurons, k + 2, count), listed(neurons, k + 3, count),
        listed(neurons, later, count), listed(neurons, later + 1, count),
        listed(neurons, later + 2, count), listed(neurons, later + 3, count),
        x, quantized, out,
    )  # fmt: skip


@piece
def gate_listed(model, layer, x, quantized, neurons, count, active, hidden, scratch):
    """Exact gates of `count` listed neurons; those that are not 0 go to `active` and `hidden`. Returns how many."""
    gate = model.matrices[layer * LAYER_MATRICES + (GATE if model.gated else UP)]
    threshold = np.float32(model.threshold)
    fetch_first(gate, neurons, count, 0, gate[COLUMNS])
    found = 0
    for k in range(0, count, 4):
        dot_listed(gate, neurons, k, count, x, quantized, scratch)
        for lane in range(min(4, count - k)):
            i = load_int(neurons + 4 * (k + lane))
            g = activate_real(
                load_real(scratch + 4 * lane) + load_real(gate[BIAS_VECTOR] + 4 * i), model.activation, threshold
            )
            if g != _ZERO:
                store_int(active + 4 * found, i)
                store_real(hidden + 4 * found, g)
                found += 1
    return found


@piece
def up_listed(model, layer, x, quantized, active, found, hidden, scratch):
    """hidden *= up of the active neurons."""
    up = model.matrices[layer * LAYER_MATRICES + UP]
    fetch_first(up, active, found, 0, up[COLUMNS])
    for k in range(0, found, 4):
        dot_listed(up, active, k, found, x, quantized, scratch)
        for lane in range(min(4, found - k)):
            at = hidden + 4 * (k + lane)
            u = load_real(scratch + 4 * lane) + load_real(up[BIAS_VECTOR] + 4 * load_int(active + 4 * (k + lane)))
            if model.activation == DRELU:
                u = max(u, _ZERO)
            store_real(at, load_real(at) * u)


@jit
def weigh_listed(model, layer, active, found, hidden, unscaled):
    """Keep `hidden` of the active neurons in `unscaled`, for the norm's root, and multiply it by the norm's weights."""
    weight = model.ffn_sub_norm[layer, 0]
    for k in range(found):
        i = load_int(active + 4 * k)
        h = load_real(hidden + 4 * k)
        store_real(unscaled + 4 * i, h)
        store_real(hidden + 4 * k, h * weight[i])


@jit
def activate_part(model, layer, x, quantized, neurons, count, gap, active, hidden, scratch):
    """Exact gates of a part of a list, as `gate_listed`.

    gap: where it is not 0, rows that may lie on storage are asked for as soon as they are known (read_ahead.py).
    """
    base = layer * LAYER_MATRICES
    if gap > 0:
        ask_for_rows(model.matrices[base + (GATE if model.gated else UP)], neurons, count, gap)
    found = gate_listed(model, layer, x, quantized, neurons, count, active, hidden, scratch)
    if gap > 0:
        ask_for_rows(model.matrices[base + DOWN], active, found, gap)
        if model.gated:
            ask_for_rows(model.matrices[base + UP], active, found, gap)
    return found


@jit
def start_sum(out, bias, columns, with_bias):
    """out = the bias of down, or zeros."""
    for c in range(0, 4 * columns, 64):
        store_f32(out + c, load_f32(bias + c) if with_bias else zero_f32())


@jit
def count_neurons(counts, member, block, predicted, active, total):
    """Add to a thread's counters of an FFN block."""
    at = FIRST_BLOCK + block * BLOCK_COUNTS
    counts[member, at + PREDICTED] += predicted
    counts[member, at + ACTIVE] += active
    counts[member, at + TOTAL] += total
