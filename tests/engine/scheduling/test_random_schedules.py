"""Random schedules on tiny pools: whatever comes and goes, requests get what they get alone, and no block is lost.

The executor's logits depend on every token in the slots that it is told of, so that a wrong block table shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import FakeExecutor, logits_after

from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.executor import Executor, FfnMode, Logits
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.prefix_cache import block_digest, root_digest
from svdengine.scheduling.request import ContextLimit, Generation, Scoring
from svdengine.scheduling.sampling import SamplingParams
from svdengine.scheduling.scheduler import Step
from svdengine.scheduling.sequence import Sequence
from svdengine.speculation.speculation import Speculation

VOCAB = 50


@dataclass(frozen=True)
class Arrival:
    """One request of a schedule."""

    step: int
    beginning: int  # which of a few texts the prompt is cut from, so that prefixes are shared
    length: int
    max_tokens: int
    temperature: float
    priority: int
    sparsity_bias: float
    ffn: FfnMode | None
    cancelled_after: int | None  # steps
    shift: bool
    scoring: bool
    next_turn: bool  # once it is done, another request goes on where it ended


@dataclass(frozen=True)
class Schedule:
    """Arrivals, and what they run on."""

    arrivals: list[Arrival]
    block_count: int
    block_size: int
    max_rows: int
    prefill_rows: int
    prefix_caching: bool
    drafts: int | None  # None: nothing is drafted
    restart_at: int  # step at which the FFN's path changes


schedules = st.builds(
    Schedule,
    st.lists(
        st.builds(
            Arrival,
            step=st.integers(0, 15),
            beginning=st.integers(0, 2),
            length=st.integers(1, 60),
            max_tokens=st.integers(1, 30),
            temperature=st.sampled_from([0.0, 1.0]),
            priority=st.sampled_from([0, 0, 0, -1, 2]),
            sparsity_bias=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
            ffn=st.sampled_from([None, None, None, "dense", "sparse"]),
            cancelled_after=st.sampled_from([None, None, None, 0, 1, 3, 8]),
            shift=st.sampled_from([False, False, True]),
            scoring=st.sampled_from([False, False, False, False, True]),
            next_turn=st.booleans(),
        ),
        min_size=1,
        max_size=8,
    ),
    block_count=st.integers(4, 12),
    block_size=st.sampled_from([BLOCK_SIZE, BLOCK_SIZE, 128, 5]),
    max_rows=st.integers(1, 40),
    prefill_rows=st.integers(1, 20),
    prefix_caching=st.sampled_from([True, True, True, False]),
    drafts=st.one_of(st.none(), st.integers(0, 99)),
    restart_at=st.sampled_from([5, 10**9]),
)


def check_every_request(schedule: Schedule) -> None:
    executor = Drafter(schedule.block_count, schedule.max_rows, schedule.block_size)
    engine = Engine(
        executor,
        prefix_caching=schedule.prefix_caching,
        prefill_rows=schedule.prefill_rows,
        drafter=None if schedule.drafts is None else Guesses(schedule.drafts, executor),
    )
    engine.scheduler.schedule = partial(check_step, engine, schedule, engine.scheduler.schedule)  # type: ignore
    room = Room(engine, schedule)
    arrivals = sorted(schedule.arrivals, key=lambda a: a.step)
    for step in range(20_000):
        while arrivals and arrivals[0].step <= step:
            room.enter(arrivals.pop(0), step)
        room.cancel(step)
        if step == schedule.restart_at:
            engine.set_ffn("sparse")
        engine.step()
        check_blocks(engine)
        room.go_on(step)
        if not arrivals and engine.scheduler.idle:
            break
    else:
        raise AssertionError("some request never ends")
    room.check()
    engine.prefix_cache.clear()
    assert engine.pool.blank_count == schedule.block_count


class Drafter(FakeExecutor):
    """Steps with another sparsity bias than requests have are drafts, wrong at times; exact steps must not see them."""

    predictor: Any

    def __init__(self, block_count: int, max_batch_rows: int, block_size: int = BLOCK_SIZE) -> None:
        super().__init__(block_count, max_batch_rows, block_size=block_size)
        self.predictor = SimpleNamespace(scores_nothing=False)

    def forward(self, batch: Batch) -> Logits:
        shift = 0 if batch.sparsity_bias is None else int(1000 * batch.sparsity_bias[0]) % 500
        if not shift:
            return super().forward(batch)
        assert self.ffn == "sparse"
        slot = self._slot(batch, 0, int(batch.positions[0]))
        assert len(batch.tokens) == 1
        bias = int(1000 * batch.sparsity_bias[0]) - shift  # type: ignore[index]
        self.cache[slot], self.paths[slot] = batch.tokens[0] + bias, "draft"
        slots = [self._slot(batch, 0, p) for p in range(int(batch.positions[0]) + 1)]
        seen = self.cache[slots].tolist()
        logits = logits_after(seen, VOCAB)
        return (logits if sum(seen) % 3 else -logits)[None]


class Guesses(Speculation):
    """Drafts some tokens that the likeliest ones will be, and then wrong ones; or has the executor draft."""

    def __init__(self, seed: int, executor: Executor) -> None:
        super().__init__(executor)
        self._random = np.random.default_rng(seed)

    def own_draft_length(self, sequence: Sequence) -> int:
        return int(self._random.integers(0, 6))

    def draft(self, sequence: Sequence, rows: int) -> list[int]:
        super().draft(sequence, rows)
        if self._random.integers(0, 2):
            return []
        seen = [token + int(1000 * sequence.sparsity_bias) for token in sequence.tokens]
        right, wrong = self._random.integers(0, 5, 2)
        draft = []
        for _ in range(right):
            draft.append(int(logits_after(seen, VOCAB).argmax()))
            seen.append(draft[-1] + int(1000 * sequence.sparsity_bias))
        return draft + [3] * int(wrong)


class Room:
    """The requests of a schedule."""

    def __init__(self, engine: Engine, schedule: Schedule) -> None:
        self.engine, self.schedule = engine, schedule
        self.capacity = schedule.block_count * schedule.block_size
        self.made: list[tuple[Generation | Scoring, Arrival, list[int], int]] = []

    def enter(self, arrival: Arrival, step: int, prompt: list[int] | None = None) -> None:
        if prompt is None:
            text = np.random.default_rng(arrival.beginning).integers(0, VOCAB, 60).tolist()
            prompt = text[: min(arrival.length, self.capacity - 1)]
        made = self._request(arrival, prompt)
        self.made.append((made, arrival, prompt, step))
        self.engine.add(made)

    def cancel(self, step: int) -> None:
        for made, arrival, _, entered in self.made:
            if arrival.cancelled_after is not None and step == entered + arrival.cancelled_after:
                self.engine.abort(made)

    def go_on(self, step: int) -> None:
        for made, arrival, prompt, _ in list(self.made):
            if not (arrival.next_turn and isinstance(made, Generation) and made.done):
                continue
            longer = [*prompt, *made.token_ids, 1, 2]
            arrival = replace(arrival, next_turn=False)
            self.made = [(m, arrival if m is made else a, p, s) for m, a, p, s in self.made]
            if len(longer) < self.capacity:
                self.enter(arrival, step, longer)

    def check(self) -> None:
        for made, arrival, prompt, _ in self.made:
            assert made.error is None
            if isinstance(made, Scoring):
                if made.done:
                    bias = int(1000 * arrival.sparsity_bias)
                    seen = [token + bias for token in prompt]
                    for i in range(len(prompt)):
                        assert np.array_equal(made.logits[i], logits_after(seen[: i + 1], VOCAB))
                continue
            expected = self._alone(arrival, prompt)
            if arrival.cancelled_after is None:
                assert made.done
            if made.done:
                assert made.token_ids == expected
            else:
                assert made.token_ids == expected[: len(made.token_ids)]

    def _alone(self, arrival: Arrival, prompt: list[int]) -> list[int]:
        executor = FakeExecutor(self.schedule.block_count, 64, block_size=self.schedule.block_size)
        engine = Engine(executor, prefix_caching=False)
        one = self._request(arrival, prompt)
        assert isinstance(one, Generation)
        engine.add(one)
        while not one.done:
            engine.step()
        return one.token_ids

    def _request(self, arrival: Arrival, prompt: list[int]) -> Any:
        if arrival.scoring:
            return Scoring(prompt, VOCAB, self.capacity, arrival.sparsity_bias)
        params = SamplingParams(
            temperature=arrival.temperature,
            max_tokens=arrival.max_tokens,
            seed=arrival.length,
            sparsity_bias=arrival.sparsity_bias,
            ffn=arrival.ffn,
            priority=arrival.priority,
        )
        limit = ContextLimit(min(self.capacity, 48) if arrival.shift else self.capacity, arrival.shift, keep=18)
        return Generation(
            prompt,
            params,
            vocab_size=VOCAB,
            end_tokens=frozenset({7}),
            limit=limit,
            decoder=None,
        )


def check_step(engine: Engine, schedule: Schedule, make_step: Callable[[], Step | None]) -> Step | None:
    """All that decode by the same path get a row, and prompts no more than they may have."""
    step = make_step()
    if step is None:
        assert engine.scheduler.idle
        return None
    rows = {chunk.sequence: chunk.rows for chunk in step.chunks}
    assert {s.ffn for s in rows} == {step.ffn}
    decoding = [s for s in engine.scheduler._running if s.pending == 1 and s.ffn == step.ffn]
    assert all(rows.get(s) == 1 + len(s.draft) for s in decoding)
    assert not any(s.draft for s in rows if s.pending > 1)
    assert all(s.most_tokens is None or len(s) + len(s.draft) <= s.most_tokens for s in rows)
    assert 1 <= sum(rows.values()) <= schedule.max_rows
    if decoding:
        assert sum(rows[s] for s in rows if s.pending > 1) <= schedule.prefill_rows
    return step


def check_blocks(engine: Engine) -> None:
    """Reference counts add up, and what is known of blocks is so."""
    scheduler, pool, cache = engine.scheduler, engine.pool, engine.prefix_cache
    size = pool.block_size
    owned = [block for s in scheduler._running for block in s.block_table]
    assert all(pool.owner_count(block) == owned.count(block) for block in range(pool.block_count))
    assert pool.free_count == pool.block_count - len(set(owned))
    assert not any(s.block_table or s.cached or s.digests for s in scheduler._waiting)
    assert set(pool.idle_blocks) == set(cache._known) - set(owned)
    assert len(cache._full) + len(cache._tails) == len(cache._known)
    for sequence in scheduler._running:
        assert sequence.cached <= len(sequence.block_table) * size
        digests = [root_digest(sequence.sparsity_bias, sequence.ffn)]
        for i in range(len(sequence.digests)):
            digests.append(block_digest(digests[-1], sequence.tokens[i * size : (i + 1) * size]))
        assert sequence.digests == digests[1:]
        for known in map(cache._known.get, sequence.block_table[sequence.cached // size :]):
            assert known is None  # a block that will be written to
    order = [(s.priority, s.arrival) for s in scheduler._running], [(s.priority, s.arrival) for s in scheduler._waiting]
    assert all(one == sorted(one) for one in order)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_every_request_gets_what_it_gets_alone(schedule: Schedule) -> None:
    check_every_request(schedule)


@pytest.mark.long
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedules)
def test_ten_thousand_schedules(schedule: Schedule) -> None:
    check_every_request(schedule)
