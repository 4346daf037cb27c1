"""The library from coroutines: the same texts, shared steps, and nothing left when tasks are cancelled."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import eventually
from tiny_model import write_tiny_model

import svdengine
from svdengine import LLM, AsyncTextStream, ModelFileError, RequestError, SamplingParams, SvdEngineError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
HELLO = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("async") / "tiny.svdp")


@pytest.fixture
def llm(path: Path) -> Iterator[LLM]:
    with svdengine.load(path, device="reference", context=128, sequences=4) as llm:
        yield llm
        assert llm.stats().blocks_used == 0 and llm.stats().waiting == llm.stats().running == 0


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "svdengine-async"])


async def texts(stream: AsyncTextStream) -> str:
    return "".join([piece async for piece in stream])


def test_the_same_as_from_threads(llm: LLM) -> None:
    expected = llm.generate(["hello", "once upon"], GREEDY)
    answer = llm.chat(HELLO, GREEDY)

    async def main() -> None:
        stream = llm.astream("hello", GREEDY)
        assert await texts(stream) == expected[0].text == stream.completion.text
        assert stream.completion.finish_reason == "length" and stream.completion.stats.generated_tokens == 12
        assert await texts(llm.astream_chat(HELLO, GREEDY)) == answer.text
        assert (await llm.achat(HELLO, GREEDY)).token_ids == answer.token_ids
        done = await llm.agenerate(["hello", "once upon"], GREEDY)
        assert [d.text for d in done] == [d.text for d in expected]
        each = [GREEDY, SamplingParams(temperature=0.0, max_tokens=1)]
        assert [len(d.token_ids) for d in await llm.agenerate(["hello", "once upon"], each)] == [12, 1]
        (special,) = await llm.agenerate("<|im_start|>", GREEDY, special=True)
        assert special.stats.prompt_tokens == 1
        async with llm.astream("hello", GREEDY, max_tokens=3) as short:
            assert await texts(short) and len(short.completion.token_ids) == 3

    asyncio.run(main())


def test_tasks_share_steps(llm: LLM) -> None:
    llm.generate("hello", GREEDY)
    before = sum(llm.stats().steps.values())

    async def main() -> list[Any]:
        return await asyncio.gather(*(llm.agenerate(["hello", "hello"], GREEDY) for _ in range(4)))

    found = asyncio.run(main())
    assert len({done.text for both in found for done in both}) == 1
    assert sum(llm.stats().steps.values()) - before < 8 * 12 / 2


def test_other_tasks_run_meanwhile(llm: LLM) -> None:
    async def main() -> int:
        ticks, answering = 0, asyncio.create_task(llm.achat(HELLO, GREEDY, max_tokens=60))
        while not answering.done():
            await asyncio.sleep(0.001)
            ticks += 1
        await answering
        return ticks

    assert asyncio.run(main()) > 2  # a loop that is held up ticks once


def test_many_tasks_at_once(llm: LLM) -> None:
    """More than fit at a time: those that have to wait get their turn."""
    prompts = [f"hello {i}" for i in range(30)]
    expected = [done.token_ids for done in llm.generate(prompts, GREEDY)]

    async def main() -> list[Any]:
        return await asyncio.gather(*(llm.agenerate(prompt, GREEDY) for prompt in prompts))

    assert [done.token_ids for (done,) in asyncio.run(main())] == expected


@pytest.mark.parametrize(
    "end", ["cancel", "break", "aclose", "timeout", "with", "error", "cancel achat", "never begun"]
)
def test_who_goes_away_frees_the_blocks(llm: LLM, end: str) -> None:
    async def read(stream: AsyncTextStream, most: int) -> None:
        count = 0
        async for _ in stream:
            count += 1
            if count == most:
                return

    async def main() -> None:
        stream = llm.astream("hello world", LONG)
        if end in ("cancel", "cancel achat"):
            task: asyncio.Task[Any]
            task = asyncio.create_task(llm.achat(HELLO, LONG) if end == "cancel achat" else read(stream, 1000))
            while not llm.stats().generated_tokens:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif end == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(stream, 1000), 0.01)
        elif end == "aclose":
            await read(stream, 2)
            await stream.aclose()
            await stream.aclose()
            assert stream.completion.finish_reason == "abort"
            assert await texts(stream) is not None
            assert await texts(stream) == ""
        elif end == "with":
            async with stream:
                await read(stream, 2)
        elif end == "error":
            with pytest.raises(ZeroDivisionError):
                async with stream:
                    await read(stream, 1 // 0)
        elif end == "break":
            await read(stream, 2)
            del stream
            gc.collect()
            while llm.stats().blocks_used:
                await asyncio.sleep(0.001)
        elif end == "never begun":
            await stream.aclose()
            assert await texts(stream) == ""
            with pytest.raises(RequestError, match="begins with the first piece"):
                _ = stream.completion
        assert llm.stats().blocks_used == 0  # at once
        assert llm.stats().generated_tokens < 100

    asyncio.run(main())


def test_errors_come_with_the_first_piece(llm: LLM) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match="temperature"):
            await llm.achat(HELLO, temperature=-1)
        with pytest.raises(RequestError, match="the prompt is empty"):
            await texts(llm.astream(""))
        with pytest.raises(RequestError, match="2 sampling parameters for 1"):
            await llm.agenerate("a", [GREEDY, GREEDY])
        with pytest.raises(svdengine.ContextOverflowError):
            await llm.agenerate(["hello", "hello " * 400], LONG)
        assert llm.stats().blocks_used == 0  # of the first, which fits

    asyncio.run(main())


def test_a_step_that_fails_is_told_to_all(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[Any]:
        tasks = [asyncio.create_task(llm.achat(HELLO, LONG)) for _ in range(3)]
        while llm.stats().generated_tokens < 3:
            await asyncio.sleep(0.001)
        monkeypatch.setattr(llm._engine, "_check", lambda: (_ for _ in ()).throw(ModelFileError("changed")))
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(error) for error in asyncio.run(main())] == [ModelFileError] * 3


def test_closing_the_model_ends_the_tasks(path: Path) -> None:
    async def main() -> None:
        llm = svdengine.load(path, device="reference", context=128)
        task = asyncio.create_task(llm.achat(HELLO, LONG))
        while not llm.stats().generated_tokens:
            await asyncio.sleep(0.001)
        llm.close()
        with pytest.raises(SvdEngineError, match="was closed"):
            await task
        with pytest.raises(SvdEngineError, match="was closed"):
            await llm.achat(HELLO, LONG)

    asyncio.run(main())


def test_a_loop_that_ends_leaves_nothing_running(llm: LLM) -> None:
    async def main() -> None:
        stream = llm.astream("hello", LONG)
        await anext(stream)
        kept.append(stream)

    kept: list[AsyncTextStream] = []
    asyncio.run(main())
    eventually(lambda: llm.stats().blocks_used == 0)
    assert kept[0].completion.finish_reason in ("abort", "length")


def test_threads_and_loops_may_share_a_model(llm: LLM) -> None:
    expected, found = llm.generate("hello", GREEDY)[0].text, []

    def work(as_loop: bool) -> None:
        for _ in range(3):
            text = asyncio.run(texts(llm.astream("hello", GREEDY))) if as_loop else "".join(llm.stream("hello", GREEDY))
            found.append(text)

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 12


def test_it_keeps_no_model_alive(path: Path) -> None:
    async def main() -> weakref.ref[LLM]:
        llm = svdengine.load(path, device="reference", context=128)
        await llm.achat(HELLO, GREEDY)
        return weakref.ref(llm)

    kept = asyncio.run(main())
    eventually(lambda: kept() is None)
