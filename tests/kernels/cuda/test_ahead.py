"""The next decode step, launched before the host has this one's tokens: in which order, and what it may not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_executor
from model_zoo import block_table, make_batch
from numpy.typing import NDArray
from random_predictors import make_predictor
from test_executor import LLAMA, RELU, executors, small_blocks

from svdengine.kernels.batch import Batch
from svdengine.kernels.cuda.ahead import Ahead, has_room_ahead, take_next
from svdengine.kernels.cuda.device import SimulatedDevice
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.step import Shape
from svdengine.kernels.executor import Choice

pytestmark = [
    pytest.mark.skipif(not SIMULATED, reason="the simulator tells the order of calls"),
    pytest.mark.usefixtures("device"),  # which installs the simulator
]
GREEDY, DRAWN = Choice(temperature=0.0), Choice(temperature=1.3, draw=0.4)
__all__ = ["small_blocks"]  # a fixture


class NotingDevice(SimulatedDevice):
    """Notes what is asked for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def replay(self, graph: Any) -> None:
        self.noted.append("step")
        super().replay(graph)

    def launch(self, kernel: Any, *arguments: Any) -> None:
        if self._recorded is None and kernel in (take_next, test_executor.sampling.choose):
            self.noted.append(kernel.name)
        super().launch(kernel, *arguments)

    def fetch(self, array: Any, to: NDArray) -> Callable[[], None]:
        self.noted.append("fetch")
        super().fetch(array, to)
        return lambda: self.noted.append("wait")


def batch_at(tokens: list[int], position: int) -> Batch:
    tables = [block_table(40, first=0), block_table(40, first=3)][: len(tokens)]
    return make_batch([([token], position) for token in tokens], tables)


def test_the_next_step_is_launched_before_the_host_waits_for_tokens() -> None:
    device = NotingDevice()
    with executors(device, LLAMA) as (cuda, reference):
        tokens = [3]
        for position in range(6):
            device.noted.clear()
            batch = batch_at(tokens, position)
            expected = reference.forward(batch)[0].argmax()
            found, _ = cuda.forward_and_sample(batch, [GREEDY])
            assert found.tolist() == [expected]
            tokens = found.tolist()
            if position == 1:  # recorded and replayed; then the next one is tried
                assert device.noted == ["step", "fetch", "take_next", "step", "wait"]
            if position > 1:  # what was launched before is taken
                assert device.noted == ["choose", "fetch", "take_next", "step", "wait"]


@pytest.mark.parametrize("ffn", ["dense", "sparse"])
def test_a_step_that_nobody_asks_for_changes_nothing(ffn: Any) -> None:
    """Another token, place, path or choice than was expected, and steps of several rows in between."""
    device, predictor = NotingDevice(), make_predictor(RELU, 8, 0, threshold=-0.05)
    with executors(device, RELU, predictor=predictor, ffn=ffn) as (cuda, reference):
        plan: list[tuple[list[int], int, list[Choice]]] = [
            ([3], 0, [GREEDY]),
            ([4], 1, [GREEDY]),
            ([5], 2, [GREEDY]),  # the device went on with another token
            ([6, 7], 3, [GREEDY, DRAWN]),
            ([6], 3, [DRAWN]),  # the same place again
            ([1], 4, [GREEDY]),
            ([2], 5, [GREEDY]),
        ]
        for tokens, position, choices in plan:
            batch = batch_at(tokens, position)
            logits = reference.forward(batch)
            found, _ = cuda.forward_and_sample(batch, choices)
            for row, choice in enumerate(choices):
                if choice is GREEDY:
                    assert found[row] == logits[row].argmax()
            assert cuda.neuron_counts() == reference.neuron_counts()
        assert cuda._ahead is not None
        cuda.reset_neuron_counts()
        assert cuda.neuron_counts().total == 0 and cuda._ahead is None


def test_counts_are_those_of_steps_that_were_asked_for() -> None:
    device, predictor = NotingDevice(), make_predictor(RELU, 8, 0, threshold=-0.05)
    with executors(device, RELU, predictor=predictor, ffn="sparse") as (cuda, reference):
        tokens = [3]
        for position in range(4):
            batch = batch_at(tokens, position)
            reference.forward(batch)
            found, _ = cuda.forward_and_sample(batch, [GREEDY])
            assert cuda.neuron_counts() == reference.neuron_counts()
            np.testing.assert_array_equal(cuda.layer_counts(), reference.layer_counts())
            tokens = found.tolist()
        with pytest.raises(ValueError, match="hidden states are kept of steps"):
            cuda.hidden_states()
        cuda.forward(batch_at(tokens, 4))
        reference.forward(batch_at(tokens, 4))
        assert cuda.neuron_counts() == reference.neuron_counts() and cuda._ahead is None


def test_a_step_ahead_is_known_by_its_batch() -> None:
    before = batch_at([3, 4], 7)
    ahead = Ahead(before, np.array([8, 9], np.int32), Shape(2, 2, 2, 1, "dense"))
    following = batch_at([8, 9], 8)
    assert ahead.is_step_of(following)
    other = np.array(following.block_tables)
    other[0, 0] = 7
    bias = np.zeros(2, np.float32)
    for changed in (
        batch_at([8, 1], 8),
        batch_at([8, 9], 9),
        batch_at([8], 8),
        replace(following, block_tables=other),
        replace(following, logit_rows=np.array([1, 0], np.int32)),
        replace(following, sparsity_bias=bias),
    ):
        assert not ahead.is_step_of(changed)
    biased = replace(ahead, before=replace(before, sparsity_bias=bias))
    assert biased.is_step_of(replace(following, sparsity_bias=bias))
    assert not biased.is_step_of(replace(following, sparsity_bias=bias + 1))


def test_there_must_be_room_for_a_step_ahead() -> None:
    assert has_room_ahead(batch_at([3, 4], 7), 48)
    assert not has_room_ahead(batch_at([3], 15), 48)  # a new KV block
    assert not has_room_ahead(batch_at([3], 19), 20)  # the context is full
    assert not has_room_ahead(make_batch([([3, 4], 7)], [[0]]), 48)  # rows of one sequence
    assert not has_room_ahead(replace(batch_at([3, 4], 7), logit_rows=np.array([1, 0], np.int32)), 48)
