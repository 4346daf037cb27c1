"""Speculative decoding: drafts from the sequence itself, and when they are worth trying."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import FakeExecutor

from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation
from svdengine.scheduling.sampling import SamplingParams
from svdengine.scheduling.sequence import Sequence
from svdengine.speculation.draft_gain import StepTimes
from svdengine.speculation.drafts import PromptLookup
from svdengine.speculation.speculation import MOST, Speculation


class Repeating(FakeExecutor):
    """A model that counts to 10 again and again."""

    def _logits(self, batch, row):  # type: ignore[no-untyped-def]
        logits = super()._logits(batch, row)
        logits[(int(batch.tokens[row]) + 1) % 10] = 100
        return logits


def generate(engine: Engine, **fields: object) -> list[int]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, **fields})  # type: ignore[arg-type]
    one = Generation(
        list(range(10)), params, vocab_size=50, end_tokens=frozenset(), limit=ContextLimit(100), decoder=None
    )
    engine.add(one)
    while not one.done:
        engine.step()
    assert one.error is None
    return one.token_ids


def test_drafts_are_what_came_before() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert lookup.draft([1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3], 6) == [9, 1, 2, 3, 9, 1]  # the last time counts
    assert lookup.draft([1, 2], 4) == []
    assert lookup.draft([7, 8, 9, 7, 8, 9], 1) == [7]


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 8))
def test_a_lookup_that_grows_finds_what_a_new_one_finds(tokens: list[int], most: int) -> None:
    lookup = PromptLookup()
    for end in range(len(tokens)):
        assert lookup.draft(tokens[:end], most) == PromptLookup().draft(tokens[:end], most)


def test_text_that_repeats_takes_fewer_steps_and_stays_the_same() -> None:
    plain, fast = Repeating(8, 64), Repeating(8, 64)
    expected = generate(Engine(plain))
    speculation = Speculation()
    engine = Engine(fast, drafter=speculation)
    speculation.note_step = lambda rows, seconds: None  # type: ignore[method-assign]
    assert generate(engine) == expected
    assert plain.steps == 60 and fast.steps < 20
    stats = engine.stats()
    assert stats.generated_tokens == 60
    assert stats.accepted_tokens == 60 - fast.steps
    assert stats.drafted_tokens <= stats.accepted_tokens + MOST  # those after the last token


def test_sampled_text_is_what_it_is_without_drafts() -> None:
    class Mixed(Repeating):
        def _logits(self, batch, row):  # type: ignore[no-untyped-def]
            return super()._logits(batch, row).clip(max=6.0)

    for seed in range(5):
        speculation = Speculation()
        speculation.note_step = lambda rows, seconds: None  # type: ignore[method-assign]
        engine = Engine(Mixed(8, 64), drafter=speculation)
        fields = {"temperature": 0.9, "seed": seed, "logprobs": 1}
        assert generate(engine, **fields) == generate(Engine(Mixed(8, 64)), **fields)
        assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens


def test_times_are_a_line_through_what_was_measured() -> None:
    times = StepTimes()
    assert times.relative_row_time(1) == 0.0
    for _ in range(300):
        times.note(1, 5e-3)
    assert times.relative_row_time(1) == 0.0  # nothing is known of more rows
    for rows in (1, 5, 3, 1, 9):
        times.note(rows, 4e-3 + rows * 1e-3)
    assert times.relative_row_time(1) == pytest.approx(1 / 5)
    assert times.relative_row_time(4) == pytest.approx(4 * 1 / 8)
    assert times.seconds(4) == pytest.approx(8e-3)


def test_what_was_measured_goes_before_the_line() -> None:
    times = StepTimes()
    assert times.seconds(1) is None
    for rows, seconds in ((1, 5e-3), (1, 5e-3), (1, 1.0), (4, 9e-3), (8, 9e-3)):  # one step was disturbed
        times.note(rows, seconds)
    assert times.seconds(1) == 5e-3 and times.seconds(8) == 9e-3


def test_drafts_are_tried_only_where_they_pay() -> None:
    noise = random.Random(0).choices(range(4), k=40)

    def tried(row_seconds: float, right: bool) -> int:
        speculation, sequence = Speculation(), Sequence([0, 1, 2, 3] * 20)
        for rows in (1, 4, 1, 8):
            speculation.step_times.note(rows, 1e-3 + rows * row_seconds)
        for step in range(len(noise)):
            count = len(speculation.draft(sequence, 1))
            sequence.append(len(sequence) % 4 if right else noise[step])
            speculation.note(sequence)
        return count

    assert tried(row_seconds=0.0, right=True) == MOST
    assert tried(row_seconds=0.1e-3, right=True) == MOST
    assert tried(row_seconds=10e-3, right=True) == 0  # a row times what a step does
    assert tried(row_seconds=0.5e-3, right=False) == 0
