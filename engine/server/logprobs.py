"""Log-probabilities of tokens, in OpenAI's two shapes, for as much of the text as was shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from svdengine.scheduling.sampler import TokenLogprobs
from svdengine.text.stream_decoder import StreamDecoder
from svdengine.text.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON has not


class LogprobTrail:
    """Finds where in the text each token begins, so that only tokens of text that was shown are told.

    The end token, and the tokens of a stop string, are held back for ever that way.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), start: int = 0) -> None:
        """`context`: the tokens before the first one, when the text goes on from theirs. `start`: where it does."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, context)
        self._texts: dict[int, str] = {}
        self._decoded = start  # characters
        self._shown = start
        self._waiting: deque[tuple[int, TokenLogprobs]] = deque()  # with the character that the token begins at

    def push(self, logprobs: Sequence[TokenLogprobs], text: str) -> list[tuple[int, TokenLogprobs]]:
        """Take the next tokens and the next text that was shown; return tokens to be told, and where they begin."""
        for entry in logprobs:
            self._waiting.append((self._decoded, entry))
            self._decoded += len(self._decoder.push(entry.token))
        self._shown += len(text)
        told = []
        while self._waiting and self._waiting[0][0] < self._shown:
            told.append(self._waiting.popleft())
        return told

    def rest(self) -> list[tuple[int, TokenLogprobs]]:
        """The tokens that were held back, such as an end token."""
        held = list(self._waiting)
        self._waiting.clear()
        return held

    def chat_shape(self, entries: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        """As in a chat completion."""
        content = [
            {**self._token(e.token, e.logprob), "top_logprobs": [self._token(*pair) for pair in e.top]}
            for _, e in entries
        ]
        return {"content": content, "refusal": None}

    def completion_shape(self, entries: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        """As in a completion."""
        return {
            "tokens": [self._text(e.token) for _, e in entries],
            "token_logprobs": [max(e.logprob, _LEAST) for _, e in entries],
            "top_logprobs": [self._top(e) for _, e in entries],
            "text_offset": [start for start, _ in entries],
        }

    def prompt_shape(self, prompt: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The same for the tokens of a prompt, of which the first have no log-probability."""
        decoder, decoded = StreamDecoder(self._tokenizer), 0
        offsets = []
        for token in prompt:
            offsets.append(decoded)
            decoded += len(decoder.push(token))
        return {
            "tokens": [self._text(token) for token in prompt],
            "token_logprobs": [None if e is None else max(e.logprob, _LEAST) for e in logprobs],
            "top_logprobs": [None if e is None else self._top(e) for e in logprobs],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens by their text, and the chosen one; of two with one text, the likelier."""
        found: dict[str, float] = {}
        for token, logprob in [*entry.top, (entry.token, entry.logprob)]:
            found.setdefault(self._text(token), max(logprob, _LEAST))
        return found

    def _text(self, token: int) -> str:
        """A token as a completion shows it: one that is no whole character by its bytes, as OpenAI does."""
        if token not in self._texts:
            data = self._tokenizer.token_bytes(token)
            try:
                data.decode()
                self._texts[token] = self._tokenizer.token_text(token)
            except UnicodeDecodeError:
                self._texts[token] = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return self._texts[token]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": max(logprob, _LEAST),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }
