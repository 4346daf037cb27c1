"""Low-bit formats, scores against a plain computation, files of arrays, and the sparse FFN of the reference."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import block_table, make_batch, random_tokens, random_weights, relative_error, zoo

from svdengine.kernels.batch import Batch
from svdengine.kernels.formats import dequantize, quantize
from svdengine.kernels.lowbit import dequantize_lowbit, quantize_lowbit
from svdengine.kernels.predictor import (
    LayerPredictor,
    Predictor,
    describe,
    layer_arrays,
    predictor_from_arrays,
    scores,
)
from svdengine.kernels.reference import ReferenceExecutor, ffn, sparse_ffn
from svdengine.models.config import ModelConfig

SPARSE = sorted(name for name, config in zoo().items() if config.sparse_ffn)


def layer_predictor(
    f: int, d: int, rank: int = 8, bits: int = 2, seed: int = 0, factors: str = "q8", relu: bool = False
) -> LayerPredictor:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    a = quantize(normal(f, rank), factors) if rank else {}  # type: ignore[arg-type]
    b = quantize(normal(rank, d) * 0.1, factors) if rank else {}  # type: ignore[arg-type]
    q = quantize_lowbit(normal(f, d) * 0.1, bits) if bits else {}
    return LayerPredictor(rank, factors, bits, a, b, q, normal(f), np.abs(normal(f)) + 0.5, relu)  # type: ignore[arg-type]


def predictor_for(config: ModelConfig, shift: float = 0.0) -> Predictor:
    layers = [layer_predictor(config.ffn_size, config.hidden_size, seed=i) for i in range(config.layer_count)]
    return Predictor(tuple(replace(p, threshold=p.threshold + np.float32(shift)) for p in layers), {"kind": "test"})


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 200), bits=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_lowbit_is_close_and_of_the_right_size(rows: int, columns: int, bits: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    parts = quantize_lowbit(matrix, bits)
    padded = -(-columns // 64) * 64
    assert parts[""].shape == (rows, padded * bits // 8) and parts[".scale"].shape == (rows, padded // 64)
    found = dequantize_lowbit(parts, bits, columns)
    assert found.shape == matrix.shape and np.isfinite(found).all()
    assert np.square(found - matrix).sum() <= np.square(matrix).sum()
    best = np.square(found - matrix).sum()
    for factor in (0.8, 1.25):  # no other scale is better for the same codes
        other = {**parts, ".scale": (parts[".scale"] * np.float16(factor)).astype(np.float16)}
        assert best <= np.square(dequantize_lowbit(other, bits, columns) - matrix).sum() * 1.001


@pytest.mark.parametrize("bits", [1, 2])
def test_padding_changes_nothing(bits: int) -> None:
    matrix = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    wide = np.concatenate([matrix, matrix[:, :1]], 1)
    whole = dequantize_lowbit(quantize_lowbit(wide, bits), bits, 65)
    np.testing.assert_array_equal(whole[:, :64], dequantize_lowbit(quantize_lowbit(matrix, bits), bits, 64))
    np.testing.assert_allclose(whole[:, 64], matrix[:, 0], rtol=2e-3)
    assert not dequantize_lowbit(quantize_lowbit(np.zeros((2, 70), np.float32), bits), bits, 70).any()


@pytest.mark.parametrize(("rank", "bits"), [(8, 0), (70, 0), (0, 1), (0, 2), (16, 2)])
@pytest.mark.parametrize("factors", ["q8", "q4"])
def test_scores_are_the_plain_sum(rank: int, bits: int, factors: str) -> None:
    layer = layer_predictor(33, 90, rank, bits, factors=factors)
    x = np.random.default_rng(5).standard_normal((7, 90)).astype(np.float32)
    plain = -(layer.threshold + np.float32(0.5) * layer.unit)
    if rank:
        plain = plain + x @ (dequantize(layer.a, factors, rank) @ dequantize(layer.b, factors, 90)).T  # type: ignore[arg-type]
    if bits:
        plain = plain + x @ dequantize_lowbit(layer.q, bits, 90).T
    assert relative_error(scores(layer, x, 0.5), plain) < 0.02


@pytest.mark.parametrize("factors", ["q8", "q4"])
def test_scores_of_a_hidden_layer_are_those_of_a_network(factors: str) -> None:
    layer = layer_predictor(33, 90, 120, 0, factors=factors, relu=True)  # wider than its input
    x = np.random.default_rng(5).standard_normal((7, 90)).astype(np.float32)
    hidden = np.maximum(x @ dequantize(layer.b, factors, 90).T, 0)  # type: ignore[arg-type]
    plain = hidden @ dequantize(layer.a, factors, 120).T - layer.threshold - np.float32(0.5) * layer.unit  # type: ignore[arg-type]
    assert relative_error(scores(layer, x, 0.5), plain) < 0.02
    assert relative_error(scores(replace(layer, relu=False), x, 0.5), plain) > 0.3


def test_a_hidden_layer_is_described_and_a_file_that_does_not_say_has_none() -> None:
    predictor = Predictor((layer_predictor(33, 20, 30, 0, relu=True), layer_predictor(33, 20, 8, 0)), {})
    arrays = {name: a for i, layer in enumerate(predictor.layers) for name, a in layer_arrays(i, layer).items()}
    described = json.loads(describe(predictor))
    assert [layer.get("relu") for layer in described["layers"]] == [True, None]
    found = predictor_from_arrays(arrays, describe(predictor), 2, 33, 20)
    assert [layer.relu for layer in found.layers] == [True, False]
    x = np.random.default_rng(5).standard_normal((3, 20)).astype(np.float32)
    np.testing.assert_array_equal(scores(found.layers[0], x), scores(predictor.layers[0], x))
    for change, message in (
        ({"relu": 1}, "relu must be true or false, found 1"),
        ({"relu": False}, r"rank must lie in 0\.\.20, found 30"),
        ({"rank": 34}, r"rank must lie in 1\.\.33, found 34"),
        ({"rank": 0}, r"rank must lie in 1\.\.33, found 0"),
    ):
        layers = [{**described["layers"][0], **change}, described["layers"][1]]
        with pytest.raises(ValueError, match=message):
            predictor_from_arrays(arrays, json.dumps({"layers": layers}), 2, 33, 20)


def test_arrays_and_description_rebuild_the_predictor() -> None:
    config = zoo()["llama_relu_tied"]
    predictor = predictor_for(config)
    arrays = {name: a for i, layer in enumerate(predictor.layers) for name, a in layer_arrays(i, layer).items()}
    sizes = config.layer_count, config.ffn_size, config.hidden_size
    found = predictor_from_arrays(arrays, describe(predictor), *sizes)
    x = np.ones((2, config.hidden_size), np.float32)
    np.testing.assert_array_equal(scores(found.layers[1], x), scores(predictor.layers[1], x))
    assert found.about["kind"] == "test"
    with pytest.raises(ValueError, match=r"predictor\.1\.unit: found nothing"):
        predictor_from_arrays({k: v for k, v in arrays.items() if k != "predictor.1.unit"}, describe(found), *sizes)
    with pytest.raises(ValueError, match=r"unexpected predictor tensor predictor\.9"):
        predictor_from_arrays({**arrays, "predictor.9": arrays["predictor.0.unit"]}, describe(found), *sizes)
    with pytest.raises(ValueError, match="does not describe 3 layers"):
        predictor_from_arrays(arrays, describe(predictor), 3, *sizes[1:])


def test_thresholds_of_earlier_files_have_the_other_sign() -> None:
    layers = layer_predictor(33, 20), layer_predictor(33, 20, seed=1)
    predictor = Predictor(layers, {})
    arrays = {name: a for i, layer in enumerate(layers) for name, a in layer_arrays(i, layer).items()}
    both = {**arrays, "predictor.1.bias": -layers[1].threshold}
    earlier = {name: a for name, a in both.items() if name != "predictor.1.threshold"}
    found = predictor_from_arrays(earlier, describe(predictor), 2, 33, 20)
    for one, other in zip(found.layers, layers, strict=True):
        np.testing.assert_array_equal(one.threshold, other.threshold)
    with pytest.raises(ValueError, match=r"found both predictor\.1\.threshold and predictor\.1\.bias"):
        predictor_from_arrays(both, describe(predictor), 2, 33, 20)
    neither = {name: a for name, a in earlier.items() if name != "predictor.1.bias"}
    with pytest.raises(ValueError, match=r"found neither predictor\.1\.threshold nor predictor\.1\.bias"):
        predictor_from_arrays(neither, describe(predictor), 2, 33, 20)
    with pytest.raises(ValueError, match=r"predictor\.1\.bias: found float32 \(32,\), expected F32 \(33,\)"):
        predictor_from_arrays({**earlier, "predictor.1.bias": np.zeros(32, np.float32)}, describe(predictor), 2, 33, 20)


def test_frequencies_are_optional_in_a_file() -> None:
    layers = (
        replace(layer_predictor(33, 20), frequency=np.linspace(0, 1, 33, dtype=np.float16)),
        layer_predictor(33, 20),
    )
    predictor = Predictor(layers, {})
    arrays = {name: a for i, layer in enumerate(layers) for name, a in layer_arrays(i, layer).items()}
    found = predictor_from_arrays(arrays, describe(predictor), 2, 33, 20)
    np.testing.assert_array_equal(found.layers[0].frequency, layers[0].frequency)
    assert found.layers[1].frequency is None
    with pytest.raises(ValueError, match=r"predictor\.1\.frequency: found float16 \(32,\)"):
        extra = {"predictor.1.frequency": np.zeros(32, np.float16)}
        predictor_from_arrays({**arrays, **extra}, describe(predictor), 2, 33, 20)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_is_dense_when_everything_is_predicted(name: str) -> None:
    config = zoo()[name]
    batch = make_batch([(random_tokens(config, 21), 0)], [block_table(21)])
    weights = random_weights(config)
    dense = ReferenceExecutor(config, weights).forward(batch)
    everything = ReferenceExecutor(config, weights, predictor=predictor_for(config, -np.inf), ffn="sparse")
    assert relative_error(everything.forward(batch), dense) < 1e-5
    some = ReferenceExecutor(config, weights, predictor=predictor_for(config), ffn="sparse")
    assert relative_error(some.forward(batch), dense) > 1e-3
    biased = Batch(**{**vars(batch), "sparsity_bias": np.array([-1e9], np.float32)})
    assert relative_error(some.forward(biased), dense) < 1e-5


@pytest.mark.parametrize("name", SPARSE)
def test_neurons_that_are_not_predicted_contribute_nothing(name: str) -> None:
    config = zoo()[name]
    weights = {key: a[0] for key, a in random_weights(config).items() if a.shape[0] == config.layer_count}
    layer = predictor_for(config).layers[0]
    x = np.random.default_rng(3).standard_normal((1, config.hidden_size)).astype(np.float32)
    out = scores(layer, x)[0] <= 0
    assert 0 < out.sum() < len(out)
    expected = sparse_ffn(config, weights, x, layer, np.float32(0))
    # A norm before down counts what its rows of zeros would not show.
    silenced = "up" if config.sub_norms else "down_T"
    zeroed = {**weights, silenced: np.where(out[:, None], 0, weights[silenced])}
    np.testing.assert_allclose(expected, ffn(config, zeroed, x), atol=1e-5)
    broken = {**weights, "up": np.where(out[:, None], np.float32(np.nan), weights["up"])}
    np.testing.assert_array_equal(sparse_ffn(config, broken, x, layer, np.float32(0)), expected)


def test_each_sequence_has_its_own_bias() -> None:
    config = zoo()["llama_relu_tied"]
    tokens, tables = random_tokens(config, 9), [[0], [1]]
    executor = ReferenceExecutor(config, random_weights(config), predictor=predictor_for(config), ffn="sparse")
    both = make_batch([(tokens, 0), (tokens, 0)], tables)
    found = executor.forward(Batch(**{**vars(both), "sparsity_bias": np.array([0.0, 0.7], np.float32)}))
    for bias, rows in ((0.0, found[:9]), (0.7, found[9:])):
        alone = Batch(**{**vars(make_batch([(tokens, 0)], [[0]])), "sparsity_bias": np.array([bias], np.float32)})
        assert relative_error(rows, executor.forward(alone)) < 1e-5
    assert relative_error(found[:9], found[9:]) > 1e-3


def test_ffn_inputs_are_what_the_ffn_read_and_leave_no_trace() -> None:
    config = zoo()["falcon_7b_relu"]
    batch = make_batch([(random_tokens(config, 9), 0)], [[0]])
    executor = ReferenceExecutor(config, random_weights(config), predictor=predictor_for(config), ffn="sparse")
    before = executor.forward(batch)
    x = executor.ffn_inputs(batch)
    assert x.shape == (config.layer_count, 9, config.hidden_size) and executor.ffn == "sparse"
    np.testing.assert_array_equal(executor.forward(batch), before)


def test_sparse_without_a_predictor_is_refused() -> None:
    config = zoo()["llama_relu_tied"]
    executor = ReferenceExecutor(config, random_weights(config), ffn="sparse")
    with pytest.raises(ValueError, match="needs a predictor"):
        executor.forward(make_batch([([1], 0)], [[0]]))
