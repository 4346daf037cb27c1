"""The attention stage of a layer: projections, rotary embedding, KV blocks, and attention itself."""

from __future__ import annotations

import numpy as np
from numba.cpython.unsafe.tuple import tuple_setitem

from svdengine.kernels.cpu.attention import attend, clear_sums, finish, gather_query, store_key_value, sum_bytes
from svdengine.kernels.cpu.attention_tile import QUERIES
from svdengine.kernels.cpu.elementwise import clear_padding, copy_row, head_rms_norm, rms_norm, rotate, scale_head
from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.kv_q8 import GROUP, QUERY, gather_q8, store_q8
from svdengine.kernels.cpu.model import LAYER_MATRICES, O
from svdengine.kernels.cpu.pieces import piece
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.sharing import counter_of, matmul, matmul_together, ready, rows_of, share
from svdengine.kernels.cpu.sync import barrier
from svdengine.kernels.cpu.workspace import ATTENTION_STAGE, KV_Q8


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
                16 * a, min(16 * b, rows), scratch, work.invariant,
            )  # fmt: skip
        start += units


@jit
def norm_joint(model, work, layer, n, member, threads):
    """RMSNorm over all heads of q, and over those of k, of each row."""
    first, last = share(2 * n, 1, member, threads)
    for item in range(first, last):
        row, is_key = item // 2, item % 2 == 1
        at = work.k + row * work.kv_stride if is_key else work.q + row * work.q_stride
        columns = (model.kv_heads if is_key else model.heads) * model.head_dim
        padded = (work.kv_stride if is_key else work.q_stride) // 4
        clear_padding(at, columns, padded)
        weight = model.joint_norm[layer, 1 if is_key else 0].ctypes.data
        rms_norm(at, weight, at, columns, padded, np.float32(model.norm_eps))


@jit
def place_keys(model, work, cache, inputs, layer, n, member, threads):
    """Norm and rotate q and k heads, and write keys and values into their blocks."""
    heads = model.heads + model.kv_heads
    scratch = work.scratch + member * work.scratch_stride
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
        if model.rope and model.first_angles[layer] >= 0:
            angle = model.first_angles[layer] + position
            rotate(at, model.cos[angle], model.sin[angle], half)
        if is_key:
            block = inputs.block_tables[inputs.sequences[row], position // 16]
            place = (layer * model.kv_heads + kv) * cache.blocks + block
            value = work.v + row * work.kv_stride + 4 * kv * model.head_dim
            key_block, value_block = cache.keys + place * cache.key_head, cache.values + place * cache.value_head
            slot = position % 16
            if cache.kind == KV_Q8:
                shape = 4 * (layer * model.kv_heads + kv) * cache.key_dim
                store_q8(
                    at, value, cache.offsets + shape, cache.factors + shape, key_block, value_block, slot,
                    model.head_dim, cache.key_dim, model.value_stride, scratch,
                )  # fmt: skip
            else:
                store_key_value(at, value, key_block, value_block, slot, model.head_dim, model.value_stride, cache.kind)
        else:
            scale_head(at, np.float32(model.attention_scale), model.head_dim)


@jit
def attend_group(model, cache, inputs, layer, row, rows, kv, head, heads, work, first, last, sums, scratch):
    """Add blocks first..last to the sums of a tile: `heads` query heads from `head` of each of `rows` rows."""
    count = rows * heads
    queries = scratch
    scores = scratch + (QUERIES * QUERY * (cache.key_dim // GROUP) if cache.kind == KV_Q8 else 16 * cache.key_dim)
    lows = (np.int64(0), np.int64(0), np.int64(0), np.int64(0))
    highs = lows
    for t in range(count):
        r = row + t // heads
        at = work.q + r * work.q_stride + 4 * (head + t % heads) * model.head_dim
        if cache.kind == KV_Q8:
            factor = cache.factors + 4 * (layer * model.kv_heads + kv) * cache.key_dim
            gather_q8(at, t, count, model.head_dim, cache.key_dim, factor, queries, scores)
        else:
            gather_query(at, t, count, model.head_dim, cache.key_dim, queries)
        position = np.int64(inputs.positions[r])
        highs = tuple_setitem(highs, t, position)
        lows = tuple_setitem(lows, t, max(np.int64(0), position - model.windows[layer] + 1))
    place = (layer * model.kv_heads + kv) * cache.blocks
    attend(
        count, queries, lows, highs, cache.keys + place * cache.key_head, cache.values + place * cache.value_head,
        inputs.block_tables[inputs.sequences[row]],
        (cache.key_head, cache.value_head), (cache.key_dim, model.value_stride), cache.kind, first, last, sums, scores,
    )  # fmt: skip


@jit
def attention_rows(model, work, cache, inputs, layer, n, member, threads):
    """Attention output of several rows: tiles of rows and heads are shared out.

    How scores are added up depends on the queries of a tile, so there a row stays alone that is to be invariant.
    """
    group = model.heads // model.kv_heads
    tile_rows = 1 if work.invariant else max(1, QUERIES // group)
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


@piece
def attention(model, work, cache, inputs, layer, n, member, threads):
    """This member's part of the attention."""
    if n == 1 and not work.invariant:
        attention_split(model, work, cache, inputs, layer, member, threads)
    else:
        attention_rows(model, work, cache, inputs, layer, n, member, threads)


@jit
def project_attention(model, work, inputs, layer, n, member, threads, sync):
    """attention_add = output projection of the attention rows."""
    own = member if n == 1 else 0
    first, last = rows_of(n, member, threads)
    if n == 1 and work.invariant:
        if member > 0:
            copy_row(work.attention, work.attention + member * work.attention_stride, model.attention_stride)
        barrier(sync, threads)  # before the first member changes what the others copy
    elif n == 1:
        # Every member joins the parts of all heads for itself.
        size = sum_bytes(model.value_stride)
        for head in range(model.heads):
            out = work.attention + member * work.attention_stride + 4 * head * model.head_dim
            at = work.partial + head * size
            finish(at, threads, model.heads * size, model.value_stride, model.head_dim, out)
    for row in range(first, last):
        at = work.attention + row * work.attention_stride
        if model.sub_norms:
            weight, columns = model.attention_sub_norm[layer, 0].ctypes.data, model.heads * model.head_dim
            rms_norm(at, weight, at, columns, model.attention_stride, np.float32(model.norm_eps))
        if model.quantized:
            quantized = work.attention_q + row * work.attention_q_stride
            quantize_groups(at, quantized, model.attention_stride, 0, model.attention_stride)
    if model.quantized or model.sub_norms:
        ready(n, sync, threads)
    matmul_together(
        model.matrices[layer * LAYER_MATRICES + O], work.attention + own * work.attention_stride, work.attention_stride,
        work.attention_q + own * work.attention_q_stride, work.attention_q_stride,
        n, work.attention_add, work.hidden_stride, model.hidden, work.scratch + member * work.scratch_stride,
        work.invariant, member, threads, counter_of(inputs, layer, ATTENTION_STAGE),
    )  # fmt: skip
