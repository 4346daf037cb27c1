"""A model whose FFN lies partly in host memory gives what it gives otherwise, and reads rows where they lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from model_zoo import random_tokens, relative_error, run_in_chunks, stored, zoo
from numpy.typing import NDArray
from test_executor import BOUND, INTEGER_BOUND, MODELS, RELU, executors, small_blocks, use_the_library_from
from test_memory_split import calibrated
from test_sparse import Bench, bound_of, layer_predictor

from svdengine.kernels import base_executor
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.cuda.device import SimulatedDevice
from svdengine.kernels.cuda.executor import CudaExecutor
from svdengine.kernels.cuda.half_copies import copy_items
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.memory_split import RESERVE, LayerSplit
from svdengine.kernels.cuda.workspace import Sizes
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.kernels.predictor import LayerPredictor
from svdengine.kernels.reference import ffn
from svdengine.kernels.reference import sparse_ffn as reference_ffn
from svdengine.models import ModelConfig

__all__ = ["small_blocks"]  # a fixture that is in use for every test of a file that has it


CONFIG = replace(zoo()["llama_relu_biases"], layer_count=1, ffn_size=45)
HOT = 20


def split_of(config: ModelConfig, hot: int) -> tuple[LayerSplit, ...]:
    """Neurons in no particular order."""
    return (LayerSplit(np.random.default_rng(3).permutation(config.ffn_size), hot),)


def check_sparse(
    device: Any, config: ModelConfig, weight_format: WeightFormat | dict[str, WeightFormat], hot: int
) -> None:
    """The neurons that a predictor names, and what they give, are those of the reference."""
    bench = Bench(device, config, weight_format, splits=split_of(config, hot))
    layer, bias = layer_predictor(config, 40, 2), np.array([-0.2, 0.3], np.float32)
    bench.set_bias(bias.tolist())
    counts = np.zeros(3, np.int64)
    expected = reference_ffn(config, bench.exact, bench.x, layer, bias[:, None], counts)
    formats = [weight_format] if isinstance(weight_format, str) else weight_format.values()
    assert relative_error(bench.run(layer), expected) < bound_of(*formats)
    assert bench.counts() == counts.tolist()


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_every_format_is_read_from_both_places(device: Any, weight_format: WeightFormat) -> None:
    check_sparse(device, CONFIG, weight_format, HOT)


@pytest.mark.parametrize("hot", [0, CONFIG.ffn_size - 1, CONFIG.ffn_size])
def test_any_number_of_neurons_may_be_hot(device: Any, hot: int) -> None:
    check_sparse(device, CONFIG, "q8", hot)


def test_a_gate_alone_and_an_up_of_another_format_are_split_too(device: Any) -> None:
    check_sparse(device, replace(zoo()["opt"], layer_count=1, ffn_size=45), "f16", 20)
    formats: dict[str, WeightFormat] = {"q": "f16", "k": "f16", "v": "f16", "o": "f16"}
    check_sparse(device, CONFIG, {**formats, "gate": "q4", "up": "bf16", "down_T": "q8"}, HOT)


def test_rows_in_host_memory_are_read_only_where_they_are_needed(device: Any) -> None:
    bench = Bench(device, CONFIG, "f32", rows=1, splits=split_of(CONFIG, HOT))
    expected = ffn(CONFIG, bench.exact, bench.x)
    gate, up, down = bench.model.layers[0].gate, bench.model.layers[0].up, bench.model.layers[0].down
    assert gate is not None and gate.hot == up.hot == down.hot == HOT
    order = bench.orders[0]
    assert order is not None
    gates = bench.x @ bench.exact["gate"].T + bench.exact["gate.bias"]
    inactive = gates[0, order[HOT:]] <= 0
    assert inactive.any() and not inactive.all()
    for matrix in (up, down):
        matrix.cold.reshape(CONFIG.ffn_size - HOT, -1)[inactive] = np.float32(np.nan).view(np.uint32)
    assert relative_error(bench.run(None), expected) < 2e-6
    down.cold[:] = np.float32(np.nan).view(np.uint32)
    assert np.isnan(bench.run(None)).all()


def split_memory(device: SimulatedDevice, setup: ExecutorSetup, share: float) -> int:
    """The bytes on the device with which an executor leaves a share of the FFN's rows in host memory."""
    whole = CudaExecutor(setup, device=SimulatedDevice(has_blas=device.has_blas)).memory
    rows = sum(setup.arrays[name].nbytes for name in ("gate", "up", "down_T", "down") if name in setup.arrays)
    sizes = Sizes.of(setup.config, setup.max_batch_rows, 16)
    # Of matrices that are split the library needs copies, which it may not need of others.
    copies = [sum(copy_items(setup.config, setup.formats, sizes, split)) for split in (False, True)]
    more = 2 * (copies[1] - copies[0]) if device.has_blas else 0
    return whole.device + RESERVE + more - int(share * rows)


