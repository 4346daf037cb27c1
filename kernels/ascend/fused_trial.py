"""The fused attention operator on this very device, tried once, before a model relies on it.

Some of CANN's versions have its symbol and no kernel for some devices: aclnnIncreFlashAttentionV4 on Atlas A3 is marked
as not supported in the documents of CANN 8.3, and as supported in later ones.
"""

from __future__ import annotations

import numpy as np

from svdengine.errors import DeviceError
from svdengine.kernels.ascend.attention import FUSED, fused_arguments
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.models import ModelConfig

_TABLES = ((2, 0), (1, 0))
_CLOSE = 2e-2  # of the largest value


def why_not_fused(device: AscendDevice, config: ModelConfig, block_size: int) -> str | None:
    """One line on why the operator cannot be used for a model's heads, or None where its results are right."""
    random = np.random.default_rng(0)
    heads, kv, width = config.head_count, config.kv_head_count, config.head_dim
    lengths = (block_size + 3, 2)  # tokens of two sequences, one of them in more than one block
    q = random.standard_normal((2, heads * width), np.float32).astype(np.float16)
    keys, values = random.standard_normal((2, 3, block_size * kv * width), np.float32).astype(np.float16)
    placed = [device.upload(array) for array in (q, keys, values, np.array(_TABLES, np.int32), np.zeros_like(q))]
    rows, placed_keys, placed_values, tables, out = placed
    try:
        pools = placed_keys, placed_values, block_size
        device.run(FUSED, *fused_arguments(config, rows, *pools, lengths, tables, out))
        found = device.read(out).astype(np.float32)
    except DeviceError as error:
        return str(error)
    finally:
        device.free(placed)
    expected = np.empty_like(found)
    for row, length in enumerate(lengths):
        own_keys, own_values = (pool[list(_TABLES[row])].reshape(-1, kv, width) for pool in (keys, values))
        expected[row] = _attended(config, q[row], own_keys, own_values, length)
    if np.isfinite(found).all() and np.abs(found - expected).max() <= _CLOSE * np.abs(expected).max():
        return None
    return f"{FUSED} gives wrong results on this device"


def _attended(config: ModelConfig, q: np.ndarray, keys: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Attention of one row (heads * head_dim) over the first tokens of keys and values (t, kv heads, head_dim)."""
    grouped = q.astype(np.float32).reshape(config.kv_head_count, -1, config.head_dim)
    scores = np.einsum("kgd,tkd->kgt", grouped, keys[:length].astype(np.float32)) * np.float32(config.attention_scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out: np.ndarray = np.einsum("kgt,tkd->kgd", weights, values[:length].astype(np.float32)).reshape(-1)
    return out
