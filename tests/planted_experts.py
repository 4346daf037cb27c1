"""A planted mixture of experts with a tokenizer: what its experts do, and how often they are chosen, is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_model import SPECIALS, byte_level_json, tiny_config

from svdengine.files.model_file import read_model_file
from svdengine.files.model_writer import ModelWriter, StoredTokenizer
from svdengine.files.predictor_file import model_fingerprint, write_model_with_predictor
from svdengine.kernels.formats import GROUP, WeightFormat
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models.config import ModelConfig, Rope
from svdengine.models.tensors import place_of, tensor_specs
from svdengine.text.tokenizer_info import TokenizerInfo
from svdengine.tools.planted_model import PlantedWeights, Sparsity

ALWAYS, NEVER = 0, 5  # experts that every token and no token has
SPARSITY = Sparsity(rank=32, predicted=0.3, active=0.2)


def mixture(**changes: Any) -> ModelConfig:
    """Six experts, of which a token has two."""
    sizes = {"hidden_size": 128, "ffn_size": 192, "layer_count": 3, "head_count": 4, "kv_head_count": 2, "head_dim": 32}
    experts = {"expert_count": 6, "active_experts": 2, "router": "sigmoid", "early_router": True, "rope": Rope(1e4)}
    config = tiny_config(family="smallthinker", activation="relu", **sizes, **experts)
    return replace(config, **changes)


class Favourites(PlantedWeights):
    """Planted weights whose router always chooses one expert, and never another."""

    def tensor(self, name: str, layer: int = 0) -> NDArray[np.float32]:
        w = super().tensor(name, layer)
        if name == "router":
            w[ALWAYS, :GROUP], w[NEVER, :GROUP] = 9, -9
        return w


def exact_expert(config: ModelConfig) -> LayerPredictor:
    """Of an expert that calibration rarely reached."""
    always, nothing = np.full(config.ffn_size, -1, np.float32), np.zeros(config.ffn_size, np.float32)
    return LayerPredictor(0, "q8", 0, {}, {}, {}, always, nothing)


def write_mixture(
    path: Path,
    config: ModelConfig,
    weight_format: WeightFormat = "q8",
    sparsity: Sparsity = SPARSITY,
    *,
    exact: tuple[int, ...] = (),
    blind: tuple[int, ...] = (),
    predictor: bool = True,
) -> Path:
    """Write a model whose predictor leaves the experts `exact` out in each layer, and finds nothing in `blind` ones."""
    weights = Favourites(config, sparsity)
    info = TokenizerInfo("tokenizer.json", 0, 3, None, (3,), False, False, {t: i for i, t in enumerate(SPECIALS)})
    with ModelWriter(path, config, weight_format, StoredTokenizer(info, byte_level_json(), None)) as writer:
        for spec in tensor_specs(config):
            for index in range(spec.shape[0] if spec.stacked else 1):
                writer.write(spec.name, weights.tensor(spec.name, index), index)
    if not predictor:
        return path
    blocks = []
    for index in range(config.ffn_blocks):
        expert, block = place_of(config, "up", index).expert, weights.layer_predictor(index)
        if expert in exact:
            block = exact_expert(config)
        blocks.append(replace(block, threshold=block.threshold + 1e6) if expert in blind else block)
    with read_model_file(path) as file:
        about = {"kind": "svd", "thresholds": "planted", "fingerprint": model_fingerprint(file)}
        write_model_with_predictor(path, file, Predictor(tuple(blocks), about))
    return path
