"""Low-rank and low-bit predictors: optimality, fallbacks, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import zoo

from svdengine.converters import low_rank
from svdengine.converters.ffn_layer import FfnLayer
from svdengine.converters.low_rank import leading_directions
from svdengine.converters.lowbit_fit import fit_lowbit
from svdengine.converters.predictor_choice import candidate_shapes
from svdengine.converters.predictors import build_predictor
from svdengine.converters.statistics import LayerStatistics
from svdengine.kernels.lowbit import dequantize_lowbit, quantize_lowbit
from svdengine.kernels.predictor import scores

F, D = 150, 90


def inputs(seed: int, n: int = 600, mean: float = 0.5) -> np.ndarray:
    """Correlated inputs (n, D) float32 whose directions differ in size."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((D, D)) * np.geomspace(1, 0.02, D)[:, None]
    return (random.standard_normal((n, D)) @ mix / 4 + mean * random.standard_normal(D)).astype(np.float32)


def statistics_of(x: np.ndarray) -> LayerStatistics:
    x = x.astype(np.float64)
    return LayerStatistics(x.mean(0), x.T @ x / len(x))


def layer_of(seed: int = 0) -> FfnLayer:
    random = np.random.default_rng(seed)
    gate = (random.standard_normal((F, D)) * 0.1).astype(np.float32)
    bias = (0.1 * random.standard_normal(F)).astype(np.float32)
    config = replace(zoo()["llama_relu_tied"], hidden_size=D, ffn_size=F)
    ones = np.ones(F, np.float32)
    return FfnLayer(config, gate, bias, gate, 0 * ones, ones, 0, (D, D, D))


def loss(gate: np.ndarray, a: np.ndarray, b: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (gate - a @ b).T, dtype=np.float64).mean())


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 40))
def test_no_factors_of_that_rank_lose_less(seed: int, rank: int) -> None:
    x, gate = inputs(seed, mean=0), layer_of(seed).gate
    random = np.random.default_rng(seed)
    u = leading_directions(gate, statistics_of(x).second_moment, rank)
    best = loss(gate, u, u.T @ gate, x)
    naive = leading_directions(gate, None, rank)
    assert best <= loss(gate, naive, naive.T @ gate, x) * (1 + 1e-4)
    near, _ = np.linalg.qr(u + 0.1 * random.standard_normal(u.shape))
    assert best <= loss(gate, near, near.T @ gate, x) * (1 + 1e-4)
    a, b = random.standard_normal((F, rank)), random.standard_normal((rank, D))
    assert best <= loss(gate, a, np.linalg.lstsq(a, gate, rcond=None)[0], x) * (1 + 1e-4)
    assert best <= loss(gate, gate @ np.linalg.pinv(b), b, x) * (1 + 1e-4)


