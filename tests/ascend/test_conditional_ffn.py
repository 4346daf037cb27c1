"""svd_score, svd_gate, svd_up_down and svd_sum together are `reference.sparse_ffn`, for every activation and size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ffn_case import (
    FfnInputs,
    add_list,
    ffn_inputs,
    launch_ffn,
    launch_score,
    listed,
    make_predictor,
    score_inputs,
    with_threshold,
)
from host_kernels import Script
from model_zoo import relative_error, zoo
from numpy.typing import NDArray

from svdengine.kernels.ascend.tiling import (
    MAX_COLUMNS,
    UB_BYTES,
    gate_ub_bytes,
    list_capacity,
    padded,
    sum_ub_bytes,
    up_down_ub_bytes,
)
from svdengine.kernels.predictor import LayerPredictor, scores
from svdengine.kernels.reference import activate, linear, sparse_ffn
from svdengine.models.config import ModelConfig

ZOO = zoo()
FAMILIES = ["llama_relu_tied", "llama_relu_biases", "llama_relu2", "prosparse", "bamboo", "opt", "falcon_7b_relu"]


class Outputs(NamedTuple):
    neurons: NDArray[np.int32]  # those that are active
    values: NDArray[np.float32]  # their gates
    partials: NDArray[np.float32]  # (blocks, columns)
    y: NDArray[np.float16]  # (hidden,)


def outputs(dumped: list[NDArray]) -> Outputs:
    counts, segments, values, partials, y = dumped
    return Outputs(listed(counts, segments), listed(counts, values), partials, y)


def sized(name: str, neurons: int, hidden: int) -> ModelConfig:
    return replace(ZOO[name], ffn_size=neurons, hidden_size=hidden)


def decided(predictor: LayerPredictor, x: NDArray[np.float32], shift: float = 0.0) -> LayerPredictor:
    """The predictor with every score moved away from zero, so that float16 factors give the same list."""
    away = np.float32(0.02) * np.sign(scores(predictor, x[None], shift)[0])
    return replace(predictor, threshold=predictor.threshold - away)


def run_ffn(program: Path, inputs: FfnInputs, predictor: LayerPredictor, blocks: int, order: int = 0) -> Outputs:
    script = Script(program)
    launch_score(script, score_inputs(predictor, inputs.x, shift=0.1), blocks, order)
    launch_ffn(script, inputs, blocks, blocks, order)
    return outputs(script.run())


def run_listed(program: Path, inputs: FfnInputs, segments: list[NDArray], blocks: int) -> Outputs:
    """The FFN of lists that are given, one for each producer."""
    script = Script(program)
    add_list(script, "predicted", inputs.config.ffn_size, len(segments))
    counts = np.zeros((len(segments), 8), np.int32)
    counts[:, 0] = [len(segment) for segment in segments]
    lists = np.full((len(segments), list_capacity(inputs.config.ffn_size, len(segments))), -1, np.int32)
    for row, segment in zip(lists, segments, strict=True):
        row[: len(segment)] = segment
    script.buffer("predicted_counts", counts)
    script.buffer("predicted", lists)
    launch_ffn(script, inputs, len(segments), blocks)
    return outputs(script.run())


def exact(inputs: FfnInputs, predicted: NDArray) -> tuple[NDArray, NDArray[np.float32], NDArray[np.float64]]:
    """Active neurons of those predicted, their gates, and the FFN's output (hidden,)."""
    config, w, x = inputs.config, inputs.weights, inputs.x.astype(np.float64)[None]
    name = "gate" if config.gated else "up"
    gates = activate(config.activation, linear(x, w[name], w.get(f"{name}.bias")), config.activation_threshold)[0]
    neurons = predicted[gates[predicted] > 0]
    up = linear(x, w["up"], w.get("up.bias"))[0] if config.gated else np.ones(config.ffn_size)
    up = np.maximum(up, 0) if config.activation == "drelu" else up
    y = (gates * up)[neurons] @ w["down_T"][neurons].astype(np.float64)
    return neurons, gates[neurons], y + w.get("down.bias", 0)


