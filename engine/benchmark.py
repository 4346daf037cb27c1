"""Throughput of prompt processing and of decoding, in the manner of llama-bench."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from svdengine.cost import kv_read_bytes, sparse_weight_bytes, weight_bytes
from svdengine.kernels.batch import Batch, Executor, Logits, NeuronCounts
from svdengine.neurons import active_density, predicted_density, since
from svdengine.page_faults import PageFaults, page_faults
from svdengine.sequence import blocks_for

if TYPE_CHECKING:
    from svdengine.llm import LLM


@dataclass(frozen=True)
class BenchRow:
    """One test. A pp test reads a prompt, a tg test decodes one sequence, greedily."""

    test: str  # pp512, tg128
    ffn: str  # the path that was asked for: dense, sparse or auto
    tokens_per_second: float
    stddev: float  # of tokens_per_second over the repetitions
    bytes_per_token: float  # of weights, predictor and KV cache that must be read
    gb_per_second: float  # bytes_per_token times tokens_per_second, in 1e9 bytes
    predicted_density: float | None = None  # share of FFN neurons predicted active; None: nothing ran sparse
    active_density: float | None = None  # share of FFN neurons computed in full
    faults_per_token: float | None = None  # page faults of all kinds; None: not asked for
    major_faults_per_token: float | None = None  # of those, pages that were not in memory
    disk_bytes_per_token: float | None = None  # read from storage


@dataclass(frozen=True)
class Trial:
    """The repetitions of one test."""

    tokens: int  # of one repetition
    rates: list[float]  # tokens a second
    neurons: NeuronCounts  # of all repetitions
    faults: PageFaults | None  # of all repetitions


def run_benchmark(
    llm: LLM,
    pp: int,
    tg: int,
    repetitions: int,
    report: Callable[[str], None] | None = None,
    *,
    paths: Sequence[str] = (),
    sparsity_bias: float = 0.0,
    faults: bool = False,
) -> list[BenchRow]:
    """Time a prompt of `pp` tokens and `tg` decoded tokens; 0 leaves a test out. `llm` must be idle.

    The tests run once for each of the FFN's `paths`, by default for the one that is set. `faults` counts page faults.
    """
    before, executor = llm.ffn, llm.executor
    bias = np.array([sparsity_bias], np.float32) if sparsity_bias else None
    prompt = _prompt(pp, llm.config.vocab_size)
    tests: list[tuple[str, int, Callable[[], None]]] = []
    if pp:
        tests.append((f"pp{pp}", pp, lambda: _read_prompt(executor, prompt, bias)))
    if tg:
        tests.append((f"tg{tg}", tg, lambda: _decode(executor, tg, bias)))
    rows = []
    try:
        for path in paths or (before,):
            llm.ffn = path
            for name, tokens, run in tests:
                rows.append(_row(llm, name, path, _repeat(executor, run, tokens, repetitions, report, faults)))
    finally:
        llm.ffn = before
    return rows


def bytes_per_token(llm: LLM, neurons: NeuronCounts, tokens: int, steps_per_token: float = 1.0) -> float:
    """Bytes of weights read for each of `tokens` tokens, of which some or all ran sparse, as `neurons` says.

    What is dense is read once a step, and rows of sparse execution once a token.
    """
    config, dense = llm.config, weight_bytes(llm.model_file)
    predicted, active = predicted_density(neurons), active_density(neurons)
    if predicted is None or active is None:
        return dense * steps_per_token
    share = neurons.total / (tokens * config.layer_count * config.ffn_size)  # of tokens that ran sparse
    around = sparse_weight_bytes(llm.model_file, None, 0.0, 0.0)  # attention, norms, embeddings
    rows = sparse_weight_bytes(llm.model_file, llm.predictor, predicted, active) - around
    return around * steps_per_token + share * rows + (1 - share) * (dense - around) * steps_per_token


def _row(llm: LLM, test: str, path: str, trial: Trial) -> BenchRow:
    config, tokens = llm.config, trial.tokens
    mean = statistics.fmean(trial.rates)
    if test.startswith("pp"):
        steps = -(-tokens // llm.executor.max_batch_rows)
        kv = kv_read_bytes(config, tokens, llm.kv_dtype) / tokens
    else:
        steps, kv = tokens, kv_read_bytes(config, (tokens + 1) / 2, llm.kv_dtype)
    size = kv + bytes_per_token(llm, trial.neurons, tokens * len(trial.rates), steps / tokens)
    row = BenchRow(
        test=test,
        ffn=path,
        tokens_per_second=mean,
        stddev=statistics.stdev(trial.rates) if len(trial.rates) > 1 else 0.0,
        bytes_per_token=size,
        gb_per_second=size * mean / 1e9,
        predicted_density=predicted_density(trial.neurons),
        active_density=active_density(trial.neurons),
    )
    if trial.faults is None:
        return row
    count = tokens * len(trial.rates)
    return replace(
        row,
        faults_per_token=(trial.faults.minor + trial.faults.major) / count,
        major_faults_per_token=trial.faults.major / count,
        disk_bytes_per_token=trial.faults.disk_bytes / count,
    )


def _repeat(
    executor: Executor,
    run: Callable[[], None],
    tokens: int,
    repetitions: int,
    report: Callable[[str], None] | None,
    faults: bool,
) -> Trial:
    """Run a test `repetitions` times, after once that does not count."""
    run()
    rates = []
    neurons = executor.neuron_counts()
    pages = page_faults() if faults else None
    for number in range(repetitions):
        if report is not None:
            report(f"{number + 1}/{repetitions}")
        begin = time.perf_counter()
        run()
        rates.append(tokens / (time.perf_counter() - begin))
    found = page_faults().since(pages) if pages is not None else None
    return Trial(tokens, rates, since(neurons, executor.neuron_counts()), found)


def _prompt(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count).astype(np.int32)


def _read_prompt(executor: Executor, tokens: np.ndarray, bias: np.ndarray | None) -> None:
    for start in range(0, len(tokens), executor.max_batch_rows):
        chunk = tokens[start : start + executor.max_batch_rows]
        _forward(executor, chunk, start, bias, last=start + len(chunk) == len(tokens))


def _decode(executor: Executor, count: int, bias: np.ndarray | None) -> None:
    token = 1
    for position in range(count):
        logits = _forward(executor, np.array([token], np.int32), position, bias, last=True)
        token = int(logits[0].argmax())


def _forward(executor: Executor, tokens: np.ndarray, start: int, bias: np.ndarray | None, *, last: bool) -> Logits:
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
            sparsity_bias=bias,
        )
    )
