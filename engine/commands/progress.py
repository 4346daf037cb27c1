"""How far long work is, with the time left: a line that moves on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_EVERY = 30.0  # seconds between lines off a terminal
_FIRST = 3.0  # seconds after which a time left is believed, and a stage is worth a line off a terminal
_REDRAW = 0.1  # seconds between two states of the line on a terminal


class StageProgress:
    """Takes (stage, steps done, steps in all) and writes to standard error.

    The time left is that of the stage: its steps are taken to last alike.
    """

    def __init__(self, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file or sys.stderr, clock
        self._moving = self._file.isatty()
        self._stage = ""
        self._begin = self._shown = 0.0
        self._first = 0  # steps that were done when the stage began

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report a step, with a note on what was found so far. Little is written: see `_due`."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._begin, self._first = stage, now, done
            self._shown = now - _EVERY + (0 if self._moving else _FIRST)
        ended = done >= total
        if not self._due(now, ended):
            return
        self._shown = now
        line = f"{stage} {done}/{total}{note}{'' if ended else self._left(now, done, total)}"
        if self._moving:
            self._file.write(f"\r{line:<60}" + ("\n" if ended else ""))
        else:
            self._file.write(line + "\n")
        self._file.flush()

    def _due(self, now: float, ended: bool) -> bool:
        """On a terminal the line is kept fresh. Elsewhere, one comes now and then, and at the end of a long stage."""
        if self._moving:
            return ended or now - self._shown >= _REDRAW
        return now - self._shown >= _EVERY or (ended and now - self._begin >= _FIRST)

    def _left(self, now: float, done: int, total: int) -> str:
        spent, steps = now - self._begin, done - self._first
        return f", {time_text(spent / steps * (total - done))} left" if steps > 0 and spent >= _FIRST else ""


def time_text(seconds: float) -> str:
    """A time in the largest unit that says enough: 40 s, 3 min, 2 h 10 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
