"""Interleaved matrices: what they hold, and that a row gets the same bits in any company."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import Kernel, at, matrix_of, padded, quantized_rows
from model_zoo import random_tokens, relative_error, run_in_chunks, zoo
from model_zoo import stored as stored_model
from numpy.typing import NDArray

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.cpu.gemv import gemv
from svdengine.kernels.cpu.matrix import FORMAT, PANEL_CODES, PART_FIELDS
from svdengine.kernels.cpu.panel_product import multiply_panels
from svdengine.kernels.cpu.panels import interleaved
from svdengine.kernels.formats import FORMATS, Parts, WeightFormat, padded_columns


@cache
def product() -> Kernel:
    return Kernel(multiply_panels)


@cache
def product_by_rows() -> Kernel:
    return Kernel(gemv)


def stored(weight_format: WeightFormat, weights: NDArray[np.float32]) -> Parts:
    parts = FORMATS[weight_format].quantize(padded(weights))
    return {suffix: np.ascontiguousarray(part) for suffix, part in parts.items()}


def panel_matrix(parts: Parts, weight_format: WeightFormat, rows: int, columns: int) -> tuple[NDArray[np.int64], Any]:
    """The fields of an interleaved matrix, and what must be kept alive."""
    panels = interleaved({suffix: part[None] for suffix, part in parts.items()}, weight_format)
    fields = matrix_of(parts, weight_format, rows, columns)
    fields[FORMAT] = PANEL_CODES[weight_format]
    for suffix, part in panels.items():
        fields[PART_FIELDS[suffix]] = part.ctypes.data
    return fields, panels


def times(fields: NDArray[np.int64], x: NDArray[np.float32], n: int, rows: int, bias: NDArray) -> NDArray[np.float32]:
    out = np.full((-(-n // 4) * 4, padded_columns(rows)), np.nan, np.float32)
    quantized = np.zeros((len(out), quantized_rows(x[:1]).shape[1]), np.uint8)
    quantized[:n] = quantized_rows(x[:n])
    product()(fields, at(bias), at(quantized), quantized.shape[1], n, at(out), 4 * out.shape[1], 0, rows)
    return out[:n, :rows]


@pytest.mark.parametrize("weight_format", PANEL_CODES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 200), n=st.integers(1, 11) | st.integers(15, 40),
    seed=st.integers(0, 1 << 20), outlier=st.booleans(),
)  # fmt: skip
def test_products_are_those_of_the_rows(
    weight_format: WeightFormat, rows: int, columns: int, n: int, seed: int, outlier: bool
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    x = padded(rng.standard_normal((n, columns)).astype(np.float32))
    if outlier:
        x[:, columns // 2] *= 1000
    bias = padded(rng.standard_normal((1, rows)).astype(np.float32))[0]
    parts = stored(weight_format, weights)
    fields, panels = panel_matrix(parts, weight_format, rows, columns)
    found = times(fields, x, n, rows, bias)

    exact = x.astype(np.float64) @ FORMATS[weight_format].dequantize(parts).astype(np.float64).T + bias[:rows]
    size = np.abs(x).max(1, keepdims=True) * np.abs(weights).sum(1) + 1
    assert (np.abs(found - exact) <= 4e-5 * size).all()
    by_rows = np.zeros(padded_columns(rows), np.float32)
    plain, quantized = matrix_of(parts, weight_format, rows, columns), quantized_rows(x)
    product_by_rows()(plain, at(bias), at(x), at(quantized), at(by_rows), 0, rows)
    assert (np.abs(found[0] - by_rows[:rows]) <= 4e-6 * size[0]).all()
    assert panels


@pytest.mark.parametrize("weight_format", PANEL_CODES)
def test_a_row_gets_the_same_bits_in_any_company(weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(3)
    rows, columns = 50, 320
    weights = rng.standard_normal((rows, columns)).astype(np.float32)
    x = rng.standard_normal((40, columns)).astype(np.float32)
    bias = padded(rng.standard_normal((1, rows)).astype(np.float32))[0]
    parts = stored(weight_format, weights)
    fields, panels = panel_matrix(parts, weight_format, rows, columns)
    alone = np.stack([times(fields, x[t:], 1, rows, bias)[0] for t in range(40)])
    for n in (*range(2, 10), 15, 16, 17, 31, 32, 40):  # 16 rows are a tile of AMX
        assert (times(fields, x, n, rows, bias) == alone[:n]).all()
    assert panels


@pytest.mark.parametrize("weight_format", PANEL_CODES)
def test_layers_lie_one_after_the_other(weight_format: WeightFormat) -> None:
    rng = np.random.default_rng(5)
    layers = [stored(weight_format, rng.standard_normal((20, 64)).astype(np.float32)) for _ in range(3)]
    stack = {suffix: np.stack([layer[suffix] for layer in layers]) for suffix in layers[0]}
    together = interleaved(stack, weight_format, threads=2)
    for i, layer in enumerate(layers):
        alone = interleaved({suffix: part[None] for suffix, part in layer.items()}, weight_format)
        for suffix, part in alone.items():
            size = part.nbytes
            whole = together[suffix].reshape(-1).view(np.uint8)
            assert (whole[i * size : (i + 1) * size] == part.reshape(-1).view(np.uint8)).all()


@pytest.mark.parametrize("name", ["llama", "llama_relu_tied", "llama_relu_biases"])
@pytest.mark.parametrize("weight_format", PANEL_CODES)
def test_a_model_answers_alike_from_copies_and_in_place(name: str, weight_format: WeightFormat) -> None:
    config = zoo()[name]
    arrays, formats, _ = stored_model(config, weight_format)
    tokens, logits = random_tokens(config, 21), []
    for interleave in (True, False):
        setup = ExecutorSetup(config, arrays, formats, block_count=8, kv_dtype="f32", interleave=interleave)
        cpu = CpuExecutor(setup, threads=2)
        try:
            assert bool(cpu.copied) == bool(cpu.copies) == interleave
            logits.append(run_in_chunks(cpu, tokens, [1, 2, 3, 15]))
        finally:
            cpu.close()
    assert relative_error(logits[0], logits[1]) < 2e-4
