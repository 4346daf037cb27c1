"""The conditional FFN on the CPU: exact on what it lists, and nothing else contributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, relative_error, run_in_chunks, stored, zoo
from numpy.typing import NDArray
from random_predictors import make_network, make_predictor

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.cpu.row_bounds import INTEGER_FORMATS
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.kernels.predictor import Predictor, scores
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models import ModelConfig

ZOO = {name: config for name, config in zoo().items() if config.sparse_ffn}
LENGTH = 21


@contextmanager
def executor(
    config: ModelConfig, weight_format: WeightFormat, predictor: Predictor | None, threads: int = 2
) -> Iterator[CpuExecutor]:
    arrays, formats, _ = stored(config, weight_format)
    setup = ExecutorSetup(
        config, arrays, formats, block_count=16, max_batch_rows=64, kv_dtype="f32", predictor=predictor
    )
    cpu = CpuExecutor(setup, threads=threads)
    try:
        yield cpu
    finally:
        cpu.close()


def decode(cpu: CpuExecutor, tokens: list[int], ffn: str) -> NDArray[np.float32]:
    cpu.ffn = ffn
    return run_in_chunks(cpu, tokens, [1] * len(tokens))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_with_every_neuron_listed_sparse_equals_dense_bit_for_bit(name: str, threads: int) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executor(ZOO[name], "q8", make_predictor(ZOO[name], 8, 2, threshold=-1e9), threads) as cpu:
        np.testing.assert_array_equal(decode(cpu, tokens, "sparse"), decode(cpu, tokens, "dense"))
        assert cpu.neuron_counts().predicted == cpu.neuron_counts().total > cpu.neuron_counts().active > 0
        cpu.predictor = make_network(ZOO[name], 150, threshold=-1e9)
        np.testing.assert_array_equal(decode(cpu, tokens, "sparse"), decode(cpu, tokens, "dense"))


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_with_every_neuron_listed_agrees_with_dense(weight_format: WeightFormat, threads: int) -> None:
    config = ZOO["llama_relu_biases"]
    x = np.random.default_rng(0).standard_normal((40, config.hidden_size), np.float32)
    with executor(config, weight_format, make_predictor(config, 8, 2, threshold=-1e9), threads) as cpu:
        cpu.ffn = "sparse"
        together = cpu.run_ffns(x).copy()
        cpu.ffn = "dense"
        # Where levels are summed in integers, the conditional path rounds hidden values to 16 bits.
        bound = 2e-4 if weight_format in INTEGER_FORMATS else 2e-5
        assert relative_error(together, cpu.run_ffns(x)) < bound


@pytest.mark.parametrize("name", ["llama_relu_tied", "opt", "bamboo", "bitnet"])
@pytest.mark.parametrize("predict", [True, False])
def test_what_a_row_gets_depends_neither_on_its_batch_nor_on_the_threads(name: str, predict: bool) -> None:
    config = ZOO[name]
    predictor = make_predictor(config, 16, 2, threshold=-0.1) if predict else None
    x = np.random.default_rng(0).standard_normal((40, config.hidden_size), np.float32)
    found = []
    for threads in (1, 3):
        with executor(config, "q8", predictor, threads) as cpu:
            cpu.ffn = "sparse"
            found.append(cpu.run_ffns(x).copy())
            np.testing.assert_array_equal(cpu.run_ffns(x[30:]), found[-1][30:])
            np.testing.assert_array_equal(cpu.run_ffns(x[38:]), found[-1][38:])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_every_format_equals_dense_bit_for_bit(weight_format: WeightFormat) -> None:
    config = ZOO["llama_relu_biases"]
    tokens = random_tokens(config, LENGTH)
    with executor(config, weight_format, make_predictor(config, 8, 1, threshold=-1e9)) as cpu:
        np.testing.assert_array_equal(decode(cpu, tokens, "sparse"), decode(cpu, tokens, "dense"))


@pytest.mark.parametrize("name", ["llama_relu_tied", "opt", "arcee", "nemotron", "jais2", "bitnet"])
def test_without_a_predictor_only_exact_zeros_are_skipped(name: str) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executor(ZOO[name], "q8", None) as cpu:
        np.testing.assert_array_equal(decode(cpu, tokens, "auto"), decode(cpu, tokens, "dense"))
        counts = cpu.neuron_counts()
        assert counts.predicted == counts.total and 0.2 < counts.active / counts.total < 0.8


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_exact_decode_has_the_bits_of_dense_and_computes_less(name: str, weight_format: WeightFormat) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executor(ZOO[name], weight_format, make_predictor(ZOO[name], 8, 2, threshold=1e9)) as cpu:
        np.testing.assert_array_equal(decode(cpu, tokens, "exact"), decode(cpu, tokens, "dense"))
        counts = cpu.neuron_counts()
        assert counts.predicted == counts.total > counts.active > 0


@pytest.mark.parametrize("name", ["llama_relu_biases", "opt"])
def test_with_no_neuron_listed_the_ffn_is_its_bias(name: str) -> None:
    config = ZOO[name]
    arrays, formats, _ = stored(config, "f32")
    arrays["down_T"] = np.zeros_like(arrays["down_T"])
    tokens = random_tokens(config, LENGTH)
    with executor(config, "f32", make_predictor(config, 8, 0, threshold=1e9)) as cpu:
        listed = decode(cpu, tokens, "sparse")
        assert cpu.neuron_counts().predicted == 0
    setup = ExecutorSetup(config, arrays, formats, block_count=16, max_batch_rows=64, kv_dtype="f32")
    empty = CpuExecutor(setup, threads=2)
    np.testing.assert_array_equal(listed, decode(empty, tokens, "dense"))
    empty.close()


@pytest.mark.parametrize(
    ("rank", "bits", "factors"), [(0, 1, "q8"), (0, 2, "q8"), (8, 0, "q8"), (70, 0, "q4"), (8, 2, "q8"), (40, 1, "q4")]
)
def test_lists_are_those_of_the_definition(rank: int, bits: int, factors: WeightFormat) -> None:
    config = replace(ZOO["llama_relu_tied"], layer_count=1)
    check_lists(config, make_predictor(config, rank, bits, 0.0, factors))


@pytest.mark.parametrize(("rank", "bits", "factors"), [(8, 0, "q8"), (70, 2, "q8"), (150, 0, "q8"), (150, 0, "q4")])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_lists_of_a_hidden_layer_are_those_of_the_definition(
    rank: int, bits: int, factors: WeightFormat, threads: int
) -> None:
    config = replace(ZOO["llama_relu_tied"], layer_count=1)
    check_lists(config, make_network(config, rank, 0.0, bits, factors), threads)


def check_lists(config: ModelConfig, predictor: Predictor, threads: int = 2) -> None:
    """Compare how many neurons are listed with the scores of the definition, in prefill and, token by token, decode."""
    tokens = random_tokens(config, LENGTH)
    with executor(config, "q8", predictor, threads) as cpu:
        x = cpu.ffn_inputs(make_batch([(tokens, 0)], [block_table(LENGTH)]))
        assert x.shape == (1, LENGTH, config.hidden_size)
        for bias in (0.0, 0.7, -0.4):
            expected = scores(predictor.layers[0], x[0], bias) > 0
            cpu.reset_neuron_counts()
            cpu.ffn = "sparse"
            batch = make_batch([(tokens, 0)], [block_table(LENGTH)])
            cpu.forward(replace(batch, sparsity_bias=np.full(1, bias, np.float32)))
            # A score that is zero but for rounding may fall on either side.
            assert abs(cpu.neuron_counts().predicted - expected.sum()) <= 3
            assert cpu.neuron_counts().total == LENGTH * config.ffn_size
        for bias in (0.0, 0.7, -0.4, 1e30):
            together = scores(predictor.layers[0], x[0], bias) > 0
            cpu.reset_neuron_counts()
            for position, token in enumerate(tokens):
                batch = make_batch([([token], position)], [block_table(LENGTH)])
                cpu.forward(replace(batch, sparsity_bias=np.full(1, bias, np.float32)))
            assert abs(cpu.neuron_counts().predicted - together.sum()) <= 3


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, LENGTH])
def test_neurons_are_counted_by_layer_as_the_reference_does(rows: int, threads: int) -> None:
    config = ZOO["llama_relu_tied"]
    predictor = make_predictor(config, 8, 0, 0.0)
    tokens = random_tokens(config, LENGTH)
    chunks = [rows] * (LENGTH // rows)
    _arrays, _, weights = stored(config, "f32")
    reference = ReferenceExecutor(config, weights, 16, 64, predictor=predictor, ffn="sparse")
    run_in_chunks(reference, tokens, chunks)
    expected = reference.layer_counts()
    assert expected.shape == (config.layer_count, 3) and len(set(map(tuple, expected))) > 1
    with executor(config, "f32", predictor, threads) as cpu:
        cpu.ffn = "sparse"
        run_in_chunks(cpu, tokens, chunks)
        counted = cpu.layer_counts()
        assert np.abs(counted - expected).max() <= 3 and np.array_equal(counted[:, 2], expected[:, 2])
        assert cpu.neuron_counts().predicted == counted[:, 0].sum()
        _ = cpu.ffn_times
        assert np.array_equal(cpu.layer_counts(), counted)
        cpu.reset_neuron_counts()
        assert not cpu.layer_counts().any()


def test_a_rank_for_which_there_is_no_room_is_refused() -> None:
    config = ZOO["llama_relu_tied"]
    with (
        executor(config, "q8", None) as cpu,
        pytest.raises(ValueError, match=r"layer 0 of the predictor has rank 151, which must lie in 0\.\.150"),
    ):
        cpu.predictor = make_network(config, 151, 0.0)


def test_rows_of_a_batch_equal_rows_alone() -> None:
    config = ZOO["llama_relu_tied"]
    predictor = make_predictor(config, 16, 2, threshold=-0.1)
    tokens = random_tokens(config, LENGTH)
    with executor(config, "f32", predictor) as cpu:
        alone = decode(cpu, tokens, "sparse")
        together = run_in_chunks(cpu, tokens, [LENGTH])
        assert relative_error(together, alone) < 2e-5


@pytest.mark.parametrize("weight_format", ["q8", "q4", "f16"])
def test_many_rows_of_a_wide_model_are_summed_as_one_is(weight_format: WeightFormat) -> None:
    """One thread has so many columns that rows of down are summed for any number of rows of a step."""
    config = replace(ZOO["llama_relu_tied"], hidden_size=1056, layer_count=1, head_dim=16)
    tokens = random_tokens(config, 40)
    with executor(config, weight_format, None, threads=1) as cpu:
        alone = decode(cpu, tokens, "dense")
        assert relative_error(run_in_chunks(cpu, tokens, [40]), alone) < 1e-3


def test_the_sparsity_bias_of_one_request_leaves_the_others_alone() -> None:
    config = ZOO["llama_relu_tied"]
    predictor = make_predictor(config, 16, 2, threshold=-0.1)
    a, b = random_tokens(config, 9, seed=1), random_tokens(config, 9, seed=2)
    with executor(config, "f32", predictor) as cpu:
        cpu.ffn = "sparse"
        batch = make_batch([(a, 0), (b, 0)], [[0], [1]])
        plain = cpu.forward(batch).copy()
        shifted = cpu.forward(replace(batch, sparsity_bias=np.array([0, 1], np.float32))).copy()
        np.testing.assert_array_equal(shifted[:9], plain[:9])
        assert np.abs(shifted[9:] - plain[9:]).max() > 0


def test_a_predictor_for_another_shape_is_refused() -> None:
    config = ZOO["llama_relu_tied"]
    other = make_predictor(replace(config, ffn_size=140), 8, 0, 0.0)
    with pytest.raises(ValueError, match="150 neurons"), executor(config, "q8", other):
        pass
