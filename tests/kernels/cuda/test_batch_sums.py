"""Sums of weighted rows of a neuron-major matrix for several rows of activations, on tensor cores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from model_zoo import relative_error
from test_batch_products import BOUND, make

from svdengine.kernels.cuda import batch_sums
from svdengine.kernels.cuda.formats.table import KERNELS
from svdengine.kernels.formats import WeightFormat

SUMMED: tuple[WeightFormat, ...] = ("q8", "q6", "q4", "ternary")
# Neurons that are whole turns, and not; padded columns; more turns than there is room for; more rows than a block has.
CASES = [(weight_format, 70, 70, 5) for weight_format in SUMMED]
CASES += [("q8", 16, 64, 10), ("q4", 77, 100, 9), ("q4", 64 * 9 + 3, 64, 3), ("q8", 40, 64, 17)]


@pytest.mark.parametrize(("weight_format", "neurons", "columns", "n"), CASES)
def test_sums(device: Any, weight_format: WeightFormat, neurons: int, columns: int, n: int) -> None:
    matrix, weights, _ = make(device, weight_format, neurons, columns)
    hidden = np.random.default_rng(1).standard_normal((n, neurons), np.float32)
    hidden[:, ::3] = 0
    hidden[0] *= 1e6
    behind = np.full((n, 5), np.nan, np.float32)  # which is not read
    given = device.upload(np.concatenate([hidden, behind], 1))
    partial = device.upload(np.full(n * 64 * matrix.stride, np.nan, np.float32))
    assert batch_sums.takes_sums(matrix)
    parts = batch_sums.sum_batch(device, matrix, given, neurons + 5, partial, n)
    found = device.download(partial)[: n * parts * matrix.stride].reshape(n, parts, matrix.stride)[:, :, :columns]
    expected = hidden @ weights
    for row in range(n):
        assert relative_error(found[row].sum(0), expected[row]) < BOUND


def test_parts_share_out_the_neurons(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sums, "LEAST_NEURONS", 16)
    matrix, weights, _ = make(device, "q8", 100, 64)  # seven turns for five parts: the last has nothing
    hidden = np.random.default_rng(1).standard_normal((12, 100), np.float32)
    partial = device.upload(np.full(12 * 64 * 64, np.nan, np.float32))
    parts = batch_sums.sum_batch(device, matrix, device.upload(hidden), 100, partial, 12)
    assert parts == 5
    found = device.download(partial)[: 12 * parts * 64].reshape(12, parts, 64)
    assert not found[:, 4].any() and found[:, 3].any()
    assert relative_error(found.sum(1), hidden @ weights) < BOUND


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(("weight_format", "value"), [("q8", np.nan), ("q4", np.inf)])
def test_an_activation_that_is_not_finite_is_seen(device: Any, weight_format: WeightFormat, value: float) -> None:
    matrix, weights, _ = make(device, weight_format, 40, 64)
    hidden, partial = np.ones((3, 40), np.float32), device.zeros(3 * 64 * 64, np.float32)
    hidden[1, 20] = value
    parts = batch_sums.sum_batch(device, matrix, device.upload(hidden), 40, partial, 3)
    found = device.download(partial)[: 3 * parts * 64].reshape(3, parts, 64).sum(1)
    assert not np.isfinite(found[1]).all() and np.isfinite(found[[0, 2]]).all()
    assert relative_error(found[2], hidden[2] @ weights) < BOUND


def test_few_neurons_and_floats_are_summed_otherwise(device: Any) -> None:
    assert not batch_sums.takes_sums(make(device, "q8", 15, 64)[0])
    assert not batch_sums.takes_sums(make(device, "f16", 64, 64)[0])


@pytest.mark.parametrize("weight_format", SUMMED)
@pytest.mark.parametrize("tiles", batch_sums.TILES)
def test_shared_memory_has_room(weight_format: WeightFormat, tiles: int) -> None:
    assert KERNELS[weight_format].tiles is not None
    assert 16 * batch_sums.room_of(weight_format, tiles).words <= 47 * 1024
