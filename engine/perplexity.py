"""Perplexity: how well a model predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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


def measure_perplexity(llm: LLM, text: str, window: int = 512, progress: Progress | None = None) -> Perplexity:
    """Score `text` in windows that do not overlap, each of at most `window` tokens.

    A window begins with the beginning-of-sequence token where the model uses one. Its first token has nothing before
    it and is not scored. Raises RequestError when the text has fewer than two tokens, or the window is out of range.
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
    total, scored = 0.0, 0
    for done, ids in enumerate(windows, 1):
        total += negative_log_likelihood(llm.logits(ids[:-1]), ids[1:])
        scored += len(ids) - 1
        if not math.isfinite(total):
            raise SvdEngineError("the model gave logits that are not finite; its weights may be damaged")
        if progress is not None:
            progress(done, len(windows), math.exp(min(total / scored, 700.0)))
    size_bytes = len(text.encode("utf-8", "replace")) * scored / len(tokens)
    mean = total / scored
    bits = total / math.log(2) / size_bytes
    return Perplexity(math.exp(min(mean, 700.0)), scored, len(windows), bits, mean)


def negative_log_likelihood(logits: np.ndarray, targets: list[int]) -> float:
    """Sum over rows of -log softmax(logits)[target], in nats; logits: (n, vocabulary) float32."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        shifted = row.astype(np.float64) - float(row.max())
        total += float(np.log(np.exp(shifted).sum()) - shifted[target])
    return total
