"""Predictors of a layer's experts as one: scores stay, and what is said where they cannot be written alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from expert_zoo import expert_zoo
from random_predictors import make_network, make_predictor

from svdengine.errors import DeviceError
from svdengine.kernels.cuda.joined_predictors import joined, joined_bytes, joined_layers
from svdengine.kernels.cuda.memory_split import split_mixture
from svdengine.kernels.formats import Parts
from svdengine.kernels.predictor import LayerPredictor, Predictor, layer_arrays, scores

CONFIG = replace(expert_zoo()["relu_dense"], hidden_size=90)


def block_of(layer: LayerPredictor, index: int, f: int) -> LayerPredictor:
    """One block of what is joined."""

    def rows(parts: Parts, count: int) -> Parts:
        return {suffix: part[index * count : (index + 1) * count] for suffix, part in parts.items()}

    part = slice(index * f, (index + 1) * f)
    return replace(
        layer, a=rows(layer.a, f), b=rows(layer.b, layer.rank), q=rows(layer.q, f),
        threshold=layer.threshold[part], unit=layer.unit[part],
    )  # fmt: skip


@pytest.mark.parametrize("factors", ["q8", "q4"])
def test_scores_stay_what_they_were(factors: str) -> None:
    shapes = ((40, 2), (70, 1), (9, 0), (0, 0), (0, 1))
    made = [make_predictor(CONFIG, rank, bits, 0.1 * rank, factors).layers for rank, bits in shapes]  # type: ignore[arg-type]
    blocks = tuple(made[i % len(made)][i] for i in range(CONFIG.ffn_blocks))
    x = np.random.default_rng(0).standard_normal((3, CONFIG.hidden_size), np.float32)
    found = joined_layers(CONFIG, Predictor(blocks, {}))
    assert len(found) == CONFIG.layer_count
    for index, layer in enumerate(found):
        own = CONFIG.blocks_of(index)
        for k, block in enumerate(own):
            expected = scores(blocks[block], x, 0.3)
            np.testing.assert_allclose(scores(block_of(layer, k, CONFIG.ffn_size), x, 0.3), expected, atol=1e-4)
    taken = sum(array.nbytes for i, layer in enumerate(found) for array in layer_arrays(i, layer).values())
    assert taken == joined_bytes(CONFIG, Predictor(blocks, {}))


def test_a_model_without_experts_has_its_own() -> None:
    config = replace(CONFIG, expert_count=0, active_experts=0, dense_layers=(), dense_blocks=0)
    predictor = make_predictor(config, 8, 2, 0.0)
    assert joined_layers(config, predictor) is predictor.layers


def test_experts_of_two_kinds_of_factors_are_refused() -> None:
    one, two = (make_predictor(CONFIG, 8, 0, 0.0, factors).layers[0] for factors in ("q8", "q4"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="factors of 2 kinds, q4 without ReLU and q8 without ReLU; expected one"):
        joined([one, two], CONFIG.hidden_size)
    network = make_network(CONFIG, 8, 0.0).layers[0]
    with pytest.raises(ValueError, match="q8 with ReLU and q8 without ReLU"):
        joined([one, network], CONFIG.hidden_size)
    with pytest.raises(DeviceError, match="layer 0 of the predictor: its experts"):
        joined_layers(CONFIG, Predictor((one, two) * CONFIG.ffn_blocks, {}))
    nothing = make_predictor(CONFIG, 0, 0, -1.0).layers[0]
    assert joined([nothing, network], CONFIG.hidden_size).relu


def test_experts_of_the_first_layers_lie_on_the_gpu() -> None:
    rows = 1000 * CONFIG.ffn_blocks  # five blocks in layers 0 and 2, and two in layer 1
    for room, expected in (
        (4999, (0, 0, 0)),
        (5000, (1, 0, 0)),
        (7000, (1, 1, 0)),
        (11999, (1, 1, 0)),
        (12000, (1, 1, 1)),
    ):
        splits = split_mixture(CONFIG, rows, room)
        assert tuple(split.hot // CONFIG.ffn_size for split in splits) == expected
