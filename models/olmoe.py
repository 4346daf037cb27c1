"""OLMoE (1B-7B): Llama with experts, and one RMSNorm over all heads of q, and one over those of k."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.experts import expert_fields, with_experts, with_stacked_experts
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config, number

_EXPERT = "layers.{layer}.mlp.experts.{expert}."


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read an OLMoE config.json."""
    attention_bias = flag(settings, "attention_bias", False)
    return gated_config(
        "olmoe",
        settings,
        norm_eps=number(settings, "rms_norm_eps", default=1e-5),
        qk_norm=True,
        qk_norm_joint=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        **expert_fields(settings),
    )


FAMILY = Family(
    name="olmoe",
    model_types=("olmoe",),
    architectures=("OlmoeForCausalLM",),
    config_from_hf=config_from_hf,
    hf=with_experts(
        LLAMA_NAMES,
        "layers.{layer}.mlp.gate",
        **{name: f"{_EXPERT}{name}_proj" for name in ("gate", "up", "down")},
    ),
    gguf=GgufFamily(
        "olmoe", with_stacked_experts(GGUF_HALF_SPLIT), lambda fields, names: {"qk_norm_joint": True}, router="softmax"
    ),
    experts=True,
)
