"""Reading config.json: what is recognised, what is refused, and how clearly."""

import contextlib
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expert_zoo import expert_zoo
from model_zoo import zoo

from svdengine.kernels.rope import rope_frequencies
from svdengine.models import (
    FAMILIES,
    ModelConfig,
    Rope,
    config_from_hf,
    hf_source,
    refuse_unread_tensors,
    tensor_specs,
    with_activation,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
OPT = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "activation_function": "relu",
}
NEMOTRON = {**LLAMA, "model_type": "nemotron", "architectures": None, "hidden_act": "relu2", "norm_eps": 1e-5}
GEMMA3 = {**LLAMA, "model_type": "gemma3_text", "architectures": None, "hidden_act": "gelu_pytorch_tanh"}
BITNET = {**LLAMA, "model_type": "bitnet", "architectures": None, "hidden_act": "relu2"}
FALCON = {"model_type": "falcon", "vocab_size": 65024, "hidden_size": 4544}
FALCON_7B = {**FALCON, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True}


def test_llama_2() -> None:
    config = config_from_hf(LLAMA)
    assert config == ModelConfig(
        family="llama",
        vocab_size=32000,
        hidden_size=4096,
        layer_count=32,
        head_count=32,
        kv_head_count=32,
        head_dim=128,
        ffn_size=11008,
        max_position=4096,
        norm="rms",
        norm_eps=1e-5,
        activation="silu",
        gated=True,
        rope=Rope(10000.0),
    )
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "relu"}, {"activation": "relu"}),
        ({"hidden_act": "fatrelu"}, {"activation": "fatrelu", "activation_threshold": 0.01}),
        (
            {"hidden_act": "fatrelu", "hidden_act_param": 0.05, "architectures": ["SparseLlamaForCausalLM"]},
            {"activation": "fatrelu", "activation_threshold": 0.05},
        ),
        ({"hidden_act": "swish", "architectures": ["SomebodysForCausalLM"]}, {"activation": "silu"}),
        ({"hidden_act": "gelu_new", "architectures": None}, {"activation": "gelu_tanh"}),
        ({"num_key_value_heads": 8, "head_dim": 64}, {"kv_head_count": 8, "head_dim": 64}),
        ({"num_key_value_heads": None, "head_dim": None}, {"kv_head_count": 32, "head_dim": 128}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope": Rope(5e5)}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope": Rope(5e5)}),
        (
            {"original_max_position_embeddings": 1024, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope": Rope(1e4, "yarn", 4.0, original_max_position=1024, attention_factor=1.1386294361119891)},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 4096}},
            {"rope": Rope(1e4, "yarn", 1.0, original_max_position=4096)},
        ),
        ({"num_experts": 0, "pretraining_tp": 2, "quantization_config": None}, {}),
        (
            {"model_type": "mistral", "architectures": ["BambooForCausalLM"], "hidden_act": "relu"},
            {"family": "bamboo", "activation": "drelu"},
        ),
    ],
)
def test_llama_like_settings(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert config_from_hf({**LLAMA, **changes}) == replace(config_from_hf(LLAMA), **expected)


def test_old_falcon_keys() -> None:
    old = {**FALCON, "model_type": "RefinedWebModel", "n_layer": 32, "n_head": 71, "multi_query": True}
    assert config_from_hf(old) == config_from_hf(FALCON_7B)
    larger = {**FALCON, "hidden_size": 8192, "model_type": "RefinedWeb", "n_layer": 60, "n_head": 128, "n_head_kv": 8}
    config = config_from_hf(larger)
    assert (config.kv_head_count, config.parallel, config.shared_norm) == (8, True, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "bert"},
            r"unnamed \(model_type 'bert'\) is not supported; supported: llama, mistral",
        ),
        ({}, "is not supported; supported: "),
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
        ({**LLAMA, "num_local_experts": 8}, "mixture-of-experts .*num_local_experts=8"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        ({**LLAMA, "hidden_act": "mish"}, "'mish' is not supported; supported: relu, fatrelu, drelu, relu2, silu"),
        ({**LLAMA, "hidden_size": "big"}, "hidden_size must be a positive whole number, found 'big'"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads must be a positive whole number, found 0"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "vocab_size must be .* found None"),
        ({**LLAMA, "num_key_value_heads": 5}, "head_count 32 is not a multiple of kv_head_count 5"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({**LLAMA, "attention_bias": "yes"}, "attention_bias must be true or false"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "longrope"}},
            "rope scaling 'longrope' is not supported; supported",
        ),
        ({**LLAMA, "rope_scaling": {"type": "su"}}, "rope scaling 'su' is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor must be a number, found None"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial rotary embedding is not supported"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.25}}, "partial rotary embedding"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        ({**LLAMA, "model_type": "bamboo", "architectures": None}, "a bamboo model has the activation relu"),
        (
            {
                **LLAMA,
                "model_type": "qwen3",
                "architectures": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["linear_attention"] * 32,
            },
            "layers of type linear_attention",
        ),
        ({**OPT, "do_layer_norm_before": False}, "OPT-350m"),
        ({**OPT, "word_embed_proj_dim": 512}, "OPT-350m"),
        ({**OPT, "layer_norm_elementwise_affine": False}, "no weights"),
        ({**FALCON_7B, "alibi": True}, "ALiBi"),
        ({**BITNET, "quantization_config": {"quant_method": "bitnet"}}, "linear_class 'bitlinear' in mode 'offline'"),
        (
            {
                **BITNET,
                "quantization_config": {
                    "quant_method": "bitnet",
                    "linear_class": "autobitlinear",
                    "use_rms_norm": True,
                },
            },
            "without norms of their own",
        ),
        ({**BITNET, "quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        ({**LLAMA, "quantization_config": {"quant_method": "bitnet"}}, "quantised with bitnet"),
        ({**GEMMA3, "text_config": 3}, "text_config must be an object"),
        ({**GEMMA3, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be above 0"),
        ({**GEMMA3, "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma3", "text_config": {"attn_logit_softcapping": 50.0}}, "text_config.attn_logit_softcap"),
        ({**NEMOTRON, "partial_rotary_factor": 0.0}, "expected an even number of them, at most all"),
        ({**NEMOTRON, "partial_rotary_factor": 1.5}, "expected an even number of them, at most all"),
        ({**NEMOTRON, "head_dim": 10}, "partial_rotary_factor 0.5 of 10 dimensions: expected an even number"),
        ({**NEMOTRON, "partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}}, "disagree"),
    ],
)
def test_refusals_are_one_clear_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_from_hf(settings)
    assert "\n" not in str(caught.value)


HUGE = (float("inf"), float("nan"), 1 << 31, 1 << 63, 10**400, -(10**400), 10**5000)


def check_frequencies(config: ModelConfig) -> None:
    if config.rope is not None:
        assert np.isfinite(rope_frequencies(config.rope, config.head_dim)).all()


YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
WINDOW = {"sliding_window": 8, "use_sliding_window": True}
BASES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, **YARN},
    "mistral": {**LLAMA, **YARN, "sliding_window": 8},
    "bamboo": {**LLAMA, **YARN, "hidden_act": "relu", "sliding_window": 8},
    "qwen2": {**LLAMA, **YARN, **WINDOW},
    "qwen3": {**LLAMA, **YARN, **WINDOW},
    "minicpm": {**LLAMA, **YARN},
    "opt": OPT,
    "falcon": FALCON_7B,
    "arcee": {**LLAMA, **YARN, "hidden_act": "relu2"},
    "nemotron": {**NEMOTRON, "partial_rotary_factor": 0.5},
    "jais2": {**LLAMA, "hidden_act": "relu2", "layer_norm_eps": 1e-5},
    "gemma3": {**LLAMA, "sliding_window": 8, "hidden_act": None},
    "bitnet": {**LLAMA, "hidden_act": "relu2"},
}


@pytest.mark.parametrize("model_type", BASES)
def test_junk_is_a_value_error(model_type: str) -> None:
    """A config.json is untrusted: whatever stands in it, the answer is a config or one ValueError."""
    settings = {**BASES[model_type], "model_type": model_type, "architectures": None}
    others = "rope_theta head_dim num_key_value_heads layer_types max_window_layers scale_depth dim_model_base"
    others += " quantization_config num_experts num_kv_heads n_head new_decoder_architecture rope_parameters"
    others += " partial_rotary_factor norm_eps text_config query_pre_attn_scalar rope_local_base_freq"
    others += " sliding_window rope_scaling tie_word_embeddings some_other_setting attention_bias hidden_act_param"
    config_from_hf(settings)
    for key in [*settings, *others.split()]:
        for junk in (None, -1, 0, 1.5, *HUGE, "x", ["x"], [None], [[]], {}, {"x": 1}, {"x": {}}, True):
            with contextlib.suppress(ValueError):
                check_frequencies(config_from_hf({**settings, key: junk}))
    for key in ("type", "factor", "beta_fast", "attention_factor", "mscale", "original_max_position_embeddings"):
        for junk in (None, -1, 0, 1.5, *HUGE, "x", ["x"], {}, True):
            for kind in ("yarn", "llama3", "linear"):
                with contextlib.suppress(ValueError):
                    check_frequencies(
                        config_from_hf({**settings, "rope_scaling": {"type": kind, "factor": 2.0, key: junk}})
                    )


def test_a_missing_tensor_is_named() -> None:
    config = config_from_hf(LLAMA)
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.3\.mlp\.down_proj\.weight or layers\.3\."):
        hf_source(config, "down", 3, ())
    with pytest.raises(ValueError, match="no name for the tensor position_embedding"):
        hf_source(config, "position_embedding", None, ())


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"logit_scale": 0.5}, "'logit_scale' (0.5)"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (LLAMA, {"final_logit_softcapping": 30}, "final_logit_softcapping"),
        (LLAMA, {"attention_multiplier": 0.015625}, "attention_multiplier"),
        (LLAMA, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
        (LLAMA, {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}, "'logits_scaling'"),
        (LLAMA, {"clip_qkv": 8.0}, "clip_qkv"),
        (LLAMA, {"is_causal": False}, "'is_causal' (False)"),
        (LLAMA, {"use_rope": False}, "use_rope"),
        (LLAMA, {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
        (LLAMA, {"rotary_dim": 64}, "rotary_dim"),
        (LLAMA, {"use_qk_norm": True}, "use_qk_norm"),
        (LLAMA, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        (LLAMA, {"moe_intermediate_size": 512}, "moe_intermediate_size"),
        (LLAMA, {"some_new_setting": 2}, "'some_new_setting' (2)"),
        (LLAMA, {"sliding_window": 512}, "sliding_window 512"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
        (LLAMA, {"layer_types": ["full_attention"] * 31}, "names 31 layers"),
        (LLAMA, {"layer_types": ["chunked_attention"] * 32}, "chunked_attention"),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "long_factor": [1.0]}},
            "rope_scaling.long_factor",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_type": "yarn"}}, "disagree"),
        ({**LLAMA, "model_type": "mistral", "architectures": None}, {"attention_bias": True}, "attention_bias"),
        (
            {**LLAMA, "model_type": "mistral", "architectures": None},
            {"sliding_window": 8, "layer_types": ["full_attention"] * 16 + ["sliding_attention"] * 16},
            "some of the layers",
        ),
        (OPT, {"rope_theta": 10000.0}, "rope_theta"),
        (FALCON_7B, {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        (FALCON_7B, {"sliding_window": 8}, "sliding_window"),
        (FALCON_7B, {"n_embed": 4545}, "disagree"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(base: Any, changes: dict[str, Any], named: str) -> None:
    config_from_hf(base)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        config_from_hf({**base, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_scale": 1.0, "attn_logit_softcapping": None, "final_logit_softcapping": 0.0, "clip_qkv": None},
        {"attention_multiplier": 128**-0.5, "query_pre_attn_scalar": 128, "embedding_multiplier": 1, "is_causal": True},
        {"no_rope_layers": [1] * 32, "use_qk_norm": False, "num_experts": 0, "n_shared_experts": 0, "mlp_bias": None},
        {"sliding_window": 0}, {"sliding_window": None}, {"sliding_window": 4096},
        {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 28},
        {"layer_types": ["full_attention"] * 32, "head_dim": 128, "partial_rotary_factor": 1.0},
        {"rope_scaling": {"rope_type": "default", "factor": 1.0}, "original_max_position_embeddings": 4096},
        {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
        {"some_new_setting": None, "some_new_switch": False, "some_new_list": []},
    ],
)  # fmt: skip
def test_settings_without_effect_are_taken(changes: dict[str, Any]) -> None:
    assert config_from_hf({**LLAMA, **changes}) == config_from_hf(LLAMA)


class _Everything:
    def __contains__(self, name: object) -> bool:
        return not str(name).endswith("_scale")  # of packed weights


@pytest.mark.parametrize("name", {**zoo(), **expert_zoo()})
def test_every_tensor_of_every_family_has_a_name(name: str) -> None:
    config = {**zoo(), **expert_zoo()}[name]
    found = [hf_source(config, spec.name, 1 if spec.stacked else None, _Everything()) for spec in tensor_specs(config)]
    several = {"router": 2} if config.shared_gate else {}  # the shared FFN's gate is a row of the router
    assert [len(source.names) for source in found] == [several.get(spec.name, 1) for spec in tensor_specs(config)]
    assert not any("{" in name for source in found for name in source.names)
    assert set(FAMILIES) == {config.family for config in (*zoo().values(), *expert_zoo().values())}


def test_of_a_gemma_that_sees_images_the_rest_is_read() -> None:
    refuse_unread_tensors(
        ["vision_tower.vision_model.head.weight", "model.multi_modal_projector.mm_soft_emb_norm.weight"]
    )
    with pytest.raises(ValueError, match=r"language_model\.model\.layers\.9\."):
        refuse_unread_tensors(["language_model.model.layers.9.mlp.up_proj.weight"])
    config = zoo()["gemma3"]
    for prefix in ("model.", "language_model.model.", "model.language_model."):
        name = f"{prefix}layers.1.post_attention_layernorm.weight"
        assert hf_source(config, "attention_post_norm.weight", 1, {name}).names == (name,)


def test_with_activation() -> None:
    config = config_from_hf(LLAMA)
    assert with_activation(config, "relu") == replace(config, activation="relu")
    assert with_activation(config, "fatrelu").activation_threshold == 0.01
    shifted = with_activation(config, "fatrelu", 0.2)
    assert with_activation(shifted, "fatrelu").activation_threshold == 0.2
    assert with_activation(shifted, "silu") == config
    with pytest.raises(ValueError, match="'mish' is not supported"):
        with_activation(config, "mish")
    with pytest.raises(ValueError, match="only fatrelu has a threshold"):
        with_activation(config, "relu", 0.1)
    with pytest.raises(ValueError, match="from 0 up"):
        with_activation(config, "fatrelu", float("nan"))
    with pytest.raises(ValueError, match="gated"):
        with_activation(config_from_hf(OPT), "drelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 1.0}, "rope theta must be above 1"),
        ({"rotated": 130}, "rope.rotated must be even and at most 128, found 130"),
        ({"rotated": 3}, "rope.rotated must be even"),
        ({"factor": 0.0}, "factor above 0"),
        ({"scaling": "llama3"}, r"rope\.original_max_position must lie in 1"),
        ({"scaling": "llama3", "original_max_position": 8, "high_freq_factor": 1.0}, "high_freq_factor must be above"),
        ({"scaling": "yarn", "original_max_position": 8, "beta_slow": 0.0}, "beta_fast must not be below"),
        ({"scaling": "su"}, r"rope\.scaling must be one of none, linear, llama3, yarn, found 'su'"),
    ],
)
def test_rope_that_cannot_be_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    config = config_from_hf(LLAMA).to_dict()
    config["rope"] |= changes
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(config)


def test_a_model_stays_what_it_was() -> None:
    """Predictors know their model by a hash of these fields: a field that says nothing new must not be among them."""
    later = {"local_rope", "score_scale", "post_norms", "sub_norms"}
    config = config_from_hf(LLAMA)
    stored = config.to_dict()
    assert not later & set(stored) and "rotated" not in stored["rope"]
    assert ModelConfig.from_dict(stored) == config
    said = replace(config, sub_norms=True, score_scale=0.5).to_dict()
    assert later & set(said) == {"sub_norms", "score_scale"} and ModelConfig.from_dict(said).sub_norms
