"""Attention alone against NumPy in float64: decode and prefill, every kind of tile, cache, window and split."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_zoo import relative_error
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda import attention
from svdengine.kernels.cuda.batch_tiles import cut_tiles
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.kv_cache import KvCache, KvDtype, head_stride
from svdengine.kernels.cuda.rounding import round_rows_to

NO_WINDOW = 1 << 30


def attend(device: Any, *shape: Any, alone: bool = False, **options: Any) -> tuple[NDArray, NDArray]:
    """What the device computes, and what is right, for what `prepared` takes."""
    arguments, expected = prepared(device, *shape, alone=alone, **options)
    attention.attend(device, *arguments)
    return device.download(arguments[2].attention).reshape(expected.shape), expected


def prepared(
    device: Any,
    head_dim: int,
    kv_heads: int,
    group: int,
    contexts: list[tuple[int, int]],
    dtype: KvDtype = "f16",
    window: int = NO_WINDOW,
    alone: bool = False,
) -> tuple[Any, NDArray]:
    """Arguments of `attention.attend`, and what is right, for sequences of (context, rows): the last rows attend.

    Blocks of a sequence lie anywhere, and what is behind its newest position is NaN.
    """
    random = np.random.default_rng(0)
    heads, stride, kind = kv_heads * group, head_stride(head_dim), np.float16 if dtype == "f16" else np.float32
    counts = [-(-context // BLOCK_SIZE) for context, _ in contexts]
    order = random.permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(contexts), max(counts)), np.int32)
    pools = np.zeros((2, len(order), kv_heads, BLOCK_SIZE, stride), kind)
    pools[..., :head_dim] = np.nan
    q, expected, positions, sequences = [], [], [], []
    for number, (context, rows) in enumerate(contexts):
        blocks = order[sum(counts[:number]) : sum(counts[: number + 1])]
        tables[number, : len(blocks)] = blocks
        kv = random.standard_normal((2, context, kv_heads, head_dim)).astype(kind)
        for p in range(context):
            pools[:, blocks[p // BLOCK_SIZE], :, p % BLOCK_SIZE, :head_dim] = kv[:, p]
        for p in range(context - rows, context):
            x = random.standard_normal((heads, head_dim)).astype(np.float32) / np.float32(head_dim**0.25)
            keys, values = kv[:, max(0, p - window + 1) : p + 1].astype(np.float64)
            scores = np.einsum("hd,phd->hp", x.astype(np.float64), keys.repeat(group, 1))
            weights = np.exp(scores - scores.max(1, keepdims=True))
            expected.append(np.einsum("hp,phd->hd", weights / weights.sum(1, keepdims=True), values.repeat(group, 1)))
            q.append(x)
            positions.append(p)
            sequences.append(number)
    n, width = len(q), heads * head_dim
    rows = 1 if alone else attention.tile_rows(group, head_dim, dtype)
    tiles = cut_tiles(np.array(sequences, np.int32), rows)
    sizes = SimpleNamespace(qkv=width, attention=width, blocks=tables.shape[1])
    work = SimpleNamespace(
        qkv=device.upload(np.array(q, np.float32)),
        positions=device.upload(np.array(positions, np.int32)),
        sequences=device.upload(np.array(sequences, np.int32)),
        block_tables=device.upload(tables),
        tiles=device.upload(tiles),
        partial=device.upload(np.full(max(64, n) * heads * (head_dim + 2), np.nan, np.float32)),
        attention=device.zeros(n * width, np.float32),
        rounded=device.zeros(n * width, np.float32),
        sizes=sizes,
    )
    config = SimpleNamespace(head_count=heads, kv_head_count=kv_heads, head_dim=head_dim)
    model: Any = SimpleNamespace(config=config, layers=[SimpleNamespace(window=window)])
    cache = KvCache((device.upload(pools[0]),), (device.upload(pools[1]),), dtype, stride)
    return (model, 0, work, cache, n, len(tiles), rows), np.array(expected)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group"), [(128, 2, 1), (64, 1, 3), (80, 1, 2), (12, 1, 1), (256, 1, 1)]
)
def test_decode(device: Any, head_dim: int, kv_heads: int, group: int, dtype: KvDtype) -> None:
    found, expected = attend(device, head_dim, kv_heads, group, [(83, 1), (17, 1)], dtype, alone=True)
    assert relative_error(found, expected) < 2e-6


def test_decode_of_more_heads_than_a_tile_has(device: Any) -> None:
    found, expected = attend(device, 8, 1, 11, [(37, 1)], alone=True)
    assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("window", [5, 33])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_decode_sees_its_window_only(device: Any, window: int, dtype: KvDtype) -> None:
    found, expected = attend(device, 16, 1, 2, [(70, 1), (4, 1)], dtype, window, alone=True)
    assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("alone", [False, True])
def test_the_context_is_split_over_blocks(
    device: Any, monkeypatch: pytest.MonkeyPatch, dtype: KvDtype, alone: bool
) -> None:
    monkeypatch.setattr(attention, "_LEAST_BLOCKS", 1)
    found, expected = attend(device, 16, 1, 2, [(75, 9)], dtype, alone=alone)
    assert relative_error(found, expected) < (2e-6 if dtype == "f32" or alone else 2e-3)


@pytest.mark.parametrize(
    ("head_dim", "heads", "least", "done"),
    [
        (32, 4, 1, True),
        (160, 2, 1, True),  # more columns than threads
        (16, 4, 1, False),  # two heads would share a group
        (32, 4, 99, False),  # nothing is joined
    ],
)
def test_what_is_joined_is_rounded_there(
    device: Any, monkeypatch: pytest.MonkeyPatch, head_dim: int, heads: int, least: int, done: bool
) -> None:
    monkeypatch.setattr(attention, "_LEAST_BLOCKS", least)
    arguments, expected = prepared(device, head_dim, heads, 1, [(75, 1), (40, 1)], alone=True)
    assert attention.attend(device, *arguments, rounded=True) == done
    work, width = arguments[2], heads * head_dim
    assert relative_error(device.download(work.attention).reshape(expected.shape), expected) < 2e-6
    alone = round_rows_to(device, work.attention, device.zeros(2 * width, np.float32), width, 2)
    same = np.array_equal(device.download(work.rounded).view(np.uint32), device.download(alone).view(np.uint32))
    assert same == done


@pytest.mark.parametrize(
    ("head_dim", "group", "contexts"),
    [(128, 1, [(150, 20)]), (12, 3, [(50, 50), (3, 3)]), (80, 2, [(40, 9)]), (256, 1, [(40, 10)]), (144, 2, [(36, 9)])],
)
def test_prefill_on_tensor_cores(device: Any, head_dim: int, group: int, contexts: list[tuple[int, int]]) -> None:
    found, expected = attend(device, head_dim, 1, group, contexts)
    assert 0 < relative_error(found, expected) < 2e-3  # queries and weights are rounded to float16


@pytest.mark.parametrize("window", [3, 70])
def test_prefill_sees_its_window_only(device: Any, window: int) -> None:
    found, expected = attend(device, 16, 1, 1, [(100, 40)], window=window)
    assert relative_error(found, expected) < 2e-3


def test_prefill_over_a_float32_cache_is_exact(device: Any) -> None:
    found, expected = attend(device, 20, 1, 3, [(40, 11)], "f32")
    assert relative_error(found, expected) < 2e-6


def test_queries_that_float16_does_not_hold_are_cut(device: Any) -> None:
    if not SIMULATED:
        pytest.skip("the same arithmetic on a GPU")
    low = attention.attention_tiles._half_pair(np.array([1e6, -1e6], np.float32), 0, 0, 2)
    np.testing.assert_array_equal(np.array([low], np.uint32).view(np.float16), [65504, -65504])
