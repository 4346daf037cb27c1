"""Nemotron 3 and 4, Minitron, Nemotron-Mini: LayerNorm, rope on half of each head, relu(up x)^2 without a gate."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_HALF_SPLIT, LLAMA_NAMES, norms_plus_one
from svdengine.models.settings import Settings, activation_fields, decoder_config, flag, integer, number, rope
from svdengine.models.windows import refuse_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Nemotron config.json."""
    refuse_window(settings)
    attention_bias = flag(settings, "attention_bias", False)
    return decoder_config(
        "nemotron",
        settings,
        norm="layer",
        norm_eps=number(settings, "norm_eps", default=1e-5),
        gated=False,
        rope=rope(settings, share=0.5),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=flag(settings, "mlp_bias", False),
        **activation_fields(settings, "hidden_act", default="relu2"),
    )


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    """Of a model whose heads are not an even share of the hidden size the file has the wrong share of a head.

    llama.cpp's converter divides the hidden size by the heads for it, whatever the size of a head is.
    """
    hidden, heads = integer(fields, "embedding_length"), integer(fields, "attention.head_count")
    if heads * integer(fields, "attention.key_length", default=hidden // heads) != hidden:
        raise ValueError(
            "GGUF files of Nemotron models whose heads together are not as wide as the model (Minitron-8B) say wrongly"
            " how much of a head rope turns; convert from the Hugging Face folder"
        )
    return {
        "norm": "layer",
        "norm_eps": number(fields, "attention.layer_norm_epsilon"),
        "gated": False,
        "activation": "relu2",
    }


FAMILY = Family(
    name="nemotron",
    model_types=("nemotron",),
    architectures=("NemotronForCausalLM",),
    config_from_hf=config_from_hf,
    hf=replace(LLAMA_NAMES, build=norms_plus_one),
    # The converter of llama.cpp has added 1 to the norms, and written the share of a head in dimensions.
    gguf=GgufFamily("nemotron", GGUF_HALF_SPLIT, _gguf_fields, partial_rotary=True),
)
