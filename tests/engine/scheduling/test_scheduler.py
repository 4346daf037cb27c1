"""The scheduler and the engine's loop, with an executor that notices every block that is not the sequence's own."""

from typing import Any

import numpy as np
import pytest
from tiny_model import FakeExecutor, logits_after

from svdengine.errors import ContextOverflowError, RequestError, SvdEngineError
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation, Scoring
from svdengine.scheduling.sampling import SamplingParams

VOCAB = 50


def request(prompt: list[int], limit: ContextLimit | int, **fields: Any) -> Generation:
    limit = ContextLimit(limit) if isinstance(limit, int) else limit
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **fields})
    return Generation(prompt, params, vocab_size=VOCAB, end_tokens=frozenset({7}), limit=limit, decoder=None)


def run(engine: Engine, *requests: Any) -> None:
    for one in requests:
        engine.add(one)
    for _ in range(10000):
        if all(one.done or one.error for one in requests):
            return
        engine.step()
    raise AssertionError("the engine makes no progress")


def alone(prompt: list[int], limit: ContextLimit | int, fields: dict[str, Any]) -> list[int]:
    engine = Engine(FakeExecutor(64, 64))
    one = request(prompt, limit, **fields)
    run(engine, one)
    return one.token_ids


def test_decode_rows_go_before_prompts() -> None:
    engine = Engine(FakeExecutor(32, 4))
    first, second = request([1, 2], 200, max_tokens=20, ignore_eos=True), request(list(range(30)), 200)
    engine.add(first)
    engine.step()
    engine.add(second)
    engine.step()
    assert len(first.token_ids) == 2
    assert second.sequence.cached == 3


def test_admission_is_first_come_first_served() -> None:
    engine = Engine(FakeExecutor(4, 64))
    large, larger, small = request([1] * 40, 64), request([2] * 50, 64), request([3], 64)
    for one in (large, larger, small):
        engine.add(one)
    engine.step()
    assert [len(one.token_ids) for one in (large, larger, small)] == [1, 0, 0]


def test_a_lower_number_goes_first() -> None:
    engine = Engine(FakeExecutor(4, 64))
    running = request([1] * 40, 64, ignore_eos=True)
    later, sooner = request([2] * 40, 64), request([3] * 40, 64, priority=-1)
    for one in (running, later, sooner):
        engine.add(one)
    engine.step()  # the one of the lower number is admitted alone
    assert [len(one.token_ids) for one in (running, later, sooner)] == [0, 0, 1]
    urgent = request([4] * 20, 64, priority=-2)
    run(engine, urgent)  # and makes room for another
    assert not sooner.done
    assert engine.scheduler.preemptions == 1
    while not (running.done and later.done):
        engine.step()
        assert not later.token_ids or running.done
    assert sooner.token_ids == alone([3] * 40, 64, {})


def test_a_short_prompt_waits_neither_for_one_long_prompt_nor_for_several() -> None:
    """Nor do those that decode: their steps stay small."""
    executor = FakeExecutor(300, 64)
    engine = Engine(executor, prefill_rows=16)
    decoding = request([1], 1000, max_tokens=None, ignore_eos=True)
    engine.add(decoding)
    engine.step()
    long = [request([i] * 900, 1000) for i in range(2, 6)]
    for one in long:
        engine.add(one)
    for _ in range(5):
        engine.step()
    short = request([9] * 24, 1000, max_tokens=1)
    engine.add(short)
    steps = 0
    while not short.done:
        executor.rows = 0
        engine.step()
        assert executor.rows <= 1 + 16
        steps += 1
    assert steps == 24 / (16 / 2)  # half of the rows for prompts were its own
    assert len(decoding.token_ids) == 1 + 5 + steps
    assert long[0].sequence.cached == 5 * 16 + steps * 8
    engine.abort(decoding)
    executor.rows = 0
    engine.step()
    assert executor.rows == 64  # nobody waits for a token now


def test_a_request_that_the_pool_cannot_hold_is_refused_at_once() -> None:
    engine = Engine(FakeExecutor(4, 64))
    with pytest.raises(
        ContextOverflowError,
        match="70 tokens need 5 KV blocks and there are 4: this model's maximum context length is 64",
    ):
        engine.add(request([1] * 70, 100))
    grows = request([1] * 60, 100, max_tokens=30, ignore_eos=True)
    run(engine, grows, fine := request([2], 60))
    assert isinstance(grows.error, ContextOverflowError)
    assert len(grows.token_ids) == 5
    assert fine.token_ids == alone([2], 60, {})
    assert engine.pool.free_count == 4


