"""The conditional FFN: score neurons, list those predicted active, and compute only these.

    P = neurons whose score is positive         scores: products with factors and low-bit rows (kernels/predictor.py)
    Q = neurons of P whose exact gate is not 0   the gate's rows of P are read, those of up and down only for Q

A list is cut into equal parts, one a thread, so that threads share the work and not the neurons. Without a predictor
P is every neuron: then only exact zeros are skipped and nothing is lost.
"""

from __future__ import annotations

import numpy as np

from svdengine.kernels.cpu.gemv import STREAM_AHEAD, dot_row
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.page_ahead import ask_for_rows
from svdengine.kernels.cpu.plan import (
    BIAS_VECTOR,
    COLUMNS,
    DATA,
    DOWN,
    DRELU,
    FACTOR_A,
    FACTOR_B,
    FATRELU,
    FORMAT,
    GATE,
    LAYER_MATRICES,
    Q2,
    Q4,
    Q8,
    RELU2,
    RESIDUAL,
    ROWS,
    UP,
)
from svdengine.kernels.cpu.rows import add_four
from svdengine.kernels.cpu.score import (
    FACTOR_BYTES,
    NEURONS,
    RESIDUAL_BYTES,
    add_factor_scores,
    add_residual_scores_1,
    add_residual_scores_2,
    list_positive,
)
from svdengine.kernels.cpu.simd import (
    load_f32,
    load_int,
    load_real,
    prefetch,
    splat_f32,
    store_f32,
    store_int,
    store_real,
    zero_f32,
)

CHUNK = 64  # listed neurons between gate, up and down: their rows wait in the second-level cache
PREDICTED, ACTIVE, TOTAL, LISTED, COUNTS = 0, 1, 2, 3, 8  # counters of a thread, on a cache line of their own
RESIDUAL_BYTES_2, RESIDUAL_BYTES_1 = RESIDUAL_BYTES[2], RESIDUAL_BYTES[1]
_ZERO = np.float32(0)


@jit
def project(model, layer, quantized, z, first, last):
    """z[first..last] = B x of a layer's predictor, or its ReLU where the predictor has one."""
    matrix = model.matrices[layer * LAYER_MATRICES + FACTOR_B]
    relu = model.predictor_relu[layer]
    for row in range(first, last):
        value = dot_row(matrix, row, quantized, quantized, STREAM_AHEAD)
        store_real(z + 4 * row, _ZERO if relu and value < _ZERO else value)


@jit
def add_row_scores(total, factor, first, z, scratch):
    """total + A z of 16 neurons from `first`, for factors that are not in panels."""
    for lane in range(NEURONS):
        row = min(first + lane, factor[ROWS] - 1)
        store_real(scratch + 4 * lane, dot_row(factor, row, z, z, STREAM_AHEAD))
    return total + load_f32(scratch)


@jit
def score_neurons(model, layer, quantized, z, shift, first, scratch):
    """Scores of 16 neurons from `first`, a multiple of 16.

    quantized: the FFN's input; z: what `project` made, quantised. shift: the sparsity bias.
    """
    base = layer * LAYER_MATRICES
    a, q = model.matrices[base + FACTOR_A], model.matrices[base + RESIDUAL]
    bias, unit = model.predictor_bias[layer].ctypes.data, model.predictor_unit[layer].ctypes.data
    groups, blocks = a[COLUMNS] // 32, q[COLUMNS] // 64
    panel = first // NEURONS
    score = load_f32(bias + 4 * first) - load_f32(unit + 4 * first) * splat_f32(shift)
    if groups > 0:
        if a[FORMAT] == Q8:
            score = add_factor_scores(score, a[DATA] + panel * groups * FACTOR_BYTES, groups, z)
        else:
            score = add_row_scores(score, a, first, z, scratch)
    if blocks > 0:
        if q[FORMAT] == Q2:
            score = add_residual_scores_2(score, q[DATA] + panel * blocks * RESIDUAL_BYTES_2, blocks, quantized)
        else:
            score = add_residual_scores_1(score, q[DATA] + panel * blocks * RESIDUAL_BYTES_1, blocks, quantized)
    return score


@jit
def list_neurons(model, layer, quantized, z, shift, neurons, first, last, scratch):
    """List the neurons of first..last whose score is positive; returns how many. first: a multiple of 16.

    The arguments are those of `score_neurons`; neurons: address of int32, with room for all of first..last and 16 more.
    """
    count = 0
    for i in range(first, last, NEURONS):
        score = score_neurons(model, layer, quantized, z, shift, i, scratch)
        count += list_positive(score, i, neurons + 4 * count)
    return count


@jit
def row_bytes(matrix):
    """Bytes of one row's values."""
    columns, kind = matrix[COLUMNS], matrix[FORMAT]
    if kind == Q8:
        return columns
    if kind == Q4:
        return columns // 2
    return 4 * columns if kind == 0 else 2 * columns


@jit
def fetch_row(matrix, row, size):
    """Ask for a row's cache lines before they are needed."""
    at = matrix[DATA] + row * size
    for line in range(0, size, 64):
        prefetch(at + line)


