"""The thread that runs requests: what comes out is what the library gives, and nothing is lost or kept."""

import queue
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import GatedExecutor
from patience import PATIENCE
from tiny_model import write_tiny_model

import svdengine
from svdengine import LLM, RequestError, SamplingParams, SvdEngineError
from svdengine.errors import QueueFullError, ShutdownError
from svdengine.server.request_loop import RequestLoop, Update

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS = ["hello", "once upon a time", "what is 2 + 2?", "the"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("loop") / "tiny.svdp")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device="reference", context=128, sequences=2) as llm:
        llm._engine.executor = GatedExecutor(llm._engine.executor)  # type: ignore[assignment]
        yield llm


@pytest.fixture
def loop(llm: LLM) -> Iterator[RequestLoop]:
    loop = RequestLoop(llm, capacity=8)
    yield loop
    gate_of(llm).let_go()
    loop.close()


def gate_of(llm: LLM) -> GatedExecutor:
    assert isinstance(llm._engine.executor, GatedExecutor)
    return llm._engine.executor


class Updates:
    """Collects the updates of one request."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Update] = queue.Queue()
        self.push = self._queue.put

    def next(self) -> Update:
        return self._queue.get(timeout=PATIENCE)

    def all(self) -> Update:
        found = self.next()
        while not found.last:
            found = found.joined(self.next())
        return found


def blocks_in_use(llm: LLM) -> int:
    llm._engine.prefix_cache.clear()
    return llm._engine.pool.block_count - llm._engine.pool.free_count


def test_updates_join_to_what_the_library_gives(llm: LLM, loop: RequestLoop) -> None:
    expected = llm.generate(PROMPTS, GREEDY, logprobs=1)
    each = [Updates() for _ in PROMPTS]
    loop.submit([(llm.prepare(p, GREEDY, logprobs=1), u.push) for p, u in zip(PROMPTS, each, strict=True)])
    for done, updates in zip(expected, each, strict=True):
        found = updates.all()
        assert found.completion is not None and found.error is None
        assert found.text == done.text == found.completion.text
        assert list(found.tokens) == done.token_ids
        assert [p.token for p in found.logprobs] == done.token_ids


def test_many_threads_with_cancellations(llm: LLM, loop: RequestLoop) -> None:
    expected = {p: llm.generate(p, GREEDY)[0].text for p in PROMPTS}

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(6):
            prompt, updates = chance.choice(PROMPTS), Updates()
            request = llm.prepare(prompt, GREEDY)
            loop.submit([(request, updates.push)])
            if chance.random() < 0.5:
                loop.cancel(request)
            found = updates.all()
            assert found.completion is not None
            if found.completion.finish_reason == "abort":
                assert expected[prompt].startswith(found.text)
            else:
                assert found.text == expected[prompt]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loop.request_count == 0
    assert blocks_in_use(llm) == 0


def test_capacity(llm: LLM, loop: RequestLoop) -> None:
    gate_of(llm).hold()
    each = [Updates() for _ in range(8)]
    loop.submit([(llm.prepare("hello", GREEDY), u.push) for u in each])
    with pytest.raises(QueueFullError, match="8 of at most 8 completions are running"):
        loop.submit([(llm.prepare("hello", GREEDY), Updates().push)])
    with pytest.raises(RequestError, match="at most 8"):
        loop.submit([(llm.prepare("hello", GREEDY), Updates().push)] * 9)
    gate_of(llm).let_go()
    assert all(u.all().completion is not None for u in each)
    more = Updates()
    loop.submit([(llm.prepare("hello", GREEDY), more.push)])
    assert more.all().completion is not None


def test_time_limits(llm: LLM, loop: RequestLoop) -> None:
    waiting, running = Updates(), Updates()
    loop.submit([(llm.prepare("hello", GREEDY), waiting.push)], seconds=0.0)
    assert isinstance(waiting.all().error, QueueFullError)
    gate_of(llm).hold()
    loop.submit([(llm.prepare("hello", GREEDY, max_tokens=None), running.push)], seconds=1.0)
    gate_of(llm).allow(3)
    first = running.next()
    assert first.tokens
    threading.Event().wait(1.05)
    gate_of(llm).let_go()
    found = first.joined(running.all())
    assert found.completion is not None and found.completion.finish_reason == "length"
    assert 1 <= len(found.tokens) <= 5
    assert blocks_in_use(llm) == 0


def test_a_step_that_fails_ends_its_requests_only(llm: LLM, loop: RequestLoop) -> None:
    gate_of(llm).fail = True
    updates = Updates()
    loop.submit([(llm.prepare("hello", GREEDY), updates.push)])
    error = updates.all().error
    assert isinstance(error, SvdEngineError) and "on fire" in str(error)
    assert loop.failing
    gate_of(llm).fail = False
    again = Updates()
    loop.submit([(llm.prepare("hello", GREEDY), again.push)])
    assert again.all().completion is not None
    assert not loop.failing and blocks_in_use(llm) == 0


def test_draining(llm: LLM, loop: RequestLoop) -> None:
    gate_of(llm).hold()
    updates = Updates()
    loop.submit([(llm.prepare("hello", GREEDY), updates.push)])
    loop.drain(60.0)
    with pytest.raises(ShutdownError, match="takes no more"):
        loop.submit([(llm.prepare("hello", GREEDY), Updates().push)])
    gate_of(llm).let_go()
    done = updates.all().completion
    assert done is not None and done.finish_reason == "length"


def test_closing_cuts_what_runs(llm: LLM) -> None:
    loop = RequestLoop(llm)
    gate_of(llm).hold()
    updates = Updates()
    loop.submit([(llm.prepare("hello", GREEDY), updates.push)])
    gate_of(llm).allow(1)
    assert updates.next().tokens
    loop.drain(0.0)
    gate_of(llm).let_go()
    loop.close()
    loop.close()
    assert isinstance(updates.all().error, ShutdownError)
    assert blocks_in_use(llm) == 0


def test_a_closed_model_is_reported(llm: LLM, loop: RequestLoop) -> None:
    request, updates = llm.prepare("hello", GREEDY), Updates()
    llm.close()
    loop.submit([(request, updates.push)])
    assert "was closed" in str(updates.all().error)
