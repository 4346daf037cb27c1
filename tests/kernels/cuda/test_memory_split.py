"""Which neurons lie on the GPU: within the budget, the frequent ones first; and what is said where nothing helps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays
from model_zoo import stored, zoo
from numpy.typing import NDArray
from random_predictors import make_predictor

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.memory_split import RESERVE, MemorySplit, split_layers, split_memory
from svdengine.kernels.formats import WeightFormat
from svdengine.kernels.predictor import Predictor
from svdengine.models import ModelConfig

RELU = replace(zoo()["llama_relu_tied"], ffn_size=50, layer_count=3)
FREQUENCIES = numpy_arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(0, 1, width=16)
)
SIZES = {"cache": 1000, "buffers": 2000}


def calibrated(config: ModelConfig) -> Predictor:
    """A predictor whose neurons differ in how often they are predicted."""
    random, found = np.random.default_rng(0), make_predictor(config, 8, 0, 0.0)
    frequencies = random.random((config.layer_count, config.ffn_size)).astype(np.float16)
    return replace(found, layers=tuple(replace(p, frequency=f) for p, f in zip(found.layers, frequencies, strict=True)))


@given(FREQUENCIES, st.integers(0, 40))
def test_the_least_frequent_neurons_are_left_out(frequencies: np.ndarray, count: int) -> None:
    splits = split_layers(frequencies, count)
    assert sum(split.hot for split in splits) == min(count, frequencies.size)
    for split, row in zip(splits, frequencies, strict=True):
        assert sorted(split.order) == list(range(len(row)))
        assert np.all(np.diff(row[split.order]) <= 0)
    cold = [row[split.order[split.hot :]] for split, row in zip(splits, frequencies, strict=True)]
    least = np.sort(frequencies.reshape(-1))[: max(frequencies.size - count, 0)]
    np.testing.assert_array_equal(np.sort(np.concatenate(cold)), least)


@given(FREQUENCIES, st.integers(0, 39))
def test_more_memory_moves_no_neuron_out(frequencies: np.ndarray, count: int) -> None:
    fewer, more = split_layers(frequencies, count), split_layers(frequencies, count + 1)
    for a, b in zip(fewer, more, strict=True):
        assert a.hot <= b.hot
        np.testing.assert_array_equal(a.order, b.order)


def test_layers_share_alike_where_nothing_is_known() -> None:
    assert [split.hot for split in split_layers(np.zeros((3, 5), np.float32), 7)] == [3, 2, 2]


@cache
def arrays_of(config: ModelConfig, weight_format: WeightFormat) -> dict[str, NDArray]:
    """Stored arrays of a model."""
    found: dict[str, NDArray] = stored(config, weight_format)[0]
    return found


def split_of(
    config: ModelConfig, available: int, weight_format: WeightFormat = "q8", predictor: Predictor | None = None
) -> MemorySplit:
    return split_memory(config, arrays_of(config, weight_format), predictor, available=available, **SIZES)


# With rows of down that are neurons, without gates, and with rows that are outputs.
@pytest.mark.parametrize(
    ("name", "weight_format"), [("llama_relu_tied", "q8"), ("llama_relu_tied", "q6"), ("opt", "f32"), ("llama", "q4")]
)
def test_a_split_keeps_to_its_budget_and_uses_it(name: str, weight_format: WeightFormat) -> None:
    config = zoo()[name]
    predictor = calibrated(config) if config.sparse_ffn else None
    whole = split_of(config, 1 << 40, weight_format, predictor)
    assert whole.host == 0 and not whole.splits
    arrays = arrays_of(config, weight_format)
    rows = sum(arrays[n].nbytes for n in ("gate", "up", "down_T", "down") if n in arrays)
    largest = rows / (config.layer_count * config.ffn_size) + arrays["up"][0, 0].nbytes * 2 * config.layer_count
    for share in (0.0, 0.3, 0.99):
        available = whole.device + RESERVE - rows + int(share * rows)
        found = split_of(config, available, weight_format, predictor)
        assert found.device + RESERVE <= available < found.device + RESERVE + largest
        assert found.weights + found.host == whole.weights and found.host > 0
        assert f"{found.host / 2**30:.2f} GiB in host memory" in found.describe()
    with pytest.raises(
        DeviceError, match=r"0\.25 GiB on the GPU without any FFN rows .* 0\.00 GiB more than it may take"
    ):
        split_of(config, whole.device + RESERVE - rows - 1, weight_format, predictor)


def test_a_predictor_takes_memory_too() -> None:
    assert split_of(RELU, 1 << 40, predictor=calibrated(RELU)).weights > split_of(RELU, 1 << 40).weights


def test_what_the_driver_gives_and_no_array_fills_counts() -> None:
    config = replace(RELU, hidden_size=1024, ffn_size=1500, layer_count=1, vocab_size=32, head_count=8, kv_head_count=8)
    arrays = {"gate": np.zeros((1, 1500, 1024), np.int8), "gate.scale": np.zeros((1, 1500, 32), np.float16)}
    arrays |= {name.replace("gate", part): a for part in ("up", "down_T") for name, a in list(arrays.items())}
    arrays["q"] = np.zeros((1, 1100, 1024), np.int8)  # 1.07 MiB, of 2 that are given
    needed = sum(a.nbytes for a in arrays.values()) + sum(SIZES.values()) + RESERVE
    waste = (2 << 20) - arrays["q"].nbytes
    # Of the rows of gate, up and down any number may be on the GPU: they leave up to 2 MiB each.
    assert not split_memory(config, arrays, None, available=needed + waste + 3 * (2 << 20), **SIZES).splits
    assert split_memory(config, arrays, None, available=needed + waste + 2 * (2 << 20), **SIZES).splits


def test_what_does_not_fit_into_the_hosts_memory_is_refused() -> None:
    predictor = calibrated(RELU)
    available = split_of(RELU, 1 << 40, predictor=predictor).device + RESERVE - 5000
    with pytest.raises(DeviceError, match=r"GiB of weights do not fit into the GPU's memory, and the host's has 0\.00"):
        split_memory(RELU, arrays_of(RELU, "q8"), predictor, available=available, host_available=4999, **SIZES)
