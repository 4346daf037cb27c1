"""Mixtures of experts on CUDA against the reference: every router, odd sizes, rows that share experts and do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simulator
from expert_zoo import expert_zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import MIXED, make_batch, random_tokens, relative_error, run_in_chunks, stored
from numpy.typing import NDArray
from random_predictors import make_predictor
from test_executor import BOUND, INTEGER_BOUND, check, executors, small, small_blocks

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cuda import expert_row, pair_groups, router
from svdengine.kernels.cuda.device import SimulatedDevice
from svdengine.kernels.cuda.executor import CudaExecutor
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.planned_device import needed_kernels
from svdengine.kernels.executor import Choice
from svdengine.kernels.formats import WeightFormat
from svdengine.kernels.predictor import Predictor
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.kernels.router import route
from svdengine.models import ModelConfig

__all__ = ["small_blocks"]  # a fixture


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if SIMULATED:
        for module in (expert_row, pair_groups):
            monkeypatch.setattr(module, "THREADS", 64 if module is pair_groups else 32)
        monkeypatch.setattr(router, "ROUTE_THREADS", 32)


def small_mixture(config: ModelConfig) -> ModelConfig:
    """The same kind of mixture with a few dozen weights a matrix: two layers where these differ."""
    two = config.dense_layers or config.sliding_window
    dense = tuple(i for i in config.dense_layers if i < 2)
    made = small(replace(config, dense_layers=(), dense_blocks=0, unrotated_layers=(), sliding_window_layers=()))
    return replace(
        made,
        layer_count=2 if two else 1,
        ffn_size=7,
        dense_layers=dense,
        dense_blocks=min(config.dense_blocks, 2) if dense else 0,
        unrotated_layers=tuple(i for i in config.unrotated_layers if i < 2),
        sliding_window_layers=(1,) if config.sliding_window else (),
        shared_blocks=min(config.shared_blocks, 2),
    )


gpu = [pytest.mark.gpu, pytest.mark.skipif(SIMULATED, reason="needs an NVIDIA GPU: too slow in the simulator")]
# Every router, what it reads, norms of all heads together, layers without experts, and FFNs that all tokens have.
QUICK = ("smallthinker", "qwen3_moe_dense", "relu_dense", "olmoe", "qwen2_moe", "shared")
ZOO = {name: small_mixture(config) if SIMULATED else config for name, config in expert_zoo().items()}
# One layer with experts, of each kind of activation; of the second enough neurons for tensor cores.
SILU, RELU = ZOO["mixtral"], replace(ZOO["mixtral_drelu"], expert_count=3, ffn_size=18)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else gpu) for n in ZOO])
def test_float32_agrees_with_the_reference(device: Any, name: str) -> None:
    check(device, ZOO[name], [2, 1])


@pytest.mark.parametrize(
    ("config", "weight_format"),
    [
        pytest.param(config, weight_format, id=f"{weight_format} {config.activation}")
        for config, weight_format in ((SILU, "f16"), (SILU, "q4"), (RELU, "q8"))
    ],
)
def test_formats_of_every_kind_agree_with_their_dequantised_weights(
    device: Any, config: ModelConfig, weight_format: WeightFormat
) -> None:
    check(device, config, [2, 1], INTEGER_BOUND, weight_format=weight_format)


def test_gates_and_ups_may_have_several_formats(device: Any) -> None:
    check(device, RELU, [2, 1], INTEGER_BOUND, weight_format="q4", others={**MIXED, "up": "f32"})


def test_a_block_that_more_rows_have_than_a_tile_holds(device: Any) -> None:
    config = replace(SILU, expert_count=1, active_experts=1, ffn_size=5)
    check(device, config, [9], INTEGER_BOUND, weight_format="q8")


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(router.ROUTERS),
    st.sampled_from([1, 5, 32, 33, 70]).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, min(n, 9)))),
    st.integers(0, 2),
    st.booleans(),
    st.integers(0, 99),
)
def test_blocks_are_chosen_as_the_reference_does(
    kind: Any, sizes: tuple[int, int], shared: int, gated: bool, seed: int
) -> None:
    if not SIMULATED:
        pytest.skip("the GPU chooses in the other tests")
    simulator.install()
    count, active = sizes
    config = replace(
        SILU, expert_count=count, active_experts=active, router=kind, expert_scale=1.3, shared_blocks=shared,
        shared_gate=gated and shared > 0,
    )  # fmt: skip
    per_row, stride = config.chosen_blocks, count + 3
    products = np.random.default_rng(seed).integers(-3, 4, (2, stride)).astype(np.float32)  # with ties
    expected = route(config, products[:, : config.router_rows])
    device = SimulatedDevice()
    chosen, order, places = (device.zeros(2 * per_row, np.int32) for _ in range(3))
    weights, groups = device.zeros(2 * per_row, np.float32), device.zeros(3 * per_row, np.int32)
    device.launch(
        router.choose_blocks, (2,), router.CHOOSE_THREADS, device.upload(products), chosen, weights, order, places,
        groups, count, active, per_row, stride, router.ROUTERS.index(kind), config.expert_scale,
        int(config.shared_gate),
    )  # fmt: skip
    np.testing.assert_array_equal(chosen.reshape(2, -1), expected[0])
    np.testing.assert_allclose(weights.reshape(2, -1), expected[1], rtol=1e-5)
    np.testing.assert_array_equal(groups.reshape(-1, 3)[:, 0], expected[0][0])


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_pairs_are_sorted_and_cut_into_tiles(n: int, blocks: int, per_row: int, width: int, seed: int) -> None:
    if not SIMULATED:
        pytest.skip("the GPU sorts in the other tests")
    simulator.install()
    per_row, random, device = min(per_row, blocks), np.random.default_rng(seed), SimulatedDevice()
    chosen = np.stack([np.sort(random.choice(blocks, per_row, replace=False)) for _ in range(n)]).astype(np.int32)
    pairs, widths = n * per_row, (width, 1)
    slots = [pair_groups.slots_of(pairs, blocks, one) for one in widths]
    order, places = device.zeros(pairs, np.int32), device.zeros(pairs, np.int32)
    starts, groups = device.zeros(blocks + 1, np.int32), device.upload(np.full(3 * sum(slots), 99, np.int32))
    device.launch(
        pair_groups.group_pairs, (blocks,), 64, device.upload(chosen), order, places, starts, groups,
        device.zeros(1, np.int32), pairs, widths[0], slots[0], widths[1], slots[1],
    )  # fmt: skip
    flat = chosen.reshape(-1)
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(places[order], np.arange(pairs))
    for first, count, one in ((0, slots[0], width), (slots[0], slots[1], 1)):
        tiles = [tuple(tile) for tile in groups.reshape(-1, 3)[first : first + count] if tile[1] < tile[2]]
        assert all(end - begin <= one and set(flat[order[begin:end]]) == {block} for block, begin, end in tiles)
        assert [begin for _, begin, _ in tiles] == [0, *(end for _, _, end in tiles)][:-1] and tiles[-1][2] == pairs


@contextmanager
def routed_by(device: Any, config: ModelConfig, products: NDArray) -> Iterator[tuple[CudaExecutor, ReferenceExecutor]]:
    """Executors of a model whose router has these rows."""
    arrays, formats, exact = stored(config, "f32")
    exact["router"] = products.astype(np.float32)
    arrays["router"] = np.zeros_like(arrays["router"])
    arrays["router"][..., : products.shape[-1]] = products
    setup = ExecutorSetup(config, arrays, formats, block_count=8, max_batch_rows=40, kv_dtype="f32")
    cuda = CudaExecutor(setup, device=device)
    try:
        yield cuda, ReferenceExecutor(config, exact, 8)
    finally:
        cuda.close()


@pytest.mark.parametrize("kind", ["all to the first", "never the last"])
def test_routers_of_few_experts(device: Any, kind: str) -> None:
    shape = len(SILU.expert_layers), SILU.expert_count, SILU.hidden_size
    rows = np.random.default_rng(3).standard_normal(shape)
    if kind == "all to the first":
        rows[:] = 0  # of equal products the first are chosen
    else:
        rows[:, : SILU.active_experts] = rows[:, :1]
        rows[:, -1] = rows[:, 0]  # one more than can be chosen of those that are equal
    tokens = random_tokens(SILU, 3)
    with routed_by(device, SILU, rows) as (cuda, reference):
        expected = run_in_chunks(reference, tokens, [3])
        assert relative_error(run_in_chunks(cuda, tokens, [2, 1]), expected) < BOUND
        inputs = cuda.ffn_inputs(make_batch([(tokens, 0)], [[0]]))
        assert relative_error(inputs, reference.ffn_inputs(make_batch([(tokens, 0)], [[0]]))) < BOUND
        assert cuda.kept_experts is not None and reference.kept_experts is not None
        np.testing.assert_array_equal(cuda.kept_experts, reference.kept_experts)
        assert not (cuda.kept_experts == SILU.expert_count - 1).any()


def test_what_is_not_a_number_is_seen_in_the_logits(device: Any) -> None:
    rows = np.ones((len(SILU.expert_layers), SILU.expert_count, SILU.hidden_size))
    rows[:, 1] = np.nan
    with routed_by(device, SILU, rows) as (cuda, _):
        for sizes in ([2], [1]):
            assert np.isnan(run_in_chunks(cuda, random_tokens(SILU, sum(sizes)), sizes)).any(1).all()


def test_prefill_and_decode_in_one_step_are_those_alone(device: Any) -> None:
    config = ZOO["smallthinker"]
    a, b = random_tokens(config, 2, seed=1), random_tokens(config, 2, seed=2)
    with executors(device, config) as (cuda, reference):
        expected = [run_in_chunks(reference, tokens, [len(tokens)]) for tokens in (a, b)]
        cuda.forward(make_batch([(a[:1], 0)], [[5]]))
        mixed = cuda.forward(make_batch([(a[1:], 1), (b, 0)], [[5], [2]]))
        assert relative_error(mixed, np.concatenate([expected[0][1:], expected[1]])) < BOUND


def test_recorded_steps_and_steps_ahead_route_anew(device: Any) -> None:
    """Greedy decoding: launched, recorded, replayed, and launched before it is asked for."""
    config = replace(SILU, expert_count=7)
    tables = [[0], [3]]
    with executors(device, config) as (cuda, reference):
        starts = [random_tokens(config, 3, seed=1), random_tokens(config, 2, seed=2)]
        batch = make_batch([(tokens, 0) for tokens in starts], tables)
        cuda.forward(batch)
        reference.forward(batch)
        tokens, positions = [1, 2], [3, 2]
        for _ in range(3):
            step = make_batch([([t], p) for t, p in zip(tokens, positions, strict=True)], tables)
            found, _ = cuda.forward_and_sample(step, [Choice(0.0)] * 2)
            expected = reference.forward(step).argmax(1)
            np.testing.assert_array_equal(found, expected)
            tokens, positions = list(map(int, found)), [p + 1 for p in positions]
        assert cuda._ahead is not None


def mixed_predictor(config: ModelConfig, threshold: float = -0.05) -> Predictor:
    """Experts with predictors of several ranks and bits, and some that calibration hardly reached."""
    made = [make_predictor(config, rank, bits, threshold).layers for rank, bits in ((4, 2), (7, 1), (0, 0))]
    return Predictor(tuple(made[i % 3][i] for i in range(config.ffn_blocks)), {"kind": "test"})


def test_a_predictor_of_each_expert_lists_its_neurons(device: Any) -> None:
    tokens = random_tokens(RELU, 3)
    with executors(device, RELU, predictor=mixed_predictor(RELU), ffn="sparse") as (cuda, reference):
        expected = run_in_chunks(reference, tokens, [2, 1])
        assert relative_error(run_in_chunks(cuda, tokens, [2, 1]), expected) < BOUND
        np.testing.assert_array_equal(cuda.layer_counts(), reference.layer_counts())
        assert 0 < cuda.neuron_counts().active < cuda.neuron_counts().predicted < cuda.neuron_counts().total


def test_predictors_without_factors_and_several_formats(device: Any) -> None:
    config = replace(ZOO["shared"], expert_count=2, active_experts=1, ffn_size=18)
    predictor = make_predictor(config, 0, 2, -0.05)
    tokens = random_tokens(config, 3)
    with executors(device, config, "q8", others={"up": "q4"}, predictor=predictor, ffn="sparse") as (cuda, reference):
        assert relative_error(run_in_chunks(cuda, tokens, [2, 1]), run_in_chunks(reference, tokens, [2, 1])) < 5e-4
        np.testing.assert_array_equal(cuda.layer_counts(), reference.layer_counts())


def test_skipping_exact_zeros_is_dense_but_for_rounding_and_computes_less(device: Any) -> None:
    config, tokens = ZOO["relu_dense"], random_tokens(ZOO["relu_dense"], 2)
    with executors(device, config, "q4") as (cuda, _):
        dense = run_in_chunks(cuda, tokens, [1, 1])
        cuda.ffn = "exact"
        assert relative_error(run_in_chunks(cuda, tokens, [1, 1]), dense) < INTEGER_BOUND
        counts = cuda.neuron_counts()
        assert counts.predicted == counts.total == len(tokens) * config.token_neurons
        assert 0.1 < counts.active / counts.total < 0.8


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_ffns_alone_sum_up(device: Any, mode: Any) -> None:
    config = replace(RELU, layer_count=2)
    x = np.random.default_rng(0).standard_normal((2, 2, config.hidden_size), np.float32)
    with executors(device, config, predictor=make_predictor(config, 0, 2, -0.05)) as (cuda, reference):
        cuda.ffn = reference.ffn = mode
        assert relative_error(cuda.run_ffns(x), reference.run_ffns(x)) < BOUND


def test_experts_that_do_not_fit_are_read_in_host_memory(device: Any) -> None:
    if not SIMULATED:
        pytest.skip("needs a device with little memory")
    config = replace(RELU, layer_count=2)
    arrays, formats, _ = stored(config, "f32")
    layer = sum(arrays[name].nbytes for name in ("gate", "up", "down_T")) // config.layer_count
    setup = ExecutorSetup(config, arrays, formats, block_count=8, max_batch_rows=8, kv_dtype="f32")
    whole = CudaExecutor(setup, device=SimulatedDevice())
    assert whole.memory.splits == () and not whole.memory.host
    unused = 1 << 20
    needed = whole.memory.device + (256 << 20) + unused
    found = CudaExecutor(setup, device=(one := SimulatedDevice(needed)), gpu_memory=needed - unused - layer)
    assert [split.hot for split in found.memory.splits] == [config.ffn_size, 0]
    assert one.pinned == found.memory.host == layer
    tokens = random_tokens(config, 3)
    np.testing.assert_array_equal(run_in_chunks(found, tokens, [2, 1]), run_in_chunks(whole, tokens, [2, 1]))


def test_what_a_mixture_launches_can_be_compiled_beforehand() -> None:
    arrays, formats, _ = stored(RELU, "q8")
    found = needed_kernels(RELU, arrays, formats, mixed_predictor(RELU))
    for name in (
        "route_f32", "choose_blocks", "group_pairs", "gather_rows", "activate_pairs", "add_pairs", "batch_q8_1_experts",
        "batch_q8_2_experts", "batch_sums_q8_2_experts", "gemv_transposed_q8_1_experts", "activated_q8_experts",
        "project_q8_experts", "predicted_q8_2_q8_experts", "gate_up_q8_experts", "down_q8_experts",
    ):  # fmt: skip
        assert name in found
    assert not {"activated_q8", "down_q8", "gate_up_q8", "predicted_q8_2_q8"} & found.keys()
