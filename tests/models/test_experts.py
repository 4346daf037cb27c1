"""Mixtures of experts: families against transformers, SmallThinker against a second implementation, and GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expert_zoo import expert_zoo, gguf_checkpoint, gguf_config, gguf_fields
from model_zoo import canonical_weights, make_batch, random_tokens, random_weights, relative_error

from svdengine.kernels.reference import ReferenceExecutor
from svdengine.models import config_from_gguf, config_from_hf, gguf_source, hf_source
from svdengine.models.config import ModelConfig

LENGTH = 41
SIZES = {
    "vocab_size": 119,
    "hidden_size": 90,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
MIXTRAL = {**SIZES, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
QWEN = {**SIZES, "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3}
QWEN |= {"moe_intermediate_size": 35}
OLMOE = {**SIZES, "model_type": "olmoe", "num_experts": 7, "num_experts_per_tok": 3}
QWEN2 = {**SIZES, "model_type": "qwen2_moe", "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 35}
QWEN2 |= {"shared_expert_intermediate_size": 105}
CASES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "mixtral_window": {**MIXTRAL, "sliding_window": 7, "rope_theta": 1e6, "router_jitter_noise": 0.1},
    "mixtral_relu_tied": {**MIXTRAL, "hidden_act": "relu", "tie_word_embeddings": True, "head_dim": 16},
    "qwen3_moe": QWEN,
    "qwen3_moe_normed": {**QWEN, "norm_topk_prob": True, "attention_bias": True, "decoder_sparse_step": 1},
    "qwen3_moe_some_dense": {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_moe_every_second": {**QWEN, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    "qwen2_moe": QWEN2,
    "qwen2_moe_normed": {**QWEN2, "norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True},
    "qwen2_moe_some_dense": {**QWEN2, "mlp_only_layers": [1], "shared_expert_intermediate_size": 35},
    "olmoe": OLMOE,
    "olmoe_normed": {**OLMOE, "norm_topk_prob": True, "rms_norm_eps": 1e-3, "num_key_value_heads": 9},
}
SMALLTHINKER: dict[str, Any] = {
    "model_type": "smallthinker",
    "architectures": ["SmallThinkerForCausalLM"],
    "vocab_size": 119,
    "hidden_size": 90,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "moe_num_primary_experts": 6,
    "moe_num_active_primary_experts": 2,
    "moe_ffn_hidden_size": 70,
    "moe_primary_router_apply_softmax": False,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_layout": [0, 1, 1, 1, 0],
    "sliding_window_layout": [0, 1, 1, 1, 0],
    "sliding_window_size": 7,
    "tie_word_embeddings": False,
}


def reference_logits(config: ModelConfig, weights: dict[str, Any], tokens: list[int]) -> np.ndarray:
    return ReferenceExecutor(config, weights).forward(make_batch([(tokens, 0)], [[4, 1, 9]]))


def saved_model(settings: dict[str, Any], folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """A random model of transformers, and the tensors of its checkpoint as others find them."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from safetensors.numpy import load_file
    from test_against_transformers import random_model

    model = random_model(settings)
    model.set_experts_implementation("eager")  # the default one wants sizes that are multiples of 16 bytes
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_same_logits_as_transformers(name: str, tmp_path: Path) -> None:
    model, checkpoint = saved_model(CASES[name], tmp_path)
    from test_against_transformers import logits_of

    config = config_from_hf(CASES[name])
    assert config_from_hf(model.config.to_dict()) == config
    tokens = random_tokens(config, LENGTH)
    weights = canonical_weights(config, checkpoint, hf_source)
    assert relative_error(reference_logits(config, weights, tokens), logits_of(model, tokens)) < 1e-4


def test_turbosparse_mixtral_is_a_mixtral_with_two_relus() -> None:
    settings = {**MIXTRAL, "hidden_act": "relu"}
    turbo = {"architectures": ["TurboSparseMixtralForCausalLM"], "model_type": "turbosparsemixtral"}
    config = config_from_hf({**settings, **turbo})
    assert config == replace(config_from_hf(settings), activation="drelu")
    with pytest.raises(ValueError, match="dReLU"):
        config_from_hf({**settings, **turbo, "hidden_act": "silu"})


# SmallThinker, written anew from the facts of its modelling code: the whole text at once, a token at a time in the FFN.


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)


