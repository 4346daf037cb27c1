"""How many tokens are worth a cheap draft step each, before an exact step of one more row checks them all."""

from __future__ import annotations

from collections import deque
from statistics import median

from svdengine.step_costs import StepCosts

_FIRST = 4  # tokens that are drafted to find out what it costs
_MARGIN = 1.05  # tokens a second must grow by this factor
_LATEST = 16  # draft steps whose median counts: the first ones may compile, and others disturb some
_PERIOD = 100  # steps after which the other choice is made once, to see whether it would be right by now


class DraftGain:
    """Chooses by measured costs, of draft steps here and of exact steps in `costs`."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._seconds: deque[float] = deque(maxlen=_LATEST)
        self._drafted = False  # what the latest choices were, and how many in a row
        self._in_a_row = 0

    def note(self, seconds: float) -> None:
        """Take the measurement of a draft step."""
        self._seconds.append(seconds)

    def choose(self, right: float, most: int) -> int:
        """Tokens to draft, at most `most`, where each after a right one is right with probability `right`."""
        count = self._best(right, most)
        if self._in_a_row >= _PERIOD and (count > 0) == self._drafted:
            count = 0 if count else min(_FIRST, most)
        self._in_a_row = self._in_a_row + 1 if (count > 0) == self._drafted else 1
        self._drafted = count > 0
        return count

    def _best(self, right: float, most: int) -> int:
        plain = self._costs.seconds(1)
        if plain is None:  # what there is to gain is measured first
            return 0
        if not self._seconds:
            return min(_FIRST, most)
        draft, best, speed = median(self._seconds), 0, _MARGIN / plain
        tokens = likely = 1.0
        for count in range(1, most + 1):
            likely *= right
            tokens += likely
            each = tokens / (count * draft + (self._costs.seconds(1 + count) or plain))
            if each > speed:
                best, speed = count, each
        return best