def check(found: Outputs, inputs: FfnInputs, predicted: NDArray) -> None:
    """float32 arithmetic up to y, which is rounded to float16."""
    neurons, gates, y = exact(inputs, predicted)
    np.testing.assert_array_equal(found.neurons, neurons)
    np.testing.assert_allclose(found.values, gates, rtol=1e-4, atol=1e-5)
    total = found.partials.astype(np.float64).sum(0)
    assert (total[len(y) :] == 0).all()
    scale = np.abs(y).max() + 1e-30
    assert np.abs(total[: len(y)] + inputs.weights.get("down.bias", 0) - y).max() <= 2e-6 * scale
    np.testing.assert_allclose(found.y, y, rtol=6e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blocks", [1, 40, 48])
def test_the_whole_ffn_is_that_of_the_reference(host_kernels: Path, name: str, blocks: int) -> None:
    inputs = ffn_inputs(sized(name, 700, 90))
    predictor = decided(make_predictor(700, 90, 40), inputs.x, shift=0.1)
    found = run_ffn(host_kernels, inputs, predictor, blocks)
    expected = sparse_ffn(inputs.config, inputs.weights, inputs.x[None], predictor, np.float32(0.1))[0]
    assert 0.02 < len(found.neurons) / 700 < 0.6
    assert relative_error(found.y.astype(np.float32), expected) < 6e-4
    check(found, inputs, np.flatnonzero(scores(predictor, inputs.x[None], 0.1)[0] > 0))


@pytest.mark.parametrize(
    ("neurons", "hidden"),
    [(1, 1), (63, 63), (64, 64), (65, 65), (150, 577), (300, 2040), (90, 2049), (30, 4100), (20, MAX_COLUMNS)],
)
@pytest.mark.parametrize("blocks", [1, 6, 48])
def test_odd_sizes(host_kernels: Path, neurons: int, hidden: int, blocks: int) -> None:
    inputs = ffn_inputs(sized("llama_relu_biases", neurons, hidden))
    capacity = list_capacity(neurons, blocks)
    segments = [np.arange(neurons)[capacity * k : capacity * (k + 1)] for k in range(blocks)]
    check(run_listed(host_kernels, inputs, segments, blocks), inputs, np.arange(neurons))


@pytest.mark.parametrize("blocks", range(1, 49))
def test_every_number_of_blocks_in_any_order(host_kernels: Path, blocks: int) -> None:
    inputs = ffn_inputs(sized("prosparse", 1300, 70))
    predictor = decided(make_predictor(1300, 70, 30), inputs.x, shift=0.1)
    found = run_ffn(host_kernels, inputs, predictor, blocks)
    check(found, inputs, np.flatnonzero(scores(predictor, inputs.x[None], 0.1)[0] > 0))
    shuffled = run_ffn(host_kernels, inputs, predictor, blocks, order=100 + blocks)
    for one, other in zip(found, shuffled, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["llama_relu_tied", "opt"])
@pytest.mark.parametrize("blocks", [1, 5, 40])
def test_empty_and_full_lists(host_kernels: Path, name: str, blocks: int) -> None:
    inputs = ffn_inputs(sized(name, 1150, 70))
    for threshold, predicted in ((1e9, np.arange(0)), (-1e9, np.arange(1150))):
        found = run_ffn(host_kernels, inputs, with_threshold(make_predictor(1150, 70, 30), threshold), blocks)
        check(found, inputs, predicted)


def test_every_neuron_active_and_none(host_kernels: Path) -> None:
    inputs = ffn_inputs(sized("llama_relu_biases", 1150, 70))
    for bias, count in ((1e3, 1150), (-1e3, 0)):
        inputs.weights["gate.bias"][:] = bias
        found = run_listed(host_kernels, inputs, [np.arange(1150)], 1)
        assert len(found.neurons) == count
        check(found, inputs, np.arange(1150))


@pytest.mark.parametrize("blocks", [1, 3, 11])
def test_skewed_segments_are_cut_into_equal_parts(host_kernels: Path, blocks: int) -> None:
    inputs = ffn_inputs(sized("bamboo", 640, 90))
    full = [np.arange(0), np.arange(0), np.arange(128, 192), np.array([200]), np.arange(0), np.arange(320, 384)]
    segments = [*full, *[np.arange(0)] * 3, np.arange(600, 640)]
    check(run_listed(host_kernels, inputs, segments, blocks), inputs, np.concatenate(segments))


def test_short_and_long_rows_give_the_same_bits(host_kernels: Path) -> None:
    """Rows of 2032 columns are multiplied together, longer ones one by one, and added up alike."""
    short = ffn_inputs(sized("llama_relu_tied", 40, 1984))
    columns = {"gate": 1984, "up": 1984, "down_T": 1984}
    weights = {k: np.pad(short.weights[k], ((0, 0), (0, 2 * n - n))) for k, n in columns.items()}
    long = FfnInputs(replace(short.config, hidden_size=2 * 1984), weights, np.pad(short.x, (0, 1984)))
    one, other = (run_listed(host_kernels, inputs, [np.arange(40)], 1) for inputs in (short, long))
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_array_equal(one.y, other.y[:1984])


@pytest.mark.parametrize("hidden", [1, 4096, MAX_COLUMNS])
def test_the_memory_of_a_block_is_as_computed(host_kernels: Path, hidden: int) -> None:
    inputs = ffn_inputs(sized("llama_relu_biases", 3, hidden))
    script = Script(host_kernels)
    add_list(script, "predicted", 3, 2)
    script.buffer("predicted_counts", np.zeros((2, 8), np.int32))
    launch_ffn(script, inputs, 2, 2)
    script.used()
    expected = [gate_ub_bytes(hidden), up_down_ub_bytes(hidden), sum_ub_bytes(2)]
    np.testing.assert_array_equal(script.run()[-1], expected)
    assert max(*expected, sum_ub_bytes(64)) <= UB_BYTES and padded(hidden) <= MAX_COLUMNS
