"""Mixtures of experts on CUDA against the reference: every router, odd sizes, rows that share experts and do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from expert_zoo import expert_zoo
from test_executor import BOUND, INTEGER_BOUND, check, small, small_blocks

from svdengine.kernels.cuda.intrinsics import SIMULATED
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


@pytest.mark.parametrize("name", ZOO)
def test_float32_agrees_with_the_reference(device: Any, name: str) -> None:
    check(device, ZOO[name], [3, 1, 1, 1])
