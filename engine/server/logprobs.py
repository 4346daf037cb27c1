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

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        """`context`: the tokens before the first one, when the text goes on from theirs."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, context)
        self._decoded = 0  # characters
        self._shown = 0
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

    def chat_shape(self, entries: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        """As in a chat completion."""
        content = [
            {**self._token(e.token, e.logprob), "top_logprobs": [self._token(*pair) for pair in e.top]}
            for _, e in entries
        ]
        return {"content": content, "refusal": None}

    def completion_shape(self, entries: Sequence[tuple[int, TokenLogprobs]]) -> dict[str, Any]:
        """As in a completion."""
        text = self._tokenizer.token_text
        return {
            "tokens": [text(e.token) for _, e in entries],
            "token_logprobs": [max(e.logprob, _LEAST) for _, e in entries],
            "top_logprobs": [{text(t): max(p, _LEAST) for t, p in e.top} for _, e in entries],
            "text_offset": [start for start, _ in entries],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": max(logprob, _LEAST),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }
