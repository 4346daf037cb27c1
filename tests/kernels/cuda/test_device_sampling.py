"""Tokens sampled on the device are those of engine/scheduling/sampler.py, given the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import simulator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from svdengine.kernels.cuda import sample_survey, sample_weights, sample_whole, sampling, workspace
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.sampling import pack_choices, sample_tokens
from svdengine.kernels.executor import NOT_FINITE, Choice
from svdengine.scheduling.sampler import candidates
from svdengine.scheduling.sampling import SamplingParams

SIZE, STRIDE = 119, 128
pytestmark = [  # infinite logits and tiny temperatures are among what is tried
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the simulator few threads, of which each still has several tokens, and more and smaller digits."""
    if SIMULATED:
        monkeypatch.setattr(sampling, "SAMPLE_THREADS", 64)
        monkeypatch.setattr(sample_survey, "SURVEY_THREADS", 32)
        monkeypatch.setattr(sample_whole, "DIGIT", 7)
        set_sizes(monkeypatch, slices=4, bins=24, listed=128)


def set_sizes(monkeypatch: pytest.MonkeyPatch, *, slices: int, bins: int, listed: int) -> None:
    for name, size in (("SLICES", slices), ("BINS", bins), ("MOST_LISTED", listed)):
        for module in (workspace, sample_survey, sampling):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)
    monkeypatch.setattr(sample_survey, "_STEP", np.float32(bins / sample_weights.LOWEST))


def choose(device: Any, logits: NDArray[np.float32], choices: list[Choice | None]) -> list[int]:
    """A token for every row of logits (rows, SIZE); -7 where none is chosen."""
    rows = len(logits)
    padded = np.full((rows, STRIDE), np.inf, np.float32)  # what lies behind the vocabulary must not matter
    padded[:, :SIZE] = logits
    numbers, top_k = pack_choices(choices, rows)
    work: Any = SimpleNamespace(
        sizes=SimpleNamespace(rows=rows, logits=STRIDE),
        logits=device.upload(padded),
        choice_numbers=device.upload(numbers),
        choice_top_k=device.upload(top_k),
        chosen=device.upload(np.full(rows, -7, np.int32)),
        # Rubbish, which is cleared where it matters.
        tops=device.upload(np.full(rows * workspace.SLICES, 1 << 62)),
        slice_weights=device.upload(np.full(rows * workspace.SLICES, 99)),
        bin_counts=device.upload(np.full(rows * workspace.BINS, 99, np.int32)),
        bin_weights=device.upload(np.full(rows * workspace.BINS, 99)),
        listed=device.upload(np.full(rows, 99, np.int32)),
        candidates=device.upload(np.full(rows * workspace.MOST_LISTED, 99, np.int32)),
    )
    sample_tokens(device, work, rows, SIZE)
    found: list[int] = device.download(work.chosen).tolist()
    return found


def choice_of(params: SamplingParams, draw: float) -> Choice:
    return Choice(params.temperature, params.top_k, params.top_p, params.min_p, draw)


def defined(logits: NDArray[np.float32], params: SamplingParams, draw: float) -> int:
    """The token that engine/scheduling/sampler.py takes for this random number."""
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
    logits = (2 * random.standard_normal((4, SIZE))).astype(np.float32)
    if ties:
        logits = np.rint(logits)  # zeros of both signs too
    params, draws = SamplingParams(**{"temperature": 1.0, **fields}), [0.0, 0.999999, *random.random(2)]
    expected = [defined(row, params, draw) for row, draw in zip(logits, draws, strict=True)]
    assert choose(device, logits, [choice_of(params, draw) for draw in draws]) == expected


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from([-1e30, -80.0, -3.0, -0.5, 0.0, 0.25, 0.3, 2.0]), min_size=SIZE, max_size=SIZE),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([1e-300, 1e-3, 0.5, 1.0, 100.0]),
            "top_k": st.sampled_from([0, 1, 2, 30, SIZE, 1 << 24]),
            "top_p": st.sampled_from([1e-12, 0.1, 0.75, 1 - 2**-53, 1.0]),
            "min_p": st.sampled_from([0.0, 1e-9, 0.3, 1.0]),
        }
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_tokens_are_the_definitions_at_the_edges(
    device: Any, values: list[float], fields: dict[str, Any], draw: float
) -> None:
    logits, params = np.array([values], np.float32), SamplingParams(**fields)
    # Weights are those of float32: a number that close to a border may fall on its other side.
    near = {defined(logits[0], params, min(max(draw + step, 0.0), 1 - 2**-53)) for step in (-1e-6, 0.0, 1e-6)}
    assert choose(device, logits, [choice_of(params, draw)])[0] in near


def test_greedy_takes_the_first_of_the_likeliest(device: Any) -> None:
    logits = np.full((2, SIZE), -3, np.float32)
    logits[0, [70, 100]] = 2.5
    assert choose(device, logits, [Choice(temperature=0.0)] * 2) == [70, 0]


def test_rows_without_a_choice_are_left_out(device: Any) -> None:
    logits = np.zeros((3, SIZE), np.float32)
    logits[1, 5] = 1
    assert choose(device, logits, [None, Choice(temperature=0.0), None]) == [-7, 5, -7]


@pytest.mark.skipif(not SIMULATED, reason="a GPU chooses its own order")
def test_the_order_of_threads_changes_no_token(device: Any) -> None:
    logits = np.rint(3 * np.random.default_rng(4).standard_normal((2, SIZE))).astype(np.float32)
    choices: list[Choice | None] = [Choice(1.0, 30, 0.8, 0.01, draw) for draw in (0.3, 0.8)]
    found = choose(device, logits, choices)
    with simulator.backwards():
        assert choose(device, logits, choices) == found


def test_damaged_logits_are_reported(device: Any) -> None:
    logits = np.zeros((4, SIZE), np.float32)
    logits[0, 80], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :5] = -np.inf  # a few of these are tokens that may not be chosen
    for temperature in (0.0, 1.0):
        assert choose(device, logits, [Choice(temperature)] * 4) == [NOT_FINITE] * 3 + [5]


@pytest.mark.skipif(not SIMULATED, reason="the sizes of the kernels are set here")
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_rows_with_too_many_candidates_are_read_whole(
    device: Any, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    set_sizes(monkeypatch, slices=4, bins=24, listed=4)
    random = np.random.default_rng(len(str(fields)))
    logits = np.rint(2 * random.standard_normal((3, SIZE))).astype(np.float32)
    params, draws = SamplingParams(**{"temperature": 1.0, **fields}), random.random(3).tolist()
    expected = [defined(row, params, draw) for row, draw in zip(logits, draws, strict=True)]
    assert choose(device, logits, [choice_of(params, draw) for draw in draws]) == expected


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 3.0])
def test_weights_are_exponentials_to_a_few_steps_of_float32(temperature: float) -> None:
    if not SIMULATED:
        pytest.skip("device functions are called here")
    random = np.random.default_rng(0)
    largest = np.float32(17.3)
    for logit in largest - np.float32(20 * temperature) * random.random(200).astype(np.float32):
        exact = np.exp((float(logit) - float(largest)) / temperature)
        with simulated_cuda():
            weight = sample_weights.weigh(logit, largest, np.float64(1 / temperature), 0)
        assert abs(weight / sample_weights.SCALE - exact) < 4e-7 * exact + 2 / sample_weights.SCALE


@contextmanager
def simulated_cuda() -> Iterator[None]:
    before = sample_weights.cuda
    sample_weights.cuda = simulator.Cuda()
    try:
        yield
    finally:
        sample_weights.cuda = before
