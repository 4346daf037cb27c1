"""The paper's thresholds (arXiv:2603.14110): raised greedily, where a quantile more misses least.

Each neuron's scores are cut at 256 quantiles. A neuron's threshold is one of them, and starts at the last one below
which nothing is lost, at most at 95 % of its tokens. Then, one quantile at a time, the neuron is raised whose sum of
squared penalties of missed tokens grows least, until the wanted share of (token, neuron) pairs lies below the
thresholds. A neuron at its last quantile is switched off; once 1 % of the neurons are, no other may follow.

Facts that the paper leaves open are those of the authors' program: the growth is that of the next quantile alone, and
quantile k is set at score number k * (n // 256) of n, its missed sum at k * (n - 1) / 255.
"""

from __future__ import annotations

import heapq

import numba
import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ConversionError

QUANTILES = 256
_START = int(0.95 * QUANTILES) - 1  # beyond which no neuron starts
_OFF_SHARE = 0.01  # of neurons that may be switched off

Array = NDArray[np.float32]


def greedy_thresholds(scores: Array, penalties: Array, share: float) -> Array:
    """Thresholds (f,) below which about `share` of the scores lie.

    `scores` (f, n) ascend along n; `penalties` (f, n) are what each of these tokens costs when it is missed. Raises
    ConversionError when there are fewer tokens than quantiles.
    """
    f, n = scores.shape
    if n < QUANTILES:
        raise ConversionError(
            f"greedy thresholds are cut from {QUANTILES} quantiles of a neuron's scores, and half of the calibration"
            f" text has {n} tokens; give more text, or raise --tokens"
        )
    missed = missed_at_quantiles(penalties)
    steps = np.clip((missed == 0).sum(1) - 1, 0, _START)
    count = int((share - steps.mean() / QUANTILES) * f * QUANTILES)
    raise_greedily(np.diff(missed, axis=1), steps, count, int(_OFF_SHARE * f))
    return scores[np.arange(f), steps * (n // QUANTILES)]


def constant_threshold(scores: Array, share: float) -> Array:
    """The same threshold (f,) for every neuron, below which `share` of all scores (f, n) lies: the paper's ablation."""
    return np.full(len(scores), np.quantile(scores, min(max(share, 0.0), 1.0)), np.float32)


def missed_at_quantiles(penalties: Array) -> NDArray[np.float64]:
    """Sum (f, QUANTILES) of squared penalties up to and with each quantile's token."""
    f, n = penalties.shape
    positions = np.linspace(0, n - 1, QUANTILES).astype(np.int64)
    missed = np.empty((f, QUANTILES))
    for i, row in enumerate(penalties):
        missed[i] = np.cumsum(np.square(row, dtype=np.float64))[positions]
    return missed


@numba.njit(nogil=True, cache=True)
def raise_greedily(growth, steps, count, off_limit):  # type: ignore[no-untyped-def]
    """Raise `steps` (f,) in place by 1 `count` times, each time where `growth` (f, last) at a neuron's step is least.

    Of equal ones the first neuron is raised. At most `off_limit` neurons are raised to the last step, where they end:
    the first that would be another one ends it all.
    """
    last = growth.shape[1]
    off = 0
    heap = [(growth[i, steps[i]], i) for i in range(len(steps)) if steps[i] < last]
    heapq.heapify(heap)
    for _ in range(count):
        if len(heap) == 0:
            return
        neuron = heap[0][1]
        if steps[neuron] + 1 == last:
            off += 1
            if off > off_limit:
                return
        steps[neuron] += 1
        if steps[neuron] == last:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (growth[neuron, steps[neuron]], neuron))
