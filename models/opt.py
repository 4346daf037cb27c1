"""OPT: LayerNorm, learned positions, an FFN of ReLU without a gate, biases everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from svdengine.models.config import ModelConfig
from svdengine.models.family import Array, Build, Family, Naming, plain
from svdengine.models.settings import Settings, activation_fields, flag, integer, layer_count

_POSITION_OFFSET = 2  # rows of the checkpoint's position table before that of position 0


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read an OPT config.json. Raises ValueError for OPT-350m, which normalises after the attention and FFN."""
    hidden, heads = integer(settings, "hidden_size"), integer(settings, "num_attention_heads")
    if not flag(settings, "do_layer_norm_before", True) or flag(settings, "_remove_final_layer_norm", False):
        raise ValueError("OPT models without norms before the layers and at the end (OPT-350m) are not supported")
    if integer(settings, "word_embed_proj_dim", default=hidden) != hidden:
        raise ValueError("OPT models whose embeddings are projected (OPT-350m) are not supported")
    if not flag(settings, "layer_norm_elementwise_affine", True):
        raise ValueError("OPT models whose norms have no weights are not supported")
    bias = flag(settings, "enable_bias", True)
    return ModelConfig(
        family="opt",
        vocab_size=integer(settings, "vocab_size"),
        hidden_size=hidden,
        layer_count=layer_count(settings),
        head_count=heads,
        kv_head_count=heads,
        head_dim=hidden // heads,
        ffn_size=integer(settings, "ffn_dim"),
        max_position=integer(settings, "max_position_embeddings"),
        norm="layer",
        norm_eps=1e-5,
        gated=False,
        rope=None,
        learned_positions=True,
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=bias,
        tied_embeddings=flag(settings, "tie_word_embeddings", True),
        **activation_fields(settings, "activation_function", default="relu"),
    )


def _without_offset(arrays: Sequence[Array]) -> Array:
    return arrays[0][_POSITION_OFFSET:]


def _build(config: ModelConfig, tensor: str) -> Build:
    return _without_offset if tensor == "position_embedding" else plain(config, tensor)


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM",),
    config_from_hf=config_from_hf,
    hf=Naming(
        stems={
            "embedding": ("embed_tokens",),
            "position_embedding": ("embed_positions",),
            "attention_norm": ("layers.{layer}.self_attn_layer_norm",),
            "q": ("layers.{layer}.self_attn.q_proj",),
            "k": ("layers.{layer}.self_attn.k_proj",),
            "v": ("layers.{layer}.self_attn.v_proj",),
            "o": ("layers.{layer}.self_attn.out_proj",),
            "ffn_norm": ("layers.{layer}.final_layer_norm",),
            "up": ("layers.{layer}.fc1",),
            "down": ("layers.{layer}.fc2",),
            "output_norm": ("final_layer_norm",),
            "lm_head": ("lm_head",),
        },
        prefixes=("model.decoder.", "decoder.", ""),
        build=_build,
    ),
)
