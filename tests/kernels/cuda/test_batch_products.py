"""Products with several rows of activations on tensor cores: every format that has tiles, sizes of all kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_zoo import relative_error
from numpy.typing import NDArray
from test_products import padded

from svdengine.kernels.cuda import batch_products
from svdengine.kernels.cuda.formats.table import KERNELS
from svdengine.kernels.cuda.model import Matrix, place_matrix
from svdengine.kernels.cuda.rounding import round_rows_to
from svdengine.kernels.formats import WeightFormat, dequantize, padded_columns, quantize

TILED: tuple[WeightFormat, ...] = tuple(name for name, kernels in KERNELS.items() if kernels.tiles is not None)
BOUND = 1e-4  # activations of 16 bits in groups of 32


def make(device: Any, weight_format: WeightFormat, rows: int, columns: int) -> tuple[Matrix, NDArray, NDArray]:
    """A matrix on the device, and the weights and bias that it stands for."""
    random = np.random.default_rng(0)
    weights, bias = random.standard_normal((rows, columns), np.float32), random.standard_normal(rows, np.float32)
    parts = quantize(weights, weight_format)
    matrix = place_matrix(device, [parts], weight_format, columns, device.upload(bias))
    return matrix, dequantize(parts, weight_format, columns), bias


def multiply(device: Any, matrix: Matrix, x: NDArray, y: Any, y_stride: int, **options: Any) -> None:
    """By the kernel for several rows."""
    stride, rows = padded_columns(x.shape[1]), padded(x)
    rounded = round_rows_to(device, device.upload(rows), device.zeros(rows.size, np.float32), stride, len(x))
    batch_products.multiply_batch(device, matrix, rounded, stride, y, y_stride, len(x), **options)


# Rows that are fewer than a block's and more; columns that some warps have nothing of, and more turns of than they have
# room for.
CASES = [(weight_format, 21, 70, 3) for weight_format in TILED]
CASES += [
    ("q8", 35, 64 * 5, 9),
    ("q6", 18, 64 * 2, 10),
    ("q8", 9, 64 * 17, 2),
    ("q4", 9, 64 * 21, 2),
    ("f16", 18, 64 * 5, 9),
]


@pytest.mark.parametrize(("weight_format", "rows", "columns", "n"), CASES)
def test_products(device: Any, weight_format: WeightFormat, rows: int, columns: int, n: int) -> None:
    matrix, weights, bias = make(device, weight_format, rows, columns)
    x = np.random.default_rng(1).standard_normal((n, columns), np.float32)
    x[0] *= 1e6  # more than float16 holds
    before = np.random.default_rng(2).standard_normal((n, 40), np.float32)
    y = device.upload(before)
    multiply(device, matrix, x, y, 40, factor=0.5, add=True)
    expected = before.copy()
    expected[:, :rows] += 0.5 * (x @ weights.T + bias)
    found = device.download(y).reshape(n, 40)
    for row in range(n):
        assert relative_error(found[row], expected[row]) < BOUND


@pytest.mark.parametrize("weight_format", ["q8", "f16"])
def test_many_rows_are_several_blocks(device: Any, weight_format: WeightFormat) -> None:
    matrix, weights, bias = make(device, weight_format, 5, 64)
    x = np.random.default_rng(1).standard_normal((35, 64), np.float32)
    y = device.zeros(35 * 5, np.float32)
    multiply(device, matrix, x, y, 5)
    assert relative_error(device.download(y).reshape(35, 5), x @ weights.T + bias) < BOUND


@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_a_row_gives_what_it_gives_alone(device: Any, weight_format: WeightFormat) -> None:
    """Integers make it so: which rows share a step changes nothing but the order of a few float32 sums."""
    matrix, _, _ = make(device, weight_format, 20, 128)
    x = np.random.default_rng(1).standard_normal((9, 128), np.float32)
    together, some = device.zeros(9 * 20, np.float32), device.zeros(2 * 20, np.float32)
    multiply(device, matrix, x, together, 20)
    multiply(device, matrix, x[3:5], some, 20)
    np.testing.assert_array_equal(device.download(together)[60:100], device.download(some))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("weight_format", "value"), [("q8", np.nan), ("q4", np.inf), ("f16", np.nan), ("bf16", np.inf)]
)
def test_an_activation_that_is_not_finite_is_seen(device: Any, weight_format: WeightFormat, value: float) -> None:
    matrix, weights, bias = make(device, weight_format, 20, 128)
    x, y = np.ones((2, 128), np.float32), device.zeros(40, np.float32)
    x[1, 40] = value
    multiply(device, matrix, x, y, 20)
    found = device.download(y).reshape(2, 20)
    assert not np.isfinite(found[1]).any()
    assert relative_error(found[0], x[0] @ weights.T + bias) < BOUND


@pytest.mark.parametrize("weight_format", TILED)
@pytest.mark.parametrize("tiles", batch_products.TILES)
def test_shared_memory_has_room_for_turns(weight_format: WeightFormat, tiles: int) -> None:
    room = batch_products.room_of(weight_format, tiles)
    assert room.turns >= 2 and 16 * room.words <= 47 * 1024
    assert 4 * room.words >= 4 * 8 * tiles * room.rows  # of the sums that take its place
