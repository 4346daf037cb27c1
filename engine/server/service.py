"""What the HTTP routes work with: the model, the loop that runs requests, the limits and the counters."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from svdengine.errors import ContextOverflowError, QueueFullError, SvdEngineError
from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.constraint import ConstraintMaker
from svdengine.server.api_error import ApiError, api_error, context_overflow
from svdengine.server.bounded_text import BoundedGrammarChecker, BoundedTemplate, BoundedTokenizer
from svdengine.server.delivery import Delivery
from svdengine.server.job import Job
from svdengine.server.metrics import Metrics
from svdengine.server.request_loop import RequestLoop, Update
from svdengine.server.settings import Settings
from svdengine.server.work import WorkThreads
from svdengine.server.work_pool import WorkPool
from svdengine.text.chat_template import ChatTemplate

log = logging.getLogger("svdengine.server")

T = TypeVar("T")

_STUCK_SECONDS = 120.0  # for a step of the model, which takes a few at most
_BUSY_SECONDS = 10.0  # that a prompt is read, with no thread free for others
QUIET_SECONDS = 15.0  # without news, after which a stream shows that it is alive


class Service:
    """One model and those who use it."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.loop = RequestLoop(llm, settings.capacity)
        self.metrics = Metrics()
        self._threads = WorkThreads()
        self._pool = WorkPool(llm)
        self._unbounded = (llm.tokenizer, _template_of(llm))
        self.tokenizer = BoundedTokenizer(llm.tokenizer, self._pool)
        template = self._unbounded[1]
        llm.read_with(
            self.tokenizer,
            BoundedTemplate(template, self._pool) if template is not None else None,
            partial(ConstraintMaker, check=BoundedGrammarChecker(self._pool).check),
        )
        self.draining = False
        self.open_responses = 0

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """The result of work that would hold up the event loop, such as reading a long prompt.

        When the caller is cancelled, because the client went, the work is given up.
        """
        return await self._threads.run(function, *arguments)

    def condition(self) -> str:
        """How it is: "ok", or why requests are not answered, or not in time."""
        if self.draining:
            return "shutting down"
        if self.loop.failing:
            return "failing"
        if self.loop.step_seconds > _STUCK_SECONDS:
            return "stuck"
        busy = self._threads.waited(asyncio.get_running_loop().time()) > _BUSY_SECONDS
        return "busy" if busy else "ok"

    def submit(self, job: Job) -> Delivery:
        """Have the job run. Raises QueueFullError, ShutdownError or RequestError."""
        delivery = Delivery()
        pairs = [(request, partial(delivery.push, i)) for i, request in enumerate(job.requests)]
        self.loop.submit(pairs, self.settings.request_seconds)
        return delivery

    async def updates(self, job: Job, delivery: Delivery) -> AsyncGenerator[dict[int, Update], None]:
        """What a submitted job gives, by request; empty when there was nothing for a while. Ending it early cancels
        the job. Raises what ended one of the requests.
        """
        running = len(job.requests)
        try:
            while running:
                news = await delivery.take(QUIET_SECONDS)
                for update in news.values():
                    if isinstance(update.error, ContextOverflowError):
                        raise context_overflow(update.error, job.prompt_field)
                    if update.error is not None:
                        raise update.error
                    if update.completion is not None:
                        running -= 1
                        self.metrics.completed(update.completion.stats, update.completion.finish_reason)
                yield news
        finally:
            if running:
                self.metrics.finished["abort"] += running
                for request in job.requests:
                    self.loop.cancel(request)

    async def complete(self, job: Job, delivery: Delivery) -> list[Completion]:
        """The completions of a submitted job, when all are done. Raises what ended one of them."""
        done: dict[int, Completion] = {}
        async with aclosing(self.updates(job, delivery)) as updates:
            async for news in updates:
                done |= completions(news)
        return [done[i] for i in range(len(job.requests))]

    def error(self, error: BaseException) -> ApiError:
        """How an error is told. One that nobody foresaw goes to the log."""
        if not isinstance(error, ApiError | SvdEngineError):
            log.error("an error in a request", exc_info=error)
        return api_error(error, self._retry_after() if isinstance(error, QueueFullError) else 1)

    def drain(self) -> None:
        """Take no more requests, and give those that run their time to end."""
        self.draining = True
        self.loop.drain(self.settings.drain_seconds)

    def close(self) -> None:
        """End the threads. The model stays open."""
        self.loop.close()
        self._pool.close()
        self._threads.close()
        self.llm.read_with(*self._unbounded)

    def metrics_text(self) -> str:
        """For /metrics."""
        return self.metrics.text(self.llm.stats(), self.loop.request_count, self.loop.capacity)

    def _retry_after(self) -> int:
        """Seconds until a place is likely to be free: places come free evenly over the time of a completion."""
        duration = self.metrics.duration
        mean = duration.sum / duration.count if duration.count else 1.0
        return min(60, max(1, math.ceil(mean / self.loop.capacity)))


def completions(news: Mapping[int, Update]) -> dict[int, Completion]:
    """Those of the requests that are done."""
    return {index: update.completion for index, update in news.items() if update.completion is not None}


def _template_of(llm: LLM) -> ChatTemplate | None:
    try:
        return llm.chat_template
    except SvdEngineError:  # there is none, or it is damaged: who needs it is told
        return None
