"""Filters of candidate tokens: each keeps some of them, before one is drawn.

Candidates are two arrays: token ids (n,) int64 and weights (n,) float64, their probabilities times any constant. Each
filter keeps their order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Weights = NDArray[np.float64]


def within_sigmas(logits: NDArray[np.float32], sigmas: float) -> Tokens:
    """Tokens whose logit is at most `sigmas` standard deviations below the largest (top-nσ, arXiv 2411.07641).

    logits: (vocabulary,). The temperature does not change which they are. Logits of minus infinity do not count.
    """
    finite = logits[np.isfinite(logits)].astype(np.float64)
    bound = float(finite.max()) - sigmas * float(finite.std())
    return np.flatnonzero(logits >= bound)


def locally_typical(tokens: Tokens, weights: Weights, mass: float) -> tuple[Tokens, Weights]:
    """The tokens whose surprise is nearest to the mean surprise and that make up `mass` together (arXiv 2202.00666).

    The token that crosses the line is kept, so that there is at least one.
    """
    probabilities = weights / weights.sum()
    with np.errstate(divide="ignore"):
        surprise = -np.log(probabilities)
    entropy = float((probabilities * np.where(probabilities > 0, surprise, 0.0)).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    count = int((np.cumsum(probabilities[order]) < mass).sum()) + 1
    kept = np.sort(order[:count])
    return tokens[kept], weights[kept]


def without_top_choices(tokens: Tokens, weights: Weights, threshold: float) -> tuple[Tokens, Weights]:
    """All but the likelier ones of the tokens of at least this probability; the least likely of these stays (XTC).

    After the sampler of p-e-w for text-generation-webui (pull request 6335). Probabilities are those among the
    candidates. Where fewer than two reach the threshold, nothing is left out.
    """
    probabilities = weights / weights.sum()
    above = np.flatnonzero(probabilities >= threshold)
    if len(above) < 2:
        return tokens, weights
    least = above[np.argmin(probabilities[above])]
    kept = np.setdiff1d(np.arange(len(tokens)), above[above != least])
    return tokens[kept], weights[kept]
