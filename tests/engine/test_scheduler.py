"""The scheduler and the engine's loop, with an executor that notices every block that is not the sequence's own."""

from typing import Any

import numpy as np
import pytest
from tiny_model import FakeExecutor, logits_after

from svdengine.engine import Engine
from svdengine.errors import ContextOverflowError, RequestError, SvdEngineError
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.request import ContextLimit, Generation, Scoring
from svdengine.sampling import SamplingParams

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


def test_the_last_admitted_is_preempted_and_comes_back() -> None:
    engine = Engine(FakeExecutor(4, 64), prefix_caching=False)
    requests = [request([i] * 15, 64, max_tokens=30, ignore_eos=True) for i in (1, 2, 3)]
    run(engine, *requests)
    for one, i in zip(requests, (1, 2, 3), strict=True):
        assert one.token_ids == alone([i] * 15, 64, {"max_tokens": 30, "ignore_eos": True})
    assert engine.pool.free_count == 4


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
    with pytest.raises(ContextOverflowError, match="has 64 tokens and the context holds 64"):
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
