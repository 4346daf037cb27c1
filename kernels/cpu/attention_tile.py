"""The inner loops of attention: up to 4 queries that share a KV head, against one block of 16 tokens.

Keys lie dimension-major, (key_dim, 16): a vector is one dimension of 16 tokens, so scores need no sum across lanes.
Values lie token-major, (16, value_stride). In 8 bits both have scales; kv_q8.py makes the scores then.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from svdengine.kernels.cpu.simd import (
    F16,
    F32,
    F32V,
    I8,
    I32,
    I32V,
    I64,
    address,
    f32x16,
    fused,
    half_to_float,
    index,
    load,
    loop,
    operation,
    splat,
    store,
)
from svdengine.kernels.cpu.workspace import KV_F16, KV_F32, KV_Q8

QUERIES = 4  # most queries in a tile
_ITEM_BYTES = {KV_F32: 4, KV_F16: 2, KV_Q8: 1}
_ZERO = ir.Constant(F32V, [0.0] * 16)


def _stored(builder, at, kind, offset=0):
    if kind == KV_Q8:
        return builder.sitofp(load(builder, at, ir.VectorType(I8, 16), offset), F32V)
    if kind == KV_F16:
        return half_to_float(builder, load(builder, at, ir.VectorType(F16, 16), offset))
    return load(builder, at, F32V, offset)


def score_tile(count: int, kind: int) -> Any:
    """scores[t, 0..16] of `count` queries with the keys of a block."""

    @operation(types.void, address, address, index, address, index)
    def tile(builder, queries, keys, key_dim, scores, stride):
        """queries: (key_dim, count) float32, scaled; key_dim: a multiple of 4. stride: bytes from query to query."""
        unroll = 4 if count == 1 else 2  # enough sums in flight to hide the latency of one
        size = 16 * _ITEM_BYTES[kind]

        def step(at, query, totals, lane):
            key = _stored(builder, at, kind, size * lane)
            return [
                fused(builder, key, splat(builder, load(builder, query, F32, 4 * (count * lane + t))), totals[t])
                for t in range(count)
            ]

        def whole(i, totals):
            at = builder.add(keys, builder.mul(i, ir.Constant(I64, size * unroll)))
            query = builder.add(queries, builder.mul(i, ir.Constant(I64, 4 * count * unroll)))
            parts = [step(at, query, totals[u * count : (u + 1) * count], u) for u in range(unroll)]
            return [total for part in parts for total in part]

        steps = builder.udiv(key_dim, ir.Constant(I64, unroll))
        totals = loop(builder, steps, [_ZERO] * (count * unroll), whole)
        sums = totals[:count]
        for u in range(1, unroll):
            sums = [builder.fadd(a, b) for a, b in zip(sums, totals[u * count : (u + 1) * count], strict=True)]
        for t in range(count):
            store(builder, builder.add(scores, builder.mul(stride, ir.Constant(I64, t))), sums[t])

    return tile


def value_tile(count: int, kind: int, vectors: int) -> Any:
    """sums[t, columns] += weights[t, tokens] times the values of a block, 16 * `vectors` columns."""

    @operation(types.void, address, index, address, index, index, address, index)
    def tile(builder, weights, weight_stride, values, value_bytes, tokens, sums, sum_stride):
        """weights, values: at the first of `tokens` (1..16) tokens. value_bytes: from one token to the next.

        In 8 bits a query has 16 weights for every 2 vectors: those that follow are 64 bytes on.
        """
        size = 16 * _ITEM_BYTES[kind]
        own = 2 if kind == KV_Q8 else vectors  # vectors that share their weights
        rows = [builder.add(sums, builder.mul(sum_stride, ir.Constant(I64, t))) for t in range(count)]
        lines = [builder.add(weights, builder.mul(weight_stride, ir.Constant(I64, t))) for t in range(count)]
        start = [load(builder, rows[t], F32V, 64 * v) for t in range(count) for v in range(vectors)]

        def body(token, totals):
            at = builder.add(values, builder.mul(token, value_bytes))
            offset = builder.mul(token, ir.Constant(I64, 4))
            loaded = [_stored(builder, at, kind, size * v) for v in range(vectors)]
            results = []
            for t in range(count):
                line = builder.add(lines[t], offset)
                weight = [splat(builder, load(builder, line, F32, 64 * g)) for g in range(-(-vectors // own))]
                results += [
                    fused(builder, loaded[v], weight[v // own], totals[t * vectors + v]) for v in range(vectors)
                ]
            return results

        totals = loop(builder, tokens, start, body)
        for t in range(count):
            for v in range(vectors):
                to = builder.add(rows[t], ir.Constant(I64, 64 * v))
                store(builder, to, totals[t * vectors + v])

    return tile


@operation(f32x16, f32x16, index, index, index, types.float32)
def mask_outside(builder, scores, start, low, high, masked):
    """Scores of the 16 positions from `start`; `masked` where a position is not in low..high."""
    lanes = ir.Constant(I32V, list(range(16)))

    def from_start(bound):
        return splat(builder, builder.trunc(builder.sub(bound, start), I32))

    seen = builder.and_(
        builder.icmp_signed(">=", lanes, from_start(low)), builder.icmp_signed("<=", lanes, from_start(high))
    )
    return builder.select(seen, scores, splat(builder, masked))


scores_1_f32, scores_2_f32, scores_3_f32, scores_4_f32 = (score_tile(t, KV_F32) for t in (1, 2, 3, 4))
scores_1_f16, scores_2_f16, scores_3_f16, scores_4_f16 = (score_tile(t, KV_F16) for t in (1, 2, 3, 4))
values_1_f32, values_2_f32, values_3_f32, values_4_f32 = (value_tile(t, KV_F32, 4) for t in (1, 2, 3, 4))
values_1_f16, values_2_f16, values_3_f16, values_4_f16 = (value_tile(t, KV_F16, 4) for t in (1, 2, 3, 4))
values_1_q8, values_2_q8, values_3_q8, values_4_q8 = (value_tile(t, KV_Q8, 4) for t in (1, 2, 3, 4))
narrow_f32, narrow_f16, narrow_q8 = (value_tile(1, kind, 1) for kind in (KV_F32, KV_F16, KV_Q8))
