"""The conditional FFN on the device: lists as the predictor defines them, and results as the reference has them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simulator
from model_zoo import random_weights, relative_error, zoo
from numpy.typing import NDArray

from svdengine.kernels.cuda import sparse
from svdengine.kernels.cuda.formats.table import kernels_of
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.memory_split import LayerSplit
from svdengine.kernels.cuda.model import Model, build_model
from svdengine.kernels.cuda.placed_predictor import place_predictor
from svdengine.kernels.cuda.rounding import takes_integers
from svdengine.kernels.cuda.score import SCORE_ROWS, SCORE_THREADS, score_kernel
from svdengine.kernels.cuda.sparse import score_rows, sparse_ffn
from svdengine.kernels.cuda.workspace import Sizes, Workspace, allocate_workspace
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat, dequantize, quantize
from svdengine.kernels.lowbit import quantize_lowbit
from svdengine.kernels.predictor import LayerPredictor, Predictor, scores
from svdengine.kernels.reference import activate, ffn
from svdengine.kernels.reference import sparse_ffn as reference_ffn
from svdengine.models import ModelConfig, tensor_specs

# Sizes are odd on purpose: no multiple of 64 columns or of 32 neurons.
ZOO = {name: replace(config, layer_count=1) for name, config in zoo().items() if config.sparse_ffn}
CONFIG = ZOO["llama_relu_biases"]
ROWS = 2


def stored(config: ModelConfig, formats: dict[str, WeightFormat]) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """Stored arrays of every tensor, and the float32 weights of the layer that they stand for."""
    arrays, exact = {}, {}
    specs = {spec.name: spec for spec in tensor_specs(config)}
    for name, weights in random_weights(config).items():
        if not specs[name].matrix:
            arrays[name] = weights
            exact[name] = weights[0]
            continue
        stacked = specs[name].stacked
        parts = quantize(weights[0] if stacked else weights, formats[name])
        arrays |= {name + suffix: part[None] if stacked else part for suffix, part in parts.items()}
        exact[name] = dequantize(parts, formats[name], weights.shape[-1])
    return arrays, exact


def layer_predictor(
    config: ModelConfig, rank: int, bits: int, factors: WeightFormat = "q8", relu: bool = False, threshold: float = 0.0
) -> LayerPredictor:
    """Random factors and residual."""
    random, (f, d) = np.random.default_rng(7), (config.ffn_size, config.hidden_size)

    def normal(rows: int, columns: int) -> NDArray[np.float32]:
        return random.standard_normal((rows, columns), np.float32) * np.float32(max(columns, 1) ** -0.5)

    a = quantize(normal(f, rank), factors) if rank else {}
    b = quantize(normal(rank, d), factors) if rank else {}
    q = quantize_lowbit(normal(f, d), bits) if bits else {}
    thresholds = np.float32(threshold) - random.standard_normal(f, np.float32) * np.float32(0.3)
    unit = random.random(f, np.float32) + np.float32(0.5)
    return LayerPredictor(rank, "q4" if factors == "q4" else "q8", bits, a, b, q, thresholds, unit, relu)


def bound_of(*formats: WeightFormat, exact: float = 2e-6) -> float:
    """How far an FFN may be off: float32, or with activations of 16 bits in groups of 32."""
    return 2e-4 if any(map(takes_integers, formats)) else exact


class Bench:
    """A model of one layer on a device, with a few rows of input."""

    def __init__(
        self,
        device: Any,
        config: ModelConfig,
        formats: dict[str, WeightFormat] | WeightFormat,
        rows: int = ROWS,
        splits: Sequence[LayerSplit] = (),
    ) -> None:
        names = [spec.name for spec in tensor_specs(config) if spec.matrix]
        formats = dict.fromkeys(names, formats) if isinstance(formats, str) else formats
        formats = {**formats, "embedding": "f32", "lm_head": "f32", "position_embedding": "f32"}
        arrays, self.exact = stored(config, formats)
        self.device, self.config, self.rows = device, config, rows
        self.model: Model = build_model(device, config, arrays, formats, 16, splits)
        self.orders = [layer.order for layer in self.model.layers]
        self.work: Workspace = allocate_workspace(device, Sizes.of(config, rows, 16))
        self.x = np.random.default_rng(1).standard_normal((rows, config.hidden_size)).astype(np.float32)
        padded = np.zeros((rows, self.work.sizes.hidden), np.float32)
        padded[:, : config.hidden_size] = self.x
        self.source = device.upload(padded)

    def set_bias(self, bias: list[float]) -> None:
        self.device.write(self.work.sparsity_bias, np.array(bias, np.float32))

    def run(self, predictor: LayerPredictor | None) -> NDArray[np.float32]:
        """The FFN of all rows, (rows, hidden), with the bias of down."""
        placed = None
        if predictor is not None:
            placed = place_predictor(self.device, self.config, Predictor((predictor,), {}), self.orders)[0]
        parts = sparse_ffn(self.device, self.model, self.work, 0, placed, self.source, self.rows)
        partial = self.device.download(self.work.partial)[: self.rows * parts * self.work.sizes.hidden]
        total = partial.reshape(self.rows, parts, -1).sum(1)[:, : self.config.hidden_size]
        return total + self.exact.get("down.bias", np.float32(0))

    def lists(self) -> list[NDArray[np.int32]]:
        """The listed neurons of each row."""
        neurons = self.device.download(self.work.neurons).reshape(self.rows, -1)
        lengths = self.device.download(self.work.lengths)
        return [neurons[r, : lengths[r]] for r in range(self.rows)]

    def counts(self) -> list[int]:
        """Predicted, active and all neurons of all rows."""
        counts: list[int] = self.device.download(self.work.counts).reshape(-1, 3).sum(0).tolist()
        return counts


@pytest.mark.parametrize(
    ("rank", "bits", "factors", "relu"),
    [
        (40, 0, "q8", False),
        (70, 2, "q8", False),
        (16, 1, "q8", False),
        (40, 0, "q4", False),
        (16, 2, "q4", False),
        (33, 1, "q4", False),
        (0, 1, "q8", False),
        (0, 2, "q8", False),
        (0, 0, "q8", False),
        (150, 0, "q8", True),
        (130, 2, "q4", True),
    ],
)
def test_scores_and_lists_are_the_definitions(
    device: Any, rank: int, bits: int, factors: WeightFormat, relu: bool
) -> None:
    bench, layer = Bench(device, CONFIG, "f16"), layer_predictor(CONFIG, rank, bits, factors, relu)
    bias = [0.0, 0.4]
    bench.set_bias(bias)
    placed = place_predictor(device, CONFIG, Predictor((layer,), {}), bench.orders)[0]
    score_rows(device, bench.model, bench.work, bench.model.layers[0], placed, bench.work.counts, bench.source, ROWS)
    found = device.download(bench.work.scores).reshape(ROWS, -1)[:, : CONFIG.ffn_size]
    expected = np.stack([scores(layer, bench.x[r : r + 1], bias[r])[0] for r in range(ROWS)])
    # Sums in another order may move a hidden value by one step of its rounding.
    assert np.abs(found - expected).max() < 1e-4 and np.median(np.abs(found - expected)) < 1e-6

    predicted = bench.lists()
    for row, listed in enumerate(predicted):
        np.testing.assert_array_equal(listed, np.flatnonzero(expected[row] > 0))
        assert 0 < len(listed) < CONFIG.ffn_size

    bench.run(layer)  # which lists those that are active too
    gates = activate("relu", bench.x @ bench.exact["gate"].T + bench.exact["gate.bias"])
    for row, listed in enumerate(bench.lists()):
        np.testing.assert_array_equal(listed, predicted[row][gates[row, predicted[row]] > 0])


def listed_by_scores(device: Any, values: NDArray[np.float32], size: int) -> tuple[NDArray[np.int32], Any, Any, Any]:
    """Lists (rows, stride), lengths, counts and tickets from scores that thresholds alone make, by two launches."""
    rows, stride = values.shape
    blocks, words = -(-size // SCORE_ROWS), stride // 32
    nothing, half = device.zeros(4, np.uint32), device.zeros(4, np.float16)
    masks, tickets = device.upload(np.full(rows * words, 0xFFFFFFFF, np.uint32)), device.zeros(rows, np.int32)
    neurons, lengths = device.zeros(rows * stride, np.int32), device.zeros(rows, np.int32)
    counts, scores = device.zeros(3, np.int64), device.zeros(rows * stride, np.float32)
    for row in range(rows):  # thresholds are shared by rows: one launch each
        part = slice(row * stride, (row + 1) * stride)
        device.launch(
            score_kernel("", 0), (blocks, 1), SCORE_THREADS, nothing, half, half, nothing.view(np.float32),
            nothing, half, device.upload(values[row]), device.zeros(stride, np.float32), nothing, nothing,
            nothing.view(np.float32), scores[part], masks[row * words : (row + 1) * words], tickets[row : row + 1],
            neurons[part], lengths[row : row + 1], counts, tickets, nothing.view(np.float32), 1, size, 0, 0, 0, 0,
            stride, words,
        )  # fmt: skip
    return device.download(neurons).reshape(rows, stride), *map(device.download, (lengths, counts, tickets))


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1023, 1025, 2500])
def test_lists_of_any_length_are_in_order(device: Any, size: int) -> None:
    stride = 2560
    values = np.random.default_rng(size).standard_normal((2, stride)).astype(np.float32)
    values[1] = np.abs(values[1])
    values[:, size // 2] = [np.nan, 0.0]
    for order in (nullcontext(), simulator.backwards() if SIMULATED else nullcontext()):  # whichever block is the last
        with order:
            found, lengths, counts, tickets = listed_by_scores(device, values, size)
        for row in range(2):
            expected = np.flatnonzero(values[row, :size] > 0)
            assert lengths[row] == len(expected)
            np.testing.assert_array_equal(found[row, : lengths[row]], expected)
        assert counts.tolist() == [lengths.sum(), 0, 2 * size]
        assert not tickets.any()


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_ffn_agrees_with_the_reference(device: Any, name: str) -> None:
    config = ZOO[name]
    bench, layer = Bench(device, config, "f16"), layer_predictor(config, 40, 2)
    bias = np.array([-0.2, 0.3], np.float32)
    bench.set_bias(bias.tolist())
    expected_counts = np.zeros(3, np.int64)
    expected = reference_ffn(config, bench.exact, bench.x, layer, bias[:, None], expected_counts)
    assert relative_error(bench.run(layer), expected) < 2e-6
    assert bench.counts() == expected_counts.tolist()


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_every_format_agrees_with_the_reference(device: Any, weight_format: WeightFormat) -> None:
    bench, layer = Bench(device, CONFIG, weight_format), layer_predictor(CONFIG, 40, 0)
    expected = reference_ffn(CONFIG, bench.exact, bench.x, layer, np.float32(0))
    assert relative_error(bench.run(layer), expected) < bound_of(weight_format)


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_rows_longer_than_a_warp_reads_at_once(device: Any, weight_format: WeightFormat) -> None:
    config = replace(CONFIG, hidden_size=130 * kernels_of(weight_format).chunk_columns, ffn_size=9)
    bench, layer = Bench(device, config, weight_format, rows=1), layer_predictor(config, 5, 1)
    expected = reference_ffn(config, bench.exact, bench.x, layer, np.float32(0))
    assert relative_error(bench.run(layer), expected) < bound_of(weight_format, exact=5e-6)


def test_warps_take_listed_neurons_in_turns(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, layer = Bench(device, CONFIG, "f16"), layer_predictor(CONFIG, 40, 0)
    expected = bench.run(layer)
    monkeypatch.setattr(sparse, "MOST_GATHER_BLOCKS", 2)
    np.testing.assert_array_equal(bench.run(layer), expected)


def test_gate_and_up_of_different_formats(device: Any) -> None:
    bench = Bench(
        device, CONFIG, {"q": "f16", "k": "f16", "v": "f16", "o": "f16", "gate": "q4", "up": "q6", "down_T": "q8"}
    )
    layer = layer_predictor(CONFIG, 40, 0)
    expected = reference_ffn(CONFIG, bench.exact, bench.x, layer, np.float32(0))
    assert relative_error(bench.run(layer), expected) < bound_of("q4")


@pytest.mark.parametrize("name", ["llama_relu_biases", "bamboo", "opt", "prosparse", "bitnet"])
def test_with_every_neuron_listed_sparse_equals_dense(device: Any, name: str) -> None:
    config = ZOO[name]
    bench = Bench(device, config, "f16")
    expected = ffn(config, bench.exact, bench.x)
    thresholds_at_minus_infinity = bench.run(layer_predictor(config, 8, 0, threshold=-np.inf))
    assert relative_error(thresholds_at_minus_infinity, expected) < 2e-6
    # Lists of all and of the active ones are cut into other parts, which are added in another order.
    assert relative_error(bench.run(None), thresholds_at_minus_infinity) < 2e-6
    predicted, active, total = bench.counts()
    assert predicted == total == 2 * ROWS * config.ffn_size > active > 0


def test_neurons_outside_the_lists_contribute_nothing(device: Any) -> None:
    layer = layer_predictor(CONFIG, 40, 0)
    bench = Bench(device, CONFIG, "f32")
    expected = bench.run(layer)
    listed = np.unique(np.concatenate(bench.lists()))
    outside = np.setdiff1d(np.arange(CONFIG.ffn_size), listed)
    assert len(outside)
    for matrix in (bench.model.layers[0].gate, bench.model.layers[0].up, bench.model.layers[0].down):
        assert matrix is not None
        words = device.download(matrix.words).reshape(CONFIG.ffn_size, -1)
        words[outside] = np.float32(np.nan).view(np.uint32)
        device.write(matrix.words, words.reshape(-1))
    np.testing.assert_array_equal(bench.run(layer), expected)


def test_rows_of_down_and_up_are_not_read_where_the_gate_is_zero(device: Any) -> None:
    bench = Bench(device, CONFIG, "f32", rows=1)
    expected = bench.run(None)
    gate = activate("relu", bench.x @ bench.exact["gate"].T + bench.exact["gate.bias"])
    inactive = np.flatnonzero(gate[0] == 0)
    assert len(inactive)
    for matrix in (bench.model.layers[0].up, bench.model.layers[0].down):
        words = device.download(matrix.words).reshape(CONFIG.ffn_size, -1)
        words[inactive] = np.float32(np.nan).view(np.uint32)
        device.write(matrix.words, words.reshape(-1))
    np.testing.assert_array_equal(bench.run(None), expected)


def test_an_empty_list_gives_the_bias_alone(device: Any) -> None:
    bench = Bench(device, CONFIG, "q8")
    found = bench.run(layer_predictor(CONFIG, 8, 1, threshold=np.inf))
    np.testing.assert_array_equal(found, np.broadcast_to(bench.exact["down.bias"], found.shape))
    assert bench.counts() == [0, 0, ROWS * CONFIG.ffn_size]


def test_what_a_row_gets_does_not_depend_on_the_others(device: Any) -> None:
    """But for the number of parts, which rows share."""
    layer = layer_predictor(CONFIG, 40, 2)
    together, alone = Bench(device, CONFIG, "f16"), Bench(device, CONFIG, "f16", rows=1)
    found, single = together.run(layer), alone.run(layer)
    np.testing.assert_array_equal(together.lists()[0], alone.lists()[0])
    assert relative_error(found[:1], single) < 1e-6


@pytest.mark.skipif(not SIMULATED, reason="a GPU chooses its own order")
def test_the_order_of_threads_and_blocks_changes_no_bit(device: Any) -> None:
    layer = layer_predictor(CONFIG, 40, 2)
    bench = Bench(device, CONFIG, "q8")
    found = bench.run(layer)
    lists, counts = bench.lists(), bench.counts()
    bench = Bench(device, CONFIG, "q8")
    with simulator.backwards():
        np.testing.assert_array_equal(bench.run(layer), found)
    assert bench.counts() == counts
    for one, other in zip(bench.lists(), lists, strict=True):
        np.testing.assert_array_equal(one, other)
