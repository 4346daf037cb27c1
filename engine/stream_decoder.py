"""Token ids to text, piece by piece, such that the pieces joined are the text of all the ids."""

from __future__ import annotations

from collections.abc import Sequence

from svdengine.tokenizer import Tokenizer

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
