"""Progress: one line that is overwritten on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import TextIO

_EVERY = {True: 0.2, False: 30.0}  # seconds between two updates: on a terminal, elsewhere


class StatusLine:
    """Writes to a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._terminal = stream, stream.isatty()
        self._width, self._last = 0, float("-inf")

    def show(self, text: str) -> None:
        """What is going on now; dropped when the last one is recent."""
        if time.monotonic() - self._last < _EVERY[self._terminal]:
            return
        self._last = time.monotonic()
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """Something that stays."""
        self._stream.write("\r" + " " * self._width + "\r" if self._width else "")
        self._stream.write(text + "\n")
        self._stream.flush()
        self._width, self._last = 0, float("-inf")
