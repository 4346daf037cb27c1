"""DRY ("don't repeat yourself"): a penalty on tokens that would go on with a repetition of several tokens.

After the sampler of p-e-w for text-generation-webui (pull request 5677), which llama.cpp has too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_LONGEST = 64  # tokens of a repetition that are counted: the penalty is beyond all logits then


def dry_penalties(
    tokens: ArrayLike, breakers: frozenset[int], *, multiplier: float, base: float, allowed_length: int
) -> dict[int, float]:
    """What is to be taken from the logit of each token that would lengthen a repetition.

    tokens: (n,), prompt and answer so far, or the last of them. breakers: tokens that no repetition goes across.

    Where the last n tokens stand somewhere before as well, the token that came after them there gets
    `multiplier * base ** (n - allowed_length)`, for the longest such n of at least `allowed_length`.
    """
    ids = np.asarray(tokens, np.int64)
    last = len(ids) - 1
    ends = np.flatnonzero(ids[:last] == ids[last]) if last > 0 else ids[:0]  # of what was said before
    longest: dict[int, int] = {}
    for length in range(1, min(_since_breaker(ids, breakers), _LONGEST) + 1):
        ends = ends[ends >= length - 1]
        ends = ends[ids[ends - (length - 1)] == ids[last - (length - 1)]]
        if not ends.size:
            break
        if length >= allowed_length:
            longest |= dict.fromkeys(np.unique(ids[ends + 1]).tolist(), length)
    return {
        token: multiplier * base ** (length - allowed_length)
        for token, length in longest.items()
        if token not in breakers
    }


def _since_breaker(ids: np.ndarray, breakers: frozenset[int]) -> int:
    """Tokens after the last one that is a breaker, as far as they are looked at."""
    for count, token in enumerate(ids[::-1][:_LONGEST].tolist()):
        if token in breakers:
            return count
    return min(len(ids), _LONGEST)
