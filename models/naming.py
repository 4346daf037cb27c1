"""Tensor names and layouts that several families share: Llama-like checkpoints, and GGUF."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

import numpy as np

from svdengine.models.config import ModelConfig
from svdengine.models.family import Array, Build, Naming, Source, plain, split_suffix

LLAMA_NAMES = Naming(
    stems={
        "embedding": ("embed_tokens",),
        "attention_norm": ("layers.{layer}.input_layernorm",),
        "q": ("layers.{layer}.self_attn.q_proj",),
        "k": ("layers.{layer}.self_attn.k_proj",),
        "v": ("layers.{layer}.self_attn.v_proj",),
        "q_norm": ("layers.{layer}.self_attn.q_norm",),
        "k_norm": ("layers.{layer}.self_attn.k_norm",),
        "o": ("layers.{layer}.self_attn.o_proj",),
        "ffn_norm": ("layers.{layer}.post_attention_layernorm",),
        "gate": ("layers.{layer}.mlp.gate_proj",),
        "up": ("layers.{layer}.mlp.up_proj",),
        "down": ("layers.{layer}.mlp.down_proj",),
        "output_norm": ("norm",),
        "lm_head": ("lm_head",),
    },
    prefixes=("model.", ""),
)

GGUF_STEMS: dict[str, tuple[str, ...]] = {
    "embedding": ("token_embd",),
    "attention_norm": ("blk.{layer}.attn_norm",),
    "q": ("blk.{layer}.attn_q",),
    "k": ("blk.{layer}.attn_k",),
    "v": ("blk.{layer}.attn_v",),
    "q_norm": ("blk.{layer}.attn_q_norm",),
    "k_norm": ("blk.{layer}.attn_k_norm",),
    "attention_sub_norm": ("blk.{layer}.attn_sub_norm",),
    "o": ("blk.{layer}.attn_output",),
    "attention_post_norm": ("blk.{layer}.post_attention_norm",),
    "ffn_norm": ("blk.{layer}.ffn_norm",),
    "ffn_post_norm": ("blk.{layer}.post_ffw_norm",),
    "gate": ("blk.{layer}.ffn_gate",),
    "up": ("blk.{layer}.ffn_up",),
    "ffn_sub_norm": ("blk.{layer}.ffn_sub_norm",),
    "down": ("blk.{layer}.ffn_down",),
    "output_norm": ("output_norm",),
    "lm_head": ("output",),
}


def half_split(heads: int) -> Build:
    """Undo GGUF's order of the rows of q and k, in which the two dimensions that rope rotates together are neighbours.

    Row (head, pair, which) of the file is row (head, which, pair) of ours.
    """

    def build(arrays: Sequence[Array]) -> Array:
        rows = arrays[0]
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)

    return build


def turned_first(config: ModelConfig, tensor: str, source: Source) -> Source:
    """The source of q, k or their biases and norms in a model of which only a part of each head turns.

    A checkpoint has the dimensions that turn in one piece, the two halves of their pairs after each other, then the
    rest. Ours pair i with i + head_dim / 2, as every executor does; pairs that turn come first, those that stay last.
    """
    stem, _ = split_suffix(tensor)
    rotated = config.rope.rotated if config.rope is not None else 0
    if not rotated or stem not in ("q", "k", "q_norm", "k_norm"):
        return source
    dims, half, rest = range(config.head_dim), rotated // 2, (config.head_dim - rotated) // 2
    order = [*dims[:half], *dims[rotated : rotated + rest], *dims[half:rotated], *dims[rotated + rest :]]

    def build(arrays: Sequence[Array]) -> Array:
        rows = source.build(arrays)
        heads = rows.reshape(-1, config.head_dim, *rows.shape[1:])
        return heads[:, order].reshape(rows.shape)

    return replace(source, build=build)


def one_more(arrays: Sequence[Array]) -> Array:
    """The weight of a norm of which a checkpoint stores what it exceeds 1 by."""
    return arrays[0] + np.float32(1)


def norms_plus_one(config: ModelConfig, tensor: str) -> Build:
    """How tensors are built where every norm's weight is stored less 1."""
    return one_more if tensor.endswith("norm.weight") else plain(config, tensor)


def _neighbours(config: ModelConfig, tensor: str) -> Build:
    stem, _ = split_suffix(tensor)
    if stem in ("q", "k"):
        return half_split(config.head_count if stem == "q" else config.kv_head_count)
    return plain(config, tensor)


GGUF_HALF_SPLIT = Naming(GGUF_STEMS)  # q and k as Hugging Face has them
GGUF_NEIGHBOURS = Naming(GGUF_STEMS, build=_neighbours)  # q and k permuted for rope on neighbouring dimensions


def scaled(source: Source, available: Container[str]) -> Source:
    """The source of a matrix of a GGUF file, times its scale where the file keeps one beside it (NVFP4)."""
    weight = source.names[0]
    scale = weight.removesuffix(".weight") + ".scale"
    if not weight.endswith(".weight") or scale not in available:
        return source

    def build(arrays: Sequence[Array]) -> Array:
        if arrays[-1].size != 1:
            raise ValueError(f"{scale} must be one number")
        return source.build([arrays[0] * arrays[-1].reshape(()), *arrays[1:-1]])

    return replace(source, names=(*source.names, scale), build=build)
