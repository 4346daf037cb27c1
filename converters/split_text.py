"""Windows of text to calibrate on: what is fitted, and what is held out to measure on, by kind of text.

The promise of a budget is about text that was not seen. Windows of a kind that was fitted are too much like it: of the
default text whole kinds are held out. Of a user's own files, which say what the model will read, one window in five is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Window = Sequence[int]  # token ids
Windows = Sequence[Window]

HELD_OUT_EVERY = 5  # one window in five is held out where whole kinds are not
ONE_KIND = "text"


@dataclass(frozen=True)
class SplitText:
    """Windows in the order in which they are read."""

    windows: Windows
    kinds: Sequence[str]  # of each window
    held_out: Sequence[bool]  # whether a window is for measuring

    @property
    def fitting(self) -> list[Window]:
        """The windows that predictors and thresholds are fitted to."""
        return [window for window, held_out in zip(self.windows, self.held_out, strict=True) if not held_out]

    def held_out_kinds(self, tokens: int) -> dict[str, list[Window]]:
        """Held-out windows by kind, about `tokens` in all: the same share of every kind, where it has as many."""
        kinds: dict[str, list[Window]] = {}
        for window, kind, held_out in zip(self.windows, self.kinds, self.held_out, strict=True):
            if held_out and len(window) > 1:
                kinds.setdefault(kind, []).append(window)
        return {kind: _at_most(windows, max(tokens // len(kinds), 2)) for kind, windows in kinds.items()}


def is_held_out(window: int) -> bool:
    """Whether the window with this index is kept for measuring, where one in five is."""
    return window % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def one_in_five(windows: Windows, kinds: Sequence[str] | None = None) -> SplitText:
    """One window in five held out, whatever its kind."""
    return SplitText(windows, kinds or [ONE_KIND] * len(windows), [is_held_out(i) for i in range(len(windows))])


def _at_most(windows: list[Window], tokens: int) -> list[Window]:
    """About `tokens` tokens, in windows at even distances over the whole text."""
    total = sum(map(len, windows))
    if total <= tokens:
        return windows
    count = max(1, round(len(windows) * tokens / total))
    kept = [windows[i * len(windows) // count] for i in range(count)]
    return kept if count > 1 else [kept[0][:tokens]]
