"""Losses, likeliest tokens and divergences of logits against plain float64, and logits from hidden states."""

from pathlib import Path

import numpy as np
import pytest
from model_zoo import random_tokens, random_weights, zoo

from svdengine.converters.logit_rows import LogitRows
from svdengine.converters.output_head import read_output_head
from svdengine.converters.statistics import window_batches
from svdengine.errors import ConversionError
from svdengine.files.model_file import read_model_file
from svdengine.files.model_writer import ModelWriter
from svdengine.kernels.reference import ReferenceExecutor, float32_weights
from svdengine.models.tensors import tensor_specs

RANDOM = np.random.default_rng(0)
DENSE, SPARSE = (RANDOM.normal(0, 4, (21, 300)).astype(np.float32) for _ in range(2))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    found: np.ndarray = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    return found


def test_rows_are_those_of_a_plain_softmax() -> None:
    rows, plain, targets = LogitRows.of(DENSE), log_softmax(DENSE), RANDOM.integers(0, 300, 21)
    np.testing.assert_allclose(rows.losses(targets), -plain[np.arange(21), targets], rtol=1e-5)
    np.testing.assert_array_equal(rows.choice, DENSE.argmax(1))
    likely = rows.likeliest(7)
    np.testing.assert_array_equal(np.sort(likely, 1), np.sort(np.argsort(DENSE, 1)[:, -7:], 1))
    np.testing.assert_allclose(rows.log_probabilities(likely), np.take_along_axis(plain, likely, 1), rtol=1e-4)
    assert rows.likeliest(1000).shape == DENSE.shape


def test_divergences_are_those_of_the_distributions() -> None:
    p, q = log_softmax(DENSE), log_softmax(SPARSE)
    found = LogitRows.of(DENSE).divergences(LogitRows.of(SPARSE))
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(1), rtol=1e-4)
    assert np.abs(LogitRows.of(DENSE).divergences(LogitRows.of(DENSE.copy()))).max() == 0


def test_small_divergences_of_a_large_vocabulary_are_right() -> None:
    """As of a model and itself with a predictor; whatever is added to all logits of a row changes nothing."""
    dense = RANDOM.normal(20, 4, (5, 50_000)).astype(np.float32)
    noise, shift = RANDOM.normal(0, 0.003, dense.shape), np.array([[0.0], [3.0], [-40.0], [0.001], [200.0]])
    sparse = (dense + noise + shift).astype(np.float32)
    p, q = log_softmax(dense), log_softmax(sparse - shift)
    found = LogitRows.of(dense).divergences(LogitRows.of(sparse))
    np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(1), rtol=0.1, atol=2e-7)


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(damage: float) -> None:
    logits = DENSE.copy()
    logits[3, 5] = damage
    with pytest.raises(ConversionError, match="not finite"):
        LogitRows.of(logits).losses(np.zeros(21, np.int64))


@pytest.mark.parametrize("name", ["llama_relu_tied", "minicpm", "opt"])
def test_a_head_makes_the_logits_of_a_step_from_its_hidden_states(name: str, tmp_path: Path) -> None:
    """Tied embeddings, a head of its own, and logits that are scaled."""
    config = zoo()[name]
    weights = random_weights(config, 0)
    with ModelWriter(tmp_path / "model.svdp", config, "q8") as writer:
        for spec in tensor_specs(config):
            for layer in range(config.layer_count if spec.stacked else 1):
                writer.write(spec.name, weights[spec.name][layer] if spec.stacked else weights[spec.name], layer)
    with read_model_file(tmp_path / "model.svdp") as file:
        executor = ReferenceExecutor(config, float32_weights(config, file.arrays, file.formats), block_count=8)
        (batch,) = window_batches(random_tokens(config, 30, 0), executor, logits=True)
        logits, head = executor.forward(batch), read_output_head(file)
        assert head is not None
        np.testing.assert_allclose(head.logits(executor.hidden_states()), logits, rtol=1e-4, atol=1e-4)
