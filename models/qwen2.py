"""Qwen 2 and 2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, gated_config
from svdengine.models.windows import window_fields


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Qwen 2 config.json."""
    return gated_config("qwen2", settings, qkv_bias=True, **window_fields(settings))


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    gguf=GgufFamily("qwen2", GGUF_HALF_SPLIT),
    harmless=("attention_bias", "qkv_bias", "no_bias"),  # q, k and v have biases whatever these say
)
