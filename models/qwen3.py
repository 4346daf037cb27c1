"""Qwen 3 (dense): Llama with RMSNorm on the heads of q and k."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config, integer
from svdengine.models.windows import window_fields


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Qwen 3 config.json."""
    attention_bias = flag(settings, "attention_bias", False)
    return gated_config(
        "qwen3",
        settings,
        head_dim=integer(settings, "head_dim", default=128),
        qk_norm=True,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        **window_fields(settings),
    )


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    gguf=GgufFamily("qwen3", GGUF_HALF_SPLIT),
)
