"""Drafts by the model's own sparse path: they change no token, leave no trace, and are made where they pay."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_model import FakeExecutor
from tiny_predictor import write_sparse_model

import svdengine
from svdengine.errors import SvdEngineError
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import NOT_FINITE, Choice
from svdengine.llm import LLM
from svdengine.scheduling.engine_loop import Engine
from svdengine.scheduling.request import ContextLimit, Generation
from svdengine.scheduling.sampling import SamplingParams
from svdengine.scheduling.sequence import Sequence
from svdengine.speculation import drafts as self_draft
from svdengine.speculation.draft_gain import DraftGain, StepTimes
from svdengine.speculation.drafts import PromptLookup, can_draft, draft_tokens
from svdengine.speculation.speculation import Speculation

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.5, seed=3, max_tokens=40, ignore_eos=True)
PROMPT = "once upon a time there was a user"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose predictor misses some active neurons, so that drafts are wrong at times."""
    return write_sparse_model(tmp_path_factory.mktemp("model") / "tiny.svdp", offset=-0.4)


@pytest.fixture(params=["reference", "cpu"])
def opened(request: pytest.FixtureRequest, path: Path) -> Iterator[Callable[..., LLM]]:
    """Opens the model on a device."""
    made: list[LLM] = []

    def opened(ffn: str = "dense", speculative: bool = False) -> LLM:
        made.append(svdengine.load(path, request.param, ffn, 2, context=128, kv_dtype="f32", speculative=speculative))
        return made[-1]

    yield opened
    for llm in made:
        llm.close()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens are drafted by the model for each step, and none by the sequence."""
    monkeypatch.setattr(Speculation, "own_draft_length", lambda *_: 3)
    monkeypatch.setattr(PromptLookup, "draft", lambda *_: [])
    monkeypatch.setattr(self_draft, "DRAFT_BIAS", 0.5)  # wrong more often


@pytest.mark.parametrize("ffn", ["dense", "sparse"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.usefixtures("always")
def test_drafts_change_no_token(opened: Callable[..., LLM], ffn: str, params: SamplingParams) -> None:
    plain, fast = opened(ffn), opened(ffn, speculative=True)
    (expected,), (found,) = plain.generate(PROMPT, params), fast.generate(PROMPT, params)
    assert found.token_ids == expected.token_ids
    stats = fast.stats()
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert sum(stats.steps.values()) < 40 and stats.generated_tokens == 40
    assert fast.ffn == ffn
    if ffn == "dense":
        assert stats.accepted_tokens < stats.drafted_tokens
        # What drafts computed is not what the text was computed with.
        assert found.stats.predicted_density is None and set(stats.steps) == {"dense"}


def test_the_rule_changes_no_token(opened: Callable[..., LLM]) -> None:
    plain, fast = opened(), opened(speculative=True)
    assert fast.generate(PROMPT, GREEDY)[0].token_ids == plain.generate(PROMPT, GREEDY)[0].token_ids
    assert fast.stats().drafted_tokens > 0


@pytest.mark.usefixtures("always")
def test_nothing_of_a_draft_is_seen_later(opened: Callable[..., LLM]) -> None:
    plain, fast = opened(), opened(speculative=True)
    blocks = []
    for llm in (plain, fast):
        (first,) = llm.generate(PROMPT, GREEDY)
        known = {(k.parent, k.tokens): k.block for k in llm._engine.prefix_cache.contents()}
        read = llm._block_store().read_blocks(list(known.values()))
        blocks.append({key: read[i, :, :, : len(key[1])] for i, key in enumerate(known)})
        turn = [*llm.tokenizer.encode(PROMPT), *first.token_ids, 5, 6, 7]
        (second,) = llm.generate([turn], GREEDY, logprobs=0, max_tokens=8)
        assert second.stats.cached_tokens > len(first.token_ids)
        blocks[-1]["logprobs"] = np.array([p.logprob for p in second.logprobs or ()])
    assert blocks[0].keys() == blocks[1].keys() and len(blocks[0]) > 3
    for key, expected in blocks[0].items():
        np.testing.assert_allclose(blocks[1][key], expected, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_several_sequences_in_a_step_have_no_drafts(opened: Callable[..., LLM]) -> None:
    fast = opened(speculative=True)
    fast.generate([PROMPT, PROMPT + "s"], GREEDY)
    assert fast.stats().drafted_tokens == 0


class Drafting(FakeExecutor):
    """Has a predictor, and can fail while it drafts."""

    predictor: Any

    def __init__(self, fail_at: int = 10**9) -> None:
        super().__init__(8, 64)
        self.predictor = SimpleNamespace(scores_nothing=False)
        self.sparse_steps = 0  # so far
        self.fail_at = fail_at

    def forward(self, batch: Batch) -> np.ndarray:
        if self.ffn == "dense":
            return super().forward(batch)
        self.sparse_steps += 1
        if self.sparse_steps == self.fail_at:
            raise RuntimeError("the device is on fire")
        return np.zeros((1, self.vocab_size), np.float32)


@pytest.mark.usefixtures("always")
def test_a_draft_that_fails_ends_the_request_and_leaves_the_path_as_it_was() -> None:
    executor = Drafting(fail_at=5)
    engine = Engine(executor, drafter=Speculation(executor))
    limit = ContextLimit(100)
    one = Generation([1, 2, 3], GREEDY, vocab_size=50, end_tokens=frozenset(), limit=limit, decoder=None)
    engine.add(one)
    with pytest.raises(RuntimeError, match="on fire"):
        while not one.done:
            engine.step()
    assert isinstance(one.error, SvdEngineError)
    assert executor.ffn == "dense"
    assert len(engine.prefix_cache) == 0 and engine.pool.blank_count == 8


def test_a_draft_ends_where_logits_are_damaged() -> None:
    class Chooser(Drafting):
        def forward_and_sample(self, batch: Batch, choices: list[Choice | None]) -> tuple[np.ndarray, np.ndarray]:
            assert [choice and choice.temperature for choice in choices] == [0.0]
            self.sparse_steps += 1
            return np.array([9 if self.sparse_steps < 3 else NOT_FINITE], np.int32), np.empty((0, 50), np.float32)

    sequence = Sequence([1, 2, 3])
    sequence.cached, sequence.block_table = 2, [0]
    steps: list[None] = []
    assert draft_tokens(Chooser(), sequence, 5, lambda: steps.append(None)) == [9, 9]
    assert len(steps) == 3


def test_only_a_predictor_can_draft() -> None:
    executor = Drafting()
    assert can_draft(executor) and executor.ffn == "dense"
    for nothing in (None, SimpleNamespace(scores_nothing=True)):  # of the latter every gate is computed: no faster
        executor.predictor = nothing
        assert not can_draft(executor)


def measured(rows_seconds: float, draft_seconds: float) -> DraftGain:
    times = StepTimes()
    for rows in (1, 5, 1, 5):
        times.note(rows, 10e-3 + (rows - 1) * rows_seconds)
    gain = DraftGain(times)
    for _ in range(4):
        gain.note(draft_seconds)
    return gain


def test_tokens_are_drafted_where_that_pays() -> None:
    assert measured(0.5e-3, 6e-3).choose(right=0.98, most=8) > 2
    assert measured(0.5e-3, 6e-3).choose(right=0.5, most=8) == 0
    assert measured(0.5e-3, 9.9e-3).choose(right=0.98, most=8) == 0  # a draft step times what an exact one does
    assert measured(5e-3, 6e-3).choose(right=0.98, most=8) == 0  # rows are dear
    assert measured(0.0, 1e-3).choose(right=1.0, most=3) == 3


def test_first_is_measured_what_there_is_to_gain() -> None:
    times = StepTimes()
    gain = DraftGain(times)
    assert gain.choose(right=0.9, most=8) == 0
    times.note(1, 10e-3)
    assert gain.choose(right=0.9, most=8) == 4
    gain.note(6e-3)


@pytest.mark.parametrize(("right", "usual"), [(0.98, True), (0.3, False)])
def test_the_other_choice_is_tried_now_and_then(right: float, usual: bool) -> None:
    gain = measured(0.5e-3, 6e-3)
    drafts = [gain.choose(right, most=8) > 0 for _ in range(303)]
    assert drafts.count(not usual) == 3
