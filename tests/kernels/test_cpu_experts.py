"""Mixtures of experts on the CPU against the reference: every router, odd sizes, rows that share experts and do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expert_zoo import expert_zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import make_batch, random_tokens, relative_error, run_in_chunks, stored
from numpy.typing import NDArray
from random_predictors import make_predictor

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.cpu.matrix import MIN_BYTES, ROW_BYTES, ROW_PART_BYTES, ROWS, SCALE_BYTES, matrix_fields
from svdengine.kernels.formats import WeightFormat
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.kernels.router import route
from svdengine.models import ModelConfig

ZOO = expert_zoo()
SPARSE = [name for name, config in ZOO.items() if config.sparse_ffn]
LENGTH = 37


@contextmanager
def executors(
    config: ModelConfig,
    weight_format: WeightFormat = "f32",
    threads: int = 2,
    router: NDArray | None = None,
    **setup: Any,
) -> Iterator[tuple[CpuExecutor, ReferenceExecutor]]:
    arrays, formats, exact = stored(config, weight_format)
    if router is not None:
        arrays["router"], exact["router"] = np.zeros_like(arrays["router"]), router
        arrays["router"][..., : router.shape[-1]] = router
    made = {"block_count": 16, "max_batch_rows": 64, "kv_dtype": "f32"} | setup
    cpu = CpuExecutor(ExecutorSetup(config, arrays, formats, **made), threads=threads)
    try:
        yield cpu, ReferenceExecutor(config, exact, block_count=16, predictor=setup.get("predictor"))
    finally:
        cpu.close()


@pytest.mark.parametrize("name", ZOO)
def test_float32_agrees_with_the_reference(name: str) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executors(ZOO[name]) as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        assert relative_error(run_in_chunks(cpu, tokens, [LENGTH]), expected) < 5e-5
        assert relative_error(run_in_chunks(cpu, tokens, [1] * LENGTH), expected) < 5e-5
        assert relative_error(run_in_chunks(cpu, tokens, [3, 1, 17, 2, 9, 5]), expected) < 5e-5


@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "relu_dense"])
@pytest.mark.parametrize("weight_format", ["f16", "q8", "q6", "q4"])
def test_every_format_agrees_with_its_dequantised_weights(name: str, weight_format: WeightFormat) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executors(ZOO[name], weight_format) as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        for sizes in ([LENGTH], [1] * LENGTH, [6, 5, 4, 3, 2, 6, 5, 4, 2]):
            assert relative_error(run_in_chunks(cpu, tokens, sizes), expected) < 5e-3


@pytest.mark.parametrize("name", ["mixtral", "smallthinker"])
def test_the_number_of_threads_changes_nothing_but_rounding(name: str) -> None:
    tokens, results = random_tokens(ZOO[name], LENGTH), []
    for threads in (1, 3, 5):
        with executors(ZOO[name], threads=threads) as (cpu, _):
            results.append(run_in_chunks(cpu, tokens, [20, *[1] * 17]))
    assert all(relative_error(result, results[0]) < 2e-5 for result in results[1:])


@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "relu_dense"])
@pytest.mark.parametrize("weight_format", ["f32", "q8"])
def test_deterministic_rows_have_the_same_bits_in_any_company(name: str, weight_format: WeightFormat) -> None:
    tokens, found = random_tokens(ZOO[name], LENGTH), []
    for threads in (1, 3):
        with executors(ZOO[name], weight_format, threads, deterministic=True) as (cpu, _):
            found += [run_in_chunks(cpu, tokens, sizes) for sizes in ([LENGTH], [1] * LENGTH, [3, 1, 17, 2, 9, 5])]
    for one in found[1:]:
        np.testing.assert_array_equal(one, found[0])


def router_for(config: ModelConfig, kind: str) -> NDArray[np.float32]:
    """Routers that choose few: every token the same experts, or one expert never."""
    rng = np.random.default_rng(3)
    router = rng.standard_normal((len(config.expert_layers), config.expert_count, config.hidden_size), np.float32)
    if kind == "all to the first":
        router[:] = 0  # of equal products the first are chosen
    elif kind == "never the last":
        router[:, : config.active_experts] = router[:, :1]
        router[:, -1] = router[:, 0]  # one more than can be chosen of those that are equal
    return router


@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "qwen3_moe"])
@pytest.mark.parametrize("kind", ["all to the first", "never the last", "random"])
def test_routers_of_few_experts(name: str, kind: str) -> None:
    config = ZOO[name]
    tokens = random_tokens(config, LENGTH)
    with executors(config, router=router_for(config, kind)) as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        for sizes in ([LENGTH], [1] * LENGTH, [1, 30, 6]):
            assert relative_error(run_in_chunks(cpu, tokens, sizes), expected) < 5e-5


@pytest.mark.parametrize("name", ["mixtral", "smallthinker"])
def test_prefill_and_decode_in_one_step(name: str) -> None:
    config = ZOO[name]
    a, b, c = (random_tokens(config, n, seed=n) for n in (21, 9, 30))
    tables = [[0, 5], [3], [9, 2]]
    with executors(config) as (cpu, reference):
        alone = [
            reference.forward(make_batch([(t, 0)], [table])).copy() for t, table in zip((a, b, c), tables, strict=True)
        ]
        cpu.forward(make_batch([(a[:20], 0), (c[:10], 0)], [tables[0], tables[2]]))
        mixed = cpu.forward(make_batch([(a[20:], 20), (b, 0), (c[10:], 10)], tables))
        assert relative_error(mixed, np.concatenate([alone[0][20:], alone[1], alone[2][10:]])) < 5e-5


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=st.integers(0, 5))
def test_any_way_to_cut_a_prompt_gives_the_same(cuts: list[int], seed: int) -> None:
    config = ZOO["smallthinker"]
    tokens = random_tokens(config, sum(cuts), seed)
    with executors(config) as (cpu, reference):
        assert relative_error(run_in_chunks(cpu, tokens, cuts), run_in_chunks(reference, tokens, [len(tokens)])) < 5e-5


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("weight_format", ["f32", "q8", "q4"])
def test_skipping_exact_zeros_has_the_bits_of_dense_and_computes_less(name: str, weight_format: WeightFormat) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executors(ZOO[name], weight_format) as (cpu, _):
        found = {}
        for ffn in ("dense", "exact"):
            cpu.ffn = ffn
            found[ffn] = run_in_chunks(cpu, tokens, [1] * LENGTH)
        np.testing.assert_array_equal(found["exact"], found["dense"])
        counts = cpu.neuron_counts()
        assert counts.predicted == counts.total == LENGTH * ZOO[name].token_neurons
        assert 0.1 < counts.active / counts.total < 0.8


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("sizes", [[LENGTH], [1] * LENGTH, [3, 1, 17, 2, 9, 5]])
def test_a_predictor_of_each_expert_lists_its_neurons(name: str, sizes: list[int]) -> None:
    config = ZOO[name]
    predictor = make_predictor(config, 8, 2, threshold=-0.1)
    tokens = random_tokens(config, LENGTH)
    with executors(config, predictor=predictor) as (cpu, reference):
        cpu.ffn = reference.ffn = "sparse"
        ours, theirs = run_in_chunks(cpu, tokens, sizes), run_in_chunks(reference, tokens, sizes)
        errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
        # A score that is zero but for rounding may fall on either side.
        assert min(errors) < 1e-6 and np.median(errors) < 1e-3 and max(errors) < 0.1
        found, expected = cpu.neuron_counts(), reference.neuron_counts()
        assert found.total == expected.total == LENGTH * config.token_neurons
        assert abs(found.predicted - expected.predicted) < 0.01 * expected.total
        assert 0 < found.active < found.predicted < found.total


@pytest.mark.parametrize("name", SPARSE)
def test_with_every_neuron_listed_sparse_equals_dense_bit_for_bit(name: str) -> None:
    config = ZOO[name]
    predictor = make_predictor(config, 8, 2, threshold=-1e9)
    tokens, found = random_tokens(config, LENGTH), []
    with executors(config, "q8", predictor=predictor) as (cpu, _):
        for cpu.ffn in ("dense", "sparse"):
            found.append(run_in_chunks(cpu, tokens, [1] * LENGTH))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["mixtral_drelu", "smallthinker"])
def test_ffns_alone_are_those_of_the_reference(name: str) -> None:
    config = ZOO[name]
    x = np.random.default_rng(0).standard_normal((40, config.hidden_size), np.float32)
    with executors(config) as (cpu, reference):
        for rows in (x, x[:1], x[:3]):
            assert relative_error(cpu.run_ffns(rows), reference.run_ffns(rows)) < 5e-5


@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "qwen3_moe"])
def test_a_router_of_numbers_that_are_none_is_seen_in_the_logits(name: str) -> None:
    config = ZOO[name]
    router = router_for(config, "random")
    router[:, 1] = np.nan
    tokens = random_tokens(config, 8)
    with executors(config, router=router) as (cpu, _):
        for sizes in ([8], [1] * 8):
            assert np.isnan(run_in_chunks(cpu, tokens, sizes)).any(1).all()


def test_a_predictor_of_layers_and_not_of_experts_is_refused() -> None:
    config = ZOO["smallthinker"]
    predictor = make_predictor(replace(config, expert_count=0), 8, 2, threshold=0.0)
    with pytest.raises(ValueError, match="a predictor of 3 layers for a model of 21"), executors(config) as (cpu, _):
        cpu.predictor = predictor


@given(
    st.sampled_from(["softmax", "topk_softmax", "sigmoid"]),
    st.integers(1, 9).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))),
    st.integers(0, 1000),
)
def test_what_routers_promise(router: Any, sizes: tuple[int, int], seed: int) -> None:
    count, active = sizes
    config = replace(ZOO["mixtral"], expert_count=count, active_experts=active, router=router)
    products = np.random.default_rng(seed).integers(-3, 4, (5, count)).astype(np.float32)  # with ties
    chosen, weights = route(config, products)
    assert (np.diff(chosen, axis=1) > 0).all() and (weights > 0).all()
    left = np.delete(np.arange(count), chosen[0])
    assert all(products[0, chosen[0]].min() >= products[0, other] for other in left)
    total = weights.sum(1)
    if router == "softmax":
        assert (total <= 1 + 1e-6).all() and (active < count or np.allclose(total, 1))
    else:
        assert np.allclose(total, 1)


@pytest.mark.parametrize("name", ["mixtral", "smallthinker", "relu_dense"])
def test_every_choice_of_an_expert_is_counted(name: str) -> None:
    config, tokens = ZOO[name], random_tokens(ZOO[name], LENGTH)
    with executors(config, threads=3) as (cpu, _):
        cpu.ffn_inputs(make_batch([(tokens, 0)], [[0, 1, 2]]))
        expected = np.zeros(config.ffn_blocks, np.int64)
        assert cpu.kept_experts is not None
        for layer in config.expert_layers:
            np.add.at(expected, config.blocks_of(layer).start + cpu.kept_experts[layer].reshape(-1), 1)
        np.testing.assert_array_equal(cpu.block_rows(), expected)
        run_in_chunks(cpu, tokens, [1] * LENGTH)
        np.testing.assert_array_equal(cpu.block_rows(), 2 * expected)
        cpu.reset_neuron_counts()
        np.testing.assert_array_equal(cpu.block_rows(), 2 * expected)


def test_a_block_is_read_where_it_was_put() -> None:
    config, tokens = ZOO["mixtral"], random_tokens(ZOO["mixtral"], LENGTH)
    arrays, formats, _ = stored(config, "q4")
    parts = [name for name in arrays if name.split(".")[0] in ("gate", "up", "down", "down_T")]
    cpu = CpuExecutor(ExecutorSetup(config, arrays, formats, block_count=16, max_batch_rows=64), threads=2)
    try:
        before = run_in_chunks(cpu, tokens, [20, *[1] * 17])
        copies = [{name: arrays[name][block].copy() for name in parts} for block in range(config.ffn_blocks)]
        for block, copy in enumerate(copies):
            cpu.place_block(block, copy)
        np.testing.assert_array_equal(run_in_chunks(cpu, tokens, [20, *[1] * 17]), before)
        for name in parts:
            copies[1][name][...] = 0
        assert np.any(run_in_chunks(cpu, tokens, [20, *[1] * 17]) != before)
        cpu.place_block(1, {name: arrays[name][1] for name in parts})
        np.testing.assert_array_equal(run_in_chunks(cpu, tokens, [20, *[1] * 17]), before)
    finally:
        cpu.close()


@pytest.mark.parametrize("weight_format", ["f16", "q8", "q6", "q4"])
def test_all_bytes_of_an_expert_can_be_asked_for(weight_format: WeightFormat) -> None:
    """Sizes of its parts, beside their addresses: with rows alone, pages of scales would be waited for one by one."""
    config = ZOO["mixtral"]
    arrays, formats, _ = stored(config, weight_format)
    parts = {name[len("up") :]: array for name, array in arrays.items() if name.split(".")[0] == "up"}
    fields = matrix_fields(parts, formats["up"], config.ffn_size, config.hidden_size, config.ffn_blocks)
    sizes = fields[:, ROWS] * fields[:, ROW_BYTES] + fields[:, [SCALE_BYTES, MIN_BYTES, ROW_PART_BYTES]].sum(1)
    assert set(sizes) == {sum(array[0].nbytes for array in parts.values())}
