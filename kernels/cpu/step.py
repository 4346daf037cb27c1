"""One step of the model, from tokens to logits, as compiled code that every thread of the team runs.

A step of one row (decode) keeps the residual stream in a private copy a thread: norms and quantisation are so short
that all threads do them rather than wait for one. A step of several rows shares the rows out instead.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba.cpython.unsafe.tuple import tuple_setitem
from numpy.typing import NDArray

from svdengine.kernels.cpu.attention import attend, clear_sums, finish, gather_query, store_key_value, sum_bytes
from svdengine.kernels.cpu.attention_tile import QUERIES
from svdengine.kernels.cpu.elementwise import (
    activate_row,
    add_row,
    copy_row,
    head_rms_norm,
    layer_norm,
    rms_norm,
    rotate,
    scale_head,
    scale_row,
)
from svdengine.kernels.cpu.gemm import gemm, gemm_transposed, load_weights
from svdengine.kernels.cpu.gemv import gemv
from svdengine.kernels.cpu.jit import entry, jit
from svdengine.kernels.cpu.plan import (
    BIAS_VECTOR,
    COLUMNS,
    DOWN,
    EMBEDDING,
    FACTOR_A,
    FACTOR_B,
    GATE,
    LAYER_MATRICES,
    LM_HEAD,
    ROWS,
    UP,
    O,
)
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.rows import add_range
from svdengine.kernels.cpu.simd import load_real, store_f32, store_int, store_real
from svdengine.kernels.cpu.sparse import (
    LISTED,
    clear_padding,
    compute_listed,
    count_neurons,
    list_neurons,
    project,
    sparse_row,
    start_sum,
)
from svdengine.kernels.cpu.sync import EPOCH, PARKED, STOP, barrier, exchange, fetch_add, load_shared, wait_for_work

DENSE, PREDICT, SKIP_ZEROS = 0, 1, 2  # FFN modes; the last computes every gate and skips what is exactly 0
ATTENTION_STAGE, UP_STAGE, DOWN_STAGE, STAGES = range(4)  # whose work is claimed; the lm_head's comes after all layers
PIECE = 32768  # weights
NEURON_UNIT = 16  # neurons are shared out in multiples of it


class Workspace(NamedTuple):
    """Addresses of the buffers of a step. A row is as wide as its stride, in bytes."""

    x: int  # residual stream
    hidden_stride: int
    normed: int
    second: int  # input of a parallel FFN that has a norm of its own
    hidden_q: int  # quantised `normed`
    hidden_q_stride: int
    q: int
    q_stride: int
    k: int
    v: int
    kv_stride: int
    attention: int
    attention_stride: int
    attention_q: int
    attention_q_stride: int
    partial: int  # in decode: running sums of each head over a thread's part of the context
    attention_add: int  # what attention adds to x
    ffn_add: int  # what the FFN adds; with neuron-major down, one row a thread in decode
    gate: int
    up: int
    ffn_stride: int
    ffn_q: int
    ffn_q_stride: int
    z: int  # B x of the predictor, one row a thread; in decode all share the first
    z_q: int
    neurons: int  # lists of neurons, int32, likewise
    neurons_stride: int
    logits: int
    logits_stride: int
    scratch: int  # one a thread
    scratch_stride: int


class Cache(NamedTuple):
    """The KV block pool: [layer][kv head][block][...], keys dimension-major and values token-major."""

    keys: int
    values: int
    key_head: int  # bytes of one block of one head
    value_head: int
    blocks: int
    half: bool


class Inputs(NamedTuple):
    """The batch, in arrays that live as long as the executor."""

    sizes: NDArray[np.int64]  # (4,) rows, rows whose logits are wanted, FFN mode, address for the FFNs' inputs or 0
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    logit_rows: NDArray[np.int32]
    sparsity_bias: NDArray[np.float32]  # of each sequence
    claims: NDArray[np.int64]  # (layers * STAGES + 1,) zeros when a step begins
    counts: NDArray[np.int64]  # (threads, COUNTS) neurons predicted, active and in all, of sparse rows


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
def matmul(matrix, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch):
    """out[:, first..last] = x times rows first..last of a matrix, plus its bias."""
    bias = matrix[BIAS_VECTOR]
    if n == 1:
        gemv(matrix, bias, x, quantized, out, first, last)
    else:
        gemm(matrix, bias, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch)


@jit
def matmul_together(
    matrix, x, x_stride, quantized, quantized_stride, n, out, out_stride, count, scratch, member, threads, counter
):
    """As `matmul`, for rows 0..count, which all members share."""
    turn = 0
    first, last = claim(counter, count, matrix[COLUMNS], 16, member, threads, turn)
    while first < last:
        matmul(matrix, x, x_stride, quantized, quantized_stride, n, out, out_stride, first, last, scratch)
        turn += 1
        first, last = claim(counter, count, matrix[COLUMNS], 16, member, threads, turn)


@jit
def counter_of(inputs, layer, stage):
    """Address of the claims of one stage of a layer."""
    return inputs.claims.ctypes.data + 8 * (layer * STAGES + stage)


@jit
def embed(model, work, inputs, n, member, threads):
    """Residual stream = embedding of the tokens (+ position)."""
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        token = inputs.tokens[0 if n == 1 else row]
        x = work.x + row * work.hidden_stride
        matrix = model.matrices[model.layers * LAYER_MATRICES + EMBEDDING]
        for column in range(0, model.hidden_stride, 16):
            store_f32(x + 4 * column, load_weights(matrix, token, column))
        if model.embedding_scale != 1.0:
            scale_row(x, np.float32(model.embedding_scale), model.hidden_stride)
        if model.learned_positions:
            position = inputs.positions[0 if n == 1 else row]
            table = model.positions[position]
            for column in range(model.hidden):
                store_real(x + 4 * column, load_real(x + 4 * column) + table[column])


@jit
def normalize(model, work, norms, out, n, member, threads, quantize):
    """out = norm(x), and its quantised form if wanted; norms: (2, hidden) weight and bias."""
    weight, bias = norms[0].ctypes.data, norms[1].ctypes.data
    first, last = rows_of(n, member, threads)
    eps = np.float32(model.norm_eps)
    for row in range(first, last):
        x = work.x + row * work.hidden_stride
        y = out + row * work.hidden_stride
        if model.layer_norm:
            layer_norm(x, weight, bias, y, model.hidden, model.hidden_stride, eps)
        else:
            rms_norm(x, weight, y, model.hidden, model.hidden_stride, eps)
        if quantize:
            quantize_groups(y, work.hidden_q + row * work.hidden_q_stride, model.hidden_stride, 0, model.hidden_stride)


@jit
def add_to_residual(model, work, addend, parts, n, member, threads):
    """x += residual_scale * addend; in decode the addend may come in several parts, one a row."""
    scale = np.float32(model.residual_scale)
    first, last = rows_of(n, member, threads)
    for row in range(first, last):
        x = work.x + row * work.hidden_stride
        if n == 1:
            for part in range(parts):
                add_row(x, addend + part * work.hidden_stride, scale, model.hidden_stride)
        else:
            add_row(x, addend + row * work.hidden_stride, scale, model.hidden_stride)


@jit
def project_qkv(model, work, layer, n, member, threads):
    """q, k and v of the normed rows: their rows are shared out as if they were one matrix."""
    own = member if n == 1 else 0
    x = work.normed + own * work.hidden_stride
    quantized = work.hidden_q + own * work.hidden_q_stride
    scratch = work.scratch + member * work.scratch_stride
    q_rows, kv_rows = model.heads * model.head_dim, model.kv_heads * model.head_dim
    q_units, kv_units = (q_rows + 15) // 16, (kv_rows + 15) // 16
    first, last = share(q_units + 2 * kv_units, 1, member, threads)
    start = 0
    for kind in range(3):
        units = q_units if kind == 0 else kv_units
        rows = q_rows if kind == 0 else kv_rows
        a, b = max(first, start) - start, min(last, start + units) - start
        if a < b:
            matrix = model.matrices[layer * LAYER_MATRICES + kind]
            out = work.q if kind == 0 else (work.k if kind == 1 else work.v)
            stride = work.q_stride if kind == 0 else work.kv_stride
            matmul(
                matrix, x, work.hidden_stride, quantized, work.hidden_q_stride, n, out, stride,
                16 * a, min(16 * b, rows), scratch,
            )  # fmt: skip
        start += units


@jit
def place_keys(model, work, cache, inputs, layer, n, member, threads):
    """Norm and rotate q and k heads, and write keys and values into their blocks."""
    heads = model.heads + model.kv_heads
    first, last = share(n * heads, 1, member, threads)
    half = model.head_dim // 2
    for item in range(first, last):
        row, head = item // heads, item % heads
        position = inputs.positions[row]
        is_key = head >= model.heads
        if is_key:
            kv = head - model.heads
            at = work.k + row * work.kv_stride + 4 * kv * model.head_dim
        else:
            kv = 0
            at = work.q + row * work.q_stride + 4 * head * model.head_dim
        if model.qk_norm:
            head_rms_norm(at, model.head_norm[layer, 1 if is_key else 0], model.head_dim, np.float32(model.norm_eps))
        if model.rope:
            rotate(at, model.cos[position], model.sin[position], half)
        if is_key:
            block = inputs.block_tables[inputs.sequences[row], position // 16]
            place = (layer * model.kv_heads + kv) * cache.blocks + block
            value = work.v + row * work.kv_stride + 4 * kv * model.head_dim
            store_key_value(
                at, value, cache.keys + place * cache.key_head, cache.values + place * cache.value_head,
                position % 16, model.head_dim, model.value_stride, cache.half,
            )  # fmt: skip
        else:
            scale_head(at, np.float32(model.attention_scale), model.head_dim)


@jit
def attend_group(model, cache, inputs, layer, row, rows, kv, head, heads, work, first, last, sums, scratch):
    """Add blocks first..last to the sums of a tile: `heads` query heads from `head` of each of `rows` rows."""
    count = rows * heads
    queries, scores = scratch, scratch + 16 * model.key_dim
    lows = (np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    highs = lows
    for t in range(count):
        r = row + t // heads
        at = work.q + r * work.q_stride + 4 * (head + t % heads) * model.head_dim
        gather_query(at, t, count, model.head_dim, model.key_dim, queries)
        position = np.int64(inputs.positions[r])
        highs = tuple_setitem(highs, t, position)
        lows = tuple_setitem(lows, t, max(np.int64(0), position - model.windows[layer] + 1))
    place = (layer * model.kv_heads + kv) * cache.blocks
    attend(
        count, queries, lows, highs, cache.keys + place * cache.key_head, cache.values + place * cache.value_head,
        inputs.block_tables[inputs.sequences[row]],
        (cache.key_head, cache.value_head), (model.key_dim, model.value_stride), cache.half, first, last, sums, scores,
    )  # fmt: skip


@jit
def attention_rows(model, work, cache, inputs, layer, n, member, threads):
    """Attention output of several rows: tiles of rows and heads are shared out."""
    group = model.heads // model.kv_heads
    tile_rows = max(1, QUERIES // group)
    tile_heads = min(group, QUERIES)
    chunks = (group + tile_heads - 1) // tile_heads
    per_rows = model.kv_heads * chunks
    scratch = work.scratch + member * work.scratch_stride
    size = sum_bytes(model.value_stride)
    first, last = share((n + tile_rows - 1) // tile_rows * per_rows, 1, member, threads)
    for item in range(first, last):
        kv, chunk = item % per_rows // chunks, item % chunks
        head = kv * group + chunk * tile_heads
        heads = min(tile_heads, (kv + 1) * group - head)
        row = item // per_rows * tile_rows
        end = min(n, row + tile_rows)
        while row < end:
            rows = 1
            while row + rows < end and inputs.sequences[row + rows] == inputs.sequences[row]:
                rows += 1
            clear_sums(scratch, rows * heads, model.value_stride)
            start = max(0, inputs.positions[row] - model.windows[layer] + 1) // 16
            stop = inputs.positions[row + rows - 1] // 16 + 1
            attend_group(
                model, cache, inputs, layer, row, rows, kv, head, heads, work, start, stop,
                scratch, scratch + QUERIES * size,
            )  # fmt: skip
            for t in range(rows * heads):
                at = work.attention + (row + t // heads) * work.attention_stride
                out = at + 4 * (head + t % heads) * model.head_dim
                finish(scratch + t * size, 1, 0, model.value_stride, model.head_dim, out)
            row += rows


@jit
def attention_split(model, work, cache, inputs, layer, member, threads):
    """Attention of one row: the context is shared out, and every member sums its part for all heads."""
    group = model.heads // model.kv_heads
    size = sum_bytes(model.value_stride)
    sums = work.partial + member * model.heads * size
    scratch = work.scratch + member * work.scratch_stride
    position = inputs.positions[0]
    start = max(0, position - model.windows[layer] + 1) // 16
    first, last = share(position // 16 + 1 - start, 1, member, threads)
    clear_sums(sums, model.heads, model.value_stride)
    for kv in range(model.kv_heads):
        for head in range(kv * group, (kv + 1) * group, QUERIES):
            heads = min(QUERIES, (kv + 1) * group - head)
            attend_group(
                model, cache, inputs, layer, 0, 1, kv, head, heads, work, start + first, start + last,
                sums + head * size, scratch,
            )  # fmt: skip


@jit
def attention(model, work, cache, inputs, layer, n, member, threads):
    """This member's part of the attention."""
    if n == 1:
        attention_split(model, work, cache, inputs, layer, member, threads)
    else:
        attention_rows(model, work, cache, inputs, layer, n, member, threads)


