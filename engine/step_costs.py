"""What a decode step costs by its number of rows, measured while the program runs."""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median

_MEMORY = 0.98  # weight of a step against that of the next
_SPREAD = 0.01  # variance of the rows below which nothing is known about their cost
_LATEST = 4  # steps of each size whose median counts


class StepCosts:
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

    def relative_cost(self, rows: int) -> float:
        """Cost of one more row, as a share of what a step of `rows` costs for each of them.

        0 where it is not known, so that it is tried: when all of the latest steps had about as many rows.
        """
        return self._slope * rows / self._line(rows) if self._weight else 0.0

    def seconds(self, rows: int) -> float | None:
        """Cost of a step of `rows`, by the line where none was measured; None before there is any measurement."""
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
