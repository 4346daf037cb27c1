"""How many kernels a decode step launches: each costs the time between two of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from svdengine.kernels.executor import FfnPath
from svdengine.kernels.formats import WeightFormat
from svdengine.tools.planned_kernels import step_launches
from svdengine.tools.random_model import shape_config


def of_a_layer(activation: str, dtype: WeightFormat, path: FfnPath, rows: int = 1) -> list[str]:
    """The kernels of one layer of Llama-2-7B's shape, whose context is long enough to be split."""
    config = shape_config("llama2-7b", 1, activation)
    one, two = (
        Counter(
            launch.kernel.name
            for launch in step_launches(
                replace(config, layer_count=layers), dtype, context=512, rank=256, path=path, rows=rows
            )
        )
        for layers in (1, 2)
    )
    return sorted((two - one).elements())


def test_a_sparse_layer() -> None:
    assert of_a_layer("relu", "f16", "predict") == [
        "add_parts_then_normalize",
        "attention_128_1x1_f16",
        "down_f16",
        "heads_f16_f16",
        "join",
        "normed_f16",
        "predicted_q8_0_f16",
        "project_q8",
    ]


@pytest.mark.parametrize(
    ("activation", "dtype", "path", "rows", "expected"),
    [
        ("relu", "f16", "predict", 1, 8),  # 11 before
        ("relu", "q8", "predict", 1, 8),
        ("relu", "q4", "predict", 1, 8),
        ("relu", "f16", "dense", 1, 7),  # 11 before
        ("relu", "q8", "dense", 1, 7),
        ("silu", "f16", "dense", 1, 6),  # 10 before
        ("silu", "q8", "dense", 1, 6),
        ("silu", "q4", "dense", 1, 6),
        ("relu", "f16", "predict", 4, 10),  # several rows are read rounded, in f16 too
        ("relu", "f16", "dense", 4, 11),
        ("silu", "q8", "dense", 4, 11),
    ],
)
def test_launches_of_a_layer(activation: str, dtype: WeightFormat, path: FfnPath, rows: int, expected: int) -> None:
    found = of_a_layer(activation, dtype, path, rows)
    assert len(found) == expected, found


@pytest.mark.parametrize(
    ("shape", "activation", "dtype", "path", "rows", "expected"),
    [
        ("mixtral-8x7b", "silu", "f16", "dense", 1, 7),  # as a dense layer, and the router
        ("mixtral-8x7b", "silu", "q4", "dense", 1, 7),
        ("smallthinker-4b", "relu", "q8", "dense", 1, 8),
        ("smallthinker-4b", "relu", "q8", "predict", 1, 9),
        ("mixtral-8x7b", "silu", "q8", "dense", 4, 16),
        ("smallthinker-4b", "relu", "q8", "predict", 4, 12),
    ],
)
def test_launches_of_a_layer_of_experts(
    shape: str, activation: str, dtype: WeightFormat, path: FfnPath, rows: int, expected: int
) -> None:
    config = replace(shape_config(shape, 1, activation), hidden_size=128, ffn_size=64, vocab_size=320)
    one, two = (
        Counter(
            launch.kernel.name
            for launch in step_launches(
                replace(config, layer_count=layers), dtype, context=512, rank=32, path=path, rows=rows
            )
        )
        for layers in (1, 2)
    )
    assert (two - one).total() == expected, sorted((two - one).elements())