@jit
def project_attention(model, work, inputs, layer, n, member, threads, sync):
    """attention_add = output projection of the attention rows."""
    own = member if n == 1 else 0
    first, last = rows_of(n, member, threads)
    if n == 1:
        # Every member joins the parts of all heads for itself.
        size = sum_bytes(model.value_stride)
        for head in range(model.heads):
            out = work.attention + member * work.attention_stride + 4 * head * model.head_dim
            at = work.partial + head * size
            finish(at, threads, model.heads * size, model.value_stride, model.head_dim, out)
    if model.quantized:
        for row in range(first, last):
            quantize_groups(
                work.attention + row * work.attention_stride, work.attention_q + row * work.attention_q_stride,
                model.attention_stride, 0, model.attention_stride,
            )  # fmt: skip
        ready(n, sync, threads)
    matmul_together(
        model.matrices[layer * LAYER_MATRICES + O], work.attention + own * work.attention_stride, work.attention_stride,
        work.attention_q + own * work.attention_q_stride, work.attention_q_stride,
        n, work.attention_add, work.hidden_stride, model.hidden, work.scratch + member * work.scratch_stride,
        member, threads, counter_of(inputs, layer, ATTENTION_STAGE),
    )  # fmt: skip


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
            n, work.gate, work.ffn_stride, first, last, scratch,
        )  # fmt: skip
    matmul(
        model.matrices[base + UP], x, work.hidden_stride, quantized, work.hidden_q_stride,
        n, work.up, work.ffn_stride, first, last, scratch,
    )  # fmt: skip
    padded = model.ffn_stride if last == model.ffn else last
    for row in range(n):
        gate = work.gate + row * work.ffn_stride
        up = work.up + row * work.ffn_stride
        threshold = np.float32(model.threshold)
        activate_row(gate, up, gate, model.activation, threshold, model.gated, first, padded)
        if model.quantized and not model.transposed_down:
            quantize_groups(gate, work.ffn_q + row * work.ffn_q_stride, model.ffn_stride, first, padded)


