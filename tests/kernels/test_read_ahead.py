"""Asking for rows before they are read: the pages come into memory, and results stay the same bits."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, zoo
from patience import eventually
from random_predictors import make_predictor
from test_cpu import executors

from svdengine.kernels.cpu.matrix import DATA, MATRIX_FIELDS, ROW_BYTES, ROWS, SCALE, SCALE_BYTES
from svdengine.kernels.cpu.read_ahead import ask_for_matrix, ask_for_rows, ask_for_scales


@numba.njit(nogil=True)
def ask(matrix, neurons, count, gap):
    ask_for_rows(matrix, neurons, count, gap)


@numba.njit(nogil=True)
def ask_for(matrix, scales_alone):
    if scales_alone:
        ask_for_scales(matrix)
    else:
        ask_for_matrix(matrix)


def resident(pages: mmap.mmap, address: int) -> list[int]:
    """Which pages of a map are in memory."""
    found = (ctypes.c_ubyte * (len(pages) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), found) == 0
    return [i for i, flag in enumerate(found) if flag & 1]


def mapped(folder: Path) -> tuple[mmap.mmap, int]:
    """A map of a file of 64 pages, none of which is in memory, and where it begins."""
    path = folder / "rows"
    path.write_bytes(os.urandom(64 * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    address = np.frombuffer(pages, np.uint8).ctypes.data
    if resident(pages, address):
        pytest.skip("this file system keeps its pages in memory")
    return pages, address


def wait_for(pages: mmap.mmap, address: int, expected: list[int]) -> None:
    """Wait until just the expected pages are in memory."""
    eventually(lambda: resident(pages, address) == expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into the page cache of Linux")
@pytest.mark.parametrize(("gap", "extra"), [(1, []), (2, [6]), (3, [6, 9, 10])])
def test_only_the_pages_of_listed_rows_are_read(tmp_path: Path, gap: int, extra: list[int]) -> None:
    listed = [2, 5, 7, 8, 11]
    pages, address = mapped(tmp_path)
    matrix, neurons = np.zeros(MATRIX_FIELDS, np.int64), np.array(listed, np.int32)
    matrix[DATA], matrix[ROW_BYTES] = address, mmap.PAGESIZE
    ask(matrix, neurons.ctypes.data, len(listed), gap)
    wait_for(pages, address, sorted([*listed, *extra] if gap < 3 else range(2, 12)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into the page cache of Linux")
@pytest.mark.parametrize("scales_alone", [False, True])
def test_scales_are_asked_for_with_rows_and_alone(tmp_path: Path, scales_alone: bool) -> None:
    pages, address = mapped(tmp_path)
    matrix = np.zeros(MATRIX_FIELDS, np.int64)
    matrix[DATA], matrix[ROWS], matrix[ROW_BYTES] = address, 8, mmap.PAGESIZE // 2
    matrix[SCALE], matrix[SCALE_BYTES] = address + 20 * mmap.PAGESIZE, mmap.PAGESIZE + 1
    ask_for(matrix, scales_alone)
    wait_for(pages, address, [20, 21] if scales_alone else [0, 1, 2, 3, 20, 21])


def test_reading_ahead_changes_no_bit() -> None:
    config = zoo()["llama_relu_biases"]
    with executors(config, "q8") as (cpu, _):
        cpu.predictor, cpu.ffn = make_predictor(config, 24, 0, -0.02), "sparse"
        batches = [
            make_batch([(random_tokens(config, count), 0)], [block_table(count)]) for count in (1, 3)
        ]  # by all threads together, and each thread its own rows
        expected = [cpu.forward(batch).copy() for batch in batches]
        cpu.read_ahead(1)
        for batch, logits in zip(batches, expected, strict=True):
            np.testing.assert_array_equal(cpu.forward(batch), logits)
