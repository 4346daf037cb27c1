"""Find the largest error at which a loss stays within its limit, in few trials: each is a run over held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

ERROR_RANGE = (1e-5, 0.1)  # within which the error is searched
MAX_TRIALS = 7
_START = 5e-4  # the first trial: about half a percent of perplexity in models that were measured
_POWER = 0.75  # the rise grows about with this power of the error there
_CLOSE = 0.9  # of the limit: near enough
_AIM = 0.95  # of the limit
_NARROW = 0.05  # a bracket of the error's logarithm that is not worth another trial
_SHRINK = 0.6  # an interpolation that leaves more of the bracket is followed by a bisection
_EDGE = 0.1  # of a bracket: no trial comes nearer to its ends


@dataclass(frozen=True)
class Found:
    """What the search came to."""

    error: float
    rise: float  # NaN where even the smallest error costs more than the limit, and was not tried


def search_error(rise_at: Callable[[float], float], limit: float) -> Found:
    """The largest error whose `rise_at(error)` is at most `limit`, about; its rise is at least 0.9 of the limit.

    By interpolation of log rise over log error, kept within a bracket. After MAX_TRIALS the best one is taken, and the
    smallest error of the range where none is within the limit.
    """
    low, high = (math.log(error) for error in ERROR_RANGE)
    below = above = math.nan  # logarithms of the rises at low and high
    best, rise, trial = low, math.nan, math.log(_START)
    for _ in range(MAX_TRIALS):
        found, width = rise_at(math.exp(trial)), high - low
        if found <= limit:
            low = best = trial
            rise, below = found, math.log(found) if found > 0 else math.nan
            if found >= _CLOSE * limit:
                break
        else:
            high, above = trial, math.log(found)
        if high - low < _NARROW:
            break
        trial = _next_trial(low, high, below, above, math.log(_AIM * limit))
        if not math.isnan(below + above) and high - low > _SHRINK * width:
            trial = (low + high) / 2
    return Found(max(math.exp(best), ERROR_RANGE[0]), rise)


def _next_trial(low: float, high: float, below: float, above: float, aim: float) -> float:
    """Where the rise is expected to be as aimed at, inside the bracket; its middle where nothing is expected."""
    if not math.isnan(below) and not math.isnan(above) and above > below:
        guess = low + (high - low) * (aim - below) / (above - below)
    elif not math.isnan(below) and high == math.log(ERROR_RANGE[1]):
        guess = low + (aim - below) / _POWER
    elif not math.isnan(above) and low == math.log(ERROR_RANGE[0]):
        guess = high + (aim - above) / _POWER
    else:
        guess = (low + high) / 2
    edge = _EDGE * (high - low)
    return min(max(guess, low + edge), high - edge)
