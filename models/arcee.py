"""Arcee's AFM-4.5B: Llama with an FFN of relu(up x)^2 without a gate."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_NEIGHBOURS, LLAMA_NAMES
from svdengine.models.settings import Settings, activation_fields, decoder_config, flag, number
from svdengine.models.windows import refuse_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read an Arcee config.json."""
    refuse_window(settings)
    attention_bias = flag(settings, "attention_bias", False)
    return decoder_config(
        "arcee",
        settings,
        norm="rms",
        norm_eps=number(settings, "rms_norm_eps", default=1e-5),
        gated=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=flag(settings, "mlp_bias", False),
        **activation_fields(settings, "hidden_act", default="relu2"),
    )


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    return {"gated": False, "activation": "relu2"}


FAMILY = Family(
    name="arcee",
    model_types=("arcee",),
    architectures=("ArceeForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    gguf=GgufFamily("arcee", GGUF_NEIGHBOURS, _gguf_fields),
)
