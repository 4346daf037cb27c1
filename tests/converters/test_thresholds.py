"""Thresholds against brute force, and tables against plain counting."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from svdengine.converters.ffn_layer import Neurons
from svdengine.converters.predictor_quality import select
from svdengine.converters.thresholds import (
    CALIBRATORS,
    Sample,
    calibrate_thresholds,
    error_thresholds,
    make_sample,
    measure_thresholds,
    recall_thresholds,
    uniform_thresholds,
)

ROW_BYTES = (10, 11, 12)


def objective(sample: Sample, threshold: float, weight: float) -> float:
    """What the error calibrator minimises, for a sample of one neuron."""
    predicted = sample.scores[0] > np.float32(threshold)
    rows = 10 * predicted.sum() + 23 * (predicted & sample.active[0]).sum()
    return float(sample.energy[0][~predicted].sum(dtype=np.float64) + weight * rows / 33)


def neurons_of(energy: np.ndarray) -> Neurons:
    return Neurons(np.where(energy > 0, 1, -1).astype(np.float32), energy > 0, energy.astype(np.float32))


def random_sample(seed: int, n: int = 200, f: int = 12, noise: float = 0.6) -> tuple[Sample, np.ndarray, Neurons]:
    random = np.random.default_rng(seed)
    gates = random.standard_normal((n, f)).astype(np.float32) - 1
    energy = (np.maximum(gates, 0) * random.standard_normal((n, f))) ** 2
    energy /= np.maximum(energy.sum(1, keepdims=True), 1e-9)
    neurons = Neurons(gates, gates > 0, energy.astype(np.float32))
    scores = (gates + noise * random.standard_normal((n, f))).astype(np.float32)
    return make_sample(scores, neurons), scores, neurons


SCORES = st.integers(-6, 6).map(float)  # few values: ties are common


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 9), st.floats(1e-4, 3.0))
def test_error_thresholds_are_optimal(data: st.DataObject, n: int, weight: float) -> None:
    scores = data.draw(hnp.arrays(np.float32, (n, 1), elements=SCORES))
    energy = data.draw(hnp.arrays(np.float64, (n, 1), elements=st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0])))
    sample = make_sample(scores, neurons_of(energy))
    found = error_thresholds(sample, np.array([weight]), ROW_BYTES)[0, 0]
    candidates = [*(scores[:, 0]), scores.min() - 1]
    best = min(objective(sample, c, weight) for c in candidates)
    assert objective(sample, found, weight) <= best + 1e-6


def test_stricter_weights_predict_less_and_lose_more() -> None:
    sample, _, _ = random_sample(1)
    table = measure_thresholds(sample, error_thresholds(sample, np.geomspace(1e-4, 10, 20), ROW_BYTES))
    assert (np.diff(table.predicted) <= 1e-12).all() and (np.diff(table.error) >= 0).all()
    assert table.error[0] < 1e-3 and table.predicted[-1] < 0.2


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_tables_agree_with_counting(calibrator: str) -> None:
    sample, scores, neurons = random_sample(2)
    table = calibrate_thresholds(calibrator, sample, sample, ROW_BYTES)  # type: ignore[arg-type]
    for level in (0, len(table.error) // 2, len(table.error) - 1):
        chosen = select(scores > table.thresholds[level], neurons)
        assert chosen.predicted_density == pytest.approx(table.predicted[level])
        assert chosen.computed_density == pytest.approx(table.computed[level])
        assert chosen.relative_error == pytest.approx(table.error[level], abs=1e-6)


@pytest.mark.parametrize("calibrator", [name for name in CALIBRATORS if name != "trained"])
def test_budgets_are_met(calibrator: str) -> None:
    sample, scores, neurons = random_sample(3, n=400)  # few tokens: between levels the error jumps
    table = calibrate_thresholds(calibrator, sample, sample, ROW_BYTES)  # type: ignore[arg-type]
    found = [select(scores > table.at(table.level_of_error(e)), neurons) for e in (1e-3, 0.05)]
    assert found[0].relative_error <= 3e-3 and found[1].relative_error <= 0.055
    assert found[1].predicted_density < found[0].predicted_density
    exact = select(scores > table.at(table.level_of_density(0.3)), neurons)
    assert exact.predicted_density == pytest.approx(0.3, abs=0.03)


def test_recall_is_kept_by_each_neuron() -> None:
    sample, scores, neurons = random_sample(4)
    for recall, cut in zip((0.99, 0.7), recall_thresholds(sample, np.array([0.99, 0.7])), strict=True):
        hits = ((scores > cut) & neurons.active).sum(0) / np.maximum(neurons.active.sum(0), 1)
        assert (hits[neurons.active.any(0)] >= recall - 1e-9).all()


def test_the_spread_of_scores_in_other_units_is_in_their_units() -> None:
    sample, scores, neurons = random_sample(6)
    same = make_sample(scores, neurons, estimates=False)
    np.testing.assert_allclose(same.spread, sample.spread, rtol=0.1)
    other = make_sample(100 * scores + 7, neurons, estimates=False)
    np.testing.assert_allclose(other.spread, 100 * same.spread, rtol=1e-3)
    still = make_sample(scores, replace(neurons, gates=np.zeros_like(scores)), estimates=False)
    np.testing.assert_allclose(still.spread, scores.std(0), rtol=1e-5)


def test_uniform_thresholds_are_uniform() -> None:
    sample, scores, neurons = random_sample(5)
    cut = uniform_thresholds(sample, np.array([0.9]))[0]
    assert len(set(cut)) == 1
    assert ((scores > cut) & neurons.active).sum() / neurons.active.sum() >= 0.9


def test_a_neuron_that_was_never_active_is_computed_only_beyond_what_was_seen() -> None:
    scores = np.arange(8, dtype=np.float32)[:, None]
    sample = make_sample(scores, neurons_of(np.zeros((8, 1))))
    for thresholds in (error_thresholds(sample, np.array([1e-6]), ROW_BYTES), recall_thresholds(sample, np.ones(1))):
        assert thresholds[0, 0] == 7.0


def test_levels_outside_the_table_are_its_ends() -> None:
    sample, _, _ = random_sample(6)
    table = measure_thresholds(sample, error_thresholds(sample, np.array([1e-4, 1e-2, 1.0]), ROW_BYTES))
    for level, row in itertools.chain([(-5.0, 0), (0.0, 0), (1.0, 1), (2.0, 2), (99.0, 2)]):
        np.testing.assert_allclose(table.at(level), table.thresholds[row])
    assert table.level_of_error(1.0) == 2.0 and table.level_of_density(1.0) == 0.0
