"""MiniCPM and ProSparse-MiniCPM: Llama with scaled embeddings, residuals and logits."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_NEIGHBOURS, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config, integer, layer_count, number
from svdengine.models.windows import refuse_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a MiniCPM config.json."""
    refuse_window(settings)
    layers, hidden = layer_count(settings), integer(settings, "hidden_size")
    attention_bias = flag(settings, "attention_bias", False)
    return gated_config(
        "minicpm",
        settings,
        embedding_scale=number(settings, "scale_emb", default=1.0),
        residual_scale=number(settings, "scale_depth", default=1.0) / math.sqrt(layers),
        logit_scale=number(settings, "dim_model_base", default=1.0) / hidden,
        tied_embeddings=flag(settings, "tie_word_embeddings", True),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
    )


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    """Files from before the scales were written are of MiniCPM-2B, whose scales these are."""
    layers, hidden = integer(fields, "block_count"), integer(fields, "embedding_length")
    return {
        "embedding_scale": number(fields, "embedding_scale", default=12.0),
        "residual_scale": number(fields, "residual_scale", default=1.4 / math.sqrt(layers)),
        "logit_scale": 1.0 / number(fields, "logit_scale", default=hidden / 256),
    }


FAMILY = Family(
    name="minicpm",
    model_types=("minicpm",),
    architectures=("MiniCPMForCausalLM",),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    gguf=GgufFamily("minicpm", GGUF_NEIGHBOURS, _gguf_fields),
)
