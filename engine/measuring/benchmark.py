"""Throughput of prompt processing and of decoding, in the manner of llama-bench."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svdengine.files.advising_executor import AdvisingExecutor
from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.executor import NO_NEURONS, Choice, Executor, FfnMode, NeuronCounts, SamplingExecutor
from svdengine.measuring.expert_use import expert_use
from svdengine.measuring.memory_traffic import sparse_weight_bytes, weight_bytes
from svdengine.measuring.page_faults import PageFaults, page_faults
from svdengine.scheduling.block_pool import kv_read_bytes
from svdengine.scheduling.sequence import blocks_for

if TYPE_CHECKING:
    from svdengine.kernels.cpu.executor import CpuExecutor
    from svdengine.llm import LLM


@dataclass(frozen=True)
class BenchRow:
    """One test: pp reads a prompt, tg decodes greedily, and ffn runs the FFNs of all layers alone.

    A mixture of experts decodes random tokens, others each time, so that every token has experts of its own.

    tg128x4 decodes 128 tokens of each of 4 sequences together; rates and bytes are then those of all their tokens.
    tg128 @ d4096 decodes them after 4,096 other tokens, which are not timed.

    The ffn test runs the compiled stages of decoding on what enters the FFNs when a prompt is read, one token at a
    time; its tokens a second are what decoding would reach if nothing else cost time.
    """

    test: str  # pp512, tg128, tg128x4, ffn128
    ffn: str  # the path that was asked for: dense, sparse or auto
    tokens_per_second: float
    stddev: float  # of tokens_per_second over the repetitions
    bytes_per_token: float  # of weights, predictor and KV cache that must be read
    gb_per_second: float  # bytes_per_token times tokens_per_second, in 1e9 bytes
    speedup: float | None = None  # tokens_per_second against those of the dense path, measured in turn; None: no other
    predicted_density: float | None = None  # share of FFN neurons predicted active; None: nothing ran sparse
    active_density: float | None = None  # share of FFN neurons computed in full
    faults_per_token: float | None = None  # page faults of all kinds; None: not asked for
    major_faults_per_token: float | None = None  # of those, pages that were not in memory
    disk_bytes_per_token: float | None = None  # read from storage
    busiest_expert: float | None = None  # share of tokens that have the expert which most have, mean of layers
    unused_experts: int | None = None  # of all layers' experts those that no token of the test had
    experts_per_token: float | None = None  # that were chosen, where experts are kept in memory
    kept_experts: float | None = None  # share of them that are kept
    read_experts: float | None = None  # share of them that came from storage, if nothing else did: an upper bound


@dataclass(frozen=True)
class Workload:
    """What is repeated. `run` goes once through all tokens."""

    name: str
    tokens: int
    run: Callable[[], None]
    together: int = 1  # tokens of a step, where they belong to as many sequences
    depth: int = 0  # tokens of each sequence that are there before
    prepare: Callable[[], None] = lambda: None  # what puts them there


@dataclass(frozen=True)
class Repetition:
    """What one repetition took."""

    seconds: float
    neurons: NeuronCounts
    faults: PageFaults | None
    experts: tuple[NDArray[np.int64], ...] = ()  # rows that chose each, by layer with experts
    uses: tuple[int, int] | None = None  # of experts by rows, and those that found it kept in memory


def run_benchmark(
    llm: LLM,
    pp: int,
    tg: int,
    repetitions: int,
    report: Callable[[str], None] | None = None,
    *,
    paths: Sequence[FfnMode] = (),
    parallel: Sequence[int] = (1,),
    sparsity_bias: float = 0.0,
    faults: bool = False,
    depth: int = 0,
) -> list[BenchRow]:
    """Time a prompt of `pp` tokens and `tg` decoded tokens; 0 leaves a test out. `llm` must be idle.

    Both come after `depth` other tokens, which are not timed; they and a test's must fit the context.

    Decoding is timed for each number of sequences in `parallel`, all decoded together.
    The tests run on each of the FFN's `paths`, by default the one that is set; where there are several, on a CPU, the
    FFNs are also timed alone, for `tg` tokens. Paths take turns, since a machine's speed drifts; but not with
    `faults`, which counts page faults: then what one path leaves in memory would be another's.
    """
    before = llm.ffn
    paths = paths or (before,)
    rows = []
    try:
        for test in _tests(llm, pp, tg, parallel, sparsity_bias, depth, alone=len(paths) > 1 and not faults):
            done = _repeat(llm, test, paths, repetitions, report, faults)
            rows += [_row(llm, test, path, done[path], done.get("dense")) for path in paths]
    finally:
        llm.ffn = before
    return rows


def bytes_per_token(llm: LLM, neurons: NeuronCounts, tokens: int, steps_per_token: float = 1.0) -> float:
    """Bytes of weights read for each of `tokens` tokens, of which some or all ran sparse, as `neurons` says.

    What is dense is read once a step, and rows of sparse execution at most once a token: where tokens of a step list
    the same row, it is read once for them, which neuron counts do not tell.
    """
    config, dense = llm.config, weight_bytes(llm.model_file)
    predicted, active = neurons.predicted_density, neurons.active_density
    if predicted is None or active is None:
        return dense * steps_per_token
    share = neurons.total / (tokens * config.token_neurons)  # of tokens that ran sparse
    around = sparse_weight_bytes(llm.model_file, None, 0.0, 0.0)  # attention, norms, embeddings
    scored_with = llm.predictor if predicted < 1 else None  # steps that only skip zeros compute all gates, and no score
    rows = sparse_weight_bytes(llm.model_file, scored_with, predicted, active) - around
    return around * steps_per_token + share * rows + (1 - share) * (dense - around) * steps_per_token


def _tests(
    llm: LLM, pp: int, tg: int, parallel: Sequence[int], sparsity_bias: float, depth: int, alone: bool
) -> list[Workload]:
    """The tests that were asked for; `alone`: the FFNs by themselves too, where the executor can."""
    executor = llm.executor
    bias = np.array([sparsity_bias], np.float32) if sparsity_bias else None
    prompt = _prompt(pp, llm.config.vocab_size)
    tests, at = [], f" @ d{depth}" if depth else ""
    # Of a mixture a repetition with the same tokens would find their experts where the one before left them.
    random, vocabulary = np.random.default_rng(2), llm.config.vocab_size
    draw = (lambda: int(random.integers(vocabulary))) if llm.config.expert_count else None
    if pp:
        read, fill = partial(read_prompt, executor, prompt, bias, depth), partial(_fill, executor, depth, pp, 1, bias)
        tests.append(Workload(f"pp{pp}{at}", pp, read, depth=depth, prepare=fill))
    for count in parallel if tg else ():
        name = f"tg{tg}{at}" if count == 1 else f"tg{tg}x{count}{at}"
        decode = partial(_decode, executor, tg, count, sparsity_bias, depth, draw)
        fill = partial(_fill, executor, depth, tg, count, bias)
        tests.append(Workload(name, tg * count, decode, count, depth, fill))
    from svdengine.kernels.cpu.executor import CpuExecutor

    if tg and alone and isinstance(executor, CpuExecutor):
        count = min(max(tg, 2), executor.max_batch_rows, llm.context)
        inputs = executor.ffn_inputs(single_sequence(_prompt(count, llm.config.vocab_size), 0, None, last=False))
        tests.append(Workload(f"ffn{tg}", tg, lambda: _run_ffns(executor, inputs, tg, sparsity_bias)))
    return tests


def _row(llm: LLM, test: Workload, path: str, done: list[Repetition], dense: list[Repetition] | None) -> BenchRow:
    count = test.tokens * len(done)
    rates = [test.tokens / repetition.seconds for repetition in done]
    mean = statistics.fmean(rates)
    neurons = sum((repetition.neurons for repetition in done), NO_NEURONS)
    size = _size_of(llm, test, neurons, count)
    row = BenchRow(
        test=test.name,
        ffn=path,
        tokens_per_second=mean,
        stddev=statistics.stdev(rates) if len(rates) > 1 else 0.0,
        bytes_per_token=size,
        gb_per_second=size * mean / 1e9,
        predicted_density=neurons.predicted_density,
        active_density=neurons.active_density,
    )
    use = expert_use(llm.config, _summed([repetition.experts for repetition in done]))
    if use is not None:
        row = replace(row, busiest_expert=use.busiest, unused_experts=use.unused)
    if dense is not None and dense is not done:
        row = replace(row, speedup=_median_seconds(dense) / _median_seconds(done))
    faults = [repetition.faults for repetition in done if repetition.faults is not None]
    if not faults:
        return row
    row = replace(
        row,
        faults_per_token=sum(found.minor + found.major for found in faults) / count,
        major_faults_per_token=sum(found.major for found in faults) / count,
        disk_bytes_per_token=sum(found.disk_bytes for found in faults) / count,
    )
    uses = [repetition.uses for repetition in done if repetition.uses is not None]
    chosen, kept = sum(chosen for chosen, _ in uses), sum(found for _, found in uses)
    if not chosen or not isinstance(llm.executor, AdvisingExecutor) or llm.executor.kept is None:
        return row
    size = llm.executor.kept.plan.expert_bytes
    read = min(1.0, sum(found.disk_bytes for found in faults) / (size * chosen))
    return replace(row, experts_per_token=chosen / count, kept_experts=kept / chosen, read_experts=read)


def _summed(repetitions: Sequence[tuple[NDArray[np.int64], ...]]) -> list[list[int]]:
    """Rows that chose each expert, by layer, of all repetitions."""
    return [np.sum(layer, 0).tolist() for layer in zip(*repetitions, strict=True)]


def _size_of(llm: LLM, test: Workload, neurons: NeuronCounts, count: int) -> float:
    """Bytes that each of `count` tokens reads in a test."""
    config, tokens = llm.config, test.tokens
    if test.name.startswith("ffn"):
        return bytes_per_token(llm, neurons, count) - sparse_weight_bytes(llm.model_file, None, 0.0, 0.0)
    if test.name.startswith("pp"):
        steps = -(-tokens // llm.executor.max_batch_rows)
        kv = kv_read_bytes(config, test.depth * steps + tokens, llm.kv_dtype) / tokens
    else:
        each = tokens // test.together
        steps, kv = each, kv_read_bytes(config, test.depth + (each + 1) / 2, llm.kv_dtype)
    return kv + bytes_per_token(llm, neurons, count, steps / tokens)


def _median_seconds(done: list[Repetition]) -> float:
    return statistics.median(repetition.seconds for repetition in done)


def _repeat(
    llm: LLM,
    test: Workload,
    paths: Sequence[FfnMode],
    repetitions: int,
    report: Callable[[str], None] | None,
    faults: bool,
) -> dict[str, list[Repetition]]:
    """Run a test `repetitions` times on each path, after once that does not count."""
    order = [path for path in paths for _ in range(repetitions)] if faults else [*paths] * repetitions
    done: dict[str, list[Repetition]] = {}
    for number, path in enumerate(order):
        if report is not None:
            report(f"{test.name} {number + 1}/{len(order)}")
        llm.ffn = path
        if not done:
            test.prepare()
        if path not in done:
            test.run()
        done.setdefault(path, []).append(_measured(llm.executor, test.run, faults))
    return done


def _measured(executor: Executor, run: Callable[[], None], faults: bool) -> Repetition:
    neurons, experts = executor.neuron_counts(), executor.expert_counts()
    kept = executor.kept if faults and isinstance(executor, AdvisingExecutor) else None
    used = kept.uses() if kept is not None else (0, 0)
    pages = page_faults() if faults else None
    begin = time.perf_counter()
    run()
    seconds = time.perf_counter() - begin
    found = page_faults().since(pages) if pages is not None else None
    uses = kept.uses() if kept is not None else None
    chosen = tuple(now - then for now, then in zip(executor.expert_counts(), experts, strict=True))
    more = (uses[0] - used[0], uses[1] - used[1]) if uses is not None else None
    return Repetition(seconds, executor.neuron_counts() - neurons, found, chosen, more)


def _prompt(count: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, count).astype(np.int32)


def read_prompt(
    executor: Executor, tokens: np.ndarray, bias: np.ndarray | None, depth: int = 0, first_block: int = 0
) -> None:
    """Read a prompt that begins at position `depth` of a sequence."""
    for start in range(0, len(tokens), executor.max_batch_rows):
        chunk = tokens[start : start + executor.max_batch_rows]
        last = start + len(chunk) == len(tokens)
        batch = single_sequence(
            chunk, depth + start, bias, last=last, first_block=first_block, block_size=executor.block_size
        )
        executor.forward(batch)


def _fill(executor: Executor, depth: int, more: int, sequences: int, bias: np.ndarray | None) -> None:
    """Read the first `depth` tokens of each of some sequences, whose blocks have room for `more`."""
    tokens = np.random.default_rng(1).integers(0, 100, depth).astype(np.int32)
    for sequence in range(sequences):
        read_prompt(executor, tokens, bias, first_block=sequence * blocks_for(depth + more, executor.block_size))


def _decode(
    executor: Executor, count: int, sequences: int, bias: float, depth: int = 0, draw: Callable[[], int] | None = None
) -> None:
    """Decode `count` tokens of each of some sequences, all in the same steps, from position `depth`.

    draw: gives the tokens that are fed, one after the other; without it each is the likeliest after the one before.
    """
    rows = np.arange(sequences, dtype=np.int32)
    blocks = blocks_for(depth + count, executor.block_size)
    tables = np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks)
    tokens = 1 + rows
    for position in range(depth, depth + count):
        batch = Batch(
            tokens=tokens,
            positions=np.full_like(rows, position),
            sequences=rows,
            block_tables=tables,
            context_lengths=np.full_like(rows, position + 1),
            logit_rows=rows,
            sparsity_bias=np.full(sequences, bias, np.float32) if bias else None,
        )
        tokens = likeliest(executor, batch)
        if draw is not None:
            tokens = np.array([draw() for _ in rows], np.int32)


def likeliest(executor: Executor, batch: Batch) -> np.ndarray:
    """The likeliest next tokens, as the engine gets them: from the executor, where it can choose."""
    if isinstance(executor, SamplingExecutor):
        return executor.forward_and_sample(batch, [Choice(temperature=0.0)] * len(batch.logit_rows))[0]
    return executor.forward(batch).argmax(1).astype(np.int32)


def _run_ffns(executor: CpuExecutor, inputs: np.ndarray, count: int, bias: float) -> None:
    """Run all layers' FFNs on `inputs` (layers, n, hidden), one token at a time, `count` times."""
    for token in range(count):
        executor.run_ffns(inputs[:, token % inputs.shape[1], None], sparsity_bias=bias)


def single_sequence(
    tokens: np.ndarray,
    start: int,
    bias: np.ndarray | None,
    *,
    last: bool,
    first_block: int = 0,
    block_size: int = BLOCK_SIZE,
) -> Batch:
    """One step of a single sequence, whose blocks are neighbours in the pool; `last`: with the last token's logits."""
    end = start + len(tokens)
    return Batch(
        tokens=tokens,
        positions=np.arange(start, end, dtype=np.int32),
        sequences=np.zeros(len(tokens), np.int32),
        block_tables=np.arange(first_block, first_block + blocks_for(end, block_size), dtype=np.int32)[None],
        context_lengths=np.array([end], np.int32),
        logit_rows=np.array([len(tokens) - 1] if last else [], np.int32),
        sparsity_bias=bias,
    )
