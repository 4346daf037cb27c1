"""Throughput of prompt processing and of decoding, in the manner of llama-bench."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from svdengine.cost import kv_read_bytes, weight_bytes
from svdengine.kernels.batch import Batch, Executor, Logits
from svdengine.sequence import blocks_for

if TYPE_CHECKING:
    from svdengine.llm import LLM


@dataclass(frozen=True)
class BenchRow:
    """One test. A pp test reads a prompt, a tg test decodes one sequence, greedily."""

    test: str  # pp512, tg128
    ffn: str
    tokens_per_second: float
    stddev: float  # of tokens_per_second over the repetitions
    bytes_per_token: float  # of weights and KV cache that must be read
    gb_per_second: float  # bytes_per_token times tokens_per_second, in 1e9 bytes


def run_benchmark(
    llm: LLM, pp: int, tg: int, repetitions: int, report: Callable[[str], None] | None = None
) -> list[BenchRow]:
    """Time a prompt of `pp` tokens and `tg` decoded tokens; 0 leaves a test out. `llm` must be idle."""
    weights, config, executor = weight_bytes(llm.model_file), llm.config, llm.executor
    rows = []
    if pp:
        steps = -(-pp // executor.max_batch_rows)
        rates = _repeat(lambda: _read_prompt(executor, _prompt(pp, config.vocab_size)), pp, repetitions, report)
        rows.append(
            _row(f"pp{pp}", "dense", rates, weights * steps / pp + kv_read_bytes(config, pp, llm.kv_dtype) / pp)
        )
    if tg:
        rates = _repeat(lambda: _decode(executor, tg), tg, repetitions, report)
        rows.append(_row(f"tg{tg}", llm.ffn, rates, weights + kv_read_bytes(config, (tg + 1) / 2, llm.kv_dtype)))
    return rows


def _row(test: str, ffn: str, rates: list[float], bytes_per_token: float) -> BenchRow:
    mean = statistics.fmean(rates)
    stddev = statistics.stdev(rates) if len(rates) > 1 else 0.0
    return BenchRow(test, ffn, mean, stddev, bytes_per_token, bytes_per_token * mean / 1e9)


def _repeat(
    run: Callable[[], None], tokens: int, repetitions: int, report: Callable[[str], None] | None
) -> list[float]:
    """Tokens per second of each repetition, after one that does not count."""
    run()
    rates = []
    for number in range(repetitions):
        if report is not None:
            report(f"{number + 1}/{repetitions}")
        begin = time.perf_counter()
        run()
        rates.append(tokens / (time.perf_counter() - begin))
    return rates


def _prompt(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count).astype(np.int32)


def _read_prompt(executor: Executor, tokens: np.ndarray) -> None:
    for start in range(0, len(tokens), executor.max_batch_rows):
        chunk = tokens[start : start + executor.max_batch_rows]
        _forward(executor, chunk, start, last=start + len(chunk) == len(tokens))


def _decode(executor: Executor, count: int) -> None:
    token = 1
    for position in range(count):
        logits = _forward(executor, np.array([token], np.int32), position, last=True)
        token = int(logits[0].argmax())


def _forward(executor: Executor, tokens: np.ndarray, start: int, *, last: bool) -> Logits:
    """One step of a single sequence that fills blocks 0, 1, ... of the pool."""
    end = start + len(tokens)
    return executor.forward(
        Batch(
            tokens=tokens,
            positions=np.arange(start, end, dtype=np.int32),
            sequences=np.zeros(len(tokens), np.int32),
            block_tables=np.arange(blocks_for(end), dtype=np.int32)[None],
            context_lengths=np.array([end], np.int32),
            logit_rows=np.array([len(tokens) - 1] if last else [], np.int32),
        )
    )
