"""SmallThinker (4B-A0.6B, 21B-A3B): experts with ReLU, chosen by what enters a layer, before its attention.

In the larger one, every fourth layer sees everything and has no rotary embedding; the others have both a window and a
rotary embedding (arXiv:2507.20984).
"""

from __future__ import annotations

from typing import Any

from svdengine.models.config import ModelConfig
from svdengine.models.experts import gating, with_experts, with_stacked_experts
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config, integer, layer_count, shown, window_size

_EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}."
_EVERY_NTH_IS_FULL = 4  # in a GGUF file, which does not say so


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a SmallThinker config.json."""
    _refuse_variants(settings)
    activation = settings.get("hidden_act", "relu")  # which published settings do not name
    if activation != "relu":
        raise ValueError(f"a SmallThinker model has the activation relu, found {shown(activation)}")
    count = integer(settings, "moe_num_primary_experts", default=32)
    rotated, slides = _layout(settings, "rope_layout", 1), _layout(settings, "sliding_window_layout", 0)
    sliding = tuple(layer for layer, on in enumerate(slides) if on)
    window = window_size(settings, "sliding_window_size")
    for copy in ("sliding_window", "sliding_window_pattern"):  # for another program
        settings.get(copy)
    if sliding and not window:
        raise ValueError(
            "sliding_window_layout names layers with a sliding window, and there is no sliding_window_size"
        )
    softmax = flag(settings, "moe_primary_router_apply_softmax", False)
    return gated_config(
        "smallthinker",
        settings,
        ffn_size=integer(settings, "moe_ffn_hidden_size", default=768),
        activation="relu",
        activation_threshold=0.0,
        tied_embeddings=flag(settings, "tie_word_embeddings", True),
        expert_count=count,
        active_experts=integer(settings, "moe_num_active_primary_experts", default=4),
        router="topk_softmax" if softmax else "sigmoid",
        early_router=True,
        unrotated_layers=tuple(layer for layer, on in enumerate(rotated) if not on),
        sliding_window=window if sliding else 0,
        sliding_window_layers=sliding,
    )


def _refuse_variants(settings: Settings) -> None:
    """Raise ValueError for what earlier configs could ask for, and no published model does."""
    if not flag(settings, "moe_enable_early_router", True):
        raise ValueError("moe_enable_early_router is false: a router after the attention is not supported")
    if 0 in _layout(settings, "moe_layer_layout", 1):
        raise ValueError("moe_layer_layout names layers without experts, which are not supported in this family")


def _layout(settings: Settings, key: str, default: int) -> list[int]:
    """A number of 0 or 1 for each layer."""
    count = layer_count(settings)
    found = settings.get(key)
    layout = [default] * count if found is None else found
    if not isinstance(layout, list) or len(layout) != count or not all(on in (0, 1) for on in layout):
        raise ValueError(f"{key} must be a list of {count} numbers of 0 or 1, found {shown(found)}")
    return layout


def _gguf_fields(fields: Settings, _: object) -> dict[str, Any]:
    """llama.cpp knows which layers have a window by their number; without one, all turn."""
    layers = range(layer_count(fields, "block_count"))
    common: dict[str, Any] = {"activation": "relu", "early_router": True, "router": gating(fields)}
    window = window_size(fields, "attention.sliding_window")
    if not window:
        return common
    full = tuple(layer for layer in layers if layer % _EVERY_NTH_IS_FULL == 0)
    sliding = tuple(layer for layer in layers if layer not in full)
    windows = {"sliding_window": window, "sliding_window_layers": sliding} if sliding else {}
    return {**common, "unrotated_layers": full, "sliding_window": 0, "sliding_window_layers": (), **windows}


FAMILY = Family(
    name="smallthinker",
    model_types=("smallthinker",),
    architectures=("SmallThinkerForCausalLM",),
    config_from_hf=config_from_hf,
    hf=with_experts(
        LLAMA_NAMES,
        "layers.{layer}.block_sparse_moe.primary_router",
        **{name: _EXPERT + name for name in ("gate", "up", "down")},
    ),
    gguf=GgufFamily("smallthinker", with_stacked_experts(GGUF_HALF_SPLIT), _gguf_fields, router="sigmoid"),
    # What a layer without experts would have, and what was measured of the zeros.
    harmless=("dense_ffn_hidden_size", "profile_sparsity", "moe_secondary_expert_size"),
    experts=True,
)
