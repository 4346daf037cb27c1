"""Gemma 3, text only: norms before and after attention and FFN, a window in most layers, and two rotary embeddings.

Of a model that sees images (4B and larger) the part that reads text is taken.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any, cast

from svdengine.models.config import ModelConfig, Rope
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES, norms_plus_one
from svdengine.models.settings import Settings, activation_fields, flag, gated_config, integer, number, rope
from svdengine.models.windows import every_nth_is_full

_EVERY_NTH_IS_FULL = 6
_LOCAL_THETA = 10000.0
_LAYERS_27B = 62  # whose scores have a scale of their own
# What a config.json may leave out, as transformers fills it in.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000.0,
}


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Gemma 3 config.json, of a model for text alone or for images too."""
    text = settings.get("text_config")
    if text is not None and not isinstance(text, Mapping):
        raise ValueError("text_config must be an object")
    return _text_config(_over(settings if text is None else text, _DEFAULTS))


def _text_config(settings: Settings) -> ModelConfig:
    bias = flag(settings, "attention_bias", False)
    windows = every_nth_is_full(settings, _EVERY_NTH_IS_FULL)
    full, local = _ropes(settings)
    scale = number(settings, "query_pre_attn_scalar")
    if scale <= 0:
        raise ValueError(f"query_pre_attn_scalar must be above 0, found {scale}")
    return gated_config(
        "gemma3",
        settings,
        **activation_fields(settings, "hidden_activation", "hidden_act", default="gelu_tanh"),
        rope=full,
        local_rope=local if windows else None,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        post_norms=True,
        embedding_scale=math.sqrt(integer(settings, "hidden_size")),
        score_scale=math.sqrt(integer(settings, "head_dim") / scale),
        tied_embeddings=flag(settings, "tie_word_embeddings", True),
        **windows,
    )


def _ropes(settings: Settings) -> tuple[Rope, Rope]:
    """Of the layers that see everything, and of those with a window, which have no scaling in older files."""
    parameters = settings.get("rope_parameters")
    full: Any = settings.get("rope_scaling") if parameters is None else parameters
    local: Any = {}
    if isinstance(parameters, Mapping) and any(name.endswith("_attention") for name in parameters):
        full, local = parameters.get("full_attention") or {}, parameters.get("sliding_attention") or {}
    theta = number(settings, "rope_local_base_freq", default=_LOCAL_THETA)
    of_full = {"rope_parameters": full, "rope_scaling": None}
    of_local = {"rope_parameters": local, "rope_scaling": None, "rope_theta": theta}
    return rope(_over(of_full, settings)), rope(_over(of_local, settings))


def _over(first: Settings, second: Settings) -> Settings:
    """Settings, and those of `second` where the first lacks them."""
    return ChainMap(cast(dict[str, Any], first), cast(dict[str, Any], second))


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    """llama.cpp knows by the number of layers which model it is, and which layers have a window."""
    layers, hidden = integer(fields, "block_count"), integer(fields, "embedding_length")
    heads = integer(fields, "attention.head_count")
    head_dim = integer(fields, "attention.key_length", default=hidden // heads)
    window = fields.get("attention.sliding_window")
    local = Rope(number(fields, "rope.freq_base_swa", default=_LOCAL_THETA))
    windows: dict[str, Any] = {"sliding_window": 0, "sliding_window_layers": ()}
    if window:
        sliding = tuple(layer for layer in range(layers) if (layer + 1) % _EVERY_NTH_IS_FULL)
        windows = {"sliding_window": integer(fields, "attention.sliding_window"), "sliding_window_layers": sliding}
    return {
        "activation": "gelu_tanh",
        "post_norms": True,
        "embedding_scale": math.sqrt(hidden),
        "score_scale": math.sqrt(head_dim / (hidden // heads)) if layers == _LAYERS_27B else 1.0,
        "local_rope": local if windows["sliding_window_layers"] else None,
        **windows,
    }


_NAMES = replace(
    LLAMA_NAMES,
    stems={
        **LLAMA_NAMES.stems,
        "attention_post_norm": ("layers.{layer}.post_attention_layernorm",),
        "ffn_norm": ("layers.{layer}.pre_feedforward_layernorm",),
        "ffn_post_norm": ("layers.{layer}.post_feedforward_layernorm",),
    },
    prefixes=("model.", "language_model.model.", "model.language_model.", "language_model.", ""),
    build=norms_plus_one,
)

FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    config_from_hf=config_from_hf,
    hf=_NAMES,
    gguf=GgufFamily("gemma3", GGUF_HALF_SPLIT, _gguf_fields),  # llama.cpp's converter has added 1 to the norms
    # How images are read, which is left out, and how transformers keeps keys and values.
    harmless=(
        *("vision_config", "mm_tokens_per_image", "cache_implementation"),
        *(f"{kind}_token_{suffix}" for kind in ("boi", "eoi", "image") for suffix in ("index", "id")),
    ),
)