@jit
def ffn(model, work, inputs, layer, normed, n, member, threads, sync):
    """ffn_add = FFN(normed), dense. Returns in how many parts decode leaves the result."""
    matrix = model.matrices[layer * LAYER_MATRICES + DOWN]
    scratch = work.scratch + member * work.scratch_stride
    if model.transposed_down and n == 1:
        # A neuron's row goes straight from its owner into the owner's partial sum.
        first, last = share(model.ffn, NEURON_UNIT, member, threads)
        ffn_hidden(model, work, layer, normed, n, member, threads, first, last)
        out = work.ffn_add + member * work.hidden_stride
        start_sum(out, matrix[BIAS_VECTOR], model.hidden_stride, member == 0)
        add_range(matrix, work.gate, first, last, out)
        barrier(sync, threads)
        return threads
    turn = 0
    counter = counter_of(inputs, layer, UP_STAGE)
    first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    while first < last:
        ffn_hidden(model, work, layer, normed, n, member, threads, first, last)
        turn += 1
        first, last = claim(counter, model.ffn, model.hidden_stride, 32, member, threads, turn)
    barrier(sync, threads)
    if model.transposed_down:
        first, last = share(model.hidden, 16, member, threads)
        gemm_transposed(
            matrix, matrix[BIAS_VECTOR], work.gate, work.ffn_stride, n, work.ffn_add, work.hidden_stride,
            model.ffn_stride, first, last, scratch,
        )  # fmt: skip
    else:
        matmul_together(
            matrix, work.gate, work.ffn_stride, work.ffn_q, work.ffn_q_stride,
            n, work.ffn_add, work.hidden_stride, model.hidden, scratch,
            member, threads, counter_of(inputs, layer, DOWN_STAGE),
        )  # fmt: skip
    barrier(sync, threads)
    return 1


