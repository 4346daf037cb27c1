"""The engine's loop: schedule, forward, postprocess."""

from __future__ import annotations

from svdengine.block_pool import BlockPool
from svdengine.errors import SvdEngineError
from svdengine.kernels.batch import Executor, FfnMode, Logits, NeuronCounts
from svdengine.neurons import since
from svdengine.prefix_cache import PrefixCache
from svdengine.request import Request
from svdengine.scheduler import Scheduler, Step
from svdengine.sequence import Sequence


class Engine:
    """Runs all requests together, one step at a time. It has no lock: callers take turns."""

    def __init__(self, executor: Executor, *, cached_prefixes: int = 4) -> None:
        self.executor = executor
        self.pool = BlockPool(executor.block_count)
        self.prefix_cache = PrefixCache(self.pool, cached_prefixes)
        self.scheduler = Scheduler(self.pool, executor.max_batch_rows, self.prefix_cache)
        self._requests: dict[Sequence, Request] = {}

    def add(self, request: Request) -> None:
        """Queue a request; it is `done` after some steps."""
        self._requests[request.sequence] = request
        self.scheduler.add(request.sequence)

    def step(self) -> None:
        """Advance every scheduled request. An error of the executor ends them all, and is raised."""
        step = self.scheduler.schedule()
        if step is None:
            return
        before = self.executor.neuron_counts()
        try:
            logits = self.executor.forward(step.batch)
        except BaseException as error:
            self._fail_all(error)
            raise
        self.scheduler.advance(step)
        self.postprocess(step, logits, since(before, self.executor.neuron_counts()))

    def postprocess(self, step: Step, logits: Logits, neurons: NeuronCounts) -> None:
        """Hand each request its rows of the logits, (rows asked for, vocabulary), and the neurons of the whole step."""
        start = 0
        for chunk in step.chunks:
            rows = logits[start : start + chunk.logit_rows]
            start += chunk.logit_rows
            self._requests[chunk.sequence].note_neurons(neurons)
            if chunk.logit_rows:
                self._hand_over(self._requests[chunk.sequence], rows)

    def set_ffn(self, ffn: FfnMode) -> None:
        """Choose the FFN's path from the next step on. What the other path cached is not built upon."""
        self.executor.ffn = ffn
        self.prefix_cache.clear()

    def abort(self, request: Request) -> None:
        """Drop a request that nobody waits for. Its computed prefix stays in the cache."""
        if self._requests.pop(request.sequence, None) is not None:
            self.scheduler.finish(request.sequence)

    def close(self) -> None:
        """End every request and close the executor."""
        self._fail_all(SvdEngineError("the model was closed"))
        self.prefix_cache.clear()
        self.executor.close()

    def _hand_over(self, request: Request, rows: Logits) -> None:
        try:
            if request.accept(rows):
                self.scheduler.shift(request.sequence, request.keep)
        except Exception as error:
            request.error = error  # one request's trouble does not stop the others
            self._requests.pop(request.sequence)
            self.scheduler.remove(request.sequence)
            return
        if request.done:
            self._requests.pop(request.sequence)
            self.scheduler.finish(request.sequence)

    def _fail_all(self, error: BaseException) -> None:
        """The KV cache is in an unknown state: nothing of it is kept."""
        for request in self._requests.values():
            request.error = error if isinstance(error, SvdEngineError) else SvdEngineError(f"a step failed: {error!r}")
            self.scheduler.remove(request.sequence)
        self._requests.clear()
        self.prefix_cache.clear()
