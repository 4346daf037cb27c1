"""Statistics of FFN inputs: exact moments, uniform samples, resumption, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from model_zoo import random_tokens, random_weights, zoo

from svdengine.converters.split_text import is_held_out
from svdengine.converters.statistics import (
    Reservoir,
    Statistics,
    StatisticsCollector,
    collect_statistics,
    window_batches,
)
from svdengine.errors import ConversionError
from svdengine.kernels.batch import Batch
from svdengine.kernels.reference import ReferenceExecutor

CONFIG = zoo()["llama_relu_tied"]
WINDOWS = [random_tokens(CONFIG, 40, seed) for seed in range(10)]


def executor_of() -> ReferenceExecutor:
    return ReferenceExecutor(CONFIG, random_weights(CONFIG), block_count=8, max_batch_rows=16)


def collector_of(fit_rows: int = 100, seed: int = 0) -> StatisticsCollector:
    return StatisticsCollector(CONFIG.layer_count, CONFIG.hidden_size, fit_rows=fit_rows, held_out_rows=50, seed=seed)


def inputs_of(held_out: bool) -> np.ndarray:
    """FFN inputs (layers, n, d) of all windows of one part, in one step each."""
    executor = ReferenceExecutor(CONFIG, random_weights(CONFIG), block_count=8)
    chosen = [w for i, w in enumerate(WINDOWS) if is_held_out(i) == held_out]
    return np.concatenate([executor.ffn_inputs(window_batches(w, executor)[0]) for w in chosen], 1)


def same(a: Statistics, b: Statistics) -> None:
    np.testing.assert_array_equal(a.fit, b.fit)
    np.testing.assert_array_equal(a.held_out, b.held_out)
    for one, other in zip(a.layers, b.layers, strict=True):
        # Rows are summed many at once, and in other groups after an interruption.
        np.testing.assert_allclose(one.mean, other.mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.second_moment, other.second_moment, rtol=1e-5, atol=1e-5)


def test_moments_are_those_of_the_fitting_windows() -> None:
    statistics = collect_statistics(executor_of(), WINDOWS, collector_of())
    x = inputs_of(held_out=False).astype(np.float64)
    assert statistics.tokens == x.shape[1] == 320
    for layer, found in enumerate(statistics.layers):
        np.testing.assert_allclose(found.mean, x[layer].mean(0), atol=1e-5)
        np.testing.assert_allclose(found.second_moment, x[layer].T @ x[layer] / 320, atol=1e-4)
        np.testing.assert_allclose(found.covariance, np.cov(x[layer].T, bias=True), atol=1e-4)


def test_samples_hold_rows_of_their_own_part_and_no_row_twice() -> None:
    statistics = collect_statistics(executor_of(), WINDOWS, collector_of())
    assert statistics.fit.shape == (2, 100, 90) and statistics.held_out.shape == (2, 50, 90)
    for sample, held_out in ((statistics.fit, False), (statistics.held_out, True)):
        rows = inputs_of(held_out)
        distance = np.abs(rows[:, None, :, :4] - sample[:, :, None, :4].astype(np.float32)).max((0, 3))
        assert (distance.min(1) < 2e-3).all()  # the same token in both layers
        assert len(set(distance.argmin(1))) == sample.shape[1]


def test_a_short_text_is_kept_whole() -> None:
    statistics = collect_statistics(executor_of(), WINDOWS, collector_of(fit_rows=5000))
    assert statistics.fit.shape[1] == 320
    rows = inputs_of(held_out=False)
    np.testing.assert_allclose(np.sort(statistics.fit, 1), np.sort(rows, 1), atol=5e-3)


def test_reservoirs_are_uniform() -> None:
    counts = np.zeros(60)
    for seed in range(200):
        reservoir = Reservoir(1, 15, 1, seed)
        for start in range(0, 60, 7):
            reservoir.add(np.arange(start, min(start + 7, 60), dtype=np.float32)[None, :, None])
        found = reservoir.sample()[0, :, 0].astype(int)
        assert len(set(found)) == 15
        counts[found] += 1
    assert abs(counts.mean() - 50) < 1e-9 and counts.min() > 25 and counts.max() < 80


def test_values_beyond_float16_are_clipped() -> None:
    reservoir = Reservoir(1, 2, 1, 0)
    reservoir.add(np.array([[[1e9], [-1e9]]], np.float32))
    assert set(reservoir.sample().ravel().astype(float)) == {65504.0, -65504.0}


def test_an_interrupted_pass_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = collect_statistics(executor_of(), WINDOWS, collector_of())
    executor, state = executor_of(), tmp_path / "state.safetensors"
    run, steps = executor.ffn_inputs, []

    def interrupt(batch: Batch) -> np.ndarray:
        steps.append(batch)
        if len(steps) == 12:  # in the middle of the fourth window
            raise KeyboardInterrupt
        return run(batch)

    executor.ffn_inputs = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(executor, WINDOWS, collector_of(), state=state)
    done: list[int] = []
    resumed = collect_statistics(
        executor_of(), WINDOWS, collector_of(), state=state, progress=lambda window, _: done.append(window)
    )
    assert done[0] == 4
    same(resumed, whole)
    same(collect_statistics(executor_of(), WINDOWS, collector_of(), state=state, progress=pytest.fail), whole)


def test_a_state_of_another_text_or_size_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    collector_of().save(state, "somebody else's")
    with pytest.raises(ConversionError, match="another text or model"):
        collect_statistics(executor_of(), WINDOWS, collector_of(), state=state)
    collect_statistics(executor_of(), WINDOWS, collector_of(), model="one", state=tmp_path / "one")
    with pytest.raises(ConversionError, match="another text or model"):
        collect_statistics(executor_of(), WINDOWS, collector_of(), model="other", state=tmp_path / "one")
    collector_of(fit_rows=7).save(state, "mine")
    with pytest.raises(ConversionError, match="another text or model"):
        collector_of().load(state, "mine")


def test_too_few_tokens_say_how_many_are_needed() -> None:
    with pytest.raises(ConversionError, match=r"160 tokens for fitting and 40 held out.*at least 256.*about 321"):
        collect_statistics(executor_of(), WINDOWS[:5], collector_of())
    with pytest.raises(ConversionError, match="0 held out"):
        collect_statistics(executor_of(), [[1] * 128] * 4, collector_of())


def test_values_that_are_not_finite_name_their_layer() -> None:
    inputs = np.zeros((2, 3, 90), np.float32)
    inputs[1, 2, 5] = np.nan
    with pytest.raises(ConversionError, match="layer 1: the FFN's input holds NaN"):
        collector_of().add(inputs, held_out=False)


def test_memory_does_not_grow_with_the_text() -> None:
    collector = collector_of()
    before = {name: array.nbytes for name, array in collector._state().items()}
    for _ in range(50):
        collector.add(np.ones((2, 64, 90), np.float32), held_out=False)
    assert {name: array.nbytes for name, array in collector._state().items()} == before


def test_moments_of_the_sample_stand_for_those_that_were_not_summed() -> None:
    size = {"fit_rows": 400, "held_out_rows": 50}
    summed = collect_statistics(
        executor_of(), WINDOWS, StatisticsCollector(CONFIG.layer_count, CONFIG.hidden_size, **size)
    )
    collector = StatisticsCollector(CONFIG.layer_count, CONFIG.hidden_size, **size, moments=False)
    sampled = collect_statistics(executor_of(), WINDOWS, collector)
    assert len(sampled.layers) == CONFIG.layer_count and sampled.tokens == summed.tokens
    for one, other in zip(sampled.layers, summed.layers, strict=True):  # float16 rows, all of them
        np.testing.assert_allclose(one.mean, other.mean, atol=1e-3)
        np.testing.assert_allclose(one.second_moment, other.second_moment, atol=5e-3)
