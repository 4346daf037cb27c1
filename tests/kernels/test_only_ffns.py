"""FFNs without the rest of a step: what they give is what the reference gives, and they are counted like a step's."""

from __future__ import annotations

import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, relative_error, stored, zoo
from random_predictors import make_predictor
from test_cpu import executors

from svdengine.kernels.reference import ffn, sparse_ffn


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize(
    "name", ["llama_relu_biases", "minicpm", "opt", "qwen2", "arcee", "gemma3", "bitnet", "bitnet_silu"]
)
def test_the_sum_of_all_ffns_agrees_with_the_reference(name: str, path: str) -> None:
    config = zoo()[name]
    if path == "sparse" and not config.sparse_ffn:
        pytest.skip("not of the ReLU family")
    weights = stored(config, "f32")[2]
    predictor = make_predictor(config, 24, 0, -0.02) if path == "sparse" else None
    with executors(config, "f32") as (cpu, _):
        if predictor is not None:
            cpu.predictor, cpu.ffn = predictor, "sparse"
        batch = make_batch([(random_tokens(config, 5), 0)], [block_table(5)])
        inputs, logits = cpu.ffn_inputs(batch), cpu.forward(batch).copy()
        cpu.reset_neuron_counts()
        alone = np.concatenate([cpu.run_ffns(inputs[:, row, None]).copy() for row in range(5)])
        once = cpu.neuron_counts()
        together = cpu.run_ffns(inputs).copy()
        twice = cpu.neuron_counts()
        np.testing.assert_array_equal(cpu.run_ffns(inputs[:, 3:4]), alone[3:4])
        np.testing.assert_array_equal(cpu.forward(batch), logits)
    expected, counts = np.zeros_like(alone), np.zeros(3, np.int64)
    for layer, x in enumerate(inputs):
        of_layer = {n: w[layer] for n, w in weights.items() if n.startswith(("gate", "up", "down", "ffn_sub_norm"))}
        if predictor is None:
            expected += ffn(config, of_layer, x)
        else:
            expected += sparse_ffn(config, of_layer, x, predictor.layers[layer], np.float32(0), counts)
    expected *= np.float32(config.residual_scale)
    assert relative_error(alone, expected) < 1e-5
    assert relative_error(together, expected) < 1e-5
    assert (once.predicted, once.active, once.total) == tuple(counts)
    assert (twice.predicted, twice.active, twice.total) == tuple(2 * counts)


def test_a_sparsity_bias_leaves_neurons_out() -> None:
    config = zoo()["llama_relu_biases"]
    with executors(config, "q8") as (cpu, _):
        cpu.predictor, cpu.ffn = make_predictor(config, 24, 0, -0.02), "sparse"
        cpu.run_ffns(np.ones((1, config.hidden_size), np.float32), sparsity_bias=50.0)
        assert cpu.neuron_counts().total > cpu.neuron_counts().predicted == 0


def test_inputs_of_another_shape_are_refused() -> None:
    config = zoo()["llama_relu_biases"]
    with executors(config, "q8") as (cpu, _):
        for shape in (
            (1, config.hidden_size + 1),
            (0, config.hidden_size),
            (cpu.max_batch_rows + 1, config.hidden_size),
        ):
            with pytest.raises(ValueError, match="inputs of shape"):
                cpu.run_ffns(np.zeros(shape, np.float32))
        with pytest.raises(ValueError, match="layers of FFNs, inputs of 1"):
            cpu.run_ffns(np.zeros((1, 1, config.hidden_size), np.float32))
