"""Mixtral, and TurboSparse-Mixtral: Mistral with experts. The latter's have dReLU (arXiv:2406.05955)."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any, cast

from svdengine.models.config import ModelConfig
from svdengine.models.experts import expert_fields, with_experts, with_stacked_experts
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_NEIGHBOURS, LLAMA_NAMES
from svdengine.models.settings import Settings, gated_config, texts
from svdengine.models.windows import all_layers_window

_TURBO_TYPE, _TURBO_CLASS = "turbosparsemixtral", "TurboSparseMixtralForCausalLM"
_DEFAULTS: Mapping[str, Any] = {"rms_norm_eps": 1e-5, "rope_theta": 1e6}  # as transformers fills them in
_EXPERT = "layers.{layer}.block_sparse_moe.experts.{expert}."


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Mixtral config.json."""
    settings = ChainMap(cast(dict[str, Any], settings), cast(dict[str, Any], _DEFAULTS))
    turbo = settings.get("model_type") == _TURBO_TYPE or _TURBO_CLASS in texts(settings, "architectures")
    fields = expert_fields(settings, "topk_softmax") | all_layers_window(settings)
    return gated_config("mixtral", settings, **fields, **(_drelu(settings) if turbo else {}))


def _drelu(settings: Settings) -> dict[str, Any]:
    """The activation of TurboSparse-Mixtral, which its settings call relu, as those of TurboSparse-Mistral do."""
    name = settings.get("hidden_act", "relu")
    if name not in ("relu", "drelu"):
        raise ValueError(f"a TurboSparse-Mixtral has the activation relu (dReLU), found {name!r}")
    return {"activation": "drelu", "activation_threshold": 0.0}


FAMILY = Family(
    name="mixtral",
    model_types=("mixtral", _TURBO_TYPE),
    architectures=("MixtralForCausalLM", _TURBO_CLASS),
    config_from_hf=config_from_hf,
    hf=with_experts(
        LLAMA_NAMES, "layers.{layer}.block_sparse_moe.gate", gate=_EXPERT + "w1", up=_EXPERT + "w3", down=_EXPERT + "w2"
    ),
    gguf=GgufFamily("llama", with_stacked_experts(GGUF_NEIGHBOURS), router="topk_softmax"),
    harmless=("router_jitter_noise",),  # of training
    experts=True,
)