def smallthinker_logits(settings: dict[str, Any], w: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    heads, kv, size = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    x = w["model.embed_tokens.weight"][tokens].astype(np.float64)
    n = len(tokens)
    for layer in range(settings["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        router_logits = x @ w[p + "block_sparse_moe.primary_router.weight"].T
        h = rms(x, w[p + "input_layernorm.weight"])
        q, k, v = (h @ w[f"{p}self_attn.{part}_proj.weight"].T for part in "qkv")
        mixed = np.zeros((n, heads * size))
        for head in range(heads):
            group = head // (heads // kv)
            a, b = q[:, head * size : (head + 1) * size], k[:, group * size : (group + 1) * size]
            if settings["rope_layout"][layer]:
                a, b = turned(a, settings["rope_theta"]), turned(b, settings["rope_theta"])
            scores = a @ b.T / size**0.5
            for i in range(n):
                first = (
                    max(0, i - settings["sliding_window_size"] + 1) if settings["sliding_window_layout"][layer] else 0
                )
                e = np.exp(scores[i, first : i + 1] - scores[i, first : i + 1].max())
                value = v[first : i + 1, group * size : (group + 1) * size]
                mixed[i, head * size : (head + 1) * size] = e / e.sum() @ value
        x = x + mixed @ w[p + "self_attn.o_proj.weight"].T
        h = rms(x, w[p + "post_attention_layernorm.weight"])
        for i in range(n):
            best = sorted(range(settings["moe_num_primary_experts"]), key=lambda e: -router_logits[i, e])
            best = best[: settings["moe_num_active_primary_experts"]]
            if settings["moe_primary_router_apply_softmax"]:
                parts = np.exp(router_logits[i, best])
            else:
                parts = 1 / (1 + np.exp(-router_logits[i, best]))
            for expert, part in zip(best, parts / parts.sum(), strict=True):
                e = f"{p}block_sparse_moe.experts.{expert}."
                hidden = np.maximum(h[i] @ w[e + "gate.weight"].T, 0) * (h[i] @ w[e + "up.weight"].T)
                x[i] += part * (hidden @ w[e + "down.weight"].T)
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def turned(x: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)


def smallthinker_checkpoint(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    d, f = settings["hidden_size"], settings["moe_ffn_hidden_size"]
    q, kv = (settings[key] * settings["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"model.embed_tokens": (119, d), "model.norm": (d,), "lm_head": (119, d)}
    for layer in range(settings["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm": (d,), p + "post_attention_layernorm": (d,)}
        shapes |= {
            f"{p}self_attn.{name}_proj": shape
            for name, shape in zip("qkvo", ((q, d), (kv, d), (kv, d), (d, q)), strict=True)
        }
        shapes[p + "block_sparse_moe.primary_router"] = settings["moe_num_primary_experts"], d
        for expert in range(settings["moe_num_primary_experts"]):
            e = f"{p}block_sparse_moe.experts.{expert}."
            shapes |= {e + "gate": (f, d), e + "up": (f, d), e + "down": (d, f)}
    random = np.random.default_rng(0)
    return {
        name + ".weight": (0.1 if len(shape) == 1 else shape[1] ** -0.5) * random.standard_normal(shape, np.float32)
        + np.float32(len(shape) == 1)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_primary_router_apply_softmax": True},
        {"rope_layout": [1] * 5, "sliding_window_layout": [0] * 5},
        {"rope_layout": [0, 0, 1, 0, 1], "moe_num_active_primary_experts": 5},
    ],
)
def test_smallthinker_against_a_second_implementation(changes: dict[str, Any]) -> None:
    settings = {**SMALLTHINKER, **changes}
    config = config_from_hf(settings)
    assert config.early_router and config.activation == "relu"
    checkpoint, tokens = smallthinker_checkpoint(settings), random_tokens(config, LENGTH)
    expected = smallthinker_logits(settings, checkpoint, tokens)
    found = reference_logits(config, canonical_weights(config, checkpoint, hf_source), tokens)
    assert relative_error(found, expected) < 1e-4


def test_published_shapes() -> None:
    small = {"hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 12, "num_key_value_heads": 2}
    small |= {"vocab_size": 151936, "head_dim": 128, "moe_num_primary_experts": 32, "moe_ffn_hidden_size": 768}
    small |= {"moe_num_active_primary_experts": 4, "model_type": "smallthinker", "rope_theta": 1.5e6}
    found = config_from_hf(small)
    assert found.unrotated_layers == () == found.sliding_window_layers and found.tied_embeddings
    assert (found.expert_count, found.active_experts, found.router) == (32, 4, "sigmoid")
    assert found.ffn_blocks == 1024 and found.token_neurons == 32 * 4 * 768
    large = {**small, "num_hidden_layers": 52, "rope_layout": [0, 1, 1, 1] * 13, "moe_num_primary_experts": 64}
    large |= {"sliding_window_layout": [0, 1, 1, 1] * 13, "sliding_window_size": 4096}
    found = config_from_hf(large)
    assert found.unrotated_layers == tuple(range(0, 52, 4)) and len(found.sliding_window_layers) == 39
    assert found.rope_of(4) is None and found.rope_of(5) == found.rope
    mixtral = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    mixtral |= {"num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
    found = config_from_hf({**mixtral, "model_type": "mixtral", "sliding_window": None})
    assert (found.ffn_blocks, found.router, found.early_router) == (256, "topk_softmax", False)


GGUF_CASES = {
    "mixtral": ("llama", {}),
    "qwen3_moe": ("qwen3moe", {}),
    "olmoe": ("olmoe", {}),
    "qwen2_moe": ("qwen2moe", {}),
    "smallthinker": ("smallthinker", {"expert_gating_func": 2}),
    "smallthinker_softmax": ("smallthinker", {"expert_gating_func": 1}),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_comes_back_as_the_same_model(name: str) -> None:
    config, (architecture, more) = gguf_config(name), GGUF_CASES[name]
    weights = random_weights(config)
    tensors = gguf_checkpoint(config, weights)
    assert config_from_gguf(gguf_fields(config, architecture, more), tensors, config.vocab_size) == config
    found = canonical_weights(config, tensors, gguf_source)
    for tensor, w in weights.items():
        np.testing.assert_array_equal(found[tensor], w, err_msg=tensor)


def test_gguf_files_with_a_tensor_for_each_expert() -> None:
    config = gguf_config("mixtral")
    weights = random_weights(config)
    tensors = gguf_checkpoint(config, weights)
    for name in [name for name in tensors if "_exps" in name]:
        for expert, w in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps", f".{expert}")] = w
    found = canonical_weights(config, tensors, gguf_source)
    assert all((found[tensor] == w).all() for tensor, w in weights.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**MIXTRAL, "num_experts_per_tok": 6}, "found 6 active experts, of 5"),
        ({**MIXTRAL, "num_local_experts": 2000}, "expert_count must lie in 1..1024"),
        ({**QWEN, "mlp_only_layers": [0], "intermediate_size": 71}, "must be a multiple of an expert's 35"),
        (
            {**QWEN2, "shared_expert_intermediate_size": 71},
            "must be a multiple of an expert's 35 neurons here, found 71",
        ),
        ({**QWEN, "mlp_only_layers": "all"}, "mlp_only_layers must be a list"),
        ({**QWEN, "decoder_sparse_step": 9}, "needs a layer that has some"),
        ({**OLMOE, "clip_qkv": 8.0}, "clip_qkv"),
        ({**SMALLTHINKER, "moe_enable_early_router": False}, "after the attention is not supported"),
        ({**SMALLTHINKER, "moe_layer_layout": [1, 0, 1, 1, 1]}, "layers without experts"),
        ({**SMALLTHINKER, "rope_layout": [1, 2]}, "rope_layout must be a list of 5 numbers"),
        ({**SMALLTHINKER, "moe_num_secondary_experts": 4}, "moe_num_secondary_experts"),
        ({**SMALLTHINKER, "sliding_window_size": None}, "there is no sliding_window_size"),
        ({**SIZES, "model_type": "llama", "num_experts": 4}, "mixture-of-experts .*num_experts=4"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}, "mixture-of-experts"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_hf(settings)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("smallthinker", {"expert_gating_func": 3}, r"expert_gating_func must be 1 \(softmax\) or 2"),
        ("smallthinker", {}, "expert_gating_func must be 1"),
        ("llama", {"expert_used_count": 9}, "found 9 active experts, of 5"),
        ("llama", {"expert_shared_count": 1}, "expert_shared_count"),
        ("minicpm", {}, "mixture-of-experts models of the GGUF architecture minicpm"),
    ],
)
def test_gguf_refusals(architecture: str, changes: dict[str, Any], message: str) -> None:
    fields = gguf_fields(expert_zoo()["mixtral"], architecture, changes)
    with pytest.raises(ValueError, match=message):
        config_from_gguf(fields, (), 119)
