"""The CPU executor against the reference: every family, weight format, thread count and way to cut a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from model_zoo import MIXED, block_table, make_batch, random_tokens, relative_error, run_in_chunks, stored, zoo
from numpy.typing import NDArray

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.executor import KvDtype
from svdengine.kernels.formats import FORMATS, WEIGHT_FORMATS, WeightFormat
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models import ModelConfig
from svdengine.models.config import Rope

ZOO = zoo()
LENGTH = 37


@contextmanager
def executors(
    config: ModelConfig,
    weight_format: WeightFormat,
    threads: int = 2,
    kv_dtype: KvDtype = "f32",
    others: Mapping[str, WeightFormat] | None = None,
) -> Iterator[tuple[CpuExecutor, ReferenceExecutor]]:
    arrays, formats, exact = stored(config, weight_format, others=others)
    setup = ExecutorSetup(config, arrays, formats, block_count=16, max_batch_rows=64, kv_dtype=kv_dtype)
    cpu = CpuExecutor(setup, threads=threads)
    try:
        yield cpu, ReferenceExecutor(config, exact, block_count=16, kv_dtype=kv_dtype)
    finally:
        cpu.close()


def kl_divergence(expected: NDArray, found: NDArray) -> float:
    """Mean KL divergence in nats of the next-token distributions."""

    def log_softmax(x: NDArray) -> NDArray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ZOO)
def test_float32_agrees_with_the_reference(name: str) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executors(ZOO[name], "f32") as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        assert relative_error(run_in_chunks(cpu, tokens, [LENGTH]), expected) < 2e-5
        assert relative_error(run_in_chunks(cpu, tokens, [1] * LENGTH), expected) < 2e-5
        assert relative_error(run_in_chunks(cpu, tokens, [3, 1, 17, 2, 9, 5]), expected) < 2e-5


@pytest.mark.parametrize("name", ["llama", "llama_relu_biases", "falcon_7b_relu", "opt", "bitnet"])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_every_format_agrees_with_its_dequantised_weights(name: str, weight_format: WeightFormat) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    bound = {32: 1e-9, 16: 1e-6}[FORMATS[weight_format].activation_bits]
    if weight_format == "ternary" or name == "bitnet":
        bound *= 5  # random weights of one size make large logits, and squares make errors twice as large
    with executors(ZOO[name], weight_format) as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        for sizes in ([LENGTH], [1] * LENGTH, [6, 5, 4, 3, 2, 6, 5, 4, 2]):
            assert kl_divergence(expected, run_in_chunks(cpu, tokens, sizes)) < bound


@pytest.mark.parametrize("name", ["llama", "llama_relu_biases"])
def test_matrices_that_read_the_same_may_have_several_formats(name: str) -> None:
    tokens = random_tokens(ZOO[name], LENGTH)
    with executors(ZOO[name], "q4", others=MIXED) as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        for sizes in ([LENGTH], [1] * LENGTH, [6, 5, 4, 3, 2, 6, 5, 4, 2]):
            assert kl_divergence(expected, run_in_chunks(cpu, tokens, sizes)) < 1e-6


@pytest.mark.parametrize("weight_format", ["f32", "q8"])
def test_the_number_of_threads_changes_nothing_but_rounding(weight_format: WeightFormat) -> None:
    tokens = random_tokens(ZOO["llama"], LENGTH)
    results = []
    for threads in (1, 2, 5):
        with executors(ZOO["llama"], weight_format, threads) as (cpu, _):
            results.append(run_in_chunks(cpu, tokens, [20, *[1] * 17]))
    for result in results[1:]:
        # A sum in another order may round an activation to the next of its 65,025 levels.
        assert relative_error(result, results[0]) < (2e-4 if weight_format == "q8" else 1e-5)


@pytest.mark.parametrize("name", ["llama_relu_tied", "opt"])
def test_more_threads_than_columns_of_down_to_share(name: str) -> None:
    """Columns of a neuron-major down are shared out by 64; a thread without any must not touch those of others."""
    tokens = random_tokens(ZOO[name], LENGTH)
    results = []
    for threads in (1, 3, 7):
        with executors(ZOO[name], "f32", threads) as (cpu, _):
            results.append(run_in_chunks(cpu, tokens, [2, 3, 4, 5, 6, 6, 5, 4, 2]))
    for result in results[1:]:
        assert relative_error(result, results[0]) < 1e-5


def test_half_precision_cache_stays_close() -> None:
    tokens = random_tokens(ZOO["llama"], LENGTH)
    with executors(ZOO["llama"], "f32", kv_dtype="f16") as (cpu, reference):
        error = relative_error(run_in_chunks(cpu, tokens, [20, *[1] * 17]), run_in_chunks(reference, tokens, [LENGTH]))
    assert 0 < error < 2e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "opt", "falcon_7b", "gemma3", "bamboo"])
def test_eight_bit_cache_agrees_with_the_reference(name: str) -> None:
    """Where the last bits of a key differ it may be rounded to another level, so that bounds are those of levels."""
    config = ZOO[name]
    tokens = random_tokens(config, LENGTH)
    with executors(config, "f32", kv_dtype="q8") as (cpu, reference):
        expected = run_in_chunks(reference, tokens, [LENGTH])
        assert relative_error(run_in_chunks(reference, tokens, [3, 1, 17, 2, 9, 5]), expected) < 2e-3
        for sizes in ([LENGTH], [1] * LENGTH, [3, 1, 17, 2, 9, 5]):
            assert relative_error(run_in_chunks(cpu, tokens, sizes), expected) < 2e-3
        blocks = block_table(LENGTH, first=1, step=2)
        ours, theirs = cpu.read_blocks(blocks), reference.read_blocks(blocks)
        levels, expected_levels = (x[..., 2:].view(np.int8)[:2].astype(int) for x in (ours, theirs))
        assert np.abs(levels - expected_levels).max() <= 1 and (levels != expected_levels).mean() < 0.01
    with executors(config, "f32") as (cpu, _):
        assert 1e-4 < relative_error(run_in_chunks(cpu, tokens, [LENGTH]), expected) < 0.1  # they were rounded


def test_biased_keys_keep_their_levels() -> None:
    """Qwen2's: biases far larger than what differs from token to token, in dimensions that hardly turn."""
    config = replace(ZOO["qwen2"], head_dim=16, rope=Rope(1e6))
    arrays, formats, exact = stored(config, "f32")
    arrays["k.bias"] = exact["k.bias"] = np.tile(np.float32(100) * (np.arange(16) % 8 > 5), (2, 3)).astype(np.float32)
    tokens = random_tokens(config, LENGTH)
    dense = run_in_chunks(ReferenceExecutor(config, exact, block_count=16), tokens, [LENGTH])
    rounded = ReferenceExecutor(config, exact, block_count=16, kv_dtype="q8")
    cpu = CpuExecutor(ExecutorSetup(config, arrays, formats, 16, max_batch_rows=64, kv_dtype="q8"), threads=2)
    for executor in (rounded, cpu):
        assert relative_error(run_in_chunks(executor, tokens, [LENGTH]), dense) < 0.02
    cpu.close()


