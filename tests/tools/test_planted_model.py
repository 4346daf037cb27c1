"""Planted models: the shares that were asked for, on any token, and a predictor that finds the active neurons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_zoo import make_batch, random_tokens
from test_random_model import TINY

from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import find_predictor
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.executor import NeuronCounts
from svdengine.kernels.predictor import Predictor
from svdengine.tools import planted_model, random_model
from svdengine.tools.planted_model import PlantedWeights, Sparsity, write_planted

CONFIG = replace(TINY, activation="relu", ffn_size=512, hidden_size=256, layer_count=3)


def decoded(path: Path, *, predict: bool) -> NeuronCounts:
    """Decode ten random tokens; without the predictor, every gate is computed and exact zeros are skipped."""
    with read_model_file(path) as file:
        predictor: Predictor | None = find_predictor(file) if predict else None
        setup = ExecutorSetup(file.config, file.arrays, file.formats, block_count=4, predictor=predictor, ffn="sparse")
        executor = CpuExecutor(setup, threads=1)
        try:
            for position, token in enumerate(random_tokens(CONFIG, 20)):
                executor.forward(make_batch([([token], position)], [[0, 1]]))
            return executor.neuron_counts()
        finally:
            executor.close()


@pytest.mark.parametrize(
    ("dtype", "sparsity"),
    [
        ("q8", Sparsity(rank=64, predicted=0.15, active=0.10, noise=0.05)),
        ("q4", Sparsity(rank=96, predicted=0.30, active=0.20, noise=0.02)),
        ("f16", Sparsity(rank=64, predicted=0.50, active=0.10, noise=0.05)),  # the paper's density
    ],
)
def test_the_shares_are_those_asked_for(tmp_path: Path, dtype: str, sparsity: Sparsity) -> None:
    write_planted(tmp_path / "m.svdp", CONFIG, dtype, sparsity)
    found, there = decoded(tmp_path / "m.svdp", predict=True), decoded(tmp_path / "m.svdp", predict=False)
    assert found.predicted / found.total == pytest.approx(sparsity.predicted, abs=0.02)
    assert found.active / found.total == pytest.approx(sparsity.active, abs=0.02)
    assert found.active > 0.9 * there.active  # what the predictor misses


EXPERTS = replace(
    CONFIG, family="smallthinker", expert_count=6, active_experts=2, router="sigmoid", early_router=True, ffn_size=256
)


def test_the_shares_are_those_asked_for_inside_experts(tmp_path: Path) -> None:
    sparsity = Sparsity(rank=64, predicted=0.3, active=0.2)
    write_planted(tmp_path / "m.svdp", EXPERTS, "q8", sparsity)
    found = decoded(tmp_path / "m.svdp", predict=True)
    assert found.total == 20 * EXPERTS.token_neurons == 20 * 3 * 2 * 256
    assert found.predicted / found.total == pytest.approx(sparsity.predicted, abs=0.03)
    assert found.active / found.total == pytest.approx(sparsity.active, abs=0.03)


def test_the_router_of_a_planted_model_has_no_favourites(tmp_path: Path) -> None:
    write_planted(tmp_path / "m.svdp", EXPERTS, "q8", Sparsity(rank=64))
    with read_model_file(tmp_path / "m.svdp") as file:
        setup = ExecutorSetup(EXPERTS, file.arrays, file.formats, block_count=8, max_batch_rows=120)
        executor = CpuExecutor(setup, threads=1)
        executor.ffn_inputs(make_batch([(random_tokens(EXPERTS, 120), 0)], [list(range(8))]))
        assert executor.kept_experts is not None
        shares = np.bincount(executor.kept_experts.reshape(-1), minlength=6) / executor.kept_experts.size
        assert shares.min() > 0.08 and shares.max() < 0.3
        executor.close()


def test_a_skewed_router_has_favourites_of_each_layer() -> None:
    """A token's first expert is the most popular one somewhat more often than by Zipf's law, which says 30 %."""
    config = replace(EXPERTS, expert_count=16, active_experts=2)
    weights = PlantedWeights(config, Sparsity(rank=64, skew=1.0))
    tokens = weights.tensor("embedding")
    assert not np.any(PlantedWeights(config, Sparsity(rank=64)).tensor("router", 0)[:, :32])
    favourites = []
    for layer in range(config.layer_count):
        first = (tokens @ weights.tensor("router", layer).T).argmax(1)
        shares = np.sort(np.bincount(first, minlength=16) / len(first))[::-1]
        favourites.append(np.bincount(first).argmax())
        assert 0.3 < shares[0] < 0.5
        assert shares[8:].sum() < 0.25
    assert len(set(favourites)) > 1


def test_shapes_of_experts() -> None:
    small, large = (
        random_model.shape_config("smallthinker-4b", None, "relu"),
        random_model.shape_config("smallthinker-21b", 6, "relu"),
    )
    assert small.token_neurons * small.expert_count == small.ffn_blocks * small.ffn_size * small.active_experts
    assert large.unrotated_layers == (0, 4) and large.sliding_window_layers == (1, 2, 3, 5)
    mixed = random_model.shape_config("smollm2-135m", 2, "relu", 4, 2)
    assert (mixed.expert_count, mixed.ffn_blocks) == (4, 8)
    with pytest.raises(ValueError, match="active_experts must lie in"):
        random_model.shape_config("smollm2-135m", 2, "relu", 4)


def test_the_gate_is_what_the_factors_and_the_noise_say() -> None:
    sparsity = Sparsity(rank=16, predicted=0.2, active=0.1, noise=0.1)
    weights = PlantedWeights(CONFIG, sparsity)
    gate = weights.tensor("gate", 1)
    np.testing.assert_array_equal(gate, PlantedWeights(CONFIG, sparsity).tensor("gate", 1))
    varying = gate[:, 32:].astype(np.float64)
    share = np.linalg.svd(varying, compute_uv=False)[:16] ** 2
    assert share.sum() / (varying**2).sum() == pytest.approx(0.9 + 0.1 * 0.1, abs=0.03)
    assert not np.any(weights.tensor("o", 0)[:32]) and not np.any(weights.tensor("down_T", 0)[:, :32])


def test_the_threshold_of_gates_meets_the_share_that_is_active() -> None:
    """Against a simulation; without noise, the gate's own quantile."""
    assert Sparsity(predicted=0.3, active=0.1, noise=1e-6).gate_threshold == pytest.approx(1.2816, abs=1e-2)
    sparsity = Sparsity(predicted=0.2, active=0.1, noise=0.3)
    score, rest = np.random.default_rng(0).standard_normal((2, 400_000))
    gate = 0.7**0.5 * score + 0.3**0.5 * rest
    both = (score > sparsity.score_threshold) & (gate > sparsity.gate_threshold)
    assert both.mean() == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize(
    "fields", [{"rank": 0}, {"noise": 0.0}, {"active": 0.2}, {"active": 0.0}, {"predicted": 1.0}, {"skew": -0.1}]
)
def test_shares_that_cannot_be_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Sparsity(**fields)  # type: ignore[arg-type]


def test_models_without_relu_gates_and_ranks_too_large_are_refused() -> None:
    for config in (TINY, replace(CONFIG, activation="drelu"), replace(CONFIG, hidden_size=128, head_dim=32)):
        with pytest.raises(ValueError, match=r"planted in|expected at most 96"):
            PlantedWeights(config, Sparsity(rank=128))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(random_model.SHAPES, "llama2-7b", TINY)
    planted_model.main(["--layers", "1", "--rank", "8", "-o", str(tmp_path / "m.svdp")])
    assert "m.svdp: " in capsys.readouterr().out
    with read_model_file(tmp_path / "m.svdp") as file:
        found = find_predictor(file)
        assert found is not None and found.layers[0].rank == 8 and found.about["kind"] == "svd"
        assert found.densities == pytest.approx((0.15, 0.1))
    with pytest.raises(SystemExit, match=r"error: found 0.15 predicted and 0.5 active"):
        planted_model.main(["--active", "0.5", "-o", str(tmp_path / "n.svdp")])
