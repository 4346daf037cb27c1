"""The predictor's kernels, each called alone: scores of 16 neurons by factors and by low-bit rows, and the list."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_harness import Kernel, at, padded, quantized_rows
from numpy.typing import NDArray

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.score import (
    add_factor_scores,
    add_residual_scores_1,
    add_residual_scores_2,
    list_positive,
)
from svdengine.kernels.cpu.score_panels import NEURONS, factor_panels, residual_panels
from svdengine.kernels.cpu.simd import load_f32, store_f32
from svdengine.kernels.formats import GROUP, dequantize, quantize
from svdengine.kernels.lowbit import BLOCK, dequantize_lowbit, quantize_lowbit
from svdengine.kernels.predictor import quantize_activations

F, D = 40, 150  # neurons: not whole panels; columns: not whole blocks


def scorer(kernel):
    """(panel, parts, activations, start (16,), out (16,)): out = start + the kernel's sum."""

    @jit
    def run(panel, parts, x, start, out):
        store_f32(out, kernel(load_f32(start), panel, parts, x))

    return Kernel(run)


def all_scores(kernel, panels: NDArray[np.uint8], x: NDArray[np.uint8], start: NDArray[np.float32]) -> NDArray:
    run, found = scorer(kernel), np.zeros((len(panels), NEURONS), np.float32)
    for panel, out in zip(panels, found, strict=True):
        run(at(panel), panels.shape[1], at(x), at(start), at(out))
    return found.reshape(-1)


def test_factors_are_those_of_the_definition() -> None:
    random = np.random.default_rng(0)
    parts = quantize(random.standard_normal((F, 70), np.float32), "q8")
    z = padded(random.standard_normal((1, 70), np.float32))
    start = np.linspace(-1, 1, NEURONS, dtype=np.float32)
    panels = factor_panels(parts[""], parts[".scale"])
    assert panels.shape[:2] == (-(-F // NEURONS), z.shape[1] // GROUP)
    found = all_scores(add_factor_scores, panels, quantized_rows(z)[0], start)
    expected = quantize_activations(z, 16) @ padded(dequantize(parts, "q8", 70)).T
    np.testing.assert_allclose(found[:F] - np.resize(start, F), expected[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("bits", "kernel"), [(1, add_residual_scores_1), (2, add_residual_scores_2)])
def test_residuals_are_those_of_the_definition(bits: int, kernel) -> None:
    random = np.random.default_rng(bits)
    parts = quantize_lowbit(random.standard_normal((F, D), np.float32), bits)
    x = padded(random.standard_normal((1, D), np.float32))
    panels = residual_panels(parts[""], parts[".scale"], bits)
    assert panels.shape[:2] == (-(-F // NEURONS), x.shape[1] // BLOCK)
    found = all_scores(kernel, panels, quantized_rows(x)[0], np.zeros(NEURONS, np.float32))
    expected = quantize_activations(x[:, :D], 8) @ dequantize_lowbit(parts, bits, D).T
    # The high one of two planes may be another of 255 levels than rounding to 8 bits at once.
    assert np.abs(found[:F] - expected[0]).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("scores", [[0.0] * 16, [1.0] * 16, [(-1.0) ** i * i for i in range(16)], [np.nan, 1e-30] * 8])
def test_the_list_has_the_neurons_above_zero_in_order(scores: list[float]) -> None:
    @jit
    def run(scores, first, neurons):
        return list_positive(load_f32(scores), first, neurons)

    values, neurons = np.array(scores, np.float32), np.full(20, -7, np.int32)
    count = Kernel(run)(at(values), 32, at(neurons))
    expected = 32 + np.flatnonzero(values > 0)
    assert count == len(expected)
    np.testing.assert_array_equal(neurons[:count], expected)
    assert (neurons[count:] == -7).all()