@jit
def sparse_together(model, work, inputs, layer, normed, member, threads, sync):
    """The conditional FFN of one row by all threads; each leaves a part of ffn_add. Returns how many parts."""
    base = layer * LAYER_MATRICES
    x = normed + member * work.hidden_stride
    quantized = work.hidden_q + member * work.hidden_q_stride
    first, last = share(model.ffn, NEURON_UNIT, member, threads)
    count, total = last - first, model.ffn
    scratch = work.scratch + member * work.scratch_stride
    if inputs.sizes[2] == PREDICT:
        rank, columns = model.matrices[base + FACTOR_B, ROWS], model.matrices[base + FACTOR_A, COLUMNS]
        z_quantized = work.z_q + member * work.hidden_q_stride
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
        for i in range(first, last):
            store_int(work.neurons + 4 * i, i)
    inputs.counts[member, LISTED] = count
    barrier(sync, threads)
    total = 0
    for other in range(threads):
        total += inputs.counts[other, LISTED]
    first, last = share(total, NEURON_UNIT, member, threads)
    out = work.ffn_add + member * work.hidden_stride
    start_sum(out, model.matrices[base + DOWN, BIAS_VECTOR], model.hidden_stride, member == 0)
    start, active = 0, 0
    for other in range(threads):
        listed = inputs.counts[other, LISTED]
        a, b = max(first, start) - start, min(last, start + listed) - start
        if a < b:
            at = work.neurons + 4 * (share(model.ffn, NEURON_UNIT, other, threads)[0] + a)
            active += compute_listed(model, layer, x, quantized, at, b - a, out, scratch)
        start += listed
    count_neurons(inputs.counts, member, count, active, model.ffn if member == 0 else 0)
    barrier(sync, threads)
    return threads


