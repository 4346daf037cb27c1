"""Falcon: LayerNorm, attention and FFN in parallel, an FFN without a gate, and q, k, v in one matrix.

Falcon-7B has one norm a layer and one kv head; the newer 11B, 40B and 180B have kv heads in groups, and two norms.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from svdengine.models.config import ModelConfig
from svdengine.models.family import Array, Build, Family, GgufFamily, Naming, plain, split_suffix
from svdengine.models.naming import GGUF_STEMS
from svdengine.models.settings import Settings, activation_fields, flag, integer, number, rope


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Falcon config.json. Raises ValueError for a model with ALiBi."""
    if flag(settings, "alibi", False):
        raise ValueError("Falcon models with ALiBi position biases (falcon-rw) are not supported")
    hidden, heads = integer(settings, "hidden_size", "n_embed"), integer(settings, "num_attention_heads", "n_head")
    grouped = flag(settings, "new_decoder_architecture", settings.get("model_type") == "RefinedWeb")
    parallel = flag(settings, "parallel_attn", True) or grouped
    one_kv_head = flag(settings, "multi_query", True) and not grouped
    groups = integer(settings, "num_kv_heads", "n_head_kv", default=heads)  # means something where there are groups
    kv_heads = groups if grouped else heads
    two_norms = integer(settings, "num_ln_in_parallel_attn", default=2) == 2 and grouped
    bias = flag(settings, "bias", False)
    return ModelConfig(
        family="falcon",
        vocab_size=integer(settings, "vocab_size"),
        hidden_size=hidden,
        layer_count=integer(settings, "num_hidden_layers", "n_layer"),
        head_count=heads,
        kv_head_count=1 if one_kv_head else kv_heads,
        head_dim=hidden // heads,
        ffn_size=integer(settings, "ffn_hidden_size", default=4 * hidden),
        max_position=integer(settings, "max_position_embeddings", default=2048),
        norm="layer",
        norm_eps=number(settings, "layer_norm_epsilon", default=1e-5),
        gated=False,
        rope=rope(settings),
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        parallel=parallel,
        shared_norm=parallel and not two_norms,
        tied_embeddings=flag(settings, "tie_word_embeddings", True),
        **activation_fields(settings, "activation", "hidden_act", default="gelu"),
    )


def _grouped_part(config: ModelConfig, part: str) -> Build:
    """Take q, k or v out of the fused matrix: for each kv head its query heads, then k, then v.

    One kv head for all query heads, and one for each, are the two ends of the same layout.
    """

    def build(arrays: Sequence[Array]) -> Array:
        fused, columns = arrays[0], arrays[0].shape[1:]
        group = config.head_count // config.kv_head_count
        heads = fused.reshape(config.kv_head_count, group + 2, config.head_dim, *columns)
        taken = {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}[part]
        return taken.reshape(-1, *columns)

    return build


def _concatenated_part(config: ModelConfig, part: str) -> Build:
    """Take q, k or v out of GGUF's fused matrix: all of q, then all of k, then all of v."""
    query, kv = config.head_count * config.head_dim, config.kv_head_count * config.head_dim
    start, stop = {"q": (0, query), "k": (query, query + kv), "v": (query + kv, query + 2 * kv)}[part]
    return lambda arrays: arrays[0][start:stop]


def _hf_build(config: ModelConfig, tensor: str) -> Build:
    stem, _ = split_suffix(tensor)
    return _grouped_part(config, stem) if stem in ("q", "k", "v") else plain(config, tensor)


def _gguf_build(config: ModelConfig, tensor: str) -> Build:
    stem, _ = split_suffix(tensor)
    return _concatenated_part(config, stem) if stem in ("q", "k", "v") else plain(config, tensor)


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    """GGUF has the parallel kinds of Falcon only; a second norm is the attention's."""
    return {
        "norm": "layer",
        "norm_eps": number(fields, "attention.layer_norm_epsilon"),
        "gated": False,
        "activation": "gelu",
        "parallel": True,
        "shared_norm": "blk.0.attn_norm_2.weight" not in tensor_names,
        "qkv_bias": "blk.0.attn_qkv.bias" in tensor_names,
    }


_QKV = ("h.{layer}.self_attention.query_key_value",)
_GGUF_QKV = ("blk.{layer}.attn_qkv",)

FAMILY = Family(
    name="falcon",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    config_from_hf=config_from_hf,
    hf=Naming(
        stems={
            "embedding": ("word_embeddings",),
            "attention_norm": ("h.{layer}.ln_attn", "h.{layer}.input_layernorm"),
            "q": _QKV,
            "k": _QKV,
            "v": _QKV,
            "o": ("h.{layer}.self_attention.dense",),
            "ffn_norm": ("h.{layer}.ln_mlp", "h.{layer}.post_attention_layernorm"),
            "up": ("h.{layer}.mlp.dense_h_to_4h",),
            "down": ("h.{layer}.mlp.dense_4h_to_h",),
            "output_norm": ("ln_f",),
            "lm_head": ("lm_head",),
        },
        prefixes=("transformer.", ""),
        build=_hf_build,
    ),
    gguf=GgufFamily(
        "falcon",
        Naming(
            stems=GGUF_STEMS
            | {"q": _GGUF_QKV, "k": _GGUF_QKV, "v": _GGUF_QKV}
            | {
                "attention_norm": ("blk.{layer}.attn_norm_2", "blk.{layer}.attn_norm"),
                "ffn_norm": ("blk.{layer}.attn_norm",),
            },
            build=_gguf_build,
        ),
        _gguf_fields,
    ),
)
