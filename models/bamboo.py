"""Bamboo and TurboSparse-Mistral: Mistral with dReLU, relu(gate x) * relu(up x) (arXiv:2406.05955)."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family
from svdengine.models.naming import LLAMA_NAMES
from svdengine.models.settings import Settings, gated_config
from svdengine.models.windows import all_layers_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Bamboo config.json, which calls dReLU relu. Raises ValueError on another activation."""
    name = settings.get("hidden_act", "relu")
    if name not in ("relu", "drelu"):
        raise ValueError(f"a bamboo model has the activation relu (dReLU), found {name!r}")
    fields = all_layers_window(settings)
    return gated_config("bamboo", settings, activation="drelu", activation_threshold=0.0, **fields)


FAMILY = Family(
    name="bamboo",
    model_types=("bamboo",),
    architectures=("BambooForCausalLM", "TurboSparseMistralForCausalLM"),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
)
