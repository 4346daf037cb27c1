"""Which path a step takes: by times that were measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, zoo
from random_predictors import make_predictor
from test_cpu_sparse import executor

from svdengine.kernels import ffn_times
from svdengine.kernels.executor import NeuronCounts
from svdengine.kernels.ffn_times import SIZES, FfnTimes, choose_path, measure_ffn_times
from svdengine.kernels.predictor import Predictor

# A machine on which a dense FFN reads 300 rows at 1 us each, or computes 2 us a row of the step, whichever is longer.
TIMES = FfnTimes(
    neurons=100,
    dense=tuple(max(300e-6, 100e-6 * n) for n in SIZES),
    scoring=tuple(10e-6 * n for n in SIZES),
    first_use=1e-6,
    further_use=0.5e-6,
)


def test_sparse_seconds_count_rows_once_from_memory_and_then_from_a_cache() -> None:
    assert TIMES.sparse_seconds(1, 0.2, 0.1) == pytest.approx(10e-6 + (20 + 2 * 10) * 1e-6)
    first, uses = (1 - 0.8**2) + 2 * (1 - 0.9**2), 2 * 0.4
    assert TIMES.sparse_seconds(2, 0.2, 0.1) == pytest.approx(20e-6 + 100 * (first + 0.5 * (uses - first)) * 1e-6)
    assert TIMES.dense_seconds(5) == pytest.approx(550e-6)
    assert TIMES.dense_seconds(64) == pytest.approx(6400e-6)


def test_rows_of_a_mixture_seldom_have_the_same_experts() -> None:
    """Four rows that each have a tenth of the neurons use about four times as many, and few of them again."""
    times = replace(TIMES, neurons=1000, share=0.1, sizes=(*SIZES, 320), dense=(*TIMES.dense, 4e-3), scoring=(0.0,) * 5)
    assert times.sparse_seconds(1, 0.2, 0.1) == pytest.approx((20 + 2 * 10) * 1e-6)
    first = 1000 * ((1 - 0.98**4) + 2 * (1 - 0.99**4))
    assert times.sparse_seconds(4, 0.2, 0.1) == pytest.approx((first + 0.5 * (4 * 40 - first)) * 1e-6)
    assert times.skipping_seconds(0.1) == pytest.approx(100e-6 * 1.2)
    assert times.dense_seconds(176) == pytest.approx((TIMES.dense[-1] + 4e-3) / 2)  # half way from 32 to 320


def test_a_mixture_is_measured_with_as_many_rows_for_each_expert() -> None:
    asked: list[tuple[int, int]] = []

    class Runner:
        ffn, max_batch_rows = "auto", 512

        def run_ffns(self, inputs: Any, layers: int, sparsity_bias: float = 0.0) -> Any:
            asked.append((len(inputs), layers))

        def neuron_counts(self) -> NeuronCounts:
            return NeuronCounts(len(asked), len(asked), 2 * len(asked))

    times = measure_ffn_times(Runner(), 64, 1000, 1e6, 16, share=0.125)  # type: ignore[arg-type]
    assert times.sizes == (1, 2, 8, 32, 256) and len(times.dense) == len(times.scoring) == 5
    assert {layers for rows, layers in asked if rows <= 32} == {64}
    assert (256, 8) in asked  # they have the bytes of eight times as many experts


def test_the_path_depends_on_densities_and_on_the_step() -> None:
    assert TIMES.fastest(1, 0.2, 0.1) == "predict"
    assert TIMES.fastest(1, 0.9, 0.1) == "skip_zeros"  # 10 us of scoring save too little
    assert TIMES.fastest(1, 1.0, 0.9) == "skip_zeros"
    assert replace(TIMES, dense=(250e-6,) * 4).fastest(1, 1.0, 0.9) == "dense"
    dense_from_two = FfnTimes(100, (300e-6,) + (310e-6,) * 3, TIMES.scoring, 1e-6, 1e-6)
    assert dense_from_two.fastest(2, 0.2, 0.1) == "predict"
    assert dense_from_two.fastest(32, 0.2, 0.1) == "dense"
    assert dense_from_two.fastest(2, 1.0, 0.9) == "dense"  # zeros are skipped in steps of one row only


def test_exact_paths_predict_nothing() -> None:
    predictor = make_predictor(zoo()["llama_relu_tied"], 8, 0, 0.0)

    def unasked() -> FfnTimes:
        raise AssertionError("no time matters")

    for given in (None, predictor):
        assert [choose_path("exact", rows, given, unasked) for rows in (1, 2, 32)] == ["skip_zeros", "dense", "dense"]
        assert [choose_path("dense", rows, given, unasked) for rows in (1, 2, 32)] == ["dense"] * 3


def test_without_a_gate_the_rows_of_up_are_the_gates() -> None:
    """All of up and few rows of down cost little more than half of a dense FFN of 200 rows: no prediction pays."""
    ungated = replace(TIMES, dense=(200e-6,) * 4, later=1)
    assert ungated.sparse_seconds(1, 0.2, 0.1) == pytest.approx(10e-6 + (20 + 10) * 1e-6)
    assert ungated.skipping_seconds(0.1) == pytest.approx(110e-6)
    assert ungated.fastest(1, 0.95, 0.1) == "skip_zeros"
    assert replace(ungated, later=2).skipping_seconds(0.6) > 200e-6 > ungated.skipping_seconds(0.6)


def test_times_are_measured_on_the_executor_and_leave_it_as_it_was() -> None:
    config = zoo()["llama_relu_tied"]
    with executor(config, "q8", make_predictor(config, 8, 0, 0.0)) as cpu:
        cpu.ffn = "auto"
        times = cpu.ffn_times
        assert cpu.ffn == "auto" and cpu.neuron_counts().total == 0 and cpu.ffn_times is times
        assert len(times.dense) == len(times.scoring) == len(SIZES)
        assert min(times.dense) > 0 and min(times.scoring) > 0
        assert 0 <= times.further_use <= times.first_use
        cpu.predictor = make_predictor(config, 16, 0, 0.0)
        assert cpu.ffn_times is not times


@pytest.mark.parametrize("sparse", [True, False])
def test_auto_takes_the_path_that_is_faster(monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    config = zoo()["llama_relu_tied"]
    asked: list[Any] = []

    def fastest(self: FfnTimes, rows: int, predicted: float, active: float) -> str:
        asked.append((rows, predicted, active))
        return "predict" if sparse else "dense"

    monkeypatch.setattr(FfnTimes, "fastest", fastest)
    about = {"table": [{"predicted_density": 0.3, "computed_density": 0.2}] * config.layer_count}
    with executor(config, "q8", Predictor(make_predictor(config, 8, 0, 0.0).layers, about)) as cpu:
        cpu.ffn = "auto"
        for length in (1, 5):
            cpu.forward(make_batch([(random_tokens(config, length), 0)], [block_table(length)]))
        assert [a[0] for a in asked] == [1, 5] and asked[0][1:] == pytest.approx((0.3, 0.2))
        assert (cpu.neuron_counts().total > 0) == sparse


@pytest.mark.parametrize("later", [2, 1])
def test_measuring_solves_for_the_times_of_a_stored_row(monkeypatch: pytest.MonkeyPatch, later: int) -> None:
    """A runner whose time follows the model exactly gives the model's numbers back."""
    clock, truth = [0.0], replace(TIMES, later=later)
    monkeypatch.setattr(ffn_times.time, "perf_counter", lambda: clock[0])

    class Runner:
        max_batch_rows = 64

        def __init__(self) -> None:
            self.ffn: Any = "auto"
            self.counts = np.zeros(3)

        def run_ffns(self, inputs: Any, layers: int, sparsity_bias: float = 0.0) -> Any:
            n = len(inputs)
            if self.ffn == "dense":
                clock[0] += layers * truth.dense_seconds(n)
            else:
                share = min(max(0.25 - 0.1 * sparsity_bias, 0.0), 1.0)
                clock[0] += layers * truth.sparse_seconds(n, share, share / 2)
                self.counts += layers * n * np.array([100 * share, 50 * share, 100])
            return inputs

        def neuron_counts(self) -> Any:
            return ffn_times.NeuronCounts(*self.counts)

    runner = Runner()
    times = measure_ffn_times(runner, 4, 100, 16e6, 8, gated=later == 2)
    assert runner.ffn == "auto"
    np.testing.assert_allclose(times.dense, TIMES.dense)
    np.testing.assert_allclose(times.scoring, TIMES.scoring)
    assert times.first_use == pytest.approx(TIMES.first_use)
    assert times.further_use == pytest.approx(TIMES.further_use, rel=1e-6)
