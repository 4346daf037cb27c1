"""Mistral 7B, Nemo and their like. Their GGUF files say that they are Llama."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family
from svdengine.models.naming import LLAMA_NAMES
from svdengine.models.settings import Settings, all_layers_window, gated_config


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Mistral config.json."""
    return gated_config("mistral", settings, **all_layers_window(settings))


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
)
