"""The paper's predictor against its definition, and what it does on a small model."""

from pathlib import Path

import numpy as np
import pytest
from model_zoo import random_tokens, zoo
from test_calibration import executor_of, write_model

from svdengine.converters.calibration import CalibrationOptions, calibrate
from svdengine.converters.calibration_size import calibration_size, default_kind, default_tokens, paper_rank
from svdengine.converters.ffn_layer import missed_penalties, read_ffn_layer, run_neurons
from svdengine.converters.paper_predictor import PaperOptions, paper_factors
from svdengine.errors import ConversionError
from svdengine.tools.random_model import SHAPES

CONFIG = zoo()["llama_relu_tied"]
WINDOWS = [random_tokens(CONFIG, 128, seed) for seed in range(10)]


def skewed_inputs(n: int = 400, d: int = 24) -> np.ndarray:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((d, d)) * np.geomspace(3, 0.1, d)[:, None]
    return (random.standard_normal((n, d)) @ mixing + 0.5).astype(np.float32)


def test_the_factors_are_the_best_of_their_rank_on_the_inputs() -> None:
    """A B x loses exactly what the singular values beyond the rank hold; A carries the others."""
    x, gate = skewed_inputs(), np.random.default_rng(1).standard_normal((40, 24)).astype(np.float32)
    outputs = gate.astype(np.float64) @ x.T.astype(np.float64)
    values = np.linalg.svd(outputs, compute_uv=False)
    for rank in (3, 8):
        a, b = paper_factors(gate, x, rank)
        assert a.shape == (40, rank) and b.shape == (rank, 24) and a.dtype == b.dtype == np.float64
        lost = np.linalg.norm(outputs - a @ b @ x.T)
        assert lost == pytest.approx(np.sqrt(np.square(values[rank:]).sum()), rel=1e-6)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), values[:rank], rtol=1e-6)
    a, b = paper_factors(gate, None, 24)
    np.testing.assert_allclose(a @ b, gate, atol=1e-5)


def test_too_few_tokens_have_no_cholesky_factor() -> None:
    x, gate = skewed_inputs(n=20), np.ones((40, 24), np.float32)
    with pytest.raises(ConversionError, match=r"layer 3: .* 20 tokens .* more than 24 tokens .* --ablation naive"):
        paper_factors(gate, x, 4, 3)


def test_penalties_are_those_of_the_three_ablations(tmp_path: Path) -> None:
    with write_model(tmp_path / "m.svdp", CONFIG) as file:
        layer = read_ffn_layer(file, 0)
        x = skewed_inputs(16, CONFIG.hidden_size)
        gate, gate_up, full = (missed_penalties(layer, x, kind) for kind in ("gate", "gate-up", "full"))
        truth = run_neurons(layer, x)
    np.testing.assert_array_equal(gate > 0, truth.active)
    np.testing.assert_allclose(full, gate_up * layer.down_norm, rtol=1e-6)
    share = np.square(full) / np.square(full).sum(1, keepdims=True)
    np.testing.assert_allclose(share, truth.energy, atol=1e-6)


def test_each_ablation_makes_a_predictor_that_says_so(tmp_path: Path) -> None:
    with write_model(tmp_path / "m.svdp", CONFIG) as file:
        executor, found = executor_of(file), {}
        for ablation in (None, "naive", "whitening", "constant", "gate", "gate-up"):
            options = CalibrationOptions(thresholds="greedy", share=0.8, rank=32, ablation=ablation)  # type: ignore[arg-type]
            found[ablation] = calibrate(file, executor, WINDOWS, options)
    for name, predictor in found.items():
        about = predictor.about
        assert about["ablation"] == (name or "full") and about["budget"] == {"s": 0.8}
    full, constant, whitening, naive = (found[name] for name in (None, "constant", "whitening", "naive"))
    for row in full.about["table"]:  # the first two layers: s is 0.7 there
        assert 1 - row["predicted_density"] == pytest.approx(0.7 * (1 - row["active_density"]), abs=0.05)
    for layer, plain in zip(constant.layers, whitening.layers, strict=True):
        assert len(np.unique(layer.threshold)) == 1 and not plain.threshold.any()
        np.testing.assert_array_equal(layer.a[""], plain.a[""])

    def error(predictor: object) -> float:
        return float(np.mean([row["relative_error"] for row in predictor.about["table"]]))  # type: ignore[attr-defined]

    assert len(np.unique(full.layers[0].threshold)) > 50 and error(full) < 1.1 * error(constant) < error(naive)
    assert np.mean([row["auroc"] for row in whitening.about["table"]]) >= np.mean(
        [row["auroc"] for row in naive.about["table"]]
    )


def test_what_the_paper_does_not_have_is_refused() -> None:
    for options, what in (
        ({"thresholds": "greedy", "density": 0.5}, "meet no budget"),
        ({"thresholds": "greedy", "kind": "lowbit"}, "svd predictor"),
        ({"share": 0.5}, "belong to greedy"),
        ({"ablation": "naive"}, "belong to greedy"),
        ({"thresholds": "greedy", "share": 1.5}, "above 0 and at most 1"),
        ({"thresholds": "greedy", "ablation": "magic"}, "unknown ablation"),
    ):
        with pytest.raises(ConversionError, match=what):
            CalibrationOptions(**options)  # type: ignore[arg-type]
    assert PaperOptions().share == 0.5


def test_ranks_and_defaults_by_size() -> None:
    assert paper_rank(4096, 11008) == 256 and paper_rank(576, 1536) == 64 and paper_rank(48, 96) == 48
    large, small = SHAPES["llama2-7b"], SHAPES["smollm2-135m"]
    assert (calibration_size(large).kind, calibration_size(large).rank) == ("svd", 256)
    assert (default_kind(large), default_kind(small)) == ("svd", "lowbit")
    assert default_kind(small, rank=64) == "svd" == default_kind(small, thresholds="greedy")
    # One in five windows is held out, and half of the rest must be enough for a Cholesky factor of d columns.
    assert default_tokens(large, "greedy") * 2 // 5 > large.hidden_size
    assert default_tokens(small, "greedy") == default_tokens(small) == 14_336
