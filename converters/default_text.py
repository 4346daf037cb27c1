"""The text that a predictor is calibrated on where none is given: many kinds, and some kinds only to measure on.

Text of one kind makes a predictor that is good on that kind: fitted on what a model writes itself, and measured on more
of it, a budget of half a percent came to one and a half on other text. So the kinds are as different as they can be,
none has more than its share, and those that are held out are seen by nothing but the measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from svdengine.converters.machine_text import WINDOW, machine_kinds
from svdengine.converters.split_text import SplitText, Window
from svdengine.text.tokenizer import Tokenizer

HELD_OUT = ("terms", "letters", "chats", "mathematics")  # kinds of passages: unlike each other, and unlike the rest
HELD_OUT_SHARE = 1 / 5  # of all tokens
WRITTEN_SHARE = 1 / 14  # of all tokens: about what one kind gets
WRITTEN = "the model's own"


def default_text(
    tokenizer: Tokenizer,
    template: str | None,
    tokens: int,
    window: int = WINDOW,
    written: Iterable[Window] = (),
    measured: int = 0,
) -> SplitText:
    """About `tokens` tokens in windows: text that every machine has, and what the model has `written`.

    At least `measured` of them are held out, but no more than a third.

    The same machine, tokenizer and written windows give the same text. Raises ModelFileError when there is no
    tokenizer.
    """
    kinds: dict[str, Iterator[Window]] = {**machine_kinds(tokenizer, template, window)}
    held_out = {kind: kinds.pop(kind) for kind in HELD_OUT}
    measured = max(int(tokens * HELD_OUT_SHARE), min(measured, tokens // 3))
    chosen = [(ids, kind, True) for ids, kind in _equal_shares(held_out, measured)]
    chosen += [(ids, kind, False) for ids, kind in _equal_shares({**kinds, WRITTEN: iter(written)}, tokens - measured)]
    windows, names, flags = zip(*chosen, strict=True)
    return SplitText(windows, names, flags)


def written_tokens(tokens: int) -> int:
    """How much of a text of so many tokens the model is to write."""
    return int(tokens * WRITTEN_SHARE)


def _equal_shares(kinds: Mapping[str, Iterator[Window]], tokens: int) -> Iterator[tuple[Window, str]]:
    """Windows until there are enough tokens, each of the kind that has had the fewest so far."""
    had, given = dict.fromkeys(kinds, 0), 0
    while had and given < tokens:
        kind = min(had, key=had.__getitem__)
        window = next(kinds[kind], None)
        if window is None:
            del had[kind]
            continue
        had[kind] += len(window)
        given += len(window)
        yield window, kind
