"""Find how strict thresholds may be before a loss passes its limit, in few trials: each is a run over held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_TRIALS = 7
_POWER = 0.75  # the rise grows about with this power of the strictness
_CLOSE = 0.75  # of the limit: near enough, since twice the loss saves but 4 % of the bytes
_AIM = 0.88  # of the limit
_NARROW = 0.05  # a bracket of the strictness's logarithm that is not worth another trial
_SHRINK = 0.6  # an interpolation that leaves more of the bracket is followed by a bisection
_EDGE = 0.1  # of a bracket: no trial comes nearer to its ends


@dataclass(frozen=True)
class Scale:
    """What is searched: a measure of strictness above 0, in which the loss grows about as a power."""

    low: float
    high: float
    start: float  # the first trial


@dataclass(frozen=True)
class Found:
    """What the search came to."""

    strictness: float
    rise: float  # NaN where even the lowest strictness costs more than the limit, and was not tried


def search_strictness(rise_at: Callable[[float], float], limit: float, scale: Scale) -> Found:
    """The highest strictness whose `rise_at` is at most `limit`, about; its rise is at least 0.75 of the limit.

    By interpolation of log rise over log strictness, kept within a bracket. After MAX_TRIALS the best one is taken, and
    the lowest of the scale where none is within the limit.
    """
    lowest, highest = low, high = math.log(scale.low), math.log(scale.high)
    below = above = math.nan  # logarithms of the rises at low and high
    best, rise, trial = low, math.nan, math.log(scale.start)
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
        if math.isnan(below) and not math.isnan(above) and low == lowest:
            trial = _inside(low, high, high + (math.log(_AIM * limit) - above) / _POWER)
        elif math.isnan(above) and not math.isnan(below) and high == highest:
            trial = _inside(low, high, low + (math.log(_AIM * limit) - below) / _POWER)
        else:
            trial = _between(low, high, below, above, math.log(_AIM * limit))
        if not math.isnan(below + above) and high - low > _SHRINK * width:
            trial = (low + high) / 2
    return Found(min(max(math.exp(best), scale.low), scale.high), rise)


def _between(low: float, high: float, below: float, above: float, aim: float) -> float:
    """Where the rise is expected to be as aimed at; the middle of the bracket where nothing is expected."""
    if not math.isnan(below) and not math.isnan(above) and above > below:
        return _inside(low, high, low + (high - low) * (aim - below) / (above - below))
    return (low + high) / 2


def _inside(low: float, high: float, guess: float) -> float:
    """A guess, kept away from the ends of the bracket."""
    edge = _EDGE * (high - low)
    return min(max(guess, low + edge), high - edge)
