"""Every weight format has its CUDA kernels, and one that has none is refused before anything is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model_zoo import relative_error
from test_executor import LLAMA, stored
from test_products import COLUMNS, ROWS, as_read, make_matrix, product_bound

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cuda import embedding, gather, gemm, gemv
from svdengine.kernels.cuda.executor import CudaExecutor
from svdengine.kernels.cuda.formats.kernels import MATRIX_PARTS
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.formats import (
    FORMATS,
    PART_SUFFIXES,
    WEIGHT_FORMATS,
    WeightFormat,
    dequantize,
    format_named,
    padded_columns,
)

UNKNOWN: Any = "q5"


def test_every_format_has_its_kernels() -> None:
    assert KERNELS.keys() == set(WEIGHT_FORMATS)
    for name in WEIGHT_FORMATS:
        assert kernels_of(name).name == name
        for tile in (1, kernels_of(name).most_sums):
            gemv.transposed_kernel(name, tile)
        for split in (False, True):
            made = [make(name, split).name for make in (gather.gate_kernel, gather.up_kernel, gather.down_kernel)]
            assert made == [f"{part}_{name}{'_split' if split else ''}" for part in ("gate", "up", "down")]


def test_every_part_of_a_format_is_a_parameter() -> None:
    assert set(MATRIX_PARTS.values()) == set(PART_SUFFIXES)
    assert kernels_of("q4").parameters("a_") == "uint32* a_words, uint8* a_scale, uint8* a_low, float32* a_row"
    assert kernels_of("q8").parameters() == "uint32* words, float16* scale, uint8* low, float32* row"


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_chunks_cover_all_columns_and_words_of_a_row(weight_format: WeightFormat) -> None:
    kernels, columns, words = kernels_of(weight_format), 256, FORMATS[weight_format].row_bytes(256) // 4
    chunks, fours = columns // kernels.chunk_columns, kernels.chunk_columns // 4
    assert chunks * kernels.chunk_words == words and len(kernels.nothing) == fours + kernels.other_sums
    firsts = [kernels.column_of(j, k) for j in range(chunks) for k in range(fours)]
    assert sorted(firsts) == list(range(0, columns, 4))
    row = np.arange(words, dtype=np.uint32)
    read = [kernels.load_chunk(np.concatenate([row + 999, row]), words, j) for j in range(chunks)]
    assert {len(w) for w in read} == {-(-kernels.chunk_words // 4) * 4}  # 16 bytes a load
    assert set(np.concatenate(read)) == set(row)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_a_part_of_the_rows_is_a_matrix(device: Any, weight_format: WeightFormat) -> None:
    matrix, weights, bias = make_matrix(device, weight_format, ROWS)
    part, x = matrix.rows_from(5, 3), np.random.default_rng(1).standard_normal((1, COLUMNS), np.float32)
    y = device.zeros(3, np.float32)
    gemv.multiply(device, part, as_read(device, x, weight_format), padded_columns(COLUMNS), y, 3, 1)
    assert relative_error(device.download(y), (x @ weights[5:8].T + bias[5:8])[0]) < product_bound(weight_format)
    assert part.rows == part.hot == 3 and not part.is_split


@pytest.mark.parametrize("kernel", [gemm.widen_kernel, embedding.embed_kernel, kernels_of])
def test_an_unknown_format_has_no_kernels(kernel: Any) -> None:
    with pytest.raises(ValueError, match="found the weight format 'q5', CUDA has kernels for f32, f16, bf16, q8, q6"):
        kernel(UNKNOWN)


def test_an_unknown_format_is_refused_wherever_a_matrix_has_it(device: Any) -> None:
    matrix = replace(make_matrix(device, "q4", ROWS)[0], format=UNKNOWN)
    y = device.zeros(64, np.float32)
    for call in (
        lambda: gemv.multiply(device, matrix, y, 64, y, 64, 1),
        lambda: gemv.multiply_transposed(device, matrix, y, 64, y, 1),
        lambda: gather.gate_kernel(UNKNOWN, False),
        lambda: gather.up_kernel(UNKNOWN, False),
        lambda: gather.gate_up_kernel(UNKNOWN, True),
        lambda: gather.down_kernel(UNKNOWN, True),
    ):
        with pytest.raises(ValueError, match="'q5'"):
            call()


def test_a_model_of_an_unknown_format_is_refused(device: Any) -> None:
    arrays, formats, _ = stored(LLAMA, "q4")
    expected = "found the weight format 'q5', expected one of f32, f16, bf16, q8, q6, q4"
    with pytest.raises(ValueError, match=expected):
        CudaExecutor(ExecutorSetup(LLAMA, arrays, {**formats, "up": UNKNOWN}, block_count=4), device=device)
    for call in (lambda: format_named(UNKNOWN), lambda: dequantize({}, UNKNOWN, 64)):
        with pytest.raises(ValueError, match=expected):
            call()
