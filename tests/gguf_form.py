"""What llama.cpp's converter makes of a model, whatever its FFN: settings of a GGUF file, and the rows of q and k."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig


def converter_permute(w: NDArray, heads: int) -> NDArray:
    """What convert_hf_to_gguf.py does to the rows of q and k of Llama-like models."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def common_fields(config: ModelConfig) -> dict[str, Any]:
    """Settings that every architecture has, without the architecture's name before them."""
    assert config.rope is not None
    return {
        "block_count": config.layer_count,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.head_count,
        "attention.head_count_kv": config.kv_head_count,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(np.float32(config.norm_eps)),
        "rope.freq_base": config.rope.theta,
    }


def named(architecture: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a file of this architecture."""
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in fields.items()}
