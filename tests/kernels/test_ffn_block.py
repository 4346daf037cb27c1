"""The FFNs by themselves: what they give is what the reference gives, and they are counted like a step's."""

from __future__ import annotations

import numpy as np
import pytest
from model_zoo import block_table, make_batch, random_tokens, relative_error, zoo
from test_cpu import executors, stored
from test_cpu_sparse import make_predictor

from svdengine.kernels.cpu.ffn_block import FfnBlocks
from svdengine.kernels.reference import ffn, sparse_ffn


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["llama_relu_biases", "minicpm", "opt", "qwen2"])
def test_the_sum_of_all_ffns_agrees_with_the_reference(name: str, path: str) -> None:
    config = zoo()[name]
    if path == "sparse" and not config.sparse_ffn:
        pytest.skip("not of the ReLU family")
    weights = stored(config, "f32")[2]
    predictor = make_predictor(config, 24, 0, 0.02) if path == "sparse" else None
    with executors(config, "f32") as (cpu, _):
        if predictor is not None:
            cpu.predictor, cpu.ffn = predictor, "sparse"
        batch = make_batch([(random_tokens(config, 5), 0)], [block_table(5)])
        blocks = FfnBlocks(cpu, batch)
        try:
            found = np.stack([blocks.run(row).copy() for row in range(blocks.rows)])
            once = cpu.neuron_counts()
            inputs, logits = cpu.ffn_inputs(batch), cpu.forward(batch).copy()
            blocks.run(4)
            np.testing.assert_array_equal(blocks.run(0), found[0])
            np.testing.assert_array_equal(cpu.forward(batch), logits)
        finally:
            blocks.close()
    expected, counts = np.zeros_like(found), np.zeros(3, np.int64)
    for layer, x in enumerate(inputs):
        of_layer = {n: w[layer] for n, w in weights.items() if n.startswith(("gate", "up", "down"))}
        if predictor is None:
            expected += ffn(config, of_layer, x)
        else:
            expected += sparse_ffn(config, of_layer, x, predictor.layers[layer], np.float32(0), counts)
    assert relative_error(found, expected * np.float32(config.residual_scale)) < 1e-5
    assert (once.predicted, once.active, once.total) == tuple(counts)


def test_a_sparsity_bias_leaves_neurons_out() -> None:
    config = zoo()["llama_relu_biases"]
    with executors(config, "q8") as (cpu, _):
        cpu.predictor, cpu.ffn = make_predictor(config, 24, 0, 0.02), "sparse"
        blocks = FfnBlocks(cpu, make_batch([(random_tokens(config, 2), 0)], [block_table(2)]))
        try:
            blocks.run(1, bias=50.0)
        finally:
            blocks.close()
        assert cpu.neuron_counts().predicted == 0
