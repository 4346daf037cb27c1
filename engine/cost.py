"""What a token costs in memory traffic: the bytes of weights and of KV cache that decoding one token reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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
        stored = (model_file.arrays.get(spec.name + suffix) for suffix in _SUFFIXES)
        size = sum(array.nbytes for array in stored if array is not None)
        whole = spec.name not in _LOOKUPS or (spec.name == "embedding" and model_file.config.tied_embeddings)
        total += size if whole else size // spec.shape[0]
    return total


def kv_bytes_per_token(config: ModelConfig, kv_dtype: str = "f16") -> int:
    """Bytes of keys and values that one token adds to the KV cache."""
    return 2 * config.layer_count * config.kv_head_count * config.head_dim * (2 if kv_dtype == "f16" else 4)


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
