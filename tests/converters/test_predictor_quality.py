"""AUROC against counting pairs, and what a measured rise of perplexity counts for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svdengine.converters.end_to_end import SparseCost
from svdengine.converters.predictor_quality import mean_auroc


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 12))
def test_auroc_is_the_share_of_pairs_in_order(data: st.DataObject, n: int) -> None:
    found = data.draw(hnp.arrays(np.float32, (n, 3), elements=st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0])))
    active = data.draw(hnp.arrays(np.bool_, (n, 3)))
    areas = []
    for scores, truth in zip(found.T, active.T, strict=True):
        pairs = scores[truth][:, None] - scores[~truth]
        if pairs.size:
            areas.append(((pairs > 0).sum() + 0.5 * (pairs == 0).sum()) / pairs.size)
    expected = np.mean(areas) if areas else np.nan
    assert mean_auroc(found, active) == pytest.approx(expected, nan_ok=True)


def test_scores_that_are_not_numbers_do_not_hang() -> None:
    mean_auroc(np.full((5, 2), np.nan, np.float32), np.array([[True, False]] * 2 + [[False, True]] * 3))


def test_a_rise_counts_from_two_standard_errors_on() -> None:
    def cost(rise: float) -> SparseCost:
        return SparseCost(800, 20.0, rise, standard_error=0.001, kl=0.0002, agreement=0.99)

    assert cost(0.002).expected_rise == cost(-0.01).expected_rise == pytest.approx(0.0002, rel=1e-3)
    assert cost(0.005).expected_rise == pytest.approx(0.003)
