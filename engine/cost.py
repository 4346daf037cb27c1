"""What a token costs in memory traffic: the bytes of weights and of KV cache that decoding one token reads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import tensor_specs

if TYPE_CHECKING:
    from svdengine.model_file import ModelFile

_SUFFIXES = ("", ".scale", ".min", ".row")
_LOOKUPS = ("embedding", "position_embedding")  # one row a token is read of them


def weight_bytes(model_file: ModelFile) -> int:
    """Bytes of weights that one decoded token reads when the FFN is dense.

    A tied embedding is the output projection too and is read whole.
    """
    total = 0
    for spec in tensor_specs(model_file.config):
        size = stored_bytes(model_file, spec.name)
        whole = spec.name not in _LOOKUPS or (spec.name == "embedding" and model_file.config.tied_embeddings)
        total += size if whole else size // spec.shape[0]
    return total


def sparse_weight_bytes(
    model_file: ModelFile, predictor: Predictor | None, predicted_density: float, active_density: float
) -> float:
    """Bytes of weights that one decoded token reads when the FFN is sparse, for shares of neurons between 0 and 1.

    The gate's row is read of every predicted neuron, the others' only of those that prove active. Without a predictor
    `predicted_density` is 1: all gates are read.
    """
    gate = stored_bytes(model_file, "gate" if model_file.config.gated else "up")
    rest = ffn_bytes(model_file) - gate
    small = weight_bytes(model_file) - gate - rest + (predictor_bytes(predictor) if predictor is not None else 0)
    return small + predicted_density * gate + active_density * rest


def ffn_bytes(model_file: ModelFile) -> int:
    """Bytes of the matrices of all FFNs."""
    return sum(stored_bytes(model_file, name) for name in ("gate", "up", "down_T", "down"))


def predictor_bytes(predictor: Predictor) -> int:
    """Bytes that the scores of one token read, in all layers."""
    return sum(layer_predictor_bytes(layer) for layer in predictor.layers)


def layer_predictor_bytes(layer: LayerPredictor) -> int:
    """Bytes that the scores of one token read in one layer."""
    parts = [*layer.a.values(), *layer.b.values(), *layer.q.values(), layer.bias]
    return sum(part.nbytes for part in parts)


def stored_bytes(model_file: ModelFile, name: str) -> int:
    """Bytes of a canonical tensor with its scales, in all layers."""
    parts = (model_file.arrays.get(name + suffix) for suffix in _SUFFIXES)
    return sum(array.nbytes for array in parts if array is not None)


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str = "f16") -> int:
    """Bytes of keys and values that one token adds to the KV cache."""
    return 2 * config.layer_count * config.kv_head_count * config.head_dim * (2 if kv_dtype == "f16" else 4)


def kv_pool_bytes_per_token(config: ModelConfig, kv_dtype: str = "f16") -> int:
    """Bytes that a token takes in the KV pool of any executor, at most: a head's vectors are padded to 16 items."""
    return kv_bytes_per_token(replace(config, head_dim=-(-config.head_dim // 16) * 16), kv_dtype)


def kv_read_bytes(config: ModelConfig, context: float, kv_dtype: str = "f16") -> float:
    """Bytes of KV cache that decoding one token reads when `context` tokens are cached; a sliding window reads less."""
    layer = kv_bytes_per_token(config, kv_dtype) / config.layer_count
    windowed = len(config.sliding_window_layers) if config.sliding_window else 0
    return layer * (
        (config.layer_count - windowed) * context + windowed * min(context, config.sliding_window or context)
    )


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, as people count them."""
    return sum(math.prod(spec.shape) for spec in tensor_specs(config))
