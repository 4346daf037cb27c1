"""Jais 2: LayerNorm and biases everywhere, and an FFN of relu(up x)^2 without a gate."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES
from svdengine.models.settings import Settings, activation_fields, decoder_config, flag, number
from svdengine.models.windows import refuse_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Jais 2 config.json."""
    refuse_window(settings)
    attention_bias = flag(settings, "attention_bias", True)
    return decoder_config(
        "jais2",
        settings,
        norm="layer",
        norm_eps=number(settings, "layer_norm_eps", default=1e-5),
        gated=False,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=flag(settings, "mlp_bias", True),
        **activation_fields(settings, "hidden_act", default="relu2"),
    )


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    return {
        "norm": "layer",
        "norm_eps": number(fields, "attention.layer_norm_epsilon"),
        "gated": False,
        "activation": "relu2",
    }


FAMILY = Family(
    name="jais2",
    model_types=("jais2",),
    architectures=("Jais2ForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    gguf=GgufFamily("jais2", GGUF_HALF_SPLIT, _gguf_fields),
)