def test_the_last_admitted_is_preempted_and_comes_back() -> None:
    engine = Engine(FakeExecutor(4, 64), prefix_caching=False)
    requests = [request([i] * 15, 64, max_tokens=30, ignore_eos=True) for i in (1, 2, 3)]
    run(engine, *requests)
    for one, i in zip(requests, (1, 2, 3), strict=True):
        assert one.token_ids == alone([i] * 15, 64, {"max_tokens": 30, "ignore_eos": True})
    assert engine.pool.free_count == 4


def test_under_pressure_no_token_is_computed_twice() -> None:
    """32 clients in a pool that holds a third of what they will come to: they take turns, and nobody is sent back."""
    executor = FakeExecutor(128, 256)
    engine = Engine(executor)
    random = np.random.default_rng(1)
    waiting = [
        request(random.integers(8, VOCAB, random.integers(30, 50)).tolist(), 1024, max_tokens=int(m), ignore_eos=True)
        for m in random.integers(20, 129, 64)
    ]
    expected = sum(len(one.sequence) + one.params.max_tokens - 1 for one in waiting)
    running: list[Generation] = []
    while waiting or running:
        while waiting and len(running) < 32:
            running.append(waiting.pop())
            engine.add(running[-1])
        engine.step()
        running = [one for one in running if not one.done]
    assert engine.scheduler.preemptions == 0
    assert executor.rows == expected


def test_a_conversation_costs_only_its_new_tokens() -> None:
    executor = FakeExecutor(16, 64)
    engine = Engine(executor)
    first = request(list(range(20)), 200, max_tokens=5, ignore_eos=True)
    run(engine, first)
    executor.rows = 0
    second = request([*range(20), *first.token_ids, 9, 9], 200, max_tokens=1)
    run(engine, second)
    assert executor.rows == 3  # the last token of the answer was never read
    assert second.completion().stats.cached_tokens == 24


def test_a_preempted_sequence_finds_what_nobody_needed() -> None:
    executor = FakeExecutor(7, 64)
    engine = Engine(executor)
    run(engine, *(request([i], 90, max_tokens=1) for i in range(20)))  # so that short answers are expected
    first = request([1] * 31, 90, max_tokens=40, ignore_eos=True)
    second = request(list(range(40)), 90, max_tokens=30, ignore_eos=True)
    run(engine, first, second)
    assert engine.scheduler.preemptions == 1
    assert engine.scheduler.prefix_hit_tokens > 0
    assert second.token_ids == alone(list(range(40)), 90, {"max_tokens": 30, "ignore_eos": True})


def test_running_sequences_share_what_they_have_in_common() -> None:
    executor = FakeExecutor(16, 64)
    engine = Engine(executor, prefill_rows=64)
    system = [i % VOCAB for i in range(48)]
    prompts = [[*system, i, i] for i in range(1, 4)]
    requests = [request(prompt, 200, max_tokens=12, ignore_eos=True) for prompt in prompts]
    engine.add(requests[0])
    engine.step()
    for one in requests[1:]:
        engine.add(one)
    engine.step()
    tables = [one.sequence.block_table for one in requests]
    assert tables[0][:3] == tables[1][:3] == tables[2][:3]
    assert len({table[3] for table in tables}) == 3
    assert engine.pool.free_count == 16 - 3 - 3
    assert executor.rows == 50 + 1 + 2 * 2
    for one in requests[1:]:
        engine.abort(one)
    run(engine, again := request(prompts[1], 200, max_tokens=12, ignore_eos=True))
    assert again.token_ids == alone(prompts[1], 200, {"max_tokens": 12, "ignore_eos": True})


def test_prompts_that_come_together_compute_what_they_share_once() -> None:
    executor = FakeExecutor(32, 16)
    engine = Engine(executor)
    system = [i % VOCAB for i in range(160)]
    requests = [request([*system, i], 400, max_tokens=1) for i in range(3)]
    run(engine, *requests)
    assert executor.rows <= 161 + 2 * 1 + 2 * 16
    tables = {tuple(one.sequence.block_table) for one in requests}
    assert tables == {()}
    assert engine.pool.free_count == 32


