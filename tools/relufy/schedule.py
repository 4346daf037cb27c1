"""How learning rate, sparsity target and penalty weight go over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_WARM_UP = 0.02  # of the steps
# Between these shares of the steps the sparsity target rises from what there is to what is wanted: late under the
# penalty, which costs most while it is high; early with thresholds, where a student has less than is wanted.
_RAMP = {"relu": (0.15, 0.75), "fatrelu": (0.05, 0.5)}
_ROUND_FROM = 0.5  # of the steps; before, weights are not rounded
_SMOOTHING = 0.9  # of the measured sparsity
_PUSH = 400.0  # what the weight gains over a whole run for each unit that the sparsity is below its target,
_LEAST_STEPS = 400  # in a run of at least so many steps: in a short one it would overshoot
_LEAN = 4.0  # what it has on top of that for the error of the moment
_MOST_WEIGHT = 6.0


def learning_rate(highest: float, step: int, total: int) -> float:
    """Up in a straight line over the first steps, then down to 0 along a cosine."""
    warm = max(1, int(_WARM_UP * total))
    if step < warm:
        return highest * (step + 1) / warm
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def is_rounded(step: int, total: int, goes_on: bool) -> bool:
    """Whether a step computes with weights as the file will hold them, where that is asked for.

    goes_on: from an earlier run. A student that has learned to live with the rounding is worse without it.
    """
    return goes_on or step >= _ROUND_FROM * total


@dataclass(frozen=True)
class Steering:
    """The target that the share of zero gates follows, and the penalty's weight, steered so that it does."""

    activation: str  # of ACTIVATIONS
    floor: float | None = None  # sparsity of an earlier run, which is kept from the first step on
    start: float | None = None  # sparsity when the target began to rise
    measured: float | None = None  # smoothed
    held: float = 0.0  # the part of the weight that remembers past errors

    def target(self, step: int, total: int, goal: float) -> float | None:
        """What the sparsity shall be at least; None while it is left alone."""
        first, last = (share * total for share in _RAMP[self.activation])
        if self.start is None or step < first:
            return self.floor
        return self.start + (goal - self.start) * min(1.0, (step - first) / max(1.0, last - first))

    def weight(self, step: int, total: int, goal: float) -> float:
        """The penalty's weight for a step."""
        target = self.target(step, total, goal)
        if target is None or self.measured is None:
            return 0.0
        return min(_MOST_WEIGHT, max(0.0, self.held + _LEAN * (target - self.measured)))

    def after(self, zeros: float, step: int, total: int, goal: float) -> Steering:
        """The state after a step in which the share `zeros` of the gates was zero."""
        measured = zeros if self.measured is None else _SMOOTHING * self.measured + (1 - _SMOOTHING) * zeros
        if step < _RAMP[self.activation][0] * total:
            return replace(self, start=measured, measured=measured)
        target = self.target(step, total, goal)
        pushed = self.held if target is None else self.held + _PUSH / max(total, _LEAST_STEPS) * (target - measured)
        return replace(self, start=self.start or measured, measured=measured, held=min(_MOST_WEIGHT, max(0.0, pushed)))
