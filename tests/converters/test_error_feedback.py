"""Rounding with error feedback: it beats rounding to nearest where inputs are correlated, and keeps to the formats."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from svdengine.converters.error_feedback import (
    MOST_LEVEL,
    column_feedback,
    neuron_feedback,
    round_columns,
    round_neurons,
)
from svdengine.kernels.formats import WeightFormat, dequantize, quantize, stored_parts

Array = NDArray[np.float32]


def correlated(rows: int, columns: int, seed: int = 0, rank: int = 24) -> Array:
    """Inputs (rows, columns) of which few directions carry most, some columns much larger than others."""
    random = np.random.default_rng(seed)
    basis = random.standard_normal((rank, columns), np.float32)
    x = random.standard_normal((rows, rank), np.float32) @ basis + 0.3 * random.standard_normal((rows, columns))
    return (x * np.exp(random.normal(0, 0.7, columns))).astype(np.float32)


def loss(error: Array, x: Array) -> float:
    """Mean squared change of x times the matrix, for inputs that rounding did not see."""
    return float(np.square(x @ error).mean())


@pytest.mark.parametrize("weight_format", MOST_LEVEL)
def test_columns_beat_rounding_to_nearest(weight_format: WeightFormat) -> None:
    x = correlated(4096, 192)
    seen, unseen = x[:2048], x[2048:]
    matrix = np.random.default_rng(1).standard_normal((80, 192), np.float32)
    nearest = dequantize(quantize(matrix, weight_format), weight_format, 192)
    fed_back = dequantize(round_columns(matrix, column_feedback(seen.T @ seen), weight_format), weight_format, 192)
    assert loss((fed_back - matrix).T, unseen) < 0.35 * loss((nearest - matrix).T, unseen)


@pytest.mark.parametrize("weight_format", MOST_LEVEL)
def test_neurons_beat_rounding_to_nearest(weight_format: WeightFormat) -> None:
    x = np.maximum(correlated(4096, 200), 0)
    seen, unseen = x[:2048], x[2048:]
    matrix = np.random.default_rng(1).standard_normal((200, 90), np.float32)
    nearest = dequantize(quantize(matrix, weight_format), weight_format, 90)
    fed_back = dequantize(round_neurons(matrix, neuron_feedback(seen.T @ seen), weight_format), weight_format, 90)
    assert loss(fed_back - matrix, unseen) < 0.5 * loss(nearest - matrix, unseen)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(list(MOST_LEVEL)), st.integers(1, 70), st.integers(1, 130), st.integers(0, 99))
def test_parts_are_those_of_the_format(weight_format: WeightFormat, rows: int, columns: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((rows, columns)).astype(np.float32) * np.exp(random.normal(0, 3, (rows, 1)))
    matrix[random.random(rows) < 0.2] = 0
    matrix = matrix.astype(np.float32)
    x, y = correlated(40, columns, seed), correlated(40, rows, seed)  # fewer tokens than inputs
    expected = stored_parts(weight_format, rows, columns)
    for parts in (
        round_columns(matrix, column_feedback(x.T @ x), weight_format),
        round_neurons(matrix, neuron_feedback(y.T @ y), weight_format),
    ):
        assert {suffix: part.shape for suffix, part in parts.items()} == {
            s: shape for s, (shape, _) in expected.items()
        }
        found = dequantize(parts, weight_format, columns)
        assert np.isfinite(found).all()
        assert np.abs(found).max(initial=0) <= 1.5 * np.abs(matrix).max(initial=0) + 1e-30
        assert not found[np.abs(matrix).max(1) == 0].any()


@pytest.mark.parametrize("weight_format", MOST_LEVEL)
def test_levels_of_four_bits_are_met(weight_format: WeightFormat) -> None:
    """A source that has 4 bits already, with other scales a group, loses next to nothing: it is not rounded anew."""
    random = np.random.default_rng(0)
    matrix = (random.integers(0, 16, (40, 128)) - 7).astype(np.float32) / 8
    matrix[:, ::32], matrix[:, 1::32] = -7 / 8, 1
    matrix *= random.uniform(0.5, 1, (40, 4, 1)).repeat(32, 1).reshape(40, 128).astype(np.float32)
    x = correlated(2500, 128)
    seen, unseen = x[:2000], x[2000:]
    found = dequantize(round_columns(matrix, column_feedback(seen.T @ seen), weight_format), weight_format, 128)
    assert loss((found - matrix).T, unseen) < 2e-5 * loss(matrix.T, unseen)


def test_inputs_that_are_never_there() -> None:
    """All moments zero, or of one neuron alone: rounding still works, as to nearest."""
    matrix = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    moment = np.zeros((64, 64), np.float32)
    for _ in range(2):
        for parts in (
            round_columns(matrix, column_feedback(moment), "q4"),
            round_neurons(matrix, neuron_feedback(moment), "q4"),
        ):
            error = dequantize(parts, "q4", 64) - matrix
            assert np.square(error).mean() < 0.02 * np.square(matrix).mean()
        moment[5, 5] = 1e8


def test_what_is_not_finite_is_refused() -> None:
    matrix, moment = np.ones((64, 64), np.float32), np.eye(64, dtype=np.float32)
    matrix[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_columns(matrix, column_feedback(moment), "q4")
    with pytest.raises(ValueError, match="NaN or infinity"):
        round_neurons(matrix, neuron_feedback(moment), "q4")
