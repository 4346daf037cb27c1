"""The search for a strictness within a loss, on rises of many shapes."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdengine.converters.loss_search import MAX_TRIALS, Scale, search_strictness

SCALE = Scale(1e-5, 0.1, 5e-4)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(0.3, 1.5), st.floats(1e-4, 0.05), st.floats(0, 2e-4))
def test_the_limit_is_met_and_nearly_used(scale: float, power: float, limit: float, gain: float) -> None:
    """The rise grows as a power of the error; small errors may even make the loss smaller."""
    trials = []

    def rise_at(error: float) -> float:
        trials.append(error)
        return scale * error**power - gain

    found = search_strictness(rise_at, limit, SCALE)
    assert len(trials) <= MAX_TRIALS and SCALE.low <= found.strictness <= SCALE.high
    if math.isnan(found.rise):
        assert rise_at(min(trials)) > limit
        return
    assert found.rise <= limit and found.rise == rise_at(found.strictness)
    right = ((limit + gain) / scale) ** (1 / power)
    if 2 * SCALE.low < right < SCALE.high:
        assert found.rise >= 0.75 * limit or found.strictness >= 0.6 * right


def test_a_power_law_takes_few_trials() -> None:
    trials = []

    def rise_at(error: float) -> float:
        trials.append(error)
        return 30 * error**0.8

    assert 0.75 * 0.005 <= search_strictness(rise_at, 0.005, SCALE).rise <= 0.005
    assert len(trials) <= 2


def test_where_nothing_is_within_the_limit_the_smallest_error_is_taken() -> None:
    found = search_strictness(lambda error: 1.0, 0.01, SCALE)
    assert found.strictness == pytest.approx(SCALE.low) and math.isnan(found.rise)


def test_where_all_is_within_the_limit_the_error_grows_towards_the_largest() -> None:
    assert search_strictness(lambda error: 0.0, 0.01, SCALE).strictness > 0.05
