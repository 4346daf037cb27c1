"""Embeddings: what the hidden states of a text's tokens come to, a vector of length 1."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ContextOverflowError, RequestError, SvdEngineError, shown
from svdengine.scheduling.request import ContextLimit, Generation
from svdengine.scheduling.sampling import SamplingParams

Pooling = Literal["mean", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class Embedding(Generation):
    """A request that reads a text, and generates nothing. It is a `Generation` of no token, and runs beside others.

    vector: (hidden,) float32, of length 1, once it is done: the mean of the last hidden states, after the final norm,
        of all tokens, or that of the last token.
    """

    def __init__(self, tokens: list[int], pooling: Pooling, *, context: int, **options: Any) -> None:
        """`context`: most tokens. Raises RequestError, ContextOverflowError for a text that is too long."""
        if pooling not in POOLINGS:
            raise RequestError(f"pooling must be one of {', '.join(POOLINGS)}, found {shown(pooling)}")
        if len(tokens) > context:
            raise ContextOverflowError(
                f"the text has {len(tokens)} tokens and this model's maximum context length is {context} tokens;"
                " shorten the text, or use a larger context"
            )
        super().__init__(tokens, SamplingParams(), limit=ContextLimit(context + 1), **options)
        self.sequence.hidden = True
        self.vector: NDArray[np.float32] | None = None
        self._pooling = pooling
        self._sum: NDArray[np.float64] | None = None

    def choice(self) -> None:
        """No token is wanted."""

    def accept(self, hidden: NDArray[np.float32]) -> bool:
        """Take the hidden states of the tokens that were cached last, (rows, hidden)."""
        first = self.sequence.cached == len(hidden)  # or the first again, after the sequence had to make room
        if self._pooling == "last":
            self._sum = hidden[-1].astype(np.float64)
        else:
            added = hidden.sum(0, dtype=np.float64)
            self._sum = added if first or self._sum is None else self._sum + added
        if self.sequence.pending == 0:
            self._note_time()
            self.vector = unit_vector(self._sum)
            self.finish("stop")
        return False


def unit_vector(vector: NDArray[np.float64]) -> NDArray[np.float32]:
    """A vector of the same direction and of length 1. Raises SvdEngineError where it has no direction."""
    largest = float(np.abs(vector).max())
    if not np.isfinite(largest) or largest == 0:
        raise SvdEngineError("the model's hidden states are not finite, or all zero: its weights may be damaged")
    scaled = vector / largest
    return (scaled / np.linalg.norm(scaled)).astype(np.float32)