def test_blocks_in_eight_bits_move_between_executors() -> None:
    config = ZOO["qwen2"]
    tokens = random_tokens(config, LENGTH)
    table = block_table(LENGTH)
    with executors(config, "f32", kv_dtype="q8") as (cpu, reference):
        for first, second in ((cpu, reference), (reference, cpu)):
            first.forward(make_batch([(tokens[:-1], 0)], [table]))
            expected = first.forward(make_batch([(tokens[-1:], LENGTH - 1)], [table])).copy()
            data = first.read_blocks(table)
            moved = [b + 7 for b in table]
            second.write_blocks(moved, data)
            assert (second.read_blocks(moved)[:2] == data[:2]).all()
            found = second.forward(make_batch([(tokens[-1:], LENGTH - 1)], [moved]))
            assert relative_error(found, expected) < 2e-3
        with pytest.raises(ValueError, match="expected uint8"):
            cpu.write_blocks(table, np.zeros((3, 2, 2, 16, 3, 10), np.float16))


def test_sequences_in_one_batch_do_not_see_each_other() -> None:
    config = ZOO["mistral"]
    a, b, c = (random_tokens(config, n, seed=n) for n in (21, 9, 30))
    tables = [[0, 5], [3], [9, 2]]
    with executors(config, "f32") as (cpu, reference):
        alone = [
            reference.forward(make_batch([(t, 0)], [table])).copy() for t, table in zip((a, b, c), tables, strict=True)
        ]
        cpu.forward(make_batch([(a[:20], 0), (c[:10], 0)], [tables[0], tables[2]]))
        mixed = cpu.forward(make_batch([(a[20:], 20), (b, 0), (c[10:], 10)], tables))
        assert relative_error(mixed, np.concatenate([alone[0][20:], alone[1], alone[2][10:]])) < 2e-5


