"""The engine with an executor that chooses tokens itself: the same tokens, and logits only where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_model import FakeExecutor

from svdengine.errors import SvdEngineError
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import NOT_FINITE, Choice, Logits
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation, Scoring
from svdengine.scheduling.sampler import candidates
from svdengine.scheduling.sampling import SamplingParams

VOCAB = 50


class Chooser(FakeExecutor):
    """Chooses tokens as engine/scheduling/sampler.py does, and counts the rows of logits that it hands out."""

    handed_out = 0

    def forward_and_sample(self, batch: Batch, choices: Sequence[Choice | None]) -> tuple[NDArray[np.int32], Logits]:
        logits = self.forward(batch)
        assert len(choices) == len(logits)
        tokens = [self.chosen(row, choice) for row, choice in zip(logits, choices, strict=True)]
        rest = logits[[choice is None for choice in choices]]
        self.handed_out += len(rest)
        return np.array(tokens, np.int32), rest

    def chosen(self, row: NDArray[np.float32], choice: Choice | None) -> int:
        if choice is None:
            return -5
        if choice.temperature == 0:
            return int(row.argmax())
        params = SamplingParams(choice.temperature, choice.top_k, choice.top_p, choice.min_p)
        tokens, weights = candidates(row, params)
        return int(tokens[np.searchsorted(np.cumsum(weights), choice.draw * weights.sum(), side="right")])


class Broken(Chooser):
    def chosen(self, row: NDArray[np.float32], choice: Choice | None) -> int:
        return NOT_FINITE


def generation(prompt: list[int], **fields: Any) -> Generation:
    limit = ContextLimit(64)
    return Generation(
        prompt, SamplingParams(**fields), vocab_size=VOCAB, end_tokens=frozenset({7}), limit=limit, decoder=None
    )


def run(engine: Engine, *requests: Any) -> None:
    for one in requests:
        engine.add(one)
    while not all(one.done or one.error for one in requests):
        engine.step()


_fields = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "seed": st.integers(0, 5),
        "max_tokens": st.integers(1, 9),
        "top_k": st.sampled_from([0, 5]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
        "logit_bias": st.sampled_from([{}, {}, {3: 2.0}]),
        "logprobs": st.sampled_from([None, None, 2]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(8, 49), min_size=1, max_size=20), _fields), min_size=1, max_size=5),
    st.integers(1, 12),
)
def test_tokens_are_the_same_wherever_they_are_chosen(specs: list[Any], max_rows: int) -> None:
    found, scored = [], []
    for executor in (FakeExecutor(30, max_rows), Chooser(30, max_rows)):
        requests = [generation(prompt, **fields) for prompt, fields in specs]
        scoring = Scoring([9, 8, 9, 10], VOCAB, 64)
        run(Engine(executor), *requests, scoring)
        found.append([(one.token_ids, one.logprobs, one.finish_reason) for one in requests])
        scored.append(scoring.logits)
    assert found[0] == found[1]
    np.testing.assert_array_equal(*scored)


def test_logits_stay_where_they_are_unless_something_needs_them() -> None:
    executor = Chooser(30, 20)
    plain = [generation([9, 10], temperature=t, seed=1, max_tokens=4, ignore_eos=True) for t in (0.0, 1.0)]
    penalised = generation([9], temperature=0.0, max_tokens=3, presence_penalty=1.0, ignore_eos=True)
    run(Engine(executor), *plain, penalised)
    assert executor.handed_out == 3


def test_damaged_logits_end_a_request() -> None:
    request = generation([9, 10], temperature=0.0)
    run(Engine(Broken(30, 20)), request)
    assert isinstance(request.error, SvdEngineError) and "not finite" in str(request.error)
