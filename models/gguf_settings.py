"""Reading the metadata of a GGUF file (gguf's constants.py names the keys)."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig, Rope
from svdengine.models.experts import gguf_expert_fields
from svdengine.models.family import GgufFamily
from svdengine.models.noted import Noted
from svdengine.models.settings import (
    Settings,
    activation_fields,
    integer,
    layer_count,
    number,
    window_size,
    yarn_magnitude,
)

ROPE_FACTORS = "rope_freqs.weight"  # tensor: what Llama 3.1's scaling divides the frequencies by, (head_dim / 2,)
_FACTOR_TOLERANCE = 1e-3
# Without the architecture: that of config.json, and that of llama.cpp, which nearly no file has.
_KEYS_OF_ACTIVATION = frozenset({"hidden_act", "hidden_activation"})


def strip_architecture(metadata: Mapping[str, object], architecture: str) -> dict[str, Any]:
    """The metadata of the architecture, without the prefix of its keys, and as plain values.

    An array of one value a layer becomes that value. Raises ValueError when layers differ.
    """
    prefix = f"{architecture}."
    return {key[len(prefix) :]: _one(key, value) for key, value in metadata.items() if key.startswith(prefix)}


def _one(key: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        if not value:
            return []
        if any(item != value[0] for item in value):
            raise ValueError(f"{key} differs between layers, which is not supported: {value[:8]}")
        value = value[0]
    # Stored as float32; its shortest decimal form is what the model's authors wrote.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def gguf_config(
    family: str,
    kind: GgufFamily,
    fields: Noted,
    tensor_names: Container[str],
    vocab_size: int,
    rope_factors: NDArray[np.float32] | None,
) -> ModelConfig:
    """The config that stripped `fields` and the presence of tensors describe. Raises ValueError on what is missing."""
    _refuse(fields, tensor_names)
    hidden, heads = integer(fields, "embedding_length"), integer(fields, "attention.head_count")
    head_dim = integer(fields, "attention.key_length", default=hidden // heads)
    if integer(fields, "attention.value_length", default=head_dim) != head_dim:
        raise ValueError("models whose keys and values have different sizes are not supported")
    layers = layer_count(fields, "block_count")
    window = window_size(fields, "attention.sliding_window")
    slides = 0 < window < integer(fields, "context_length", default=2048)
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "layer_count": layers,
        "head_count": heads,
        "kv_head_count": integer(fields, "attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "ffn_size": integer(fields, "feed_forward_length"),
        "max_position": integer(fields, "context_length", default=2048),
        "norm": "rms",
        "norm_eps": number(fields, "attention.layer_norm_rms_epsilon", default=1e-5),
        "gated": True,
        "rope": _rope(fields, head_dim, tensor_names, rope_factors, kind.partial_rotary),
        "qkv_bias": "blk.0.attn_q.bias" in tensor_names,
        "output_bias": "blk.0.attn_output.bias" in tensor_names,
        "ffn_bias": "blk.0.ffn_up.bias" in tensor_names,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensor_names,
        "sliding_window": window if slides else 0,
        "sliding_window_layers": tuple(range(layers)) if slides else (),
        "tied_embeddings": "output.weight" not in tensor_names,
        "activation": "silu",
    }
    chosen = activation_fields(fields, *sorted(_KEYS_OF_ACTIVATION)) if _KEYS_OF_ACTIVATION & set(fields) else {}
    experts = gguf_expert_fields(fields, kind.router) if kind.router is not None else {}
    return ModelConfig(family=family, **common | experts | kind.fields(fields, tensor_names) | chosen)


def _refuse(fields: Settings, tensor_names: Container[str]) -> None:
    if "attention.sliding_window_pattern" in fields:
        raise ValueError("a sliding window in some of the layers of a GGUF file is not supported")
    if "output.bias" in tensor_names:
        raise ValueError("a bias of the output projection is not supported (tensor output.bias)")


def _rope(
    fields: Noted,
    head_dim: int,
    tensor_names: Container[str],
    factors: NDArray[np.float32] | None,
    partial: bool,
) -> Rope:
    rotated = integer(fields, "rope.dimension_count", default=head_dim)
    if rotated != head_dim and not partial:
        raise ValueError(f"partial rotary embedding is not supported ({rotated} of {head_dim} dimensions)")
    return replace(_scaled_rope(fields, head_dim, tensor_names, factors), rotated=0 if rotated == head_dim else rotated)


def _scaled_rope(
    fields: Noted, head_dim: int, tensor_names: Container[str], factors: NDArray[np.float32] | None
) -> Rope:
    theta = number(fields, "rope.freq_base", default=10000.0)
    kind = fields.get("rope.scaling.type", "linear" if "rope.scale_linear" in fields else "none")
    factor = number(fields, "rope.scaling.factor", "rope.scale_linear", default=1.0)
    off = kind == "none" or (kind == "linear" and factor == 1.0)
    if kind == "none":
        fields.note("rope.scaling.")  # numbers of a scaling that is switched off
    if ROPE_FACTORS in tensor_names:
        if factors is None:
            raise ValueError(f"the values of {ROPE_FACTORS} are needed to know the rope scaling")
        if not off:
            raise ValueError(f"rope scaling {kind!r} together with {ROPE_FACTORS} is not supported")
        return rope_from_factors(theta, head_dim, factors)
    if off:
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor=factor)
    if kind == "yarn":
        context = integer(fields, "context_length", default=2048)
        attention = number(fields, "rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor", default=1.0)
        return Rope(
            theta,
            "yarn",
            factor=factor,
            original_max_position=integer(fields, "rope.scaling.original_context_length", default=context),
            beta_fast=number(fields, "rope.scaling.yarn_beta_fast", default=32.0),
            beta_slow=number(fields, "rope.scaling.yarn_beta_slow", default=1.0),
            attention_factor=attention * yarn_magnitude(factor),
        )
    raise ValueError(f"rope scaling {kind!r} is not supported; supported: none, linear, yarn")


def rope_from_factors(theta: float, head_dim: int, factors: NDArray[np.float32]) -> Rope:
    """Llama 3.1's scaling, recovered from the divisors of the frequencies (head_dim / 2,) that it leads to.

    Of the share of a frequency that is kept, (turns - low) / (high - low), only the slope and the offset over the
    frequency can be seen: low_freq_factor is set to 1, and high_freq_factor and the original context follow. Raises
    ValueError for factors that no such scaling gives.
    """
    divisors = np.asarray(factors, np.float64).reshape(-1)
    if divisors.shape != (head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() < 1 - 1e-6:
        raise ValueError(f"{ROPE_FACTORS} must hold {head_dim // 2} numbers from 1 up")
    factor = float(divisors.max())
    if factor <= 1 + 1e-6:
        return Rope(theta)
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)  # a token
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-6) & (kept < 1 - 1e-6)
    if between.sum() >= 2:
        slope, offset = np.polyfit(turns[between], kept[between], 1)
        if slope > 0 > offset:
            found = Rope(
                theta,
                "llama3",
                factor=round(factor, 4),
                original_max_position=round(-slope / offset),
                high_freq_factor=round(1 - 1 / offset, 4),
            )
            expected = np.clip((turns * found.original_max_position - 1) / (found.high_freq_factor - 1), 0, 1)
            if np.abs(expected - kept).max() < _FACTOR_TOLERANCE:
                return found
    raise ValueError(f"the scaling in {ROPE_FACTORS} is not that of Llama 3.1; convert from the original checkpoint")
