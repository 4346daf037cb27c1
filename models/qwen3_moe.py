"""Qwen 3 with experts (30B-A3B, 235B-A22B)."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.experts import dense_layer_fields, expert_fields, with_experts, with_stacked_experts
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config, head_size, integer
from svdengine.models.windows import refuse_window

_EXPERT = "layers.{layer}.mlp.experts.{expert}."


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Qwen 3 MoE config.json."""
    refuse_window(settings)
    attention_bias = flag(settings, "attention_bias", False)
    size = integer(settings, "moe_intermediate_size", default=768)
    return gated_config(
        "qwen3_moe",
        settings,
        ffn_size=size,
        head_dim=head_size(settings),
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        **expert_fields(settings),
        **dense_layer_fields(settings, size),
    )


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    config_from_hf=config_from_hf,
    hf=with_experts(
        LLAMA_NAMES,
        "layers.{layer}.mlp.gate",
        **{name: f"{_EXPERT}{name}_proj" for name in ("gate", "up", "down")},
    ),
    gguf=GgufFamily("qwen3moe", with_stacked_experts(GGUF_HALF_SPLIT), router="topk_softmax"),
    experts=True,
)