@pytest.mark.parametrize("moment", [True, False])
def test_iteration_comes_close_to_the_exact_decomposition(moment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate = inputs(3), layer_of(3).gate
    c = statistics_of(x).second_moment if moment else None
    x = x if moment else np.eye(D, dtype=np.float32)
    exact = leading_directions(gate, c, 24)
    monkeypatch.setattr(low_rank, "EXACT_SIZE", 0)
    found = leading_directions(gate, c, 24)
    np.testing.assert_allclose(found.T @ found, np.eye(24), atol=1e-5)
    assert loss(gate, found, found.T @ gate, x) <= 1.01 * loss(gate, exact, exact.T @ gate, x)


def test_a_singular_moment_is_no_difficulty() -> None:
    x, gate = inputs(4)[:5], layer_of(4).gate
    u = leading_directions(gate, statistics_of(x).second_moment, 20)
    np.testing.assert_allclose(u.T @ u, np.eye(20), atol=1e-5)
    assert loss(gate, u, u.T @ gate, x) < 1e-8


def error_of(kind: str, rank: int, bits: int, factors: str = "q8", mean: float = 0.5) -> float:
    x, layer = inputs(7, mean=mean), layer_of(7)
    predictor = build_predictor(kind, layer, statistics_of(x), rank, bits, factors)  # type: ignore[arg-type]
    truth = x @ layer.gate.T + layer.gate_bias
    error = scores(predictor, x) - truth
    assert np.abs(error.mean(0)).max() < 0.05 * truth.std() or kind == "svd-naive"
    return float(np.square(error).mean() / np.square(truth - truth.mean(0)).mean())


def test_more_rank_more_bits_and_both_are_better() -> None:
    assert error_of("svd", 64, 0) < error_of("svd", 16, 0) < 0.9
    assert error_of("svd", 16, 0) < error_of("svd-naive", 16, 0)
    assert error_of("lowbit", 0, 2) < error_of("lowbit", 0, 1) < 0.6
    for bits in (1, 2):
        assert error_of("svd+lowbit", 32, bits) < min(error_of("svd", 32, 0), error_of("lowbit", 0, bits))


@pytest.mark.parametrize("bits", [1, 2])
def test_low_bit_copies_fitted_to_the_inputs_beat_rounding(bits: int) -> None:
    x, gate = inputs(11), layer_of(11).gate
    centred = x - x.mean(0)

    def lost(copy: np.ndarray) -> float:
        return float(np.square(centred @ (gate - copy).T).sum())

    fitted = dequantize_lowbit(fit_lowbit(gate, statistics_of(x).covariance, bits), bits, D)
    assert lost(fitted) < 0.7 * lost(dequantize_lowbit(quantize_lowbit(gate, bits), bits, D))
    rest = (gate * 1e-3).astype(np.float32)
    assert lost(gate - rest + dequantize_lowbit(fit_lowbit(rest, statistics_of(x).covariance, bits), bits, D)) <= lost(
        gate - rest
    )


def test_factors_of_four_bits_cost_some_accuracy() -> None:
    assert error_of("svd", 64, 0, "q8") < error_of("svd", 64, 0, "q4") < 0.3


def test_full_rank_is_the_gate() -> None:
    assert error_of("svd", 90, 0) < 1e-3


def test_unit_is_the_deviation_of_the_gate() -> None:
    x, layer = inputs(8), layer_of(8)
    predictor = build_predictor("svd", layer, statistics_of(x), 8, 0)
    np.testing.assert_allclose(predictor.unit, (x @ layer.gate.T).std(0), rtol=1e-3)


def test_a_dead_gate_gives_finite_numbers() -> None:
    x, layer = inputs(9), layer_of(9)
    layer.gate[3] = 0
    for kind, rank, bits in (("svd", 8, 0), ("lowbit", 0, 1), ("lowbit", 0, 2), ("svd+lowbit", 8, 2)):
        predictor = build_predictor(kind, layer, statistics_of(x), rank, bits)
        assert np.isfinite(scores(predictor, x)).all() and (predictor.unit > 0).all()


def test_what_cannot_be_built_is_refused() -> None:
    layer, moments = layer_of(), statistics_of(inputs(0))
    for kind, rank, bits, what in (
        ("svd", 91, 0, "rank of svd must lie in 1..90, found 91"),
        ("svd+lowbit", 0, 2, "rank"),
        ("lowbit", 0, 3, "1 or 2 bits a weight, found 3"),
        ("magic", 1, 1, "unknown predictor"),
    ):
        with pytest.raises(ValueError, match=what):
            build_predictor(kind, layer, moments, rank, bits)
        with pytest.raises(ValueError, match=what):
            candidate_shapes(kind, rank, bits, layer.config)


def test_automatic_shapes_cover_every_kind_within_the_model() -> None:
    config = zoo()["llama_relu_tied"]
    shapes = candidate_shapes("auto", None, None, config)
    assert {s.kind for s in shapes} == {"svd", "lowbit", "svd+lowbit"}
    assert len(set(shapes)) == len(shapes) and all(s.rank <= config.hidden_size for s in shapes)
    wide = replace(config, hidden_size=4096, ffn_size=11008)
    assert 256 in {s.rank for s in candidate_shapes("svd", None, None, wide)}
    assert [s.rank for s in candidate_shapes("svd", 48, None, config)] == [48]