def test_only_wanted_rows_have_logits() -> None:
    config = ZOO["llama"]
    tokens = random_tokens(config, 12)
    with executors(config, "q8") as (cpu, _):
        batch = make_batch([(tokens, 0)], [[0]])
        every = cpu.forward(batch).copy()
        for wanted in ([11], [3, 7, 8], []):
            some = type(batch)(**{**vars(batch), "logit_rows": np.array(wanted, np.int32)})
            np.testing.assert_allclose(cpu.forward(some), every[wanted], rtol=1e-4, atol=1e-5)


def test_stale_cache_and_activations_do_not_leak_into_a_new_sequence() -> None:
    config = ZOO["llama_relu_biases"]
    tokens = random_tokens(config, 20)
    with executors(config, "q8") as (cpu, _):
        fresh = cpu.forward(make_batch([(tokens, 0)], [[0, 1]])).copy()
        cpu.forward(make_batch([(random_tokens(config, 60, seed=5), 0)], [[3, 1, 0, 2]]))
        np.testing.assert_array_equal(cpu.forward(make_batch([(tokens, 0)], [[0, 1]])), fresh)


def test_a_batch_that_breaks_the_rules_is_refused() -> None:
    config = ZOO["llama"]
    with executors(config, "f32") as (cpu, _):
        good = vars(make_batch([([1, 2], 0)], [[0]]))
        for field, value in (
            ("tokens", [1, config.vocab_size]),
            ("tokens", [-1, 0]),
            ("positions", [0, 16]),
            ("sequences", [0, 1]),
            ("block_tables", [[16]]),
            ("logit_rows", [2]),
            ("tokens", [1]),
        ):
            broken = {**good, field: np.array(value, np.int32)}
            with pytest.raises(ValueError):
                cpu.forward(type(make_batch([([1], 0)], [[0]]))(**broken))


@pytest.mark.parametrize("n", [1, 4, 40])
def test_what_fills_up_the_residual_stream_stays_zero(n: int) -> None:
    """Norms sum over it. In q4 a stored 0 need not be exactly 0, and down_T is padded along its outputs."""
    config = ZOO["llama_relu_biases"]
    with executors(config, "q4") as (cpu, _):
        cpu.forward(make_batch([(random_tokens(config, n), 0)], [block_table(n)]))
        assert not cpu._residual[:n, config.hidden_size :].any()


def test_a_closed_executor_says_so() -> None:
    with executors(ZOO["llama"], "f32") as (cpu, _):
        cpu.close()
        cpu.close()
        for use in (lambda: cpu.forward(make_batch([([1], 0)], [[0]])), lambda: cpu.read_blocks([0])):
            with pytest.raises(ValueError, match="closed"):
                use()


def test_a_matrix_of_the_wrong_shape_never_reaches_compiled_code() -> None:
    config = ZOO["llama"]
    arrays, formats, _ = stored(config, "q8")
    arrays["gate"] = arrays["gate"][:, :-1]
    with pytest.raises(ValueError, match="gate"):
        CpuExecutor(ExecutorSetup(config, arrays, formats, block_count=4), threads=1)
