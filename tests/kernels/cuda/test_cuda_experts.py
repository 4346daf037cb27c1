"""Mixtures of experts on CUDA against the reference: every router, odd sizes, rows that share experts and do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expert_zoo import expert_zoo
from model_zoo import MIXED, random_tokens, relative_error, run_in_chunks
from random_predictors import make_predictor
from test_executor import BOUND, INTEGER_BOUND, check, executors, small, small_blocks

from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.formats import WeightFormat
from svdengine.kernels.predictor import Predictor
from svdengine.models import ModelConfig

__all__ = ["small_blocks"]  # a fixture


def small_mixture(config: ModelConfig) -> ModelConfig:
    """The same kind of mixture with a few dozen weights a matrix."""
    layers = 2 if config.dense_layers or config.sliding_window else 1
    dense = tuple(i for i in config.dense_layers if i < layers)
    few = replace(config, layer_count=layers, dense_layers=dense, dense_blocks=config.dense_blocks if dense else 0)
    unrotated = tuple(i for i in config.unrotated_layers if i < layers)
    windows = (1,) if config.sliding_window else ()
    made = replace(small(replace(few, sliding_window=0, sliding_window_layers=())), layer_count=layers)
    return replace(
        made, unrotated_layers=unrotated, sliding_window=3 if windows else 0, sliding_window_layers=windows
    )


ZOO = {name: small_mixture(config) if SIMULATED else config for name, config in expert_zoo().items()}
FEW = {name: replace(config, layer_count=1, dense_layers=(), dense_blocks=0) for name, config in ZOO.items()}


@pytest.mark.parametrize("name", ZOO)
def test_float32_agrees_with_the_reference(device: Any, name: str) -> None:
    check(device, ZOO[name], [3, 1, 1, 1])


@pytest.mark.parametrize("name", ["mixtral", "relu_dense"])
@pytest.mark.parametrize("weight_format", ["f16", "q8", "q4"])
def test_every_kind_of_format_agrees_with_its_dequantised_weights(
    device: Any, name: str, weight_format: WeightFormat
) -> None:
    check(device, FEW[name], [3, 1], INTEGER_BOUND, weight_format=weight_format)


@pytest.mark.parametrize("name", ["mixtral", "relu_dense"])
def test_gates_and_ups_may_have_several_formats(device: Any, name: str) -> None:
    check(device, FEW[name], [2, 1], INTEGER_BOUND, weight_format="q4", others={**MIXED, "up": "f32"})


def mixed_predictor(config: ModelConfig, threshold: float = -0.05) -> Predictor:
    """Experts with predictors of several ranks and bits, and some that calibration hardly reached."""
    made = [make_predictor(config, rank, bits, threshold).layers for rank, bits in ((4, 2), (7, 1), (3, 0), (0, 0))]
    return Predictor(tuple(made[i % 4][i] for i in range(config.ffn_blocks)), {"kind": "test"})


@pytest.mark.parametrize("name", ["mixtral_drelu", "relu_dense", "shared"])
def test_a_predictor_of_each_expert_lists_its_neurons(device: Any, name: str) -> None:
    config = ZOO[name]
    tokens = random_tokens(config, 6)
    with executors(device, config, predictor=mixed_predictor(config), ffn="sparse") as (cuda, reference):
        expected = run_in_chunks(reference, tokens, [3, 1, 1, 1])
        assert relative_error(run_in_chunks(cuda, tokens, [3, 1, 1, 1]), expected) < BOUND
        np.testing.assert_array_equal(cuda.layer_counts(), reference.layer_counts())
        assert 0 < cuda.neuron_counts().active < cuda.neuron_counts().predicted < cuda.neuron_counts().total
