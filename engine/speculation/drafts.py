"""Where drafts come from: from the sequence itself, or from the model by its sparse path.

Prompt lookup takes what followed the last tokens of a sequence where they occurred in it before (Saxena, Prompt Lookup
Decoding, 2023, github.com/apoorvumang/prompt-lookup-decoding).

The model drafts by cheap decode steps whose FFNs run sparse, more sparsely than text that is kept may be. Keys and
values that drafts leave behind are not exact. They lie at positions that the next exact step computes anew before any
of its rows attends, and no one counts them as cached. (In the manner of Zhang et al., Draft & Verify: Lossless Large
Language Model Acceleration via Self-Speculative Decoding, 2023, arXiv:2309.08168, where whole layers are skipped
instead of neurons.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as TokenIds
from contextlib import contextmanager

import numpy as np

from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import NOT_FINITE, Choice, Executor, SamplingExecutor
from svdengine.scheduling.sequence import Sequence

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


DRAFT_BIAS = 0.1  # added to a sequence's sparsity bias while it drafts
_LIKELIEST = Choice(temperature=0.0)


def can_draft(executor: Executor) -> bool:
    """Whether the executor has a sparse path for single rows that lists neurons by a predictor."""
    if executor.predictor is None or executor.predictor.scores_nothing:
        return False
    with _sparse(executor):
        return executor.ffn_path(1) == "predict"


def draft_tokens(executor: Executor, sequence: Sequence, count: int, done: Callable[[], None]) -> list[int]:
    """The likeliest tokens after a sequence's last one, which alone is pending: a step for each, `count` at most.

    Its blocks have to have room for positions up to those of all tokens but the last one drafted. `done` is called
    after each step. The executor's `ffn` is as before afterwards, whatever happens.
    """
    draft: list[int] = []
    sampling = executor if isinstance(executor, SamplingExecutor) else None  # asked once: it takes long
    with _sparse(executor):
        for i in range(count):
            batch = _one_row((sequence.tokens[-1:] + draft)[-1], sequence.cached + i, sequence)
            token = _likeliest(executor, sampling, batch)
            done()
            if token == NOT_FINITE:  # the exact step will tell
                break
            draft.append(token)
    return draft


def _likeliest(executor: Executor, sampling: SamplingExecutor | None, batch: Batch) -> int:
    if sampling is not None:
        return int(sampling.forward_and_sample(batch, [_LIKELIEST])[0][0])
    return int(executor.forward(batch)[0].argmax())


def _one_row(token: int, position: int, sequence: Sequence) -> Batch:
    return Batch(
        tokens=np.array([token], np.int32),
        positions=np.array([position], np.int32),
        sequences=np.zeros(1, np.int32),
        block_tables=np.array([sequence.block_table], np.int32),
        context_lengths=np.array([position + 1], np.int32),
        logit_rows=np.zeros(1, np.int32),
        sparsity_bias=np.array([sequence.sparsity_bias + DRAFT_BIAS], np.float32),
    )


@contextmanager
def _sparse(executor: Executor) -> Iterator[None]:
    mode, executor.ffn = executor.ffn, "sparse"
    try:
        yield
    finally:
        executor.ffn = mode
