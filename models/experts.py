"""Mixtures of experts: what a config.json, or a GGUF file, says of them, and what their tensors are called.

Executors know three routers (`ModelConfig.router`). Softmax over all experts, divided by the sum over those that are
chosen, is the softmax over those that are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from svdengine.models.config import Router
from svdengine.models.family import Naming
from svdengine.models.settings import Settings, flag, integer, layer_count, number, shown

COUNT_KEYS = ("num_experts", "num_local_experts")  # transformers knows the number of experts under both names
_GATING: Mapping[object, Router] = {1: "topk_softmax", 2: "sigmoid"}  # of GGUF, for families that norm the weights


def expert_fields(settings: Settings, router: Router | None = None) -> dict[str, Any]:
    """The experts of a config.json; router: the family's, where `norm_topk_prob` does not say which one it is."""
    if router is None:
        router = "topk_softmax" if flag(settings, "norm_topk_prob", False) else "softmax"
    count = integer(settings, *COUNT_KEYS)
    return {
        "expert_count": count,
        "active_experts": _active(integer(settings, "num_experts_per_tok"), count),
        "router": router,
    }


def dense_layer_fields(settings: Settings, size: int) -> dict[str, Any]:
    """The layers without experts (Qwen): of `mlp_only_layers`, and all but every `decoder_sparse_step`-th.

    size: neurons of an expert. Raises ValueError where such a layer's FFN is not a multiple of it.
    """
    layers, step = settings.get("mlp_only_layers") or [], integer(settings, "decoder_sparse_step", default=1)
    count, wide = layer_count(settings), integer(settings, "intermediate_size", default=size)
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise ValueError(f"mlp_only_layers must be a list of whole numbers, found {shown(layers)}")
    dense = tuple(i for i in range(count) if i in layers or (i + 1) % step)
    if not dense:
        return {}
    if wide % size:
        raise ValueError(
            f"layers without experts have {wide} neurons, which must be a multiple of an expert's {size} here"
        )
    return {"dense_layers": dense, "dense_blocks": wide // size}


def gguf_expert_fields(fields: Settings, router: Router) -> dict[str, Any]:
    """The experts of a GGUF file of a family with this router. Raises ValueError on numbers that make no sense."""
    count, active = integer(fields, "expert_count"), integer(fields, "expert_used_count")
    named: dict[str, Any] = {}
    if fields.get("expert_feed_forward_length"):
        named = {"ffn_size": integer(fields, "expert_feed_forward_length")}
        fields.get("feed_forward_length")  # of layers without experts, of which a GGUF file of these families has none
    if fields.get("expert_shared_feed_forward_length"):
        size = named["ffn_size"] if named else integer(fields, "feed_forward_length")
        named |= shared_fields(fields, "expert_shared_feed_forward_length", size, gate=True)
    scale = number(fields, "expert_weights_scale", default=1.0) or 1.0  # 0: it is not used
    return {
        "expert_count": count,
        "active_experts": _active(active, count),
        "router": router,
        "expert_scale": scale,
        **named,
    }


def gating(fields: Settings) -> Router:
    """The router that `expert_gating_func` of a GGUF file names: softmax or sigmoid, else ValueError."""
    found = fields.get("expert_gating_func")
    if found not in _GATING:
        raise ValueError(f"expert_gating_func must be 1 (softmax) or 2 (sigmoid), found {shown(found)}")
    return _GATING[found]


def _active(active: int, count: int) -> int:
    if active > count:
        raise ValueError(f"found {active} active experts, of {count}")
    return active


def shared_fields(settings: Settings, key: str, size: int, *, gate: bool) -> dict[str, Any]:
    """The FFN that each token gets besides its experts, of `key` neurons; size: those of an expert.

    Raises ValueError where it is not a multiple of it. gate: whether the router's weights have one for it.
    """
    if not settings.get(key):
        return {}
    wide = integer(settings, key)
    if wide % size:
        raise ValueError(f"{key} must be a multiple of an expert's {size} neurons here, found {wide}")
    return {"shared_blocks": wide // size, "shared_gate": gate}


def with_experts(naming: Naming, router: str, **experts: str) -> Naming:
    """Names of a checkpoint whose layers have a router, and experts with these names of gate, up and down."""
    stems = {"router": (router,)} | {f"expert_{name}": (stem,) for name, stem in experts.items()}
    return replace(naming, stems={**naming.stems, **stems})


def with_shared(naming: Naming, router: str, **shared: str) -> Naming:
    """These names, and those of an FFN that every token gets besides: of its gate among the routers, gate, up, down."""
    stems = {"shared_router": (router,)} | {f"shared_{name}": (stem,) for name, stem in shared.items()}
    return replace(naming, stems={**naming.stems, **stems})


def with_stacked_experts(naming: Naming) -> Naming:
    """Names of a GGUF file: all experts of a layer in one tensor, or, in files before April 2024, each in its own."""
    stems = {
        f"expert_{name}": (f"blk.{{layer}}.ffn_{name}_exps", f"blk.{{layer}}.ffn_{name}.{{expert}}")
        for name in ("gate", "up", "down")
    }
    shared = {name: f"blk.{{layer}}.ffn_{name}_shexp" for name in ("gate", "up", "down")}
    naming = with_shared(naming, "blk.{layer}.ffn_gate_inp_shexp", **shared)
    return replace(naming, stems={**naming.stems, "router": ("blk.{layer}.ffn_gate_inp",), **stems})
