"""Speculative decoding: how many drafted tokens are worth a row of a step each.

A step computes the last token of a sequence and, in further rows, tokens that were drafted to follow it. Each row gives
the logits after its token, so that those tokens whose predecessors were right are known from one step. What a request
samples does not depend on drafts: a row is used only where the token sampled before it is the drafted one. (Executors
may round a row that is computed with others differently, as they do where sequences share a step.)
"""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

from svdengine.prompt_lookup import PromptLookup
from svdengine.sequence import Sequence
from svdengine.step_costs import StepCosts

MOST = 8  # drafted tokens of a step
_MARGIN = 1.2  # what a row gains must be worth this many times its cost
_RATE = 0.1  # of learning how often drafts are right
_START = 0.5


class _History:
    """Drafts of one sequence so far."""

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self.right = _START  # share of drafted tokens that came, where those before them did
        self.guess: list[int] = []  # what was drafted for the next step, whether it was tried or not
        self.length = 0  # of the sequence then


class Speculation:
    """Decides on drafts by how often they were right and by what rows cost, both measured all the time."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.drafted_tokens = 0  # so far, those that steps computed
        self.accepted_tokens = 0  # of them, those that were right
        self._histories: WeakKeyDictionary[Sequence, _History] = WeakKeyDictionary()

    def draft(self, sequence: Sequence, rows: int) -> list[int]:
        """Tokens that are worth trying after a sequence's last one, in a step of `rows` without any drafts."""
        history = self._histories.setdefault(sequence, _History())
        history.guess, history.length = history.lookup.draft(sequence.tokens, MOST), len(sequence)
        return history.guess[: _worthwhile(history.right, _MARGIN * self.costs.relative_cost(rows))]

    def note(self, sequence: Sequence) -> None:
        """Compare the tokens that a step gave a sequence with what was drafted for it."""
        history = self._histories.get(sequence)
        if history is None:
            return
        given = sequence.tokens[history.length :]
        for drafted, token in zip(history.guess, given, strict=False):
            history.right += _RATE * ((drafted == token) - history.right)
        self.drafted_tokens += len(sequence.draft)
        self.accepted_tokens += max(len(given) - 1, 0)
        history.guess = []


def _worthwhile(right: float, cost: float) -> int:
    """How many drafted tokens all come with a probability above `cost`, if each after a right one does with `right`."""
    if cost >= right:
        return 0
    return MOST if cost <= 0 or right >= 1 else min(int(math.log(cost) / math.log(right)), MOST)