@jit
def sparse_rows(model, work, inputs, layer, normed, n, member, threads):
    """The conditional FFN of several rows: each has its own list, and a thread does whole rows."""
    first, last = share(n, 1, member, threads)
    predict = inputs.sizes[2] == PREDICT
    for row in range(first, last):
        sparse_row(
            model, layer, normed + row * work.hidden_stride, work.hidden_q + row * work.hidden_q_stride,
            work.z + member * work.hidden_stride, work.z_q + member * work.hidden_q_stride,
            work.neurons + member * work.neurons_stride, inputs.sparsity_bias[inputs.sequences[row]], predict,
            work.ffn_add + row * work.hidden_stride, work.scratch + member * work.scratch_stride,
            inputs.counts, member,
        )  # fmt: skip


@jit
def keep_ffn_inputs(model, work, inputs, layer, normed, n, member, threads):
    """Copy the FFN's inputs to where the caller finds them, when it asked for them."""
    kept = inputs.sizes[3]  # (layers, n, hidden_stride)
    if kept != 0 and n > 1:
        first, last = share(n, 1, member, threads)
        for row in range(first, last):
            to = kept + (layer * n + row) * work.hidden_stride
            copy_row(normed + row * work.hidden_stride, to, model.hidden_stride)


@jit
def layer_step(model, work, cache, inputs, layer, n, member, threads, sync):
    """One layer: x += attention(norm(x)); x += ffn(norm(x)); or both from the same x."""
    # The predictor reads the quantised input whatever the weights' format is.
    quantize = model.quantized or inputs.sizes[2] == PREDICT
    normalize(model, work, model.attention_norm[layer], work.normed, n, member, threads, quantize)
    ready(n, sync, threads)
    project_qkv(model, work, layer, n, member, threads)
    barrier(sync, threads)
    place_keys(model, work, cache, inputs, layer, n, member, threads)
    barrier(sync, threads)
    attention(model, work, cache, inputs, layer, n, member, threads)
    barrier(sync, threads)
    project_attention(model, work, inputs, layer, n, member, threads, sync)
    barrier(sync, threads)
    normed = work.normed
    if model.parallel:
        if not model.shared_norm:
            normed = work.second
            normalize(model, work, model.ffn_norm[layer], normed, n, member, threads, quantize)
        add_to_residual(model, work, work.attention_add, 1, n, member, threads)
    else:
        add_to_residual(model, work, work.attention_add, 1, n, member, threads)
        normalize(model, work, model.ffn_norm[layer], normed, n, member, threads, quantize)
    keep_ffn_inputs(model, work, inputs, layer, normed, n, member, threads)
    parts = 1
    if inputs.sizes[2] == DENSE:
        ready(n, sync, threads)
        parts = ffn(model, work, inputs, layer, normed, n, member, threads, sync)
    elif n == 1:
        parts = sparse_together(model, work, inputs, layer, normed, member, threads, sync)
    else:
        sparse_rows(model, work, inputs, layer, normed, n, member, threads)
    add_to_residual(model, work, work.ffn_add, parts, n, member, threads)


