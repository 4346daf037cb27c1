"""The engine's loop: schedule, forward, postprocess."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import SvdEngineError
from svdengine.kernels.executor import (
    Choice,
    Executor,
    FfnMode,
    FfnPath,
    HiddenStates,
    LayerCounts,
    Logits,
    NeuronCounts,
    SamplingExecutor,
)
from svdengine.scheduling.block_pool import BlockPool
from svdengine.scheduling.prefix_cache import PrefixCache
from svdengine.scheduling.request import Request
from svdengine.scheduling.scheduler import PREFILL_ROWS, Chunk, Drafter, Scheduler, Step
from svdengine.scheduling.sequence import Sequence


@dataclass(frozen=True)
class EngineStats:
    """Counts since the model was loaded, and the state of the queue and of the KV block pool.

    steps: forward passes but those that only drafted, by how their FFNs ran: dense, predict (the predictor chose
        neurons) or skip_zeros (every gate was computed, and what is exactly 0 skipped).
    rows: of these, rows: a token each.
    prompt_tokens: tokens read in prompts, with those that were read again after a preemption.
    prefix_hit_tokens: tokens that were not read, because the KV cache had them.
    generated_tokens: tokens that were sampled.
    drafted_tokens: rows of tokens that might come next, with speculative decoding.
    accepted_tokens: of these, those that came.
    preemptions: sequences sent back to the queue because KV blocks ran out, or the FFN's path changed.
    waiting: sequences in the queue.
    running: sequences that have KV blocks.
    blocks_used: KV blocks of running sequences, 16 tokens each.
    blocks_cached: of sequences that ended; given out again when no free ones are left.
    blocks_free: KV blocks that hold nothing.
    experts: of a mixture, an entry for each layer with experts: how many rows chose each of these.
    """

    steps: Mapping[FfnPath, int]
    rows: Mapping[FfnPath, int]
    prompt_tokens: int
    prefix_hit_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    waiting: int
    running: int
    blocks_used: int
    blocks_cached: int
    blocks_free: int
    experts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Outputs:
    """What a step gave: for each row with logits either a token, if it was chosen by the executor, or the logits."""

    choices: list[Choice | None]  # of each row; None: its logits are there
    tokens: NDArray[np.int32]  # (rows,), read where there is a choice
    logits: Logits  # (rows without a choice, vocabulary)
    hidden: NDArray[np.float32] | None = None  # (rows of the step, hidden), where a sequence wants its own


class Engine:
    """Runs all requests together, one step at a time. It has no lock: callers take turns."""

    def __init__(
        self,
        executor: Executor,
        *,
        prefix_caching: bool = True,
        prefill_rows: int = PREFILL_ROWS,
        drafter: Drafter | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`drafter`: decides on drafted tokens; None: there are none.

        `check`: called before and after what the executor does in a step; what it raises ends the step.
        """
        self.executor = executor
        self.pool = BlockPool(executor.block_count, executor.block_size)
        self.prefix_cache = PrefixCache(self.pool, enabled=prefix_caching)
        self._drafter = drafter
        self._check = check
        self.scheduler = Scheduler(self.pool, executor.max_batch_rows, self.prefix_cache, prefill_rows, self._drafter)
        self._requests: dict[Sequence, Request] = {}
        self._steps: Counter[FfnPath] = Counter()
        self._rows: Counter[FfnPath] = Counter()

    @property
    def executor(self) -> Executor:
        """What runs steps."""
        return self._executor

    @executor.setter
    def executor(self, executor: Executor) -> None:
        # What it offers is asked once: of a protocol that takes longer than much else that a step does on the host.
        self._executor = executor
        self._sampling = executor if isinstance(executor, SamplingExecutor) else None

    def add(self, request: Request) -> None:
        """Queue a request; it is `done` after some steps. Raises ContextOverflowError when the pool cannot hold it."""
        self.scheduler.add(request.sequence)
        self._requests[request.sequence] = request

    def step(self) -> None:
        """Advance every scheduled request. An error of the executor ends them all, and is raised."""
        step = self.scheduler.schedule()
        if step is None:
            return
        mode = self.executor.ffn
        if step.ffn is not None:
            self.executor.ffn = step.ffn
        try:
            self._run(step)
        finally:
            if step.ffn is not None:
                self.executor.ffn = mode

    def _run(self, step: Step) -> None:
        """Compute a step, and hand out what it gave."""
        by_layer = any(self._requests[chunk.sequence].by_layer for chunk in step.chunks)
        try:
            self._check()
            step = self._with_draft(step)
            before, begin = self.executor.neuron_counts(), time.perf_counter()
            layers_before = self.executor.layer_counts() if by_layer else None
            outputs = self._forward(step)
            self._check()
        except BaseException as error:
            self._fail_all(error)
            raise
        decoding = all(chunk.sequence.pending == 1 for chunk in step.chunks)
        self.scheduler.advance(step)
        path = self.executor.ffn_path(len(step.batch.tokens))
        self._steps[path] += 1
        self._rows[path] += len(step.batch.tokens)
        neurons = None if path == "dense" else self.executor.neuron_counts() - before
        layers = None if layers_before is None else self.executor.layer_counts() - layers_before
        self.postprocess(step, outputs, neurons, layers)
        if self._drafter is not None and decoding:
            self._drafter.note_step(len(step.batch.tokens), time.perf_counter() - begin)

    def postprocess(
        self, step: Step, outputs: Outputs, neurons: NeuronCounts | None, layers: LayerCounts | None = None
    ) -> None:
        """Hand each request its token or rows of the logits, and the neurons of the whole step if any were counted."""
        row = logit = first = 0
        for chunk in step.chunks:
            request, count = self._requests[chunk.sequence], chunk.logit_rows
            start, first = first, first + chunk.rows
            if neurons is not None:
                request.note_neurons(neurons, layers)
            if chunk.sequence.hidden and outputs.hidden is not None:
                self._hand_over(request, partial(request.accept, outputs.hidden[start:first]))
            if not count:
                continue
            if outputs.choices[row] is None:
                self._hand_over(request, partial(request.accept, outputs.logits[logit : logit + count]))
                logit += count
            else:
                self._hand_over(request, partial(request.accept_token, int(outputs.tokens[row])))
            row += count

    def stats(self) -> EngineStats:
        """What was done so far, and the state of the queue and of the pool. It may be called during a step."""
        scheduler, pool = self.scheduler, self.pool
        return EngineStats(
            steps=dict(self._steps),
            rows=dict(self._rows),
            prompt_tokens=scheduler.prompt_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            generated_tokens=scheduler.generated_tokens,
            drafted_tokens=self._drafter.drafted_tokens if self._drafter else 0,
            accepted_tokens=self._drafter.accepted_tokens if self._drafter else 0,
            preemptions=scheduler.preemptions,
            waiting=scheduler.waiting_count,
            running=scheduler.running_count,
            blocks_used=pool.block_count - pool.free_count,
            blocks_cached=pool.idle_count,
            blocks_free=pool.blank_count,
            experts=tuple(tuple(layer.tolist()) for layer in self.executor.expert_counts()),
        )

    def set_ffn(self, ffn: FfnMode) -> None:
        """Choose the FFN's path from the next step on. What the other path cached is computed anew."""
        self.executor.ffn = ffn
        self.scheduler.restart()

    def abort(self, request: Request) -> None:
        """Drop a request that nobody waits for. Its computed prefix stays in the cache."""
        if self._requests.pop(request.sequence, None) is not None:
            self.scheduler.finish(request.sequence)

    def close(self) -> None:
        """End every request and close the executor."""
        self._fail_all(SvdEngineError("the model was closed"))
        self.prefix_cache.clear()
        self.executor.close()

    def _with_draft(self, step: Step) -> Step:
        """The step with what the model drafts first, where it is to."""
        if self._drafter is None or not step.to_draft:
            return step
        draft = self._drafter.draft_by_model(step.chunks[0].sequence, step.to_draft)
        return self.scheduler.with_draft(step, draft)

    def _forward(self, step: Step) -> Outputs:
        """Run a step, and fetch hidden states where they are wanted."""
        outputs = self._logits_or_tokens(step)
        if not any(chunk.sequence.hidden for chunk in step.chunks):
            return outputs
        if not isinstance(self.executor, HiddenStates):
            raise SvdEngineError(f"the device {self.executor.name} gives no hidden states")
        return replace(outputs, hidden=self.executor.hidden_states())

    def _logits_or_tokens(self, step: Step) -> Outputs:
        """Run a step. An executor that can chooses the tokens of those requests that leave it to do so."""
        rows = len(step.batch.logit_rows)
        if self._sampling is not None:
            choices = [c for chunk in step.chunks for c in self._choices(chunk)]
            if any(choice is not None for choice in choices):
                return Outputs(choices, *self._sampling.forward_and_sample(step.batch, choices))
        return Outputs([None] * rows, np.empty(0, np.int32), self.executor.forward(step.batch))

    def _choices(self, chunk: Chunk) -> list[Choice | None]:
        """How a token is chosen for each of a chunk's rows with logits; None where their logits are wanted."""
        if chunk.logit_rows != 1:
            return [None] * chunk.logit_rows
        return [self._requests[chunk.sequence].choice()]

    def _hand_over(self, request: Request, accept: Callable[[], bool]) -> None:
        try:
            if accept():
                self.scheduler.shift(request.sequence, request.keep)
            else:
                self.scheduler.confirm(request.sequence)
            if not request.done:
                self.scheduler.check_length(request.sequence)
        except Exception as error:
            request.error = error  # one request's trouble does not stop the others
            self._requests.pop(request.sequence)
            self.scheduler.finish(request.sequence)
            return
        if request.done:
            self._requests.pop(request.sequence)
            self.scheduler.finish(request.sequence)

    def _fail_all(self, error: BaseException) -> None:
        """The KV cache is in an unknown state: nothing of it is kept."""
        for request in self._requests.values():
            request.error = error if isinstance(error, SvdEngineError) else SvdEngineError(f"a step failed: {error!r}")
            self.scheduler.finish(request.sequence)
        self._requests.clear()
        self.prefix_cache.clear()
