"""Sums of weighted rows of neuron-major matrices, in every weight format, against the definition in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Kernel, at, matrix_of
from numpy.typing import NDArray

from svdengine.kernels.cpu.matrix import BOUNDS
from svdengine.kernels.cpu.row_bounds import INTEGER_FORMATS, row_bounds
from svdengine.kernels.cpu.rows import add_rows
from svdengine.kernels.formats import FORMATS, WEIGHT_FORMATS, Parts, WeightFormat, quantize

ROWS, COLUMNS = 75, 619  # rows in no multiple of what is added at once; columns in no multiple of 64 or 512
ADD = Kernel(add_rows)


class Matrix:
    """A stored matrix, and how its rows are added up."""

    def __init__(self, name: WeightFormat, weights: NDArray[np.float32] | None = None) -> None:
        random = np.random.default_rng(3)
        if weights is None:
            weights = random.standard_normal((ROWS, COLUMNS), np.float32) * random.uniform(0.01, 2, (ROWS, 1))
            weights[4, :64] = 0  # groups without a scale
        self.name = name
        self.parts: Parts = quantize(weights.astype(np.float32), name)
        self.weights = FORMATS[name].dequantize(self.parts)  # (rows, padded columns)
        self.fields = matrix_of(self.parts, name, *weights.shape)
        if name in INTEGER_FORMATS:
            self._bounds = row_bounds(self.parts)
            self.fields[BOUNDS] = at(self._bounds)
        self.sums = np.zeros((40, self.weights.shape[1]), np.int32)

    def add(
        self, hidden: NDArray, rows: NDArray, first: int = 0, last: int | None = None, start: float = 0
    ) -> NDArray[np.float32]:
        """(n, padded columns) `start` + hidden (n, rows) times rows, in columns first..last."""
        hidden, rows = np.ascontiguousarray(hidden, np.float32), np.ascontiguousarray(rows, np.int32)
        out = np.full((len(hidden), self.weights.shape[1]), start, np.float32)
        scratch = np.full(1 << 19, 0xA5, np.uint8)
        ADD(
            self.fields, at(rows), len(rows), at(hidden), hidden.strides[0], len(hidden), at(out), out.strides[0],
            at(self.sums), self.sums.strides[0], first, self.weights.shape[1] if last is None else last, at(scratch),
        )  # fmt: skip
        assert not self.sums.any()
        return out


@pytest.fixture(scope="module", params=WEIGHT_FORMATS)
def matrix(request: pytest.FixtureRequest) -> Iterator[Matrix]:
    yield Matrix(request.param)


def weights_of(n: int, count: int, seed: int = 5) -> NDArray[np.float32]:
    """(n, count), of very different sizes, many of them 0, as hidden values are after ReLU."""
    random = np.random.default_rng(seed)
    sizes = random.standard_normal((n, count)) * np.exp(random.standard_normal((n, count)))
    return (sizes * (random.random((n, count)) < 0.6)).astype(np.float32)


def error(found: NDArray, expected: NDArray) -> float:
    """Relative to what the sums are in the mean."""
    return float(np.abs(found - expected).max() / np.sqrt((expected**2).mean()))


@pytest.mark.parametrize(("first", "last"), [(0, 640), (64, 512)])
@pytest.mark.parametrize("count", [1, 3, 16, 33, ROWS])
def test_weighted_rows_are_added(matrix: Matrix, first: int, last: int, count: int) -> None:
    rows, hidden = np.random.default_rng(1).permutation(ROWS)[:count], weights_of(3, count)
    hidden[:, 0] = 1
    found, expected = matrix.add(hidden, rows, first, last, start=0.25), np.full((3, 640), 0.25, np.float32)
    expected[:, first:last] += hidden @ matrix.weights[rows, first:last]
    assert error(found, expected) < 2e-3
    np.testing.assert_array_equal(found[:, :first], 0.25)
    np.testing.assert_array_equal(found[:, last:], 0.25)


def test_no_rows_add_nothing(matrix: Matrix) -> None:
    np.testing.assert_array_equal(matrix.add(np.zeros((2, 1)), np.zeros(0), start=0.5), 0.5)
    np.testing.assert_array_equal(matrix.add(np.zeros((1, 5)), np.arange(5), start=0.5), 0.5)


def test_an_output_does_not_depend_on_those_beside_it_nor_on_which_columns_are_added_at_once(matrix: Matrix) -> None:
    rows, hidden = np.arange(ROWS), weights_of(37, ROWS)
    together = matrix.add(hidden, rows)
    for t in (0, 5, 31, 32, 36):
        np.testing.assert_array_equal(matrix.add(hidden[t : t + 1], rows)[0], together[t])
    parts = matrix.add(hidden, rows, 0, 192), matrix.add(hidden, rows, 192, 640)
    np.testing.assert_array_equal(np.concatenate([parts[0][:, :192], parts[1][:, 192:]], axis=1), together)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(WEIGHT_FORMATS), st.integers(0, 2**32), st.integers(1, ROWS))
def test_rows_without_weight_change_nothing(name: WeightFormat, seed: int, count: int) -> None:
    """Dense and conditional FFNs agree bit for bit when every active neuron is listed."""
    matrix, hidden = _MATRICES[name], weights_of(1, count, seed)
    rows = np.sort(np.random.default_rng(seed).permutation(ROWS)[:count])
    active = np.flatnonzero(hidden[0])
    np.testing.assert_array_equal(matrix.add(hidden, rows), matrix.add(hidden[:, active], rows[active]))


_MATRICES = {name: Matrix(name) for name in WEIGHT_FORMATS}


@pytest.mark.parametrize("name", sorted(INTEGER_FORMATS))
def test_sums_of_very_many_rows_fit_their_integers(name: WeightFormat) -> None:
    """All weights as large as they can be and of one sign: the unit makes room."""
    matrix = Matrix(name, np.ones((40_000, 64), np.float32))
    found = matrix.add(np.full((1, 40_000), 3.0), np.arange(40_000))
    np.testing.assert_allclose(found[0], 3.0 * matrix.weights.sum(0, dtype=np.float64), rtol=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_seen_in_its_output_alone(matrix: Matrix, value: float) -> None:
    hidden = weights_of(2, ROWS)
    hidden[0, 3] = value
    found = matrix.add(hidden, np.arange(ROWS))
    assert not np.isfinite(found[0, :COLUMNS]).any() and np.isfinite(found[1]).all()


@pytest.mark.parametrize("name", sorted(INTEGER_FORMATS))
def test_beside_a_large_weight_others_lose_little(name: WeightFormat) -> None:
    """They are rounded in its unit."""
    matrix, hidden = _MATRICES[name], np.ones((1, ROWS), np.float32)
    hidden[0, 7] = 1000
    expected = hidden @ matrix.weights
    assert np.abs(matrix.add(hidden, np.arange(ROWS)) - expected).max() < 1e-3 * np.abs(expected).max()
