"""The kernels of every weight format, each called alone, against the format's definition in NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from kernel_harness import Kernel, at, matrix_of, padded, quantized_rows, stored
from numpy.typing import NDArray

from svdengine.kernels.cpu.formats import dispatch
from svdengine.kernels.cpu.formats.kernels import FormatKernels
from svdengine.kernels.cpu.gemm import gemm, gemm_transposed
from svdengine.kernels.cpu.matrix import DATA, FORMAT, check_codes
from svdengine.kernels.formats import FORMATS, WEIGHT_FORMATS, Parts, WeightFormat, quantize
from svdengine.kernels.predictor import quantize_activations

ROWS, COLUMNS = 21, 619  # no multiple of 16 rows; columns beyond a chunk of 512, and not a multiple of 64
KERNELS = {kernels.name: kernels for kernels in dispatch.ALL}


@dataclass(frozen=True)
class Case:
    """A stored matrix, activations, and what their products are by definition."""

    kernels: FormatKernels
    parts: Parts
    matrix: NDArray[np.int64]
    weights: NDArray[np.float32]  # (ROWS, padded columns)
    x: NDArray[np.float32]  # (9, padded columns)
    quantized: NDArray[np.uint8]
    products: NDArray[np.float32]  # (9, ROWS)


@pytest.fixture(scope="module", params=WEIGHT_FORMATS)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def make_case(name: WeightFormat) -> Case:
    random = np.random.default_rng(3)
    w = random.standard_normal((ROWS, COLUMNS), np.float32) * random.uniform(0.01, 2, (ROWS, 1)).astype(np.float32)
    w[4, :64] = 0  # groups without a scale
    x = padded(random.standard_normal((9, COLUMNS), np.float32))
    parts = quantize(w, name)
    weights = FORMATS[name].dequantize(parts)
    bits = FORMATS[name].activation_bits
    products = (x if bits == 32 else quantize_activations(x, bits)) @ weights.T
    return Case(KERNELS[name], parts, matrix_of(parts, name, ROWS, COLUMNS), weights, x, quantized_rows(x), products)


def close(found: NDArray, expected: NDArray) -> None:
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def test_dot_of_a_row(case: Case) -> None:
    dot = Kernel(case.kernels.dot_row)
    found = np.array([dot(case.matrix, row, at(case.x), at(case.quantized), 0) for row in range(ROWS)])
    close(found, case.products[0])


def test_four_rows_are_bit_for_bit_those_of_one(case: Case) -> None:
    dot, four, out = Kernel(case.kernels.dot_row), Kernel(case.kernels.dot_four), np.zeros(4, np.float32)
    rows = (20, 3, 4, 11)
    four(case.matrix, *rows, *rows[::-1], at(case.x), at(case.quantized), at(out))
    alone = [dot(case.matrix, row, at(case.x), at(case.quantized), 0) for row in rows]
    np.testing.assert_array_equal(out, np.array(alone, np.float32))


def test_single_weights(case: Case) -> None:
    load, out = Kernel(stored(case.kernels.load_weights)), np.zeros(16, np.float32)
    for row, column in ((0, 0), (20, 16), (3, 32), (3, 48), (7, 576), (4, 0)):
        load(case.matrix, row, column, at(out))
        np.testing.assert_allclose(out, case.weights[row, column : column + 16], rtol=1e-6, atol=1e-6)


def test_columns_of_neuron_major_rows(case: Case) -> None:
    panel = np.full((8, 16), np.nan, np.float32)
    Kernel(case.kernels.pack_columns)(case.matrix, 96, 16, 24, at(panel))
    expected = np.zeros((8, 16), np.float32)
    expected[:5] = case.weights[16:21, 96:112]  # rows beyond the last are zeros
    np.testing.assert_allclose(panel, expected, rtol=1e-6, atol=1e-6)


def test_products_of_several_rows() -> None:
    """One test for all formats: the tiles are compiled once."""
    scratch = np.zeros(1 << 18, np.uint8)
    multiply, bias = Kernel(gemm), np.linspace(-1, 1, 32, dtype=np.float32)
    for name in WEIGHT_FORMATS:
        case = make_case(name)
        for n in (2, 3, 9):
            out = np.zeros((16, 32), np.float32)
            x, quantized = np.zeros((16, 640), np.float32), np.zeros((16, case.quantized.shape[1]), np.uint8)
            x[:9], quantized[:9] = case.x, case.quantized
            multiply(
                case.matrix, at(bias), at(x), x.strides[0], at(quantized), quantized.strides[0], n,
                at(out), out.strides[0], 0, ROWS, at(scratch),
            )  # fmt: skip
            close(out[:n, :ROWS], case.products[:n] + bias[:ROWS])


def test_products_with_neuron_major_rows() -> None:
    scratch, hidden = np.zeros(1 << 18, np.uint8), np.zeros((8, 64), np.float32)
    hidden[:3, :ROWS] = np.random.default_rng(5).standard_normal((3, ROWS), np.float32)
    multiply, bias = Kernel(gemm_transposed), np.linspace(-1, 1, 640, dtype=np.float32)
    for name in WEIGHT_FORMATS:
        case, out = make_case(name), np.zeros((8, 640), np.float32)
        multiply(
            case.matrix, at(bias), at(hidden), hidden.strides[0], 3, at(out), out.strides[0], 64, 0, 640, at(scratch)
        )
        np.testing.assert_allclose(out[:3], hidden[:3, :ROWS] @ case.weights + bias, rtol=1e-4, atol=1e-4)


def test_a_format_that_no_kernel_reads_is_an_error_and_reads_nothing() -> None:
    case = make_case("f32")
    unknown = case.matrix.copy()
    unknown[[FORMAT, DATA]] = len(WEIGHT_FORMATS), 8  # an address where nothing is
    with pytest.raises(ValueError, match=f"format code {len(WEIGHT_FORMATS)}"):
        check_codes(unknown[None])
    check_codes(case.matrix[None])
    assert np.isnan(Kernel(dispatch.dot_row)(unknown, 0, at(case.x), at(case.quantized), 0))


def test_every_format_has_its_kernels() -> None:
    assert KERNELS.keys() == set(WEIGHT_FORMATS)
