"""Attention of few queries that share a kv head, without tensor cores: decode, and prefill over a float32 cache.

A warp takes a KV block of 16 positions at a time. Four lanes share a key, which they read straight into registers; the
queries lie in shared memory. Softmax is computed as keys come (arXiv:2205.14135), by each warp for itself. Then each
lane has 16 bytes of values of some positions, and adds them to its sums, weighted. In the end warps are added up.

Scores are in units of log 2, so that weights are powers of two.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.intrinsics import (
    FULL,
    Kernel,
    as_float,
    h2f,
    jit,
    kernel,
    lane_index,
    ldg128_near,
    unrolled,
    warp_index,
    warp_sum,
)
from svdengine.kernels.cuda.kv_cache import KvDtype, head_stride
from svdengine.kernels.cuda.tensor_cores import exp2, load_four

THREADS = 128
_WARPS = _MOST_WARPS = THREADS // 32
_QUERIES = 8  # whose sums a thread can hold in registers
_QUERY_ITEMS = 2048  # float32 of queries in shared memory, at most; of sums there are as many for each warp
_SHARERS = 4  # lanes that share a key
LOG2E = np.float32(math.log2(math.e))
UNSEEN = np.float32(-1e30)  # a maximum of no positions
MASKED = np.float32(-2e30)  # a score that no position has: its weight is zero beside any maximum
_ZERO, _HALF = np.float32(0), np.float32(0.5)

PARAMETERS = (
    "float32* qkv, uint32* keys, uint32* values, int32* places, int32* sequences, int32* tables, int32* tiles,"
    " float32* partial, float32* out, int32 group, int32 kv_heads, int32 stride, int32 blocks, int32 window,"
    " int32 splits, int32 least, int32 out_stride"
)


def most_queries(head_dim: int) -> int:
    """Queries of a tile, at most."""
    return min(_QUERIES, max(1, _QUERY_ITEMS // head_dim))


@jit(device=True)
def block_share(places, first, count, window, splits, least):
    """The KV blocks from `begin` up to `end` that this split (blockIdx.z) has of those that some row of a tile sees."""
    begin = max(0, places[first] - window + 1) // BLOCK_SIZE
    end = places[first + count - 1] // BLOCK_SIZE + 1
    share = max((end - begin + splits - 1) // splits, least)
    begin += cuda.blockIdx.z * share
    return begin, min(end, begin + share)


@jit(device=True)
def _unpack_half(w, k):
    """Pair k of the float16 in some words."""
    return h2f(w[k])


@jit(device=True)
def _unpack_single(w, k):
    return as_float(w[2 * k]), as_float(w[2 * k + 1])


@cache
def rows_kernel(head_dim: int, rows: int, heads: int, dtype: KvDtype) -> Kernel:
    """Attention of tiles of up to `rows` rows and `heads` heads; grid: (tiles, kv heads * tiles a group, splits)."""
    queries, vector = rows * heads, head_stride(head_dim)
    items = 8 if dtype == "f16" else 4  # of 16 bytes
    pairs, words, pieces = items // 2, vector // (items // 4), vector // items
    unpack = _unpack_half if dtype == "f16" else _unpack_single
    of_lane = -(-pieces // _SHARERS)  # pieces of a key that a lane has
    padded = of_lane * _SHARERS * items  # items of a query in shared memory, zeros behind its own
    of_warp = 4 if pieces <= 8 else 2 if pieces <= 16 else 1  # positions that the lanes of a warp have at once
    rounds = -(-pieces // 32)  # pieces of a value that a lane has
    lanes, positions = 32 // of_warp, BLOCK_SIZE // of_warp  # that share a value; that a lane goes through
    score_items, float_items = 2 * queries, 4 * items
    query_room, weight_room = queries * padded, _MOST_WARPS * queries * BLOCK_SIZE
    sum_room, warp_room, sum_items = _MOST_WARPS * queries * vector, _MOST_WARPS * queries, queries * rounds * items

    @jit(device=True, forceinline=True)
    def dot_query(query, i, part, query_items, floats, scores):
        """Add to the scores of a query and two keys what their piece i of this lane gives."""
        for k in range(0, items, 4):
            q = load_four(query_items, query * padded + (part + _SHARERS * i) * items + k)
            for j in range(4):
                scores[2 * query] += q[j] * floats[k + j]
                scores[2 * query + 1] += q[j] * floats[items + k + j]

    dot_queries = unrolled(dot_query, queries)

    @jit(device=True, forceinline=True)
    def dot_piece(i, keys, low, high, part, query_items, floats, scores):
        """Add to all scores what piece i of this lane gives; low, high: where the two keys begin."""
        at = 4 * _SHARERS * i
        if pieces % _SHARERS:  # a piece too many meets zeros of the queries
            at = 4 * min(_SHARERS * i, pieces - 1 - part)
        w = ldg128_near(keys, low, at) + ldg128_near(keys, high, at)
        for pair in range(2 * pairs):
            floats[2 * pair], floats[2 * pair + 1] = unpack(w, pair)
        dot_queries(0, i, part, query_items, floats, scores)

    @jit(device=True, forceinline=True)
    def weigh(query, at, window, part, mine, scores, best, total, added, weights, own):
        """Turn the scores of a query into weights, for its new maximum; at: its row's position in the block."""
        ours = scores[2 * query + 1] if part & 1 else scores[2 * query]
        other = scores[2 * query] if part & 1 else scores[2 * query + 1]
        score = ours + cuda.shfl_xor_sync(FULL, other, 1)
        score += cuda.shfl_xor_sync(FULL, score, 2)
        here = at[query // heads]
        score = score if mine <= here and mine > np.int32(here - window) else MASKED
        highest = max(score, cuda.shfl_xor_sync(FULL, score, 1))
        highest = max(highest, cuda.shfl_xor_sync(FULL, highest, 4))
        highest = max(highest, cuda.shfl_xor_sync(FULL, highest, 8))
        highest = max(best[query], max(highest, cuda.shfl_xor_sync(FULL, highest, 16)))
        shrink, weight = exp2(best[query] - highest), exp2(score - highest)
        best[query], total[query] = highest, total[query] * shrink + weight
        weights[own + query * BLOCK_SIZE + mine] = weight
        for i in range(rounds * items):
            added[query * rounds * items + i] *= shrink

    @jit(device=True, forceinline=True)
    def add_query(query, r, k, at, weights, floats, added):
        """Add four positions' values, weighted, to the sums of a query."""
        weight = load_four(weights, at + query * BLOCK_SIZE + k)
        for j in range(items):
            x = added[(query * rounds + r) * items + j]
            for i in range(4):
                x += weight[i] * floats[i * items + j]
            added[(query * rounds + r) * items + j] = x

    @jit(device=True, forceinline=True)
    def add_values(step, full, values, base, limit, piece, turn, own, weights, floats, added):
        """Add to all sums what four positions of this lane give."""
        r, k = step // (positions // 4), step % (positions // 4) * 4
        at = base + turn * words + 4 * min(piece + 32 * r, pieces - 1)
        for i in range(4):
            w = ldg128_near(values, at, (k + i if full else min(k + i, limit - turn)) * words)
            for pair in range(pairs):
                floats[i * items + 2 * pair], floats[i * items + 2 * pair + 1] = unpack(w, pair)
        add_queries(0, r, k, own + turn, weights, floats, added)

    add_queries = unrolled(add_query, queries)
    dot_key, weigh_all = unrolled(dot_piece, of_lane), unrolled(weigh, queries)
    add_all_values = unrolled(add_values, rounds * (positions // 4))

    @jit(device=True, forceinline=True)
    def attend_block(
        full, keys, values, base, start, newest, window, place, here,
        query_items, weights, own, best, total, added, scores, floats,
    ):  # fmt: skip
        """Let all queries attend to a KV block, whose vectors begin at word `base`, as one warp.

        Of a block that is not full the rest may be left from others: the newest position is read in its place.
        """
        lane = lane_index()
        key, part = np.int32(lane >> 2), np.int32(lane & 3)
        mine = np.int32(key + 8 * (part & 1))  # whose score a lane has in the end; two lanes have the same
        piece, turn = min(lane % lanes, pieces - 1), lane // lanes * positions  # turn: its first position with values
        limit = newest - start
        low, high = (key, key + 8) if full else (min(key, limit), min(key + 8, limit))
        for i in range(score_items):
            scores[i] = _ZERO
        dot_key(
            0, keys, base + low * words + 4 * part, base + high * words + 4 * part, part, query_items, floats, scores
        )
        for i in range(rows):
            here[i] = np.int32(place[i] - start)
        weigh_all(0, here, window, part, mine, scores, best, total, added, weights, own)
        cuda.syncwarp()
        add_all_values(0, full, values, base, limit, piece, turn, own, weights, floats, added)
        cuda.syncwarp()  # so that weights may be written again

    @jit(device=True, forceinline=True)
    def leave_query(query, warp, best, total, added, best_of, total_of, sums):
        """Leave what a warp has of a query in shared memory."""
        lane, whole = lane_index(), _HALF * warp_sum(total[query])
        if lane == 0:
            best_of[warp * queries + query], total_of[warp * queries + query] = best[query], whole
        for r in range(rounds):
            for i in range(items):
                x = added[(query * rounds + r) * items + i]
                if of_warp > 2:
                    x += cuda.shfl_xor_sync(FULL, x, 8)
                if of_warp > 1:
                    x += cuda.shfl_xor_sync(FULL, x, 16)
                if lane < lanes and lane + 32 * r < pieces:
                    sums[(warp * queries + query) * vector + (lane + 32 * r) * items + i] = x

    leave_all = unrolled(leave_query, queries)

    @kernel(
        PARAMETERS,
        name=f"attention_{head_dim}_{rows}x{heads}_{dtype}",
        launch_bounds=(THREADS, 4 if queries <= 4 else 2),
        fastmath=True,
    )
    def attention(
        qkv, keys, values, places, sequences, tables, tiles, partial, out,
        group, kv_heads, stride, blocks, window, splits, least, out_stride,
    ):  # fmt: skip
        query_items = cuda.shared.array(query_room, types.float32, alignment=16)
        weights = cuda.shared.array(weight_room, types.float32, alignment=16)
        sums = cuda.shared.array(sum_room, types.float32, alignment=16)
        best_of, total_of = cuda.shared.array(warp_room, types.float32), cuda.shared.array(warp_room, types.float32)
        best, total = cuda.local.array(queries, types.float32), cuda.local.array(queries, types.float32)
        place, here = cuda.local.array(rows, types.int32), cuda.local.array(rows, types.int32)
        added = cuda.local.array(sum_items, types.float32)
        scores, floats = cuda.local.array(score_items, types.float32), cuda.local.array(float_items, types.float32)

        # Which rows and heads: queries past the end are computed as zeros and not written.
        first, count = tiles[2 * cuda.blockIdx.x], tiles[2 * cuda.blockIdx.x + 1]
        chunks = (group + heads - 1) // heads
        kv, chunk = cuda.blockIdx.y // chunks, cuda.blockIdx.y % chunks
        head, present = kv * group + chunk * heads, min(heads, group - chunk * heads)
        t, warp = cuda.threadIdx.x, warp_index()
        for i in range(t, query_room, THREADS):
            query, d = i // padded, i % padded
            row, h = query // heads, query % heads
            inside = row < count and h < present and d < head_dim
            at = (first + row) * stride + (head + h) * head_dim + d
            query_items[i] = LOG2E * qkv[at] if inside else _ZERO
        for i in range(rows):
            place[i] = places[first + min(i, count - 1)]
        for i in range(queries):
            best[i], total[i] = UNSEEN, _ZERO
        for i in range(sum_items):
            added[i] = _ZERO
        cuda.syncthreads()

        begin, end = block_share(places, first, count, window, splits, least)
        table, newest = sequences[first] * blocks, places[first + count - 1]
        own = warp * (queries * BLOCK_SIZE)  # of the weights, where those of this warp begin
        block = begin + warp
        while block < end and (block + 1) * BLOCK_SIZE <= newest + 1:
            base = (tables[table + block] * kv_heads + kv) * (BLOCK_SIZE * words)
            attend_block(
                True, keys, values, base, block * BLOCK_SIZE, newest, window, place, here,
                query_items, weights, own, best, total, added, scores, floats,
            )  # fmt: skip
            block += _WARPS
        if block < end:  # the newest, not full yet
            base = (tables[table + block] * kv_heads + kv) * (BLOCK_SIZE * words)
            attend_block(
                False, keys, values, base, block * BLOCK_SIZE, newest, window, place, here,
                query_items, weights, own, best, total, added, scores, floats,
            )  # fmt: skip

        leave_all(0, warp, best, total, added, best_of, total_of, sums)
        cuda.syncthreads()
        for i in range(t, queries * head_dim, THREADS):
            query, d = i // head_dim, i % head_dim
            row, h = query // heads, query % heads
            if row < count and h < present:
                highest, mixed, whole = UNSEEN, _ZERO, _ZERO
                for w in range(_WARPS):
                    highest = max(highest, best_of[w * queries + query])
                for w in range(_WARPS):
                    factor = exp2(best_of[w * queries + query] - highest)
                    mixed += factor * sums[(w * queries + query) * vector + d]
                    whole += factor * total_of[w * queries + query]
                if splits == 1:
                    out[(first + row) * out_stride + (head + h) * head_dim + d] = mixed / whole
                else:
                    at = ((first + row) * kv_heads * group + head + h) * splits + cuda.blockIdx.z
                    partial[at * (head_dim + 2) + d] = mixed
                    if d == 0:
                        partial[at * (head_dim + 2) + head_dim] = highest
                        partial[at * (head_dim + 2) + head_dim + 1] = whole

    return attention
