"""Mistral 7B, Nemo and their like. Their GGUF files say that they are Llama."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family
from svdengine.models.naming import LLAMA_NAMES
from svdengine.models.settings import Settings, gated_config
from svdengine.models.windows import all_layers_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Mistral config.json."""
    return gated_config("mistral", settings, **all_layers_window(settings))


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    harmless=("use_sliding_window", "max_window_layers"),  # of Qwen; the class does not look at them
)
