"""Drafts without a second model: what followed the last tokens of a sequence where they occurred in it before.

Saxena, Prompt Lookup Decoding, 2023 (github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence as TokenIds

_NGRAM = 3  # tokens that must have occurred before


class PromptLookup:
    """Where each n-gram of one sequence occurred last."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token after it
        self._length = 0  # of the sequence, when it was looked at last

    def draft(self, tokens: TokenIds[int], most: int) -> list[int]:
        """`most` tokens that may come next, as if what repeats itself went on; none where the last ones are new."""
        if len(tokens) < self._length:  # its context was shifted
            self._after.clear()
            self._length = 0
        for position in range(max(self._length, _NGRAM), len(tokens)):
            self._after[tuple(tokens[position - _NGRAM : position])] = position
        self._length = len(tokens)
        start = self._after.get(tuple(tokens[-_NGRAM:]))
        if start is None:
            return []
        return [tokens[start + i % (len(tokens) - start)] for i in range(most)]
