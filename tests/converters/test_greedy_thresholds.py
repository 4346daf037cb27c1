"""Greedy thresholds against a greedy that looks at every neuron in every step, and their bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svdengine.converters.greedy_thresholds import (
    QUANTILES,
    constant_threshold,
    greedy_thresholds,
    missed_at_quantiles,
    raise_greedily,
)
from svdengine.errors import ConversionError


def raise_naively(growth: np.ndarray, steps: np.ndarray, count: int, off_limit: int) -> None:
    """The definition: in each step, the first neuron of the least growth."""
    last, off = growth.shape[1], 0
    padded = np.concatenate([growth, np.full((len(growth), 1), np.inf)], 1)
    for _ in range(count):
        neuron = int(padded[np.arange(len(steps)), steps].argmin())
        if steps[neuron] == last:
            return
        off += steps[neuron] + 1 == last
        if off > off_limit:
            return
        steps[neuron] += 1


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 7), st.integers(0, 50), st.integers(0, 6))
def test_the_heap_does_what_a_naive_greedy_does(
    data: st.DataObject, neurons: int, last: int, count: int, off_limit: int
) -> None:
    # Few values: ties are common, and growth falls as often as it rises.
    growth = data.draw(hnp.arrays(np.float64, (neurons, last), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])))
    steps = data.draw(hnp.arrays(np.int64, neurons, elements=st.integers(0, last)))
    expected = steps.copy()
    raise_naively(growth, expected, count, off_limit)
    raise_greedily(growth, steps, count, off_limit)
    np.testing.assert_array_equal(steps, expected)


def sorted_sample(seed: int, f: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in ascending order, and penalties that grow with them and are zero for the lower part."""
    random = np.random.default_rng(seed)
    gates = random.standard_normal((f, n)).astype(np.float32) - random.uniform(0.5, 2, (f, 1)).astype(np.float32)
    scores = gates + 1.5 * random.standard_normal((f, n)).astype(np.float32)
    order = scores.argsort(1)
    return np.take_along_axis(scores, order, 1), np.maximum(np.take_along_axis(gates, order, 1), 0)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5])
def test_the_wanted_share_lies_below_the_thresholds(share: float) -> None:
    scores, penalties = sorted_sample(0, 200, 2560)
    thresholds = greedy_thresholds(scores, penalties, share)
    assert (scores <= thresholds[:, None]).mean() == pytest.approx(share, abs=0.01)


def test_less_is_missed_than_at_one_threshold_or_one_quantile() -> None:
    scores, penalties = sorted_sample(1, 200, 2560)
    lost = {
        name: float(np.square(penalties, dtype=np.float64)[scores <= cuts[:, None]].sum())
        for name, cuts in {
            "greedy": greedy_thresholds(scores, penalties, 0.6),
            "constant": constant_threshold(scores, 0.6),
            "quantile": np.quantile(scores, 0.6, axis=1),
        }.items()
    }
    assert lost["greedy"] < 0.9 * lost["quantile"] and lost["greedy"] < 0.9 * lost["constant"]


def test_no_neuron_starts_beyond_95_percent_and_few_are_switched_off() -> None:
    scores, penalties = sorted_sample(2, 200, 2560)
    idle = greedy_thresholds(scores, np.zeros_like(penalties), 0.5)
    np.testing.assert_array_equal(idle, scores[:, 242 * 10])  # they all cost nothing, and start where they may
    all_of_it = greedy_thresholds(scores, np.zeros_like(penalties), 1.0)
    assert (all_of_it == scores[:, 255 * 10]).sum() == 2  # 1 % of them; the third would have been one too many
    penalties[0] = 0
    assert greedy_thresholds(scores, penalties, 1e-3)[0] == scores[0, 242 * 10]


def test_missed_sums_include_the_first_and_the_last_token() -> None:
    penalties = np.full((1, 1000), 2, np.float32)
    missed = missed_at_quantiles(penalties)
    assert missed.shape == (1, QUANTILES) and missed[0, 0] == 4 and missed[0, -1] == 4000


def test_too_few_tokens_for_the_quantiles_are_refused() -> None:
    scores, penalties = sorted_sample(3, 4, 255)
    with pytest.raises(ConversionError, match=r"256 quantiles.* has 255 tokens"):
        greedy_thresholds(scores, penalties, 0.5)