def setup_of(config: ModelConfig, weight_format: WeightFormat = "f32", **options: Any) -> ExecutorSetup:
    arrays, formats, _ = stored(config, weight_format)
    return ExecutorSetup(config, arrays, formats, block_count=8, max_batch_rows=40, kv_dtype="f32", **options)


def check(
    device: Any, config: ModelConfig, sizes: list[int], weight_format: WeightFormat = "f32", bound: float = BOUND,
    share: float = 0.5, **options: Any,
) -> None:  # fmt: skip
    """Logits of a split model, whose prompt is cut into chunks, agree with the reference's."""
    tokens = random_tokens(config, sum(sizes))
    memory = split_memory(device, setup_of(config, weight_format, **options), share)
    with executors(device, config, weight_format, gpu_memory=memory, **options) as (cuda, reference):
        assert 0 < cuda.memory.host == device.pinned
        assert relative_error(run_in_chunks(cuda, tokens, sizes), run_in_chunks(reference, tokens, sizes)) < bound
        if cuda.ffn == "sparse":
            assert cuda.neuron_counts() == reference.neuron_counts()


@pytest.fixture
def simulated(device: Any) -> SimulatedDevice:
    if not isinstance(device, SimulatedDevice):
        pytest.skip("the simulator's memory is set here")
    return device


# With down as rows of neurons or of outputs, biases, a norm of its own, and no gate.
@pytest.mark.parametrize("name", ["llama", "llama_relu_biases", "opt", "bamboo"])
def test_the_dense_path_agrees_with_the_reference(simulated: SimulatedDevice, name: str) -> None:
    check(simulated, MODELS[name], [3, 1, 1])


@pytest.mark.parametrize("weight_format", ["q6", "q4"])
def test_formats_with_scales_agree_on_the_dense_path(simulated: SimulatedDevice, weight_format: WeightFormat) -> None:
    check(simulated, RELU, [2, 1], weight_format, INTEGER_BOUND)


@pytest.mark.parametrize("name", ["llama", "llama_relu_tied"])
@pytest.mark.parametrize("weight_format", ["f32", "q6"])
def test_the_library_multiplies_a_copy(monkeypatch: pytest.MonkeyPatch, name: str, weight_format: WeightFormat) -> None:
    if not SIMULATED:
        pytest.skip("the simulator's memory is set here")
    use_the_library_from(2, monkeypatch)
    check(SimulatedDevice(has_blas=True), MODELS[name], [3], weight_format, 3e-3, share=0.9)


def test_predicted_neurons_are_those_of_the_reference(simulated: SimulatedDevice) -> None:
    config = replace(RELU, layer_count=2)
    check(simulated, config, [1, 1, 1], share=0.6, predictor=shifted(config), ffn="sparse")


def shifted(config: ModelConfig) -> Any:
    """A predictor with frequencies, which calls about half of the neurons active."""
    found = calibrated(config)
    return replace(found, layers=tuple(replace(p, threshold=np.full_like(p.threshold, -0.05)) for p in found.layers))


def test_frequent_neurons_lie_on_the_device(simulated: SimulatedDevice) -> None:
    predictor = calibrated(RELU)
    setup = setup_of(RELU, predictor=predictor)
    cuda = CudaExecutor(setup, device=simulated, gpu_memory=split_memory(simulated, setup, 0.5))
    frequency = frequency_of(predictor.layers[0])
    (split,), up = cuda.memory.splits, cuda._state.model.layers[0].up
    assert frequency[split.order[: split.hot]].min() >= frequency[split.order[split.hot :]].max()
    held = np.concatenate([up.words, up.cold]).view(np.float32).reshape(RELU.ffn_size, -1)
    np.testing.assert_array_equal(held, setup.arrays["up"][0][split.order])


def frequency_of(layer: LayerPredictor) -> NDArray[np.float16]:
    assert layer.frequency is not None
    return layer.frequency


def test_times_are_measured_on_all_layers(simulated: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    config, asked = replace(RELU, layer_count=3), []
    setup = setup_of(config, predictor=calibrated(config))
    cuda = CudaExecutor(setup, device=simulated, gpu_memory=split_memory(simulated, setup, 0.5))
    monkeypatch.setattr(base_executor, "measure_ffn_times", lambda *arguments, **_: asked.append(arguments[-1]))
    _ = cuda.ffn_times
    assert asked == [3]
