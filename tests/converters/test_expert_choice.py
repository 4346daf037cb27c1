"""Whether a predictor pays for experts, and which: on planted mixtures whose best answer is known by counting bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_experts import ALWAYS, NEVER, mixture, write_mixture

from svdengine import load
from svdengine.commands.greeting import greeting
from svdengine.converters.calibration import EXACT, CalibrationOptions, calibrate, find_shapes
from svdengine.converters.calibration_size import default_kind
from svdengine.converters.expert_choice import PAYS, choose_for_experts, expert_shapes, find_subjects
from svdengine.converters.predictor_choice import PredictorShape
from svdengine.converters.statistics import StatisticsCollector, collect_statistics
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.predictor_file import write_model_with_predictor
from svdengine.kernels.ffn_times import choose_path
from svdengine.kernels.formats import FORMATS
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.kernels.reference import ReferenceExecutor, float32_weights
from svdengine.measuring.predictor_table import predictor_lines, predictor_report
from svdengine.models.config import ModelConfig
from svdengine.tools.planted_model import Sparsity
from svdengine.tools.random_model import SHAPES

# Of width d = 192: a predictor of rank 64 reads 64 (d + f) weights of 8.5 bits, the gate has d f.
WIDE = mixture(hidden_size=192, ffn_size=768, layer_count=2, head_dim=48)
NARROW = replace(WIDE, ffn_size=64)
RANK_64 = Sparsity(rank=64, predicted=0.12, active=0.1, noise=0.01)


def windows(config: ModelConfig, count: int = 14) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, config.vocab_size, 64).tolist() for n in range(count)]


def executor_of(file: ModelFile) -> ReferenceExecutor:
    return ReferenceExecutor(file.config, float32_weights(file.config, file.arrays, file.formats), block_count=8)


def calibrated(path: Path, **options: object) -> tuple[Predictor, ModelFile]:
    file = read_model_file(path)
    wanted = CalibrationOptions(kind="auto", **options)  # type: ignore[arg-type]
    return calibrate(file, executor_of(file), windows(file.config), wanted), file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    write_mixture(folder / "wide.svdp", WIDE, sparsity=RANK_64, predictor=False)
    write_mixture(folder / "narrow.svdp", NARROW, sparsity=RANK_64, predictor=False)
    return folder


def test_a_predictor_that_pays_is_made_for_all_experts(folder: Path) -> None:
    """Gates of rank 64 with a tenth active: it reads well below what exact zeros leave."""
    found, file = calibrated(folder / "wide.svdp", max_error=0.01, rank=64)
    choice = found.about["choice"]
    assert not choice["exact"] and (choice["best"]["kind"], choice["best"]["rank"]) == ("svd", 64)
    assert choice["best"]["factors"] == "q4"  # enough to find the neurons, in half the bytes
    assert {layer.factor_format for layer in found.layers if layer.rank} == {"q4"}
    gate = 768 * 192 * 8.5 / 8
    assert choice["gate_bytes"] == pytest.approx(gate) and choice["dense_bytes"] == pytest.approx(3 * gate)
    factors = FORMATS["q4"].stored_bytes(768, 64) + FORMATS["q4"].stored_bytes(64, 192)
    assert choice["best"]["scoring"] == factors + 4 * 768
    assert choice["best"]["read"] < PAYS * choice["exact_bytes"]
    ranks = {row["rank"] for row in found.about["table"] if row["kind"] != EXACT}
    assert ranks == {64} and found.layers[NEVER].rank == 0
    lines = "\n".join(predictor_lines(predictor_report(found, file.config)))
    assert "experts: with svd of rank 64 in q4 a token reads" in lines and "of 12" in lines
    file.close()


def test_nothing_pays_where_experts_are_narrow_and_the_file_says_why(folder: Path, tmp_path: Path) -> None:
    """A rank of 64 is all of a gate of 64 neurons: its factors are larger than the gate, which has 8.5 bits too."""
    found, file = calibrated(folder / "narrow.svdp", rank=64)
    assert found.scores_nothing and found.about["choice"]["exact"] and not found.about["outcome"]
    assert found.about["kind"] == EXACT
    assert {row["kind"] for row in found.about["table"]} == {EXACT}
    assert found.densities == pytest.approx((1.0, 0.1), abs=0.04)
    path = tmp_path / "m.svdp"
    write_model_with_predictor(path, file, found)
    file.close()
    with load(path, device="reference") as llm:
        report = predictor_report(llm.predictor, NARROW) if llm.predictor is not None else {}
        assert "no predictor pays" in greeting(llm)
        assert "experts: no predictor pays. At best, with " in "\n".join(predictor_lines(report))
        assert report["totals"]["no_predictor"] == "12 of 12" and report["totals"]["recall"] == 1.0
    with load(path, device="cpu", threads=1, ffn="exact") as llm:
        exact = llm.logits([5, 6, 7, 9])
        llm.ffn = "sparse"
        np.testing.assert_allclose(llm.logits([5, 6, 7, 9]), exact, rtol=1e-3, atol=1e-4)  # nothing is missed


def test_nothing_pays_where_most_neurons_are_active(tmp_path: Path) -> None:
    """With four fifths active a perfect predictor saves a fifth of the gate: less than a tenth of what is read."""
    busy = Sparsity(rank=64, predicted=0.9, active=0.8)
    found, file = calibrated(write_mixture(tmp_path / "m.svdp", NARROW, sparsity=busy, predictor=False))
    file.close()
    choice = found.about["choice"]
    assert choice["exact"] and found.scores_nothing
    active = (choice["exact_bytes"] / choice["gate_bytes"] - 1) / 2
    assert active == pytest.approx(0.8, abs=0.05)
    assert choice["best"]["read"] > choice["exact_bytes"] - (1 - active) * choice["gate_bytes"]


def test_auto_asks_no_times_where_nothing_is_scored() -> None:
    def times() -> None:
        raise AssertionError("measured for nothing")

    always = np.full(4, -1, np.float32)
    predictor = Predictor((LayerPredictor(0, "q8", 0, {}, {}, {}, always, 0 * always),) * 2, {})
    assert choose_path("auto", 1, predictor, times) == "skip_zeros"  # type: ignore[arg-type]
    assert choose_path("auto", 3, predictor, times) == "dense"  # type: ignore[arg-type]
    assert choose_path("sparse", 3, predictor, times) == "predict"  # type: ignore[arg-type]


def test_densities_count_experts_as_often_as_tokens_reach_them() -> None:
    rows = [
        {"reached": 0.9, "predicted_density": 0.2, "computed_density": 0.1},
        {"reached": 0.1, "predicted_density": 1.0, "computed_density": 0.3},  # exact, and rarely reached
        {"reached": 0.0},
    ]
    assert Predictor((), {"table": rows}).densities == pytest.approx((0.28, 0.12))
    plain = Predictor((), {"table": [{"predicted_density": 0.2}, {"predicted_density": 0.4}]})
    assert plain.densities[0] == pytest.approx(0.3)
    assert Predictor((), {"table": [{"reached": -1.0, "predicted_density": 0.5}]}).densities[0] == 0.25


def test_the_planted_rank_is_found_on_experts_that_tokens_reach(folder: Path) -> None:
    with read_model_file(folder / "wide.svdp") as file:
        config = file.config
        collector = StatisticsCollector(config.layer_count, config.hidden_size, experts=config.chosen_blocks)
        statistics = collect_statistics(executor_of(file), windows(config), collector)
        subjects = find_subjects(file, statistics)
        assert 2 <= len(subjects) <= 6
        assert len(subjects[0].fit[0]) == statistics.fit.shape[1]  # the expert that every token has comes first
        shapes = [PredictorShape("svd", rank, 0) for rank in (16, 64, 128, 192)]
        found = choose_for_experts(shapes, subjects, ["q8"])
        assert found is not None and found.factors == "q8"
        assert found.shape == shapes[1]  # the planted rank: less misses it, more only costs
        small = choose_for_experts(expert_shapes(config, None, None), subjects, ["q8", "q4"])
        assert small is not None and len(small.trials) == len({t.read for t in small.trials})
        least = min(t.read for t in small.trials)
        assert small.record["best"]["read"] == round(least) <= min(t.read for t in found.trials)
        assert choose_for_experts(expert_shapes(config, 64, None), [], ["q8"]) is None
    assert ALWAYS == 0


def test_what_is_tried_and_when() -> None:
    small, large = SHAPES["smallthinker-4b"], SHAPES["smallthinker-21b"]
    assert default_kind(small) == default_kind(large) == "auto" and default_kind(small, rank=64) == "svd"
    assert default_kind(SHAPES["smollm2-135m"]) == "lowbit"
    names = [(s.kind, s.rank, s.bits) for s in find_shapes(small, "auto", None, None, "error")]
    assert names == [("svd", 64, 0), ("svd", 128, 0), ("svd", 256, 0), ("lowbit", 0, 1), ("lowbit", 0, 2)]
    assert all(s.kind == "svd" for s in find_shapes(large, "auto", None, None, "error"))
