"""What CANN's operators compute, in NumPy, with the limits that their documentation states.

An operator takes its arguments in the order of signatures.py: arrays (views of device memory) for tensors. Sums are
float32, as on the device; what is written is rounded to the output's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fake_memory import BrokenRule
from numpy.typing import NDArray

from svdengine.kernels.reference import activate

Array = NDArray[Any]


def need(condition: bool, what: str) -> None:
    """Raise BrokenRule unless the condition holds."""
    if not condition:
        raise BrokenRule(what)


def mm(x: Array, weights: Array, out: Array, cube_type: int) -> None:
    need(x.ndim == weights.ndim == 2 and cube_type == 0, "Mm: not two matrices in their own type")
    _half(x, weights, out)
    need(out.shape == (len(x), weights.shape[1]), f"Mm: {x.shape} times {weights.shape} is not {out.shape}")
    # Anything else is copied at each call.
    need(any(w.flags.c_contiguous for w in (weights, weights.T)), "Mm: a matrix has gaps between its rows")
    out[...] = x.astype(np.float32) @ weights.astype(np.float32)


def batch_mat_mul(x: Array, y: Array, out: Array, cube_type: int) -> None:
    need(x.ndim == y.ndim == 3 and cube_type == 0, "BatchMatMul: not two batches in their own type")
    _half(x, y, out)
    # Strided batches fail on devices (error 561103).
    need(all(a.flags.c_contiguous for a in (x, y, out)), "BatchMatMul: a batch is not contiguous")
    out[...] = x.astype(np.float32) @ y.astype(np.float32)


def weight_quant_batch_matmul(
    x: Array, weights: Array, scale: Array, offset: None, s: None, o: None, bias: None, group: int, y: Array
) -> None:
    need(all(a is None for a in (offset, s, o, bias)), "WeightQuantBatchMatmulV2: an unknown option")
    k, n = weights.shape
    _half(x, scale, y)
    need(weights.dtype == np.int8, "WeightQuantBatchMatmulV2: weights are not int8")
    need(max(k, n) <= 65535, f"WeightQuantBatchMatmulV2: {k} x {n} weights")
    need(32 <= group <= k - 1 and group % 32 == 0, f"WeightQuantBatchMatmulV2: groups of {group} of {k}")
    need(scale.shape == (-(-k // group), n), f"WeightQuantBatchMatmulV2: scales {scale.shape}")
    need(x.flags.c_contiguous and weights.flags.c_contiguous, "WeightQuantBatchMatmulV2: an operand is not contiguous")
    full = weights.astype(np.float32) * np.repeat(scale.astype(np.float32), group, 0)[:k]
    y[...] = x.astype(np.float32) @ full


def rms_norm(x: Array, gamma: Array, epsilon: float, y: Array, inverse: Array) -> None:
    _half(x, gamma, y)
    need(inverse.dtype == np.float32 and inverse.shape == (*x.shape[:-1], 1), "RmsNorm: 1 / rms is not float32 (n, 1)")
    wide = x.astype(np.float32)
    inverse[...] = 1 / np.sqrt(np.square(wide).mean(-1, keepdims=True) + np.float32(epsilon))
    y[...] = wide * inverse * gamma.astype(np.float32)


def add_rms_norm(x: Array, other: Array, gamma: Array, epsilon: float, y: Array, inverse: Array, total: Array) -> None:
    _half(x, other, total)
    need(x.shape == other.shape == total.shape, f"AddRmsNorm: {x.shape} and {other.shape}")
    total[...] = x.astype(np.float32) + other.astype(np.float32)
    rms_norm(total, gamma, epsilon, y, inverse)


def layer_norm(
    x: Array, shape: Sequence[int], weight: Array, bias: Array, epsilon: float, y: Array, mean: None, deviation: None
) -> None:
    _half(x, weight, bias, y)
    need(list(shape) == list(weight.shape) == [x.shape[-1]], "LayerNorm: another shape is normalised")
    wide = x.astype(np.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(epsilon))
    y[...] = scaled * weight.astype(np.float32) + bias.astype(np.float32)


def rotary_position_embedding(x: Array, cos: Array, sin: Array, mode: int, y: Array) -> None:
    _half(x, cos, sin, y)
    width = x.shape[-1]
    need(mode == 0 and x.ndim == 4 and x.shape == y.shape, "RotaryPositionEmbedding: not halves of four dimensions")
    need(width % 2 == 0 and width < 896 and x.shape[2] < 1000, f"RotaryPositionEmbedding: {x.shape}")
    need(cos.shape == sin.shape == (1, x.shape[1], 1, width), f"RotaryPositionEmbedding: angles {cos.shape}")
    wide = x.astype(np.float32)
    first, second = np.split(wide, 2, -1)
    y[...] = wide * cos.astype(np.float32) + np.concatenate([-second, first], -1) * sin.astype(np.float32)


def incre_flash_attention(
    q: Array, keys: Sequence[Array], values: Sequence[Array], shift: None, mask: None, lengths: Sequence[int],
    *rest: Any,
) -> None:  # fmt: skip
    *quantised, table, padding, heads, scale, layout, kv_heads, block, _, out = rest
    need(all(a is None for a in (shift, mask, padding, *quantised)), "IncreFlashAttentionV4: an unknown option")
    (k,), (v,) = keys, values
    n, one, width = q.shape
    head = width // heads
    _half(q, k, v, out)
    need(one == 1 and layout == b"BSH" and out.shape == q.shape, "IncreFlashAttentionV4: not one token each")
    need(head % 16 == 0 and head <= 512 and heads <= 256, f"IncreFlashAttentionV4: {heads} heads of {head}")
    need(block % 16 == 0 and 0 < block <= 512, f"IncreFlashAttentionV4: blocks of {block}")
    need(k.shape == v.shape and k.shape[1:] == (block, kv_heads * head), f"IncreFlashAttentionV4: keys {k.shape}")
    need(table.dtype == np.int32 and table.ndim == 2, "IncreFlashAttentionV4: no table")
    need(len(table) == n == len(lengths), f"IncreFlashAttentionV4: {len(table)} tables for {n} sequences")
    need(table.shape[1] * block >= max(lengths), "IncreFlashAttentionV4: the table is too short")
    for row, length in enumerate(lengths):
        used = table[row, : -(-length // block)]
        need(length > 0 and (used >= 0).all() and (used < len(k)).all(), "IncreFlashAttentionV4: no such block")
        seen_k, seen_v = (c[used].reshape(-1, kv_heads, head)[:length].astype(np.float32) for c in (k, v))
        queries = q[row].astype(np.float32).reshape(kv_heads, heads // kv_heads, head)
        scores = np.einsum("kgd,tkd->kgt", queries, seen_k) * np.float32(scale)
        out[row, 0] = np.einsum("kgt,tkd->kgd", _softmax(scores), seen_v).reshape(-1)


def sum_of(summands: Sequence[Array], out: Array) -> None:
    _half(*summands, out)
    need(np.broadcast_shapes(*(a.shape for a in summands)) == out.shape, f"Sum: {[a.shape for a in summands]}")
    total = summands[0].astype(np.float32)
    for array in summands[1:]:
        total = total + array.astype(np.float32)
    out[...] = total


def inplace_copy(to: Array, source: Array) -> None:
    need(to.dtype == source.dtype, "InplaceCopy: of another type")
    need(np.broadcast_shapes(to.shape, source.shape) == to.shape, f"InplaceCopy: {source.shape} to {to.shape}")
    to[...] = source


def clamp_min(x: Array, least: float, out: Array) -> None:
    need(x.shape == out.shape and x.dtype == out.dtype, f"ClampMin: {x.shape} and {out.shape}")
    out[...] = np.maximum(x, np.float16(least))


def inplace_gt_scalar(x: Array, other: float) -> None:
    x[...] = x.astype(np.float32) > np.float32(other)


def softmax(x: Array, dimension: int, y: Array) -> None:
    need(dimension == -1, "Softmax: not over the last dimension")
    y[...] = _softmax(x.astype(np.float32))


def embedding(table: Array, indices: Array, rows: Array) -> None:
    _indexed(table, indices)
    rows[...] = table[indices]


def index_select(source: Array, dimension: int, indices: Array, rows: Array) -> None:
    need(dimension == 0, "IndexSelect: not rows")
    _indexed(source, indices)
    rows[...] = source[indices]


def index_copy(to: Array, dimension: int, indices: Array, rows: Array) -> None:
    need(dimension == 0 and to.dtype == rows.dtype, "InplaceIndexCopy: not rows of one type")
    _indexed(to, indices)
    need(len(set(indices.tolist())) == len(indices) == len(rows), "InplaceIndexCopy: a row is written twice")
    to[indices] = rows


def permute(x: Array, dimensions: Sequence[int], y: Array) -> None:
    turned = x.transpose(*dimensions)
    need(turned.shape == y.shape, f"Permute: {turned.shape} is not {y.shape}")
    y[...] = turned


def inplace_add(x: Array, other: Array, factor: float) -> None:
    need(np.broadcast_shapes(x.shape, other.shape) == x.shape, f"InplaceAdd: {other.shape} to {x.shape}")
    x[...] = x.astype(np.float32) + np.float32(factor) * other.astype(np.float32)


def inplace_mul(x: Array, other: Array) -> None:
    need(np.broadcast_shapes(x.shape, other.shape) == x.shape, f"InplaceMul: {other.shape} and {x.shape}")
    x[...] = x.astype(np.float32) * other.astype(np.float32)


def inplace_muls(x: Array, factor: float) -> None:
    x[...] = x.astype(np.float32) * np.float32(factor)


def relu(x: Array, y: Array) -> None:
    y[...] = np.maximum(x, 0)


def inplace_relu(x: Array) -> None:
    x[...] = np.maximum(x, 0)


def threshold(x: Array, limit: float, value: float, y: Array) -> None:
    y[...] = np.where(x.astype(np.float32) > np.float32(limit), x, np.float16(value))


def silu(x: Array, y: Array) -> None:
    y[...] = activate("silu", x.astype(np.float32))


def gelu(x: Array, approximation: int, y: Array) -> None:
    y[...] = activate("gelu_tanh" if approximation == 1 else "gelu", x.astype(np.float32))


OPERATORS: dict[str, Callable[..., None]] = {
    "aclnnMm": mm,
    "aclnnBatchMatMul": batch_mat_mul,
    "aclnnWeightQuantBatchMatmulV2": weight_quant_batch_matmul,
    "aclnnRmsNorm": rms_norm,
    "aclnnAddRmsNorm": add_rms_norm,
    "aclnnLayerNorm": layer_norm,
    "aclnnRotaryPositionEmbedding": rotary_position_embedding,
    "aclnnIncreFlashAttentionV4": incre_flash_attention,
    "aclnnSoftmax": softmax,
    "aclnnEmbedding": embedding,
    "aclnnIndexSelect": index_select,
    "aclnnInplaceIndexCopy": index_copy,
    "aclnnPermute": permute,
    "aclnnInplaceAdd": inplace_add,
    "aclnnInplaceMul": inplace_mul,
    "aclnnInplaceMuls": inplace_muls,
    "aclnnRelu": relu,
    "aclnnInplaceRelu": inplace_relu,
    "aclnnThreshold": threshold,
    "aclnnSilu": silu,
    "aclnnGeluV2": gelu,
    "aclnnSum": sum_of,
    "aclnnInplaceCopy": inplace_copy,
    "aclnnClampMin": clamp_min,
    "aclnnInplaceGtScalar": inplace_gt_scalar,
}

# Of Atlas inference products (310P), those that the table of products at the head of an operator's page does not list:
# ops-math and ops-nn of August 2026, ops-transformer of November 2025.
NOT_ON_310P = {
    "aclnnPermute", "aclnnInplaceAdd", "aclnnRelu", "aclnnInplaceRelu", "aclnnThreshold", "aclnnInplaceIndexCopy",
    "aclnnLayerNorm", "aclnnRotaryPositionEmbedding", "aclnnIncreFlashAttentionV4",
}  # fmt: skip

# Those that work in the memory of their first argument; all others write the last tensors, which no input overlaps.
OUTPUTS: dict[str, int] = {"aclnnRmsNorm": 2, "aclnnAddRmsNorm": 3}  # how many; by default one


def _half(*arrays: Array) -> None:
    need(all(a.dtype == np.float16 for a in arrays), f"types {[a.dtype.name for a in arrays]}, not all float16")


def _indexed(source: Array, indices: Array) -> None:
    need(indices.dtype in (np.int32, np.int64) and indices.ndim == 1, "an index is not a list of integers")
    need(bool(((indices >= 0) & (indices < len(source))).all()), f"an index lies outside 0..{len(source) - 1}")


def _softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    result: Array = weights / weights.sum(-1, keepdims=True)
    need(bool(np.isfinite(result).all()), "softmax of nothing, or of NaN")
    return result