@jit
def activate_real(x, kind, threshold):
    """ReLU and its relatives on one number (for dReLU, on one of its two factors)."""
    if kind == FATRELU:
        return x if x > threshold else _ZERO
    if not x > _ZERO:
        return _ZERO
    return x * x if kind == RELU2 else x


@jit
def add_listed(down, neurons, hidden, count, out, first, last):
    """out[first..last] += hidden[k] times down's row of neuron k, for `count` listed neurons, four at a time."""
    for k in range(0, count, 4):
        r0 = load_int(neurons + 4 * k)
        r1, r2, r3 = r0, r0, r0
        h1, h2, h3 = _ZERO, _ZERO, _ZERO
        if k + 1 < count:
            r1, h1 = load_int(neurons + 4 * k + 4), load_real(hidden + 4 * k + 4)
        if k + 2 < count:
            r2, h2 = load_int(neurons + 4 * k + 8), load_real(hidden + 4 * k + 8)
        if k + 3 < count:
            r3, h3 = load_int(neurons + 4 * k + 12), load_real(hidden + 4 * k + 12)
        add_four(down, r0, r1, r2, r3, load_real(hidden + 4 * k), h1, h2, h3, out, first, last)


@jit
def gate_chunk(model, layer, x, quantized, neurons, count, active, hidden):
    """Exact gates of `count` listed neurons; those that are not 0 go to `active` and `hidden`. Returns how many."""
    base = layer * LAYER_MATRICES
    gate = model.matrices[base + (GATE if model.gated else UP)]
    up, down = model.matrices[base + UP], model.matrices[base + DOWN]
    gate_bytes, up_bytes, down_bytes = row_bytes(gate), row_bytes(up), row_bytes(down)
    threshold = np.float32(model.threshold)
    # A row is fetched while the row so many places before it is computed.
    places = 4 if gate_bytes <= 1024 else 1
    for k in range(min(places, count)):
        fetch_row(gate, load_int(neurons + 4 * k), gate_bytes)
    found = 0
    for k in range(count):
        i = load_int(neurons + 4 * k)
        following = load_int(neurons + 4 * min(k + places, count - 1))
        g = dot_row(gate, i, x, quantized, (following - i) * gate_bytes) + load_real(gate[BIAS_VECTOR] + 4 * i)
        g = activate_real(g, model.activation, threshold)
        if g != _ZERO:
            store_int(active + 4 * found, i)
            store_real(hidden + 4 * found, g)
            found += 1
            if model.gated:
                fetch_row(up, i, up_bytes)
            else:
                fetch_row(down, i, down_bytes)
    return found


@jit
def up_chunk(model, layer, x, quantized, active, found, hidden, fetch_down):
    """hidden *= up of the active neurons; on the way their rows of down are fetched, if they come next."""
    up, down = model.matrices[layer * LAYER_MATRICES + UP], model.matrices[layer * LAYER_MATRICES + DOWN]
    down_bytes = row_bytes(down)
    for k in range(found):
        i = load_int(active + 4 * k)
        if fetch_down:
            fetch_row(down, i, down_bytes)
        u = dot_row(up, i, x, quantized, 0) + load_real(up[BIAS_VECTOR] + 4 * i)
        if model.activation == DRELU:
            u = max(u, _ZERO)
        store_real(hidden + 4 * k, load_real(hidden + 4 * k) * u)


@jit
def compute_listed(model, layer, x, quantized, neurons, count, gap, out, scratch):
    """out += the FFN of `count` listed neurons of one input. Returns how many were active.

    gap: where it is not 0, rows that may lie on storage are asked for as soon as they are known (page_ahead.py).
    """
    base = layer * LAYER_MATRICES
    down = model.matrices[base + DOWN]
    if gap > 0:
        gate = model.matrices[base + (GATE if model.gated else UP)]
        ask_for_rows(gate, row_bytes(gate), neurons, count, gap)
    active, hidden = scratch, scratch + 4 * CHUNK
    total = 0
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        found = gate_chunk(model, layer, x, quantized, neurons + 4 * start, size, active, hidden)
        if gap > 0:
            ask_for_rows(down, row_bytes(down), active, found, gap)
            if model.gated:
                up = model.matrices[base + UP]
                ask_for_rows(up, row_bytes(up), active, found, gap)
        if model.gated:
            up_chunk(model, layer, x, quantized, active, found, hidden, True)
        add_listed(down, active, hidden, found, out, 0, down[COLUMNS])
        total += found
    return total


@jit
def start_sum(out, bias, columns, with_bias):
    """out = the bias of down, or zeros."""
    for c in range(0, 4 * columns, 64):
        store_f32(out + c, load_f32(bias + c) if with_bias else zero_f32())


@jit
def count_neurons(counts, member, predicted, active, total):
    """Add to a thread's counters."""
    counts[member, PREDICTED] += predicted
    counts[member, ACTIVE] += active
    counts[member, TOTAL] += total


@jit
def clear_padding(z, rank, columns):
    """Zeros after the last of `rank` floats."""
    for i in range(rank, columns):
        store_real(z + 4 * i, _ZERO)
