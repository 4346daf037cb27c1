"""How long decode steps take by their number of rows, and how many drafted tokens are worth their steps."""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

_MEMORY = 0.98  # weight of a step against that of the next
_SPREAD = 0.01  # variance of the rows below which nothing is known about their time
_LATEST = 4  # steps of each size whose median counts


class StepTimes:
    """The latest steps of each size, and a line through the seconds and rows of all of late."""

    def __init__(self) -> None:
        self._weight = self._rows = self._squares = self._seconds = self._products = 0.0
        self._latest: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_LATEST))

    def note(self, rows: int, seconds: float) -> None:
        """Take the measurement of a step."""
        self._weight = _MEMORY * self._weight + 1
        self._rows = _MEMORY * self._rows + rows
        self._squares = _MEMORY * self._squares + rows * rows
        self._seconds = _MEMORY * self._seconds + seconds
        self._products = _MEMORY * self._products + rows * seconds
        self._latest[rows].append(seconds)

    def relative_row_time(self, rows: int) -> float:
        """Time of one more row, as a share of what a step of `rows` takes for each of them.

        0 where it is not known, so that it is tried: when all of the latest steps had about as many rows.
        """
        return self._slope * rows / self._line(rows) if self._weight else 0.0

    def seconds(self, rows: int) -> float | None:
        """Time of a step of `rows`, by the line where none was measured; None before there is any measurement."""
        if rows in self._latest:
            return median(self._latest[rows])
        return self._line(rows) if self._weight else None

    def _line(self, rows: int) -> float:
        return max((self._seconds + self._slope * (rows * self._weight - self._rows)) / self._weight, 1e-9)

    @property
    def _slope(self) -> float:
        """Seconds of one more row; 0 where that is not known."""
        if not self._weight:
            return 0.0
        mean = self._rows / self._weight
        spread = self._squares / self._weight - mean * mean
        if spread < _SPREAD:
            return 0.0
        return max((self._products - mean * self._seconds) / self._weight, 0.0) / spread


_FIRST = 4  # tokens that are drafted to find out how long it takes
_MARGIN = 1.05  # tokens a second must grow by this factor
_LATEST = 16  # draft steps whose median counts: the first ones may compile, and others disturb some
_PERIOD = 100  # steps after which the other choice is made once, to see whether it would be right by now


class DraftGain:
    """Chooses by measured times, of draft steps here and of exact steps in `times`."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times
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
        plain = self._times.seconds(1)
        if plain is None:  # what there is to gain is measured first
            return 0
        if not self._seconds:
            return min(_FIRST, most)
        draft, best, speed = median(self._seconds), 0, _MARGIN / plain
        tokens = likely = 1.0
        for count in range(1, most + 1):
            likely *= right
            tokens += likely
            each = tokens / (count * draft + (self._times.seconds(1 + count) or plain))
            if each > speed:
                best, speed = count, each
        return best
