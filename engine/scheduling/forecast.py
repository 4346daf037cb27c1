"""How many KV blocks the sequences at hand will come to hold, which decides whether one more is let in.

Sequences grow by a token a step until they end, and give their blocks back one after the other. So what they need
together is highest just before one of them ends: at each of these moments those that are left have grown, and those
that ended have given back. This counts less than the sum of what each will ever hold, and more than what they hold
now; to admit by the latter would send them back and forth once all of them have grown.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable

import numpy as np

from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.scheduling.sequence import Sequence

_FIRST_GUESS = 256  # tokens of an answer, before some have ended; the first ones to end are short
_SOME = 16
_REMEMBERED = 64  # answers
_SHARE = 0.75  # of the answers that went on from where one stands, those that ended no later than it is expected to


class AnswerLengths:
    """How long answers are, learned from the last ones that ended."""

    def __init__(self) -> None:
        self._newest: deque[int] = deque()
        self._sorted: list[int] = []

    def learn(self, sequence: Sequence) -> None:
        """Take a sequence that ends now."""
        length = len(sequence) - sequence.given
        if length <= 0:
            return
        if len(self._newest) == _REMEMBERED:
            self._sorted.remove(self._newest.popleft())
        self._newest.append(length)
        insort(self._sorted, length)

    def remaining(self, sequence: Sequence) -> int:
        """Tokens that a sequence is expected to grow by: at least a block, unless it may not become so long."""
        if sequence.every_row:
            return 0
        so_far = len(sequence) - sequence.given
        longer, known = bisect_right(self._sorted, so_far), len(self._sorted)
        usual = self._sorted[longer + int(_SHARE * (known - longer))] if longer < known else 0
        if known < _SOME:
            usual = max(usual, _FIRST_GUESS)
        more = max(usual - so_far, BLOCK_SIZE)
        if sequence.most_tokens is not None:
            more = min(more, max(sequence.most_tokens - len(sequence), 0))
        return more


def most_further_blocks(sequences: Iterable[Sequence], lengths: AnswerLengths, block_size: int = BLOCK_SIZE) -> int:
    """The largest number of blocks, beyond those that they have, that sequences will need at any time."""
    growing = sorted(((lengths.remaining(sequence), sequence) for sequence in sequences), key=lambda pair: pair[0])
    steps = np.array([remaining for remaining, _ in growing])
    tokens = np.array([len(sequence) for _, sequence in growing])
    held = np.array([len(sequence.block_table) for _, sequence in growing])
    # What is shared with others by way of the prefix cache may stay in use.
    own = held - [sequence.reused // block_size for _, sequence in growing]
    # Row i: what each needs when the i-th ends; those before it have ended, and given back what was theirs.
    needed = np.triu(-(-(tokens + steps[:, None]) // block_size) - held).sum(1) - (np.cumsum(own) - own)
    return max(int(needed.max(initial=0)), 0)