@jit
def logits(model, work, inputs, n, wanted, member, threads, sync):
    """Logits of the wanted rows: final norm, then the lm_head, shared out by vocabulary."""
    ready(n, sync, threads)
    weight, bias = model.output_norm[0].ctypes.data, model.output_norm[1].ctypes.data
    eps = np.float32(model.norm_eps)
    first, last = rows_of(wanted, member, threads)
    for row in range(first, last):
        source = inputs.logit_rows[0 if wanted == 1 else row]
        x = work.x + (member if n == 1 else source) * work.hidden_stride
        y = work.normed + row * work.hidden_stride
        if model.layer_norm:
            layer_norm(x, weight, bias, y, model.hidden, model.hidden_stride, eps)
        else:
            rms_norm(x, weight, y, model.hidden, model.hidden_stride, eps)
        if model.logit_scale != 1.0:
            scale_row(y, np.float32(model.logit_scale), model.hidden_stride)
        if model.head_quantized:
            quantize_groups(y, work.hidden_q + row * work.hidden_q_stride, model.hidden_stride, 0, model.hidden_stride)
    ready(wanted, sync, threads)
    own = member if wanted == 1 else 0
    matmul_together(
        model.matrices[model.layers * LAYER_MATRICES + LM_HEAD],
        work.normed + own * work.hidden_stride, work.hidden_stride,
        work.hidden_q + own * work.hidden_q_stride, work.hidden_q_stride,
        wanted, work.logits, work.logits_stride, model.vocabulary, work.scratch + member * work.scratch_stride,
        member, threads, counter_of(inputs, model.layers, 0),
    )  # fmt: skip
    barrier(sync, threads)


@jit
def forward(model, work, cache, inputs, member, threads, sync):
    """A whole step. Every member of the team calls it."""
    n, wanted = inputs.sizes[0], inputs.sizes[1]
    embed(model, work, inputs, n, member, threads)
    for layer in range(model.layers):
        layer_step(model, work, cache, inputs, layer, n, member, threads, sync)
    if wanted > 0:
        logits(model, work, inputs, n, wanted, member, threads, sync)
    else:
        barrier(sync, threads)


@entry
def run(model, work, cache, inputs, member, threads, sync, seen):
    """What a thread of the team does. The first one runs one step; the others wait for steps and run them.

    Returns the last epoch seen, or -1 when the team is to stop.
    """
    at = sync.ctypes.data
    if member == 0:
        fetch_add(at + 8 * EPOCH, 1)
        forward(model, work, cache, inputs, member, threads, at)
        return seen
    exchange(at + 8 * (PARKED + 8 * member), 0)
    while True:
        epoch = wait_for_work(at, member, seen)
        if epoch < 0:
            return seen
        if load_shared(at + 8 * STOP) != 0:
            return np.int64(-1)
        seen = epoch
        forward(model, work, cache, inputs, member, threads, at)
