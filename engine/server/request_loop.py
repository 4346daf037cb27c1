"""A thread that drives a model for many requests at a time, which come and go from other threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from svdengine.errors import QueueFullError, RequestError, ShutdownError, SvdEngineError
from svdengine.llm import LLM
from svdengine.scheduling.completion import Completion
from svdengine.scheduling.request import Generation, LayerCounts
from svdengine.scheduling.sampler import TokenLogprobs


@dataclass(frozen=True)
class Update:
    """What a request gave since its last update. The last one has a completion, or an error."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # of the tokens, where they were asked for
    layers: tuple[LayerCounts | None, ...] = ()  # neurons of their steps, where these are kept
    completion: Completion | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether no other follows."""
        return self.completion is not None or self.error is not None

    def joined(self, later: Update) -> Update:
        """This one and the next in one."""
        return Update(
            self.text + later.text,
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            self.layers + later.layers,
            later.completion,
            later.error,
        )


Listener = Callable[[Update], None]  # called on the loop's thread: it must be quick and must not raise


@dataclass
class _Entry:
    listener: Listener
    deadline: float  # on the monotonic clock
    tokens: int = 0  # of them, how many the listener knows


@dataclass
class _Inbox:
    """What other threads ask of the loop. All fields are guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    calls: deque[Callable[[], None]] = field(default_factory=deque)
    requests: int = 0  # submitted and not ended
    refusing: bool = False  # no further request is taken
    stop_at: float | None = None  # when what still runs is cut short, on the monotonic clock
    closed: bool = False


class RequestLoop:
    """Runs requests together, a step at a time, and hands on after each step what it gave them.

    Nothing but this object may take steps of the model meanwhile, if its requests are to come in time.
    """

    def __init__(self, llm: LLM, capacity: int = 64) -> None:
        """`capacity`: most requests that run or wait at a time."""
        self._llm = llm
        self.capacity = capacity
        self._entries: dict[Generation, _Entry] = {}  # the loop's thread only
        self._inbox = _Inbox()
        self._failing = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="svdengine-requests", daemon=True)
        self._thread.start()

    @property
    def request_count(self) -> int:
        """Requests that run or wait."""
        return self._inbox.requests

    @property
    def failing(self) -> bool:
        """Whether the latest step raised an error, or no further one will come."""
        return self._failing or not self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """How long the step at hand takes so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def submit(self, requests: Sequence[tuple[Generation, Listener]], seconds: float | None = None) -> None:
        """Run requests from `LLM.prepare`, all or none.

        One that is not complete after `seconds` ends as if its length limit were reached, or with QueueFullError
        when it has no token yet. Raises QueueFullError when too many others run or wait, RequestError when these alone
        are too many, ShutdownError when the loop is ending.
        """
        if len(requests) > self.capacity:
            raise RequestError(f"{len(requests)} completions were asked for at once; at most {self.capacity} may run")
        deadline = time.monotonic() + seconds if seconds is not None else float("inf")
        inbox = self._inbox
        with inbox.changed:
            if inbox.refusing:
                raise ShutdownError("the program is shutting down and takes no more requests")
            if inbox.requests + len(requests) > self.capacity:
                raise QueueFullError(
                    f"{inbox.requests} of at most {self.capacity} completions are running or waiting, and "
                    f"{len(requests)} more were asked for; try again later"
                )
            inbox.requests += len(requests)
            inbox.calls.extend(
                partial(self._begin, request, _Entry(listener, deadline)) for request, listener in requests
            )
            inbox.changed.notify()

    def cancel(self, request: Generation) -> None:
        """End a request before the next step. Its last update says "abort"; one that is done is left as it is."""
        self._ask(partial(self._end, request))

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end those that still run after `seconds` with ShutdownError."""
        inbox = self._inbox
        with inbox.changed:
            inbox.refusing = True
            inbox.stop_at = time.monotonic() + seconds
            inbox.changed.notify()

    def close(self) -> None:
        """End every request with ShutdownError, and the thread. The model stays open. Closing twice is fine."""
        self.drain(0.0)
        with self._inbox.changed:
            self._inbox.closed = True
            self._inbox.changed.notify()
        self._thread.join()

    def _ask(self, call: Callable[[], None]) -> None:
        with self._inbox.changed:
            self._inbox.calls.append(call)
            self._inbox.changed.notify()

    def _run(self) -> None:
        while True:
            for call in self._calls():
                call()
            self._end_overdue()
            if self._entries:
                self._step()
            elif self._inbox.closed and not self._inbox.calls:
                return
            self._hand_on()

    def _calls(self) -> list[Callable[[], None]]:
        """What was asked; it waits for something when there is nothing to do."""
        inbox = self._inbox
        with inbox.changed:
            while not (inbox.calls or self._entries or inbox.closed):
                inbox.changed.wait()
            calls = list(inbox.calls)
            inbox.calls.clear()
        return calls

    def _begin(self, request: Generation, entry: _Entry) -> None:
        self._entries[request] = entry
        try:
            self._llm.add(request)
        except SvdEngineError as error:
            request.error = error

    def _end(self, request: Generation) -> None:
        if request in self._entries:
            self._llm.abort(request)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        stop_at = self._inbox.stop_at
        for request, entry in self._entries.items():
            if request.done:
                continue
            if stop_at is not None and now >= stop_at:
                self._cut(request, ShutdownError("the program is shutting down; the answer was cut short"))
            elif now >= entry.deadline and not request.token_ids:
                self._cut(request, QueueFullError("the time limit passed before the request's turn; try again later"))
            elif now >= entry.deadline:
                self._llm.abort(request, "length")

    def _cut(self, request: Generation, error: Exception) -> None:
        request.error = error
        self._llm.abort(request)

    def _step(self) -> None:
        self._step_began = time.monotonic()
        try:
            self._llm.step()
            self._failing = False
        except Exception as error:
            self._failing = True
            for request in self._entries:
                if not request.done:
                    self._cut(request, error)
        finally:
            self._step_began = None

    def _hand_on(self) -> None:
        news = [(request, entry, _news(request, entry)) for request, entry in self._entries.items()]
        ended = [request for request, _, update in news if update.last]
        for request in ended:
            del self._entries[request]
        with self._inbox.changed:  # before it is told: whoever hears of an end may submit at once
            self._inbox.requests -= len(ended)
        for _, entry, update in news:
            if update.tokens or update.text or update.last:
                entry.listener(update)


def _news(request: Generation, entry: _Entry) -> Update:
    text = "".join(request.pieces)
    request.pieces.clear()
    layers = tuple(request.layers)
    request.layers.clear()
    start, entry.tokens = entry.tokens, len(request.token_ids)
    return Update(
        text,
        tuple(request.token_ids[start:]),
        tuple(islice(request.logprobs, start, None)),
        layers,
        request.completion() if request.finish_reason is not None else None,
        request.error,
    )
