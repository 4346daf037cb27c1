"""Tokens sampled on the device are those of engine/sampler.py, given the same random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simulator
from numpy.typing import NDArray

from svdengine.kernels.cuda import sampling
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.sampling import NOT_FINITE, Choices, allocate_sampling, sample
from svdengine.sampler import candidates
from svdengine.sampling import SamplingParams

SIZE, STRIDE = 119, 128


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each still has several tokens, and the simulator less to do."""
    monkeypatch.setattr(sampling, "SAMPLE_THREADS", 64)


def choose(device: Any, logits: NDArray[np.float32], params: SamplingParams, draws: NDArray[np.float64]) -> list[int]:
    """A token for every row of logits (rows, SIZE)."""
    n = len(logits)
    padded = np.full((n, STRIDE), np.inf, np.float32)  # what lies behind the vocabulary must not matter
    padded[:, :SIZE] = logits
    columns = [np.full(n, v) for v in (params.temperature, params.top_k, params.top_p, params.min_p)]
    buffers = allocate_sampling(device, n, STRIDE)
    found = sample(device, buffers, device.upload(padded), STRIDE, SIZE, Choices(*columns, draws))
    return found.tolist()


def defined(logits: NDArray[np.float32], params: SamplingParams, draw: float) -> int:
    """The token that engine/sampler.py takes for this random number."""
    tokens, probabilities = candidates(logits, params)
    cumulative = np.cumsum(probabilities)
    index = int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))
    return int(tokens[min(index, len(tokens) - 1)])


FILTERS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.5},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.7, "temperature": 1.7},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 0.6},
    {"top_p": 0.8, "min_p": 0.3},
    {"top_k": 500, "min_p": 0.02},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_tokens_are_the_definitions(device: Any, fields: dict[str, Any], ties: bool) -> None:
    random = np.random.default_rng(len(str(fields)))
    logits = (2 * random.standard_normal((2, SIZE))).astype(np.float32)
    if ties:
        logits = np.rint(logits)  # zeros of both signs too
    params = SamplingParams(**{"temperature": 1.0, **fields})
    for draws in np.array([[0.0, 0.999999], *random.random((2, 2))]):
        expected = [defined(row, params, draw) for row, draw in zip(logits, draws, strict=True)]
        assert choose(device, logits, params, draws) == expected


def test_greedy_takes_the_first_of_the_likeliest(device: Any) -> None:
    logits = np.full((2, SIZE), -3, np.float32)
    logits[0, [70, 100]] = 2.5
    assert choose(device, logits, SamplingParams(temperature=0.0), np.zeros(2)) == [70, 0]


@pytest.mark.skipif(not SIMULATED, reason="a GPU chooses its own order")
def test_the_order_of_threads_changes_no_token(device: Any) -> None:
    logits = np.rint(3 * np.random.default_rng(4).standard_normal((2, SIZE))).astype(np.float32)
    params, draws = SamplingParams(top_k=30, top_p=0.8, min_p=0.01), np.array([0.3, 0.8])
    found = choose(device, logits, params, draws)
    with simulator.backwards():
        assert choose(device, logits, params, draws) == found


def test_damaged_logits_are_reported(device: Any) -> None:
    logits = np.zeros((4, SIZE), np.float32)
    logits[0, 80], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :5] = -np.inf  # a few of these are tokens that may not be chosen
    for temperature in (0.0, 1.0):
        found = choose(device, logits, SamplingParams(temperature=temperature), np.zeros(4))
        assert found == [NOT_FINITE] * 3 + [5]
