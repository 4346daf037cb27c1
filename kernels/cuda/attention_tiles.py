"""Attention of many queries that share a kv head, on tensor cores: prefill over a float16 cache.

A tile of a block is 64 queries, some rows of one sequence times some query heads of one kv head, 16 of them a warp. It
goes through the context 64 positions at a time, whose keys and values lie in shared memory (FlashAttention-2,
arXiv:2307.08691). Queries and weights are rounded to float16, sums are float32. Where heads are wide, two warps have
the same queries and half of the sums each, and a block has 32 queries and 32 positions.

Values are copied while scores are computed, and the next keys while values are added.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.attention_rows import LOG2E, MASKED, PARAMETERS, UNSEEN, block_share
from svdengine.kernels.cuda.intrinsics import FULL, Kernel, f2h, jit, kernel, lane_index, unrolled, warp_index
from svdengine.kernels.cuda.kv_cache import head_stride
from svdengine.kernels.cuda.tensor_cores import (
    copy_async,
    exp2,
    load_matrices,
    load_transposed_matrices,
    mma_f16,
    wait_for_copies,
)

THREADS = 128
_WARPS = THREADS // 32
_WIDE = 128  # columns of a head, from which on two warps share its queries
_LARGEST = np.float32(65504)  # that float16 holds
_ZERO, _NONE = np.float32(0), np.uint32(0)


def most_queries(head_dim: int) -> int:
    """Queries of a tile."""
    return 16 * _WARPS if head_dim <= _WIDE else 8 * _WARPS


@jit(device=True)
def _half_pair(qkv, at, column, head_dim):
    """Two neighbouring items of a query from item `at` on, for scores in units of log 2; zeros behind its end."""
    low = LOG2E * qkv[at + column] if column < head_dim else _ZERO
    high = LOG2E * qkv[at + column + 1] if column + 1 < head_dim else _ZERO
    return f2h(max(-_LARGEST, min(_LARGEST, low)), max(-_LARGEST, min(_LARGEST, high)))


@cache
def tiles_kernel(head_dim: int, heads: int) -> Kernel:
    """Attention of tiles of `most_queries` queries with `heads` heads; grid as of `attention_rows.rows_kernel`."""
    steps = -(-head_dim // 16)  # of 16 columns
    sharers = 1 if head_dim <= _WIDE else 2  # warps with the same queries
    out_steps = -(-steps // sharers)
    positions = 64 // sharers
    vector = head_stride(head_dim)
    words, pieces, row_pieces = vector // 2, vector // 8, 2 * out_steps * sharers
    row_words = 4 * row_pieces + 4  # an odd number of 16 bytes: 8 rows lie in different banks
    room, score_items, out_items, query_items = positions * row_words, positions // 2, 8 * out_steps, 4 * steps

    weight_items = positions // 4

    @jit(device=True, forceinline=True)
    def copy_piece(index, to, cache, base, limit, at):
        """Begin to copy 16 bytes of a KV block: a piece of position `i // pieces` of it, to word `at` and on."""
        i = np.int32(cuda.threadIdx.x + index * THREADS)
        p = np.int32(np.uint32(i) // np.uint32(pieces))
        piece = np.int32(i - p * pieces)
        if p < BLOCK_SIZE:
            copy_async(to, at + p * row_words + 4 * piece, cache, base, np.int32(min(p, limit)) * words + 4 * piece)

    copy_block = unrolled(copy_piece, -(-BLOCK_SIZE * pieces // THREADS))

    @jit(device=True, forceinline=True)
    def copy_blocks(j, to, cache, tables, table, kv, kv_heads, start, newest):
        """Begin to copy the vectors of KV block j of a tile whose positions begin at `start`.

        What lies behind the newest position may be left from others: the newest is read in its place.
        """
        first = min(start + j * BLOCK_SIZE, newest // BLOCK_SIZE * BLOCK_SIZE)
        base = (tables[table + first // BLOCK_SIZE] * kv_heads + kv) * (BLOCK_SIZE * words)
        copy_block(0, to, cache, base, np.int32(newest - first), j * BLOCK_SIZE * row_words)

    @jit(device=True, forceinline=True)
    def mask(i, start, column, upper_low, upper_end, lower_low, lower_end, scores):
        """Hide those of 8 positions that a row does not see: up to its `low`, and from its `end` on."""
        for k in range(2):
            at = np.int32(start + 8 * i + column + k)
            if at >= upper_end or at <= upper_low:
                scores[4 * i + k] = MASKED
            if at >= lower_end or at <= lower_low:
                scores[4 * i + 2 + k] = MASKED

    @jit(device=True, forceinline=True)
    def score_step(index, query, key_words, key_at, scores):
        """Add to the scores of 16 positions what 16 columns give."""
        s, p = index // (positions // 16), index % (positions // 16)
        b = load_matrices(key_words, key_at + p * 16 * row_words + 8 * s)
        for half in range(2):
            i = 8 * p + 4 * half
            c = mma_f16(
                query[4 * s], query[4 * s + 1], query[4 * s + 2], query[4 * s + 3], b[2 * half], b[2 * half + 1],
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3],
            )  # fmt: skip
            for k in range(4):
                scores[i + k] = c[k]

    @jit(device=True, forceinline=True)
    def weigh(i, upper_best, lower_best, scores, totals):
        """Turn the scores of 8 positions into weights, and add them up."""
        for k in range(2):
            upper, lower = exp2(scores[4 * i + k] - upper_best), exp2(scores[4 * i + 2 + k] - lower_best)
            scores[4 * i + k], scores[4 * i + 2 + k] = upper, lower
            totals[0] += upper
            totals[1] += lower

    @jit(device=True, forceinline=True)
    def shrink_step(i, upper, lower, added):
        """Sums of 8 columns, for new maxima."""
        for k in range(2):
            added[4 * i + k] *= upper
            added[4 * i + 2 + k] *= lower

    @jit(device=True, forceinline=True)
    def add_step(index, weights, value_words, value_at, added):
        """Add to the sums of 16 columns what 16 positions give."""
        p, s = index // out_steps, index % out_steps
        b = load_transposed_matrices(value_words, value_at + p * 16 * row_words + 8 * s)
        for half in range(2):
            i = 8 * s + 4 * half
            c = mma_f16(
                weights[4 * p], weights[4 * p + 1], weights[4 * p + 2], weights[4 * p + 3],
                b[2 * half], b[2 * half + 1], added[i], added[i + 1], added[i + 2], added[i + 3],
            )  # fmt: skip
            for k in range(4):
                added[i + k] = c[k]

    begin_copies, mask_all = unrolled(copy_blocks, positions // BLOCK_SIZE), unrolled(mask, positions // 8)
    score_all, weigh_all = unrolled(score_step, steps * (positions // 16)), unrolled(weigh, positions // 8)
    shrink_all, add_all = unrolled(shrink_step, 2 * out_steps), unrolled(add_step, out_steps * (positions // 16))

    @kernel(PARAMETERS, name=f"attention_tiles_{head_dim}_{heads}", launch_bounds=(THREADS, 2), fastmath=True)
    def attention(
        qkv, keys, values, places, sequences, tables, tiles, partial, out,
        group, kv_heads, stride, blocks, window, splits, least, out_stride,
    ):  # fmt: skip
        key_words = cuda.shared.array(room, types.uint32, alignment=16)
        value_words = cuda.shared.array(room, types.uint32, alignment=16)
        query = cuda.local.array(query_items, types.uint32)  # as A of a product, 16 columns after 16
        scores = cuda.local.array(score_items, types.float32)  # as C, 8 positions after 8
        added = cuda.local.array(out_items, types.float32)  # as C, 8 columns after 8
        weights = cuda.local.array(weight_items, types.uint32)  # as A, 16 positions after 16
        totals = cuda.local.array(2, types.float32)

        first, count = tiles[2 * cuda.blockIdx.x], tiles[2 * cuda.blockIdx.x + 1]
        chunks = (group + heads - 1) // heads
        kv, chunk = cuda.blockIdx.y // chunks, cuda.blockIdx.y % chunks
        head, present = kv * group + chunk * heads, min(heads, group - chunk * heads)
        t, lane, warp = cuda.threadIdx.x, lane_index(), warp_index()
        upper = warp // sharers * 16 + (lane >> 2)  # this lane's two queries
        lower, column = upper + 8, 2 * (lane & 3)
        # Queries past the end are computed from others, and not written.
        upper_row, lower_row = min(upper // heads, count - 1), min(lower // heads, count - 1)
        upper_at = (first + upper_row) * stride + (head + min(upper % heads, present - 1)) * head_dim
        lower_at = (first + lower_row) * stride + (head + min(lower % heads, present - 1)) * head_dim
        for s in range(steps):
            query[4 * s] = _half_pair(qkv, upper_at, 16 * s + column, head_dim)
            query[4 * s + 1] = _half_pair(qkv, lower_at, 16 * s + column, head_dim)
            query[4 * s + 2] = _half_pair(qkv, upper_at, 16 * s + column + 8, head_dim)
            query[4 * s + 3] = _half_pair(qkv, lower_at, 16 * s + column + 8, head_dim)
        upper_place, lower_place = places[first + upper_row], places[first + lower_row]
        for i in range(out_items):
            added[i] = _ZERO
        for piece in range(pieces, row_pieces):  # columns that only fill up
            for i in range(t, positions, THREADS):
                for k in range(4):
                    key_words[i * row_words + 4 * piece + k] = _NONE
                    value_words[i * row_words + 4 * piece + k] = _NONE

        begin, end = block_share(places, first, count, window, splits, least)
        table, oldest, newest = sequences[first] * blocks, places[first], places[first + count - 1]
        stop = end * BLOCK_SIZE
        # Where this lane's rows of matrices begin: see load_matrices.
        key_at = ((lane >> 4) * 8 + (lane & 7)) * row_words + (lane >> 3 & 1) * 4
        value_at = (lane & 15) * row_words + (lane >> 4) * 4 + warp % sharers * out_steps * 8
        upper_best, lower_best = UNSEEN, UNSEEN
        totals[0], totals[1] = _ZERO, _ZERO
        if begin < end:
            begin_copies(0, key_words, keys, tables, table, kv, kv_heads, begin * BLOCK_SIZE, newest)
        for start in range(begin * BLOCK_SIZE, stop, positions):
            wait_for_copies()
            cuda.syncthreads()
            begin_copies(0, value_words, values, tables, table, kv, kv_heads, start, newest)
            for i in range(score_items):
                scores[i] = _ZERO
            score_all(0, query, key_words, key_at, scores)
            if start + positions > min(oldest + 1, stop) or start <= newest - window:  # not all see all
                upper_end, lower_end = np.int32(min(upper_place + 1, stop)), np.int32(min(lower_place + 1, stop))
                upper_low, lower_low = np.int32(upper_place - window), np.int32(lower_place - window)
                mask_all(0, start, column, upper_low, upper_end, lower_low, lower_end, scores)
            upper_highest, lower_highest = upper_best, lower_best
            for i in range(positions // 8):
                upper_highest = max(upper_highest, max(scores[4 * i], scores[4 * i + 1]))
                lower_highest = max(lower_highest, max(scores[4 * i + 2], scores[4 * i + 3]))
            upper_highest = max(upper_highest, cuda.shfl_xor_sync(FULL, upper_highest, 1))
            upper_highest = max(upper_highest, cuda.shfl_xor_sync(FULL, upper_highest, 2))
            lower_highest = max(lower_highest, cuda.shfl_xor_sync(FULL, lower_highest, 1))
            lower_highest = max(lower_highest, cuda.shfl_xor_sync(FULL, lower_highest, 2))
            upper_shrink, lower_shrink = exp2(upper_best - upper_highest), exp2(lower_best - lower_highest)
            upper_best, lower_best = upper_highest, lower_highest
            totals[0] *= upper_shrink
            totals[1] *= lower_shrink
            weigh_all(0, upper_best, lower_best, scores, totals)
            for i in range(weight_items):
                weights[i] = f2h(scores[2 * i], scores[2 * i + 1])
            shrink_all(0, upper_shrink, lower_shrink, added)
            wait_for_copies()
            cuda.syncthreads()
            if start + positions < stop:
                begin_copies(0, key_words, keys, tables, table, kv, kv_heads, start + positions, newest)
            add_all(0, weights, value_words, value_at, added)

        upper_total, lower_total = totals[0], totals[1]
        upper_total += cuda.shfl_xor_sync(FULL, upper_total, 1)
        upper_total += cuda.shfl_xor_sync(FULL, upper_total, 2)
        lower_total += cuda.shfl_xor_sync(FULL, lower_total, 1)
        lower_total += cuda.shfl_xor_sync(FULL, lower_total, 2)
        for half in range(2):
            mine = upper if half == 0 else lower
            row, h = mine // heads, mine % heads
            if row < count and h < present:
                best, total = (upper_best, upper_total) if half == 0 else (lower_best, lower_total)
                at = ((first + row) * kv_heads * group + head + h) * splits + cuda.blockIdx.z
                to = (first + row) * out_stride + (head + h) * head_dim if splits == 1 else at * (head_dim + 2)
                factor = np.float32(1) / total if splits == 1 else np.float32(1)
                for i in range(2 * out_steps):
                    for k in range(2):
                        d = warp % sharers * out_steps * 16 + 8 * i + column + k
                        if d < head_dim:
                            x = factor * added[4 * i + 2 * half + k]
                            if splits == 1:
                                out[to + d] = x
                            else:
                                partial[to + d] = x
                if splits > 1 and column == 0 and warp % sharers == 0:
                    partial[to + head_dim] = best
                    partial[to + head_dim + 1] = total

    return attention
