"""Token ids to text, piece by piece, such that the pieces joined are the text of all the ids; and where to stop."""

from __future__ import annotations

from collections.abc import Sequence

from svdengine.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what the bytes of an unfinished character decode to
_PATIENCE = 12  # tokens that may be held back; real text finishes a character long before
_CONTEXT = 6  # tokens before the first that decide about its leading space


class StreamDecoder:
    """Decodes a window that begins some tokens back, so that spaces and joined characters come out as in the whole."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: the tokens before the first one, when the text goes on from theirs."""
        self._tokenizer = tokenizer
        self._window = _whole_characters(tokenizer, context)
        self._shown = len(tokenizer.decode(self._window)) if self._window else 0  # characters of the window
        self._read = len(self._window)  # tokens of the window whose text was all shown

    def push(self, token: int) -> str:
        """Text that this token completes; "" while a character is unfinished."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        waiting = len(self._window) - self._read
        end = len(text)
        if text.endswith(_REPLACEMENT):
            # A UTF-8 character has at most three bytes before its last, so at most three marks stand for it.
            end = len(text) - min(3, len(text) - len(text.rstrip(_REPLACEMENT))) if waiting > _PATIENCE else 0
        piece = text[self._shown : end]
        if end == len(text):
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        elif waiting > 4 * _PATIENCE:
            return self.flush()
        else:
            self._shown = max(self._shown, end)
        return piece

    def flush(self) -> str:
        """What was held back, unfinished as it is; the stream can go on afterwards."""
        text = self._tokenizer.decode(self._window)
        piece, self._shown, self._read = text[self._shown :], len(text), len(self._window)
        return piece


def _whole_characters(tokenizer: Tokenizer, context: Sequence[int]) -> list[int]:
    """The last tokens of the context, from the beginning of a character."""
    tokens = [t for t in context[-4 * _CONTEXT :] if not tokenizer.is_silent(t)]
    for count in range(_CONTEXT, 2 * _CONTEXT):
        if _REPLACEMENT not in tokenizer.decode(tokens[-count:]):
            return tokens[-count:]
    return tokens[-_CONTEXT:]


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and cuts the text before one that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def push(self, piece: str) -> str:
        """Take the next piece of text and return what is safe to show. After a stop string that is always ""."""
        if self.found is not None:
            return ""
        text = self._held + piece
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            # The one that is complete first ends the text, as if the text had come letter by letter.
            at, self.found = min(hits, key=lambda hit: (hit[0] + len(hit[1]), hit[0]))
            self._held = ""
            return text[:at]
        safe = self._safe_length(text)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What is still held back, when generation ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _safe_length(self, text: str) -> int:
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(text)
