"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from svdengine.converters.logit_rows import LogitRows
from svdengine.errors import RequestError, SvdEngineError

if TYPE_CHECKING:
    from svdengine.llm import LLM

Progress = Callable[[int, int, float], None]  # windows done, windows in all, perplexity so far


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens."""

    perplexity: float
    tokens: int  # that were scored
    windows: int
    bits_per_byte: float  # of UTF-8 text, which compares models with different tokenizers
    nll: float  # mean negative log-likelihood, nats a token


@dataclass(frozen=True)
class ScoredText:
    """A text in windows of tokens, each of which is scored by itself; its first token is not."""

    windows: list[list[int]]
    bytes_per_token: float  # of UTF-8

    @property
    def token_count(self) -> int:
        """Tokens that are scored."""
        return sum(len(window) - 1 for window in self.windows)

    def perplexity(self, total: float) -> Perplexity:
        """From the summed negative log-likelihood of all windows, in nats."""
        if not math.isfinite(total):
            raise SvdEngineError("the model gave logits that are not finite; its weights may be damaged")
        mean = total / self.token_count
        bits = mean / math.log(2) / self.bytes_per_token
        return Perplexity(math.exp(min(mean, 700.0)), self.token_count, len(self.windows), bits, mean)


def split_text(llm: LLM, text: str, window: int) -> ScoredText:
    """Cut `text` into windows that do not overlap, each of at most `window` tokens.

    A window begins with the beginning-of-sequence token where the model uses one. Raises RequestError when the text
    has fewer than two tokens, or the window is out of range.
    """
    if not 2 <= window <= llm.context:
        raise RequestError(f"the window must lie between 2 and the context of {llm.context} tokens, found {window}")
    tokens = llm.tokenizer.encode(text, bos=False)
    start = [llm.tokenizer.bos_id] if llm.tokenizer.add_bos and llm.tokenizer.bos_id is not None else []
    size = window - len(start)
    windows = [start + tokens[at : at + size] for at in range(0, len(tokens), size)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise RequestError(f"the text has {len(tokens)} tokens, which is too few to score")
    return ScoredText(windows, len(text.encode("utf-8", "replace")) / len(tokens))


def measure_perplexity(
    llm: LLM, text: str, window: int = 512, progress: Progress | None = None, sparsity_bias: float = 0.0
) -> Perplexity:
    """Score `text` in windows, as `split_text` cuts it."""
    scored = split_text(llm, text, window)
    total, tokens = 0.0, 0
    for done, ids in enumerate(scored.windows, 1):
        rows = LogitRows.of(llm.logits(ids[:-1], sparsity_bias=sparsity_bias))
        total += float(rows.losses(np.asarray(ids[1:], np.int64)).sum())
        tokens += len(ids) - 1
        if progress is not None:
            progress(done, len(scored.windows), math.exp(min(total / tokens, 700.0)))
    return scored.perplexity(total)