def test_the_least_recently_used_prefix_is_given_up_first() -> None:
    executor = FakeExecutor(7, 64)
    engine = Engine(executor)
    prompts = [[i] * 33 for i in (1, 2, 3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):  # each takes three blocks
        run(engine, request(prompt, 100, max_tokens=1))
    for prompt, computed in ((prompts[2], 1), (prompts[0], 1), (prompts[1], 33)):
        executor.rows = 0
        run(engine, request(prompt, 100, max_tokens=1))
        assert executor.rows == computed


def test_other_prompts_share_full_blocks() -> None:
    executor = FakeExecutor(16, 64)
    engine = Engine(executor)
    prefix = [i % VOCAB for i in range(35)]
    run(engine, request([*prefix, *[1] * 40], 200, max_tokens=1))
    executor.rows = 0
    run(engine, request([*prefix, 2], 200, max_tokens=1))
    assert executor.rows == 36 - 32


def test_context_end() -> None:
    engine = Engine(FakeExecutor(4, 64))
    one = request([1] * 60, 64, max_tokens=None, ignore_eos=True)
    run(engine, one)
    assert one.finish_reason == "length"
    assert len(one.token_ids) == 4
    with pytest.raises(
        ContextOverflowError, match="has 64 tokens and this model's maximum context length is 64 tokens"
    ):
        request([1] * 64, 64)


def test_context_shift_keeps_the_beginning() -> None:
    engine = Engine(FakeExecutor(4, 8))
    one = request([1, 2, 3], ContextLimit(40, shift=True, keep=2), max_tokens=200, ignore_eos=True)
    run(engine, one)
    assert len(one.token_ids) == 200
    assert one.sequence.tokens[:2] == [1, 2]
    assert one.sequence.tokens[2:] == one.token_ids[-len(one.sequence.tokens) + 2 :]

    # Each token follows from the tokens that were left at that time.
    tokens = [1, 2, 3]
    for token in one.token_ids:
        assert token == int(logits_after(tokens, VOCAB).argmax())
        tokens.append(token)
        if len(tokens) >= 40:
            del tokens[2 : 2 + (len(tokens) - 2 + 1) // 2]
    long = request([1, 2, *[3] * 60, 4], ContextLimit(40, shift=True, keep=2))
    assert long.sequence.tokens == [1, 2, *[3] * 18, 4]


def test_end_tokens() -> None:
    prompt = next([p, q] for p in range(VOCAB) for q in range(VOCAB) if logits_after([p, q], VOCAB).argmax() == 7)
    engine = Engine(FakeExecutor(8, 8))
    ended, ignored = request(prompt, 100), request(prompt, 100, ignore_eos=True)
    stopped = request(prompt, 100, ignore_eos=True, stop_token_ids=[7])
    run(engine, ended, ignored, stopped)
    assert ended.token_ids == stopped.token_ids == [7] and ended.finish_reason == "stop"
    assert len(ignored.token_ids) == 8 and ignored.finish_reason == "length"


def test_abort_frees_blocks_in_every_state() -> None:
    engine = Engine(FakeExecutor(4, 8), prefix_caching=False)
    running, prefilling, queued = request([1], 60), request([2] * 30, 60), request([3] * 50, 60)
    for one in (running, prefilling, queued):
        engine.add(one)
    engine.step()
    for one in (running, prefilling, queued, queued):
        engine.abort(one)
    assert engine.scheduler.idle and engine.pool.free_count == 4
    engine.step()


def test_an_executor_that_fails_ends_all_requests() -> None:
    executor = FakeExecutor(4, 8)
    engine = Engine(executor)
    first, second = request([1], 60), request([2], 60)
    engine.add(first)
    engine.add(second)
    engine.step()
    executor.fail = True
    with pytest.raises(RuntimeError, match="on fire"):
        engine.step()
    assert isinstance(first.error, SvdEngineError) and isinstance(second.error, SvdEngineError)
    assert engine.pool.free_count == 4
    executor.fail = False
    run(engine, third := request([1], 60))
    assert third.error is None


def test_a_request_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(FakeExecutor(4, 8), prefix_caching=False)
    broken, fine = request([1], 60), request([2], 60)
    monkeypatch.setattr(broken._sampler, "sample", lambda logits: 1 // 0)
    run(engine, broken, fine)
    assert isinstance(broken.error, ZeroDivisionError)
    assert fine.token_ids == alone([2], 60, {})
    assert engine.pool.free_count == 4


@pytest.mark.parametrize("max_rows", [1, 7, 64])
def test_scoring_gives_every_row(max_rows: int) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 30).tolist()
    engine = Engine(FakeExecutor(4, max_rows))
    run(engine, request(tokens, 60, max_tokens=1))  # leaves the same prefix in the cache
    scoring = Scoring(tokens, VOCAB, 60)
    run(engine, scoring, request([5] * 20, 60, max_tokens=20, ignore_eos=True))
    for i in range(30):
        assert np.array_equal(scoring.logits[i], logits_after(tokens[: i + 1], VOCAB))


def test_unusable_prompts() -> None:
    with pytest.raises(RequestError, match="empty"):
        request([], 10)
    with pytest.raises(RequestError, match="token id 50; ids of this model lie in"):
        request([50], 10)
    with pytest.raises(ContextOverflowError, match="11 tokens do not fit the context of 10"):
        Scoring([1] * 11, VOCAB, 10)
