"""Small mixtures of experts of every kind, for the tests of executors that run them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf_form import common_fields, converter_permute, named
from model_zoo import zoo

from svdengine.models import FAMILIES, tensor_specs
from svdengine.models.config import ModelConfig, Rope
from svdengine.models.family import split_suffix
from svdengine.models.naming import GGUF_STEMS
from svdengine.models.tensors import FFN_MATRICES, place_of


def expert_zoo() -> dict[str, ModelConfig]:
    """Small configs by name. Sizes are odd on purpose, as those of `zoo`."""
    base = replace(zoo()["llama"], ffn_size=70)
    mixtral = replace(base, family="mixtral", expert_count=5, active_experts=2)
    early = {"early_router": True, "activation": "relu"}
    windows = {"sliding_window": 7, "sliding_window_layers": (1, 2), "unrotated_layers": (0,)}
    qwen = replace(base, family="qwen3_moe", qk_norm=True, head_dim=16)
    return {
        "mixtral": mixtral,
        "mixtral_drelu": replace(mixtral, activation="drelu", rope=Rope(1e6)),
        "smallthinker": replace(
            base, family="smallthinker", layer_count=3, expert_count=7, active_experts=3, router="sigmoid",
            tied_embeddings=True, **early, **windows,
        ),
        "smallthinker_softmax": replace(base, family="smallthinker", expert_count=33, active_experts=4, **early),
        "qwen3_moe": replace(qwen, expert_count=18, active_experts=4, router="softmax"),
        "qwen3_moe_dense": replace(
            qwen, layer_count=4, expert_count=6, active_experts=2, dense_layers=(0, 2), dense_blocks=3
        ),
        "relu_dense": replace(
            mixtral, activation="fatrelu", activation_threshold=0.1, layer_count=3, dense_layers=(1,), dense_blocks=2,
            expert_scale=1.7, residual_scale=0.6, router="softmax",
        ),
        "olmoe": replace(
            base, family="olmoe", expert_count=7, active_experts=3, router="softmax", qk_norm=True, qk_norm_joint=True
        ),
        "qwen2_moe": replace(
            base, family="qwen2_moe", qkv_bias=True, expert_count=7, active_experts=3, router="softmax",
            shared_blocks=2, shared_gate=True,
        ),
        "shared": replace(
            mixtral, activation="relu", router="sigmoid", expert_scale=1.3, shared_blocks=9, layer_count=3,
            dense_layers=(1,), dense_blocks=10,
        ),
        "one_expert": replace(mixtral, expert_count=1, active_experts=1, activation="relu"),
        "all_experts": replace(mixtral, expert_count=3, active_experts=3),
    }  # fmt: skip


GGUF_NAMES = {"gate": "ffn_gate_exps", "up": "ffn_up_exps", "down": "ffn_down_exps"}


def gguf_config(name: str) -> ModelConfig:
    """The config of a model that a GGUF file can describe."""
    config = expert_zoo()[name]
    if name == "smallthinker":  # llama.cpp knows which layers slide by their number
        return replace(config, layer_count=5, unrotated_layers=(0, 4), sliding_window_layers=(1, 2, 3))
    return replace(config, router="topk_softmax") if name == "qwen3_moe" else config


def gguf_fields(config: ModelConfig, architecture: str, more: dict[str, Any]) -> dict[str, Any]:
    fields = {
        **common_fields(config),
        "rope.dimension_count": config.head_dim,
        "expert_count": config.expert_count,
        "expert_used_count": config.active_experts,
        **more,
    }
    if config.family != "mixtral":
        fields |= {"feed_forward_length": 999, "expert_feed_forward_length": config.ffn_size}
    if config.sliding_window:
        fields["attention.sliding_window"] = config.sliding_window
    if config.shared_blocks:
        fields["expert_shared_feed_forward_length"] = config.shared_blocks * config.ffn_size
    return named(architecture, fields)


def gguf_checkpoint(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file: all experts of a layer together."""
    tensors: dict[str, np.ndarray] = {}
    for spec in tensor_specs(config):
        stem, suffix = split_suffix(spec.name)
        if not spec.stacked:
            tensors[GGUF_STEMS[stem][0] + suffix] = weights[spec.name]
            continue
        for index, w in enumerate(weights[spec.name]):
            place = place_of(config, spec.name, index)
            layer = place.layer
            if stem in ("q", "k") and config.family == "mixtral":
                heads = config.head_count if stem == "q" else config.kv_head_count
                w = converter_permute(w, heads)
            if spec.name in FFN_MATRICES:
                assert place.expert is not None
                if place.expert >= config.expert_count:
                    name = f"blk.{layer}.ffn_{stem}_shexp.weight"
                    parts = [tensors[name]] if name in tensors else []
                    tensors[name] = np.concatenate([*parts, w.T if spec.name == "down_T" else w], int(stem == "down"))
                    continue
                name = f"blk.{layer}.{GGUF_NAMES[stem]}.weight"
                stack = tensors.get(name, np.zeros((0, *(w.T if spec.name == "down_T" else w).shape), np.float32))
                tensors[name] = np.concatenate([stack, (w.T if spec.name == "down_T" else w)[None]])
            else:
                names = {"router": "blk.{layer}.ffn_gate_inp"}
                if stem == "router" and config.shared_gate:
                    tensors[f"blk.{layer}.ffn_gate_inp_shexp.weight"], w = w[-1], w[:-1]
                tensors[names.get(stem, GGUF_STEMS.get(stem, ("",))[0]).format(layer=layer) + suffix] = w
    return tensors


def hf_checkpoint(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder: each expert by itself."""
    stems, tensors = FAMILIES[config.family].hf.stems, {}
    for spec in tensor_specs(config):
        stem, suffix = split_suffix(spec.name)
        for index, w in enumerate(weights[spec.name] if spec.stacked else weights[spec.name][None]):
            place = place_of(config, spec.name, index)
            (name,) = stems[stem if place.expert is None else f"expert_{stem}"]
            name = (
                ("" if stem == "lm_head" else "model.") + name.format(layer=place.layer, expert=place.expert) + suffix
            )
            tensors[name] = np.ascontiguousarray(w.T if spec.name == "down_T" else w)
    return tensors
