"""Deterministic steps: a row gets the same bits whatever rows are beside it, and with any number of threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import block_table, make_batch, random_tokens, stored, zoo
from numpy.typing import NDArray
from random_predictors import make_predictor

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.executor import FfnMode, KvDtype
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat

ZOO = zoo()
LENGTH, OTHERS, KNOWN = 40, 5, 20  # tokens of the sequence that is looked at; sequences beside it, and their tokens
# Every format, and 1, 3 and 9 query heads a KV head, windows, parallel layers, and both layouts of down.
DENSE = [("llama", name) for name in WEIGHT_FORMATS]
DENSE += [("llama_relu_biases", name) for name in WEIGHT_FORMATS]
DENSE += [
    ("mistral", "q4"),
    ("qwen3", "q8"),
    ("bamboo", "q6"),
    ("opt", "q4"),
    ("falcon_7b", "q4"),
    ("falcon_40b", "f16"),
    ("bitnet", "ternary"),
    ("gemma3", "q8"),
]
SPARSE = [("llama_relu_biases", name) for name in WEIGHT_FORMATS] + [("bamboo", "q4"), ("opt", "q8")]

Pieces = list[tuple[int, list[int], int]]  # rows of the sequence; rows of each one beside it; how many come before it


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    opened.clear()
    yield
    for executor in opened.values():
        executor.close()
    alone.cache_clear()


opened: dict[tuple[str, WeightFormat, int], CpuExecutor] = {}


def executor_of(name: str, weight_format: WeightFormat, threads: int) -> CpuExecutor:
    if (name, weight_format, threads) not in opened:
        config = ZOO[name]
        arrays, formats, _ = stored(config, weight_format)
        predictor = make_predictor(config, 16, 2, threshold=-0.1) if config.sparse_ffn else None
        setup = ExecutorSetup(
            config, arrays, formats, block_count=24, max_batch_rows=64, predictor=predictor, deterministic=True
        )
        opened[name, weight_format, threads] = CpuExecutor(setup, threads=threads)
    return opened[name, weight_format, threads]


@cache
def alone(name: str, weight_format: WeightFormat, ffn: FfnMode) -> NDArray[np.float32]:
    """Logits of every row by itself, with one thread."""
    executor = executor_of(name, weight_format, 1)
    executor.ffn = ffn
    tokens, table = random_tokens(ZOO[name], LENGTH), block_table(LENGTH)
    rows = [executor.forward(make_batch([([token], i)], [table])).copy() for i, token in enumerate(tokens)]
    return np.concatenate(rows)


def cut(sizes: Sequence[int]) -> list[int]:
    """As many of the sizes as the sequence has rows for, the last one shortened."""
    ends = np.minimum(np.cumsum(sizes), LENGTH)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


@st.composite
def schedules(draw: st.DrawFn) -> Pieces:
    """Ways to read the whole sequence, others beside it."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 30)), min_size=1, max_size=8))
    pieces: Pieces = []
    for size in cut([*sizes, LENGTH]):
        rows = draw(st.lists(st.integers(1, 9), max_size=min(OTHERS, (64 - size) // 9)))
        pieces.append((size, rows, draw(st.integers(0, len(rows)))))
    return pieces


def run(executor: CpuExecutor, tokens: list[int], pieces: Pieces) -> NDArray[np.float32]:
    """Logits of all rows of the sequence, read in these pieces in blocks that are not neighbours."""
    config = executor.config
    mine, rest = block_table(LENGTH, first=3, step=7), [b for b in range(24) if b % 7 != 3]
    others = [rest[2 * i : 2 * i + 2] for i in range(OTHERS)]
    for i, table in enumerate(others):
        executor.forward(make_batch([(random_tokens(config, KNOWN, seed=i + 1), 0)], [table]))
    out, start = [], 0
    for step, (size, rows, before) in enumerate(pieces):
        chunks = [(random_tokens(config, n, seed=100 * step + i), KNOWN) for i, n in enumerate(rows)]
        tables = others[: len(rows)]
        chunks.insert(before, (tokens[start : start + size], start))
        logits = executor.forward(make_batch(chunks, [*tables[:before], mine, *tables[before:]]))
        first = sum(rows[:before])
        out.append(logits[first : first + size].copy())
        start += size
    return np.concatenate(out)


def check(name: str, weight_format: WeightFormat, ffn: FfnMode, threads: int, pieces: Pieces) -> None:
    executor = executor_of(name, weight_format, threads)
    expected = alone(name, weight_format, ffn)
    executor.ffn = ffn
    found = run(executor, random_tokens(ZOO[name], LENGTH), pieces)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("name", "weight_format"), DENSE)
@settings(max_examples=8, deadline=None)
@given(pieces=schedules(), threads=st.sampled_from([1, 3]))
def test_a_row_is_what_it_is_alone(name: str, weight_format: WeightFormat, threads: int, pieces: Pieces) -> None:
    check(name, weight_format, "dense", threads, pieces)


@pytest.mark.parametrize(("name", "weight_format"), SPARSE)
@settings(max_examples=8, deadline=None)
@given(pieces=schedules(), threads=st.sampled_from([1, 3]))
def test_a_row_is_what_it_is_alone_where_neurons_are_predicted(
    name: str, weight_format: WeightFormat, threads: int, pieces: Pieces
) -> None:
    check(name, weight_format, "sparse", threads, pieces)
    assert not np.array_equal(alone(name, weight_format, "sparse"), alone(name, weight_format, "dense"))


@pytest.mark.parametrize(("name", "weight_format"), SPARSE)
def test_auto_is_exact_bit_for_bit_whether_it_skips_zeros_or_not(name: str, weight_format: WeightFormat) -> None:
    executor = executor_of(name, weight_format, 3)
    executor.ffn = "auto"
    assert executor.ffn_path(1) == "skip_zeros" and executor.ffn_path(2) == "dense"
    check(name, weight_format, "auto", 3, [(1, [], 0), (30, [2], 0), *[(1, [], 0)] * 9])
    np.testing.assert_array_equal(alone(name, weight_format, "auto"), alone(name, weight_format, "dense"))


@pytest.mark.parametrize("kv_dtype", ["f16", "q8"])
def test_a_context_of_several_runs_of_attention(kv_dtype: KvDtype) -> None:
    config = replace(ZOO["qwen2"], max_position=512)
    arrays, formats, _ = stored(config, "q8")
    setup = ExecutorSetup(
        config, arrays, formats, block_count=24, max_batch_rows=200, kv_dtype=kv_dtype, deterministic=True
    )
    executor = CpuExecutor(setup, threads=1)
    try:
        tokens, table = random_tokens(config, 330), block_table(330)
        together = [executor.forward(make_batch([(tokens[a:b], a)], [table])).copy() for a, b in ((0, 190), (190, 330))]
        for i, token in enumerate(tokens):
            found = executor.forward(make_batch([([token], i)], [table]))
            np.testing.assert_array_equal(found[0], together[i >= 190][i - 190 * (i >= 190)])
    finally:
        executor.close()


def test_other_steps_are_not() -> None:
    """What the option is for: without it the rows of a step change what each of them gets."""
    config = ZOO["llama_relu_biases"]
    arrays, formats, _ = stored(config, "q4")
    setup = ExecutorSetup(config, arrays, formats, block_count=24, max_batch_rows=64)
    executor = CpuExecutor(setup, threads=1)
    try:
        tokens = random_tokens(config, LENGTH)
        assert not np.array_equal(
            run(executor, tokens, [(LENGTH, [], 0)]), run(executor, tokens, [(1, [], 0)] * LENGTH)
        )
    finally:
        executor.close()
