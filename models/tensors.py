"""The canonical tensors of a model: names and logical shapes, derived from a ModelConfig.

A *matrix* can be stored in any weight format (kernels/formats.py); a *vector* is always float32. Tensors of layers
are stacked: their first axis is the layer, or what `place_of` says.
"""

from __future__ import annotations

from dataclasses import dataclass

from svdengine.models.config import ModelConfig

ROUTER = "router"
FFN_MATRICES = ("gate", "up", "down", "down_T")  # those that a model has are stacked over FFN blocks


@dataclass(frozen=True)
class TensorSpec:
    """One canonical tensor. `shape` is logical: (layers?, rows, columns) of a matrix, (layers?, size) of a vector."""

    name: str
    shape: tuple[int, ...]
    matrix: bool
    stacked: bool  # the first axis is the layer, of the router a layer with experts, of FFNs the block


def tensor_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Every tensor that a model of this config has, in file order. Row i of a matrix makes output i.

    `down` is (d, f); a model whose FFN neurons can be zero has `down_T` (f, d) instead: one row a neuron.
    """
    layers, d, f = config.layer_count, config.hidden_size, config.ffn_size
    heads, kv = config.head_count * config.head_dim, config.kv_head_count * config.head_dim
    specs: list[TensorSpec] = []

    def matrix(name: str, rows: int, columns: int, count: int = layers) -> None:
        specs.append(TensorSpec(name, (count, rows, columns), True, True))

    def vector(name: str, size: int, wanted: bool = True, count: int = layers) -> None:
        if wanted:
            specs.append(TensorSpec(name, (count, size), False, True))

    specs.append(TensorSpec("embedding", (config.vocab_size, d), True, False))
    if config.learned_positions:
        specs.append(TensorSpec("position_embedding", (config.max_position, d), True, False))
    layer_norm = config.norm == "layer"
    vector("attention_norm.weight", d)
    vector("attention_norm.bias", d, layer_norm)
    for name, rows in (("q", heads), ("k", kv), ("v", kv)):
        matrix(name, rows, d)
        vector(f"{name}.bias", rows, config.qkv_bias)
    vector("q_norm.weight", heads if config.qk_norm_joint else config.head_dim, config.qk_norm)
    vector("k_norm.weight", kv if config.qk_norm_joint else config.head_dim, config.qk_norm)
    vector("attention_sub_norm.weight", heads, config.sub_norms)
    matrix("o", d, heads)
    vector("o.bias", d, config.output_bias)
    vector("attention_post_norm.weight", d, config.post_norms)
    vector("ffn_norm.weight", d, not config.shared_norm)
    vector("ffn_norm.bias", d, layer_norm and not config.shared_norm)
    if config.expert_count:
        matrix(ROUTER, config.router_rows, d, len(config.expert_layers))
    blocks = config.ffn_blocks
    for name in ("gate", "up") if config.gated else ("up",):
        matrix(name, f, d, blocks)
        vector(f"{name}.bias", f, config.ffn_bias, blocks)
    vector("ffn_sub_norm.weight", f, config.sub_norms)
    if config.sparse_ffn:
        matrix("down_T", f, d, blocks)
    else:
        matrix("down", d, f, blocks)
    vector("down.bias", d, config.ffn_bias)
    vector("ffn_post_norm.weight", d, config.post_norms)
    specs.append(TensorSpec("output_norm.weight", (d,), False, False))
    if layer_norm:
        specs.append(TensorSpec("output_norm.bias", (d,), False, False))
    if not config.tied_embeddings:
        specs.append(TensorSpec("lm_head", (config.vocab_size, d), True, False))
    return tuple(specs)


@dataclass(frozen=True)
class Place:
    """Where one tensor of a stack belongs."""

    layer: int
    expert: int | None = None  # the number of the layer's expert; those after the last are parts of its shared FFN
    part: int | None = None  # of a wide FFN of a layer without experts: which ffn_size of its neurons


def place_of(config: ModelConfig, name: str, index: int) -> Place:
    """Of which layer, and which part of it, the tensor at `index` of the stack `name` is."""
    if not config.expert_count or name not in (ROUTER, *FFN_MATRICES):
        return Place(index)
    if name == ROUTER:
        return Place(config.expert_layers[index])
    for layer in range(config.layer_count):
        blocks = config.blocks_of(layer)
        if index in blocks:
            number = index - blocks.start
            return Place(layer, part=number) if layer in config.dense_layers else Place(layer, expert=number)
    raise IndexError(f"{name}: found the index {index}, expected one below {config.ffn_blocks}")
