"""Speculative decoding: how many drafted tokens are worth a row of a step each.

A step computes the last token of a sequence and, in further rows, tokens that were drafted to follow it. Each row gives
the logits after its token, so that those tokens whose predecessors were right are known from one step. What a request
samples does not depend on drafts: a row is used only where the token sampled before it is the drafted one. (Executors
may round a row that is computed with others differently, as they do where sequences share a step.)

Drafts come from the sequence itself (prompt_lookup.py), where its last tokens occurred before. Where they did not, and
no other sequence is in the step, the model drafts by its sparse path (self_draft.py), if it has a predictor.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from weakref import WeakKeyDictionary

from svdengine.kernels.executor import Executor
from svdengine.scheduling.sequence import Sequence
from svdengine.speculation.draft_gain import DraftGain, StepTimes
from svdengine.speculation.drafts import PromptLookup, can_draft, draft_tokens

MOST = 8  # drafted tokens of a step
_MARGIN = 1.2  # what a row gains must be worth this much of what it takes
_RATE = 0.1  # of learning how often drafts are right
_START = 0.5
_MODEL_START = 0.9


class _History:
    """Drafts of one sequence so far."""

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self.right = _START  # share of drafted tokens that came, where those before them did
        self.guess: list[int] = []  # what was drafted for the next step, whether it was tried or not
        self.length = 0  # of the sequence then
        self.model_right = _MODEL_START  # as `right`, of what the model itself drafted
        self.by_model = False  # whether it drafted for the step at hand


class Speculation:
    """Decides on drafts by how often they were right and by how long rows take, both measured all the time."""

    def __init__(self, executor: Executor | None = None) -> None:
        """`executor`: what runs the model, for it to draft too; None: only sequences do."""
        self.step_times = StepTimes()
        self._executor = executor
        self._gain = DraftGain(self.step_times)
        self.drafted_tokens = 0  # so far, those that steps computed
        self.accepted_tokens = 0  # of them, those that were right
        self._histories: WeakKeyDictionary[Sequence, _History] = WeakKeyDictionary()

    def draft(self, sequence: Sequence, rows: int) -> list[int]:
        """Tokens that are worth trying after a sequence's last one, in a step of `rows` without any drafts."""
        history = self._history(sequence)
        history.guess, history.length = history.lookup.draft(sequence.tokens, MOST), len(sequence)
        history.by_model = False
        return history.guess[: _worthwhile(history.right, _MARGIN * self.step_times.relative_row_time(rows))]

    def own_draft_length(self, sequence: Sequence) -> int:
        """How many tokens are worth drafting by the model itself, for a sequence alone in a step without drafts.

        None are where of a step of one row and the step that checks them one is exact and the other predicts.
        """
        executor = self._executor
        if executor is None or not can_draft(executor):
            return 0
        count = self._gain.choose(self._history(sequence).model_right, MOST)
        one, checking = (executor.ffn_path(n) == "predict" for n in (1, 1 + count))
        return count if one == checking else 0

    def draft_by_model(self, sequence: Sequence, count: int) -> list[int]:
        """Have the model draft tokens for a sequence that has blocks for `count` more, and measure what each takes."""
        assert self._executor is not None
        times = [time.perf_counter()]
        draft = draft_tokens(self._executor, sequence, count, lambda: times.append(time.perf_counter()))
        for begin, end in pairwise(times):
            self._gain.note(end - begin)
        self._history(sequence).by_model = True
        return draft

    def note_step(self, rows: int, seconds: float) -> None:
        """Take what an exact step of `rows` decoding rows took."""
        self.step_times.note(rows, seconds)

    def note(self, sequence: Sequence) -> None:
        """Compare the tokens that a step gave a sequence with what was drafted for it."""
        history = self._histories.get(sequence)
        if history is None:
            return
        given = sequence.tokens[history.length :]
        for drafted, token in zip(history.guess, given, strict=False):
            history.right += _RATE * ((drafted == token) - history.right)
        if history.by_model:
            for drafted, token in zip(sequence.draft, given, strict=False):
                history.model_right += _RATE * ((drafted == token) - history.model_right)
        self.drafted_tokens += len(sequence.draft)
        self.accepted_tokens += max(len(given) - 1, 0)
        history.guess = []

    def _history(self, sequence: Sequence) -> _History:
        return self._histories.setdefault(sequence, _History())


def _worthwhile(right: float, least: float) -> int:
    """How many drafted tokens all come with a probability above `least`, where each comes with `right` after others."""
    if least >= right:
        return 0
    return MOST if least <= 0 or right >= 1 else min(int(math.log(least) / math.log(right)), MOST)
