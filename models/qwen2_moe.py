"""Qwen 1.5 and 2 with experts (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): each token also gets an FFN that all share."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.experts import (
    dense_layer_fields,
    expert_fields,
    shared_fields,
    with_experts,
    with_shared,
    with_stacked_experts,
)
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config, integer
from svdengine.models.windows import refuse_window

_EXPERT, _SHARED = "layers.{layer}.mlp.experts.{expert}.", "layers.{layer}.mlp.shared_expert."
_MATRICES = ("gate", "up", "down")


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Qwen 2 MoE config.json."""
    refuse_window(settings)
    size = integer(settings, "moe_intermediate_size", default=1408)
    return gated_config(
        "qwen2_moe",
        settings,
        ffn_size=size,
        qkv_bias=flag(settings, "qkv_bias", True),
        **expert_fields(settings),
        **shared_fields(settings, "shared_expert_intermediate_size", size, gate=True),
        **dense_layer_fields(settings, size),
    )


FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architectures=("Qwen2MoeForCausalLM",),
    config_from_hf=config_from_hf,
    hf=with_shared(
        with_experts(LLAMA_NAMES, "layers.{layer}.mlp.gate", **{name: f"{_EXPERT}{name}_proj" for name in _MATRICES}),
        "layers.{layer}.mlp.shared_expert_gate",
        **{name: f"{_SHARED}{name}_proj" for name in _MATRICES},
    ),
    gguf=GgufFamily("qwen2moe", with_stacked_experts(GGUF_HALF_SPLIT), router="softmax"),
    experts=True,
    harmless=("attention_bias", "no_bias"),  # q, k and v have biases whatever these say
)
