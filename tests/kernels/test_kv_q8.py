"""The KV cache in 8 bits: its rounding, and the CPU's kernels for it, each by itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kernel_harness import Kernel, at
from model_zoo import zoo
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cpu.attention import attend, clear_sums, finish, sum_bytes
from svdengine.kernels.cpu.kv_blocks import QuantizedKvBlocks
from svdengine.kernels.cpu.kv_q8 import GROUP, QUERY, gather_q8, store_q8
from svdengine.kernels.cpu.workspace import KV_Q8
from svdengine.kernels.kv_q8 import (
    PACKED,
    dequantize_kv,
    group_count,
    key_shape,
    pack_kv,
    quantize_kv,
    unpack_kv,
)
from svdengine.kernels.reference import rotate
from svdengine.kernels.rope import rope_tables

HEADS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([1, 10, 31, 32, 33, 64, 80])),
    elements=st.floats(-60000, 60000, width=32),
)
STORE, GATHER, CLEAR, ATTEND, FINISH = map(Kernel, (store_q8, gather_q8, clear_sums, attend, finish))


@given(HEADS)
def test_rounding_is_to_the_nearest_of_255_levels(x: NDArray[np.float32]) -> None:
    level, scale = quantize_kv(x)
    back = dequantize_kv(level, scale, x.shape[-1])
    assert level.shape == (*x.shape[:-1], group_count(x.shape[-1]), 32) and back.shape == x.shape
    step = np.repeat(scale.astype(np.float32), 32, -1)[..., : x.shape[-1]]
    # Half a step, and what a scale in float16 lacks of the largest item over 127.
    assert (np.abs(back - x) <= 0.5 * step + 127 * (np.abs(step) / 2048 + 2.0**-24)).all()
    again, same = unpack_kv(pack_kv(level, scale))
    assert (again == level).all() and (same == scale).all() and pack_kv(level, scale).shape[-1] == PACKED


def test_what_is_not_finite_stays_so_and_zero_is_zero() -> None:
    x = np.zeros((4, 40), np.float32)
    x[0, 3], x[1, 39], x[2, 0] = np.nan, np.inf, 1e30
    back = dequantize_kv(*quantize_kv(x), 40)
    assert not np.isfinite(back[:3]).all(-1).any()
    assert np.isfinite(back[0, 32:]).all() and np.isfinite(back[1, :32]).all()
    assert not back[3].any()


def test_keys_are_shaped_by_how_their_bias_turns() -> None:
    config = zoo()["llama_silu_biases"]
    bias = 8 * np.random.default_rng(0).standard_normal((2, 30)).astype(np.float32)
    offsets, factors = key_shape(config, {"k.bias": bias})
    for layer in range(2):
        cos, sin = rope_tables(config, np.arange(4096))
        turned = rotate(np.repeat(bias[layer].reshape(1, 3, 10), 4096, 0), cos, sin)
        np.testing.assert_allclose(offsets[layer], turned.mean(0), atol=1e-3)
        strays = np.square(turned - offsets[layer]).mean(0)
        strays = np.tile(np.sqrt(strays[:, :5] + strays[:, 5:]), 2)
        assert (np.abs(np.log2(factors[layer] / np.maximum(1, strays / 2))) < 0.51).all()
    assert (np.log2(factors) % 1 == 0).all() and factors.max() > 1
    still, ones = key_shape(replace(config, rope=None), {"k.bias": bias})
    assert (still.reshape(2, 30) == bias).all() and (ones == 1).all()
    for other, arrays in ((config, {}), (replace(config, qk_norm=True), {"k.bias": bias})):
        still, ones = key_shape(other, arrays)
        assert not still.any() and (ones == 1).all()


class Pool:
    """Some tokens of one KV head in a pool of blocks, written by the compiled kernel."""

    def __init__(
        self, keys: NDArray[np.float32], values: NDArray[np.float32], table: list[int], offset: Any, factor: Any
    ) -> None:
        head_dim = keys.shape[1]
        self.model: Any = SimpleNamespace(head_dim=head_dim, value_stride=-(-head_dim // 16) * 16, layers=1, kv_heads=1)
        self.blocks = QuantizedKvBlocks(self.model, max(table) + 1, offset, factor)
        for pool in (self.blocks._keys, self.blocks._values):
            pool.fill(255)  # what another sequence left there; as a scale it is NaN
        self.cache, self.table = self.blocks.cache, np.array(table, np.int32)
        scratch = np.zeros(256, np.uint8)
        keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        cache = self.cache
        for i, block in enumerate(np.repeat(self.table, BLOCK_SIZE)[: len(keys)].tolist()):
            STORE(
                at(keys) + 4 * head_dim * i, at(values) + 4 * head_dim * i, cache.offsets, cache.factors,
                cache.keys + block * cache.key_head, cache.values + block * cache.value_head,
                i % BLOCK_SIZE, head_dim, cache.key_dim, self.model.value_stride, at(scratch),
            )  # fmt: skip


@pytest.mark.parametrize("head_dim", [10, 32, 48, 64, 80, 128])
def test_the_cpu_rounds_as_defined(head_dim: int) -> None:
    random = np.random.default_rng(head_dim)
    keys, values = (
        random.standard_normal((21, head_dim), np.float32) * 10.0 ** random.integers(-6, 4, (21, 1)) for _ in "kv"
    )
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    keys[3], values[4], keys[5, 0], values[6, -1] = 0, 0, np.nan, np.inf
    offset = random.standard_normal(head_dim).astype(np.float32)
    factor = (2.0 ** random.integers(0, 5, head_dim)).astype(np.float32)
    pool = Pool(keys, values, [4, 1], offset, factor)
    data = pool.blocks.read([4, 1])
    assert data.shape == (2, 2, 1, 16, 1, group_count(head_dim), PACKED)
    for i, expected in enumerate(((keys - offset) / factor, values)):
        level, scale = unpack_kv(data[:, i, 0, :, 0].reshape(32, -1, PACKED)[:21])
        right_level, right_scale = quantize_kv(expected)
        finite = np.isfinite(right_scale)
        assert not finite.all() and (finite == np.isfinite(scale)).all()
        assert (scale == right_scale)[finite].all() and (level == right_level).all()
    other = QuantizedKvBlocks(pool.model, 3, offset, factor)
    other.write([2, 0], data)
    assert (other.read([2, 0]) == data).all() and not other.read([1]).any()
    for wrong in (data[:1], data.view(np.int8), data[..., :-1]):
        with pytest.raises(ValueError, match="expected uint8"):
            other.write([2, 0], wrong)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([10, 32, 48, 64, 80, 128]),
    st.integers(1, 4),
    st.integers(1, 320),
    st.integers(1, 400),
    st.integers(0, 99),
)
def test_the_cpu_attends_to_what_is_stored(head_dim: int, count: int, length: int, window: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    keys, values = (random.standard_normal((length, head_dim)).astype(np.float32) for _ in "kv")
    queries = random.standard_normal((count, head_dim)).astype(np.float32)
    blocks = -(-length // BLOCK_SIZE)
    factor = (2.0 ** random.integers(0, 3, head_dim)).astype(np.float32)
    table = random.permutation(blocks + 3)[:blocks].tolist()
    pool = Pool(keys, values, table, np.zeros(head_dim, np.float32), factor)
    highs = [max(0, length - 1 - t) for t in range(count)]
    lows = [max(0, high + 1 - window) for high in highs]
    cache, model = pool.cache, pool.model

    packed, staging = np.zeros(4 * QUERY * cache.key_dim // GROUP, np.uint8), np.zeros(128, np.uint8)
    for t in range(count):
        GATHER(
            at(queries) + 4 * head_dim * t, t, count, head_dim, cache.key_dim, cache.factors, at(packed), at(staging)
        )
    size = sum_bytes.py_func(model.value_stride)
    sums, scratch = np.zeros(count * size, np.uint8), np.zeros(1 << 16, np.uint8)
    CLEAR(at(sums), count, model.value_stride)
    four = [tuple((numbers + [0] * 4)[:4]) for numbers in (lows, highs)]
    ATTEND(
        count, at(packed), *four, cache.keys, cache.values, pool.table, (cache.key_head, cache.value_head),
        (cache.key_dim, model.value_stride), KV_Q8, min(lows) // 16, max(highs) // 16 + 1, at(sums), at(scratch),
    )  # fmt: skip
    rounded_keys, rounded_values = (dequantize_kv(*quantize_kv(x), head_dim) for x in (keys / factor, values))
    rounded_keys *= factor
    out = np.zeros(head_dim, np.float32)
    for t in range(count):
        FINISH(at(sums) + t * size, 1, 0, model.value_stride, head_dim, at(out))
        seen = slice(lows[t], highs[t] + 1)
        score = rounded_keys[seen].astype(np.float64) @ queries[t]
        weight = np.exp(score - score.max())
        expected = weight @ rounded_values[seen] / weight.sum()
        np.testing.assert_allclose(out, expected, atol=2e-3 * np.abs(values).max())
