"""What all executors have in common, on the reference's: predictors that take turns, times, counts, and closing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from model_zoo import make_batch, random_weights, relative_error, zoo
from random_predictors import make_network, make_predictor

from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.executor import FfnPath
from svdengine.kernels.predictor import Predictor
from svdengine.kernels.reference import ReferenceExecutor

RELU = zoo()["llama_relu_tied"]
BATCH = make_batch([([1, 2, 3], 0)], [[0]])


class Choosing(ReferenceExecutor):
    """The reference, with the path of a step chosen as on devices."""

    full = False  # whether there is room for another predictor
    released = 0

    def ffn_path(self, n: int) -> FfnPath:
        return BaseExecutor.ffn_path(self, n)

    def _place_predictor(self, predictor: Predictor | None) -> None:
        if self.full and predictor is not None:
            raise MemoryError

    def _release(self) -> None:
        self.released += 1


@pytest.fixture
def executor() -> Choosing:
    return Choosing(RELU, random_weights(RELU), 4, 64, predictor=make_predictor(RELU, 8, 0, 0.0), ffn="sparse")


def test_times_are_measured_once_for_a_predictor(executor: Choosing) -> None:
    executor.forward(BATCH)
    counted, times = executor.neuron_counts(), executor.ffn_times
    assert executor.ffn_times is times and executor.ffn == "sparse"
    assert executor.neuron_counts() == counted  # what was counted while measuring is forgotten
    executor.predictor = make_predictor(RELU, 16, 0, 0.0)
    assert executor.ffn_times is not times
    executor.reset_neuron_counts()
    assert executor.neuron_counts().total == 0


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (make_predictor(replace(RELU, layer_count=1), 8, 0, 0.0), "1 layers for a model of 2"),
        (make_predictor(replace(RELU, ffn_size=140), 8, 0, 0.0), "140 neurons, the model 150 neurons"),
        (make_network(RELU, 151, 0.0), r"rank 151, which must lie in 0\.\.150"),
        (make_predictor(replace(RELU, hidden_size=190), 8, 0, 0.0), r"predictor\.0\.B: found int8 \(8, 192\)"),
        (make_predictor(replace(RELU, hidden_size=190), 0, 2, 0.0), r"predictor\.0\.Q: found uint8 \(150, 48\)"),
    ],
)
def test_a_predictor_that_does_not_fit_leaves_the_one_before(
    executor: Choosing, predictor: Predictor, message: str
) -> None:
    before = executor.predictor
    with pytest.raises(ValueError, match=message):
        executor.predictor = predictor
    assert executor.predictor is before and executor.ffn_path(1) == "predict"


def test_without_room_for_a_predictor_there_is_none(executor: Choosing) -> None:
    executor.full = True
    with pytest.raises(MemoryError):
        executor.predictor = make_predictor(RELU, 16, 0, 0.0)
    assert executor.predictor is None and executor.ffn_path(1) == "skip_zeros"


def test_a_model_without_zeros_runs_dense() -> None:
    silu = zoo()["llama"]
    assert Choosing(silu, random_weights(silu), 4, 64, ffn="sparse").ffn_path(1) == "dense"


def test_ffn_inputs_leave_the_path_as_it_was(executor: Choosing) -> None:
    dense = executor.ffn_inputs(BATCH)
    assert executor.ffn == "sparse" and executor.neuron_counts().total == 0
    with pytest.raises(ValueError):
        executor.ffn_inputs(make_batch([([RELU.vocab_size], 0)], [[0]]))
    assert executor.ffn == "sparse"
    np.testing.assert_array_equal(executor.ffn_inputs(BATCH), dense)


def test_ffns_alone_sum_up(executor: Choosing) -> None:
    x = executor.ffn_inputs(BATCH)
    each = [executor.run_ffns(np.stack([x[layer]] * 2), 2) for layer in range(2)]
    assert executor.neuron_counts().total == 4 * 3 * RELU.ffn_size
    first = [executor.run_ffns(x[layer], 1) for layer in range(2)]
    second = [each[layer] - first[layer] for layer in range(2)]
    assert relative_error(executor.run_ffns(x), first[0] + second[1]) < 1e-5
    assert not executor.run_ffns(x, sparsity_bias=1e9).any()


def test_a_closed_executor_says_so_and_is_closed_once(executor: Choosing) -> None:
    executor.close()
    executor.close()
    assert executor.released == 1
    x = np.zeros((1, RELU.hidden_size), np.float32)
    for use in (lambda: executor.forward(BATCH), lambda: executor.ffn_inputs(BATCH), lambda: executor.run_ffns(x)):
        with pytest.raises(ValueError, match="the executor is closed"):
            use()
