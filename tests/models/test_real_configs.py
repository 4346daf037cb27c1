"""Settings of published checkpoints, with all the fields that they have beyond what is read: each one is taken."""

from dataclasses import asdict
from typing import Any

import pytest
from published_settings import sizes

from svdengine.models import config_from_hf

_COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "tie_word_embeddings": False,
}
_LLAMA = {**_COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_LLAMA |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
_QWEN = {**_COMMON, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "rms_norm_eps": 1e-06}
_MISTRAL = {**_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
_FALCON = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "alibi": False, "bias": False, "bos_token_id": 11}
_FALCON |= {"eos_token_id": 11, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "torch_dtype": "bfloat16"}
_FALCON |= {
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 65024,
    "architectures": ["FalconForCausalLM"],
}
_FALCON |= {
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "model_type": "falcon",
    "parallel_attn": True,
}

_GEMMA3 = {"attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2}
_GEMMA3 |= {
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
}
_GEMMA3 |= {"hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "pad_token_id": 0}
_GEMMA3 |= {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_scaling": None, "rope_theta": 1e6}
_GEMMA3 |= {"torch_dtype": "bfloat16", "transformers_version": "4.55.0.dev0"}


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 2": (
        {**_LLAMA, **sizes(4096, 11008, 32, 32, 32, 32000, 4096), "rms_norm_eps": 1e-5, "rope_scaling": None,
         "_name_or_path": "meta-llama/Llama-2-7b-hf", "max_length": 4096, "pad_token_id": 0, "head_dim": 128},
        {"rope": "none"},
    ),
    "Llama 3.1": (
        {**_LLAMA, **sizes(4096, 14336, 32, 32, 8, 128256, 131072), "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 8192}, "eos_token_id": [128001, 128008],
         "unsloth_fixed": True, "unsloth_version": "2025.1.5", "quantization_config": None},
        {"rope": "llama3"},
    ),
    "SmolLM2": (
        {**_LLAMA, **sizes(576, 1536, 30, 9, 3, 49152, 8192), "rms_norm_eps": 1e-5, "rope_theta": 100000,
         "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "tie_word_embeddings": True,
         "pad_token_id": 2, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
        {"rope": "none", "tied_embeddings": True},
    ),
    "Mistral 7B v0.1": (
        {**_MISTRAL, **sizes(4096, 14336, 32, 32, 8, 32000, 32768), "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "sliding_window": 4096},
        {"sliding_window": 4096},
    ),
    "Mistral Nemo": (
        {**_MISTRAL, **sizes(5120, 14336, 40, 32, 8, 131072, 1024000), "head_dim": 128, "rms_norm_eps": 1e-5,
         "rope_theta": 1000000.0, "sliding_window": None},
        {"sliding_window": 0, "head_dim": 128},
    ),
    "Qwen2": (
        {**_QWEN, **sizes(3584, 18944, 28, 28, 4, 152064, 32768), "architectures": ["Qwen2ForCausalLM"],
         "model_type": "qwen2", "max_window_layers": 28, "rope_theta": 1000000.0, "sliding_window": 131072,
         "use_sliding_window": False},
        {"sliding_window": 0, "qkv_bias": True},
    ),
    "Qwen2.5 with mrope switched off": (
        {**_QWEN, **sizes(896, 4864, 24, 14, 2, 151936, 32768), "architectures": ["Qwen2ForCausalLM"],
         "model_type": "qwen2", "max_window_layers": 21, "rope_theta": 1000000.0, "sliding_window": 32768,
         "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False},
        {"tied_embeddings": True},
    ),
    "Qwen3": (
        {**_QWEN, **sizes(1024, 3072, 28, 16, 8, 151936, 40960), "architectures": ["Qwen3ForCausalLM"],
         "attention_bias": False, "head_dim": 128, "max_window_layers": 28, "model_type": "qwen3", "rope_scaling": None,
         "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False},
        {"qk_norm": True},
    ),
    "MiniCPM 2B": (
        {**_COMMON, **sizes(2304, 5760, 40, 36, 36, 122753, 4096), "_name_or_path": "openbmb/CPM-2B",
         "architectures": ["MiniCPMForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}, "rms_norm_eps": 1e-05, "rope_scaling": None,
         "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4, "attention_bias": False, "pretraining_tp": 1},
        {"embedding_scale": 12.0},
    ),
    "MiniCPM-S": (
        {**_COMMON, **sizes(1536, 3840, 52, 24, 8, 73440, 4096), "_name_or_path": "SparseLLM/ProSparse-MiniCPM-1B-sft",
         "architectures": ["MiniCPMForCausalLM"], "hidden_act": "fatrelu", "hidden_act_param": 0.03, "pad_token_id": 0,
         "rms_norm_eps": 1e-05, "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4, "attention_bias": False},
        {"activation_threshold": 0.03},
    ),
    "ProSparse": (
        {**_LLAMA, **sizes(4096, 11008, 32, 32, 32, 32000, 4096), "architectures": ["SparseLlamaForCausalLM"],
         "model_type": "sparsellama", "auto_map": {"AutoModel": "modeling_sparsellama.SparseLlamaModel"},
         "hidden_act": "fatrelu", "hidden_act_param": 0.01, "rms_norm_eps": 1e-5, "rope_scaling": None},
        {"activation": "fatrelu"},
    ),
    "TurboSparse": (
        {**_COMMON, **sizes(4096, 14336, 32, 32, 8, 32064, 32768), "architectures": ["BambooForCausalLM"],
         "auto_map": {"AutoConfig": "configuration_bamboo.BambooConfig"}, "model_type": "bamboo", "hidden_act": "relu",
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
        {"activation": "drelu"},
    ),
    "OPT": (
        {"_name_or_path": "facebook/opt-1.3b", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
         "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
         "bos_token_id": 2,
         "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 8192, "hidden_size": 2048,
         "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
         "num_attention_heads": 32, "num_hidden_layers": 24, "pad_token_id": 1, "prefix": "</s>",
         "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
         "word_embed_proj_dim": 2048, "output_projection": None},
        {"learned_positions": True},
    ),
    "Falcon 7B": (
        {**_FALCON, "apply_residual_connection_post_layernorm": False, "hidden_size": 4544, "multi_query": True,
         "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32},
        {"kv_head_count": 1, "shared_norm": True},
    ),
    "Falcon 40B": (
        {**_FALCON, "hidden_size": 8192, "new_decoder_architecture": True, "num_attention_heads": 128,
         "num_hidden_layers": 60, "num_kv_heads": 8},
        {"kv_head_count": 8, "shared_norm": False},
    ),
    "AFM-4.5B": (
        {**_COMMON, **sizes(2560, 18432, 36, 20, 4, 128005, 65536), "architectures": ["ArceeForCausalLM"],
         "model_type": "arcee", "attention_bias": False, "mlp_bias": False, "head_dim": 128, "hidden_act": "relu2",
         "bos_token_id": 128000, "eos_token_id": 128003, "pad_token_id": 128004, "rms_norm_eps": 1e-5,
         "rope_theta": 10000.0,
         "rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 20.0, "beta_fast": 32.0, "beta_slow": 1.0,
                          "mscale": 1.0, "original_max_position_embeddings": 4096}},
        {"rope": "yarn", "gated": False, "activation": "relu2", "norm": "rms", "head_dim": 128},
    ),
    "Nemotron-Mini-4B": (
        {**_COMMON, **sizes(3072, 9216, 32, 24, 8, 256000, 4096), "architectures": ["NemotronForCausalLM"],
         "model_type": "nemotron", "attention_bias": False, "mlp_bias": False, "head_dim": 128, "hidden_act": "relu2",
         "bos_token_id": 2, "eos_token_id": 3, "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000},
        {"rotated": 64, "gated": False, "activation": "relu2", "norm": "layer"},
    ),
    "Minitron-8B": (
        {**_COMMON, **sizes(4096, 16384, 32, 48, 8, 256000, 4096), "architectures": ["NemotronForCausalLM"],
         "model_type": "nemotron", "attention_bias": False, "mlp_bias": False, "head_dim": 128, "hidden_act": "relu2",
         "bos_token_id": 2, "eos_token_id": 3, "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "rope_theta": 10000},
        {"rotated": 64, "head_dim": 128, "hidden_size": 4096, "head_count": 48},
    ),
    "Gemma 3 270M": (
        {**_GEMMA3, **sizes(640, 2048, 18, 4, 1, 262144, 32768), "architectures": ["Gemma3ForCausalLM"],
         "model_type": "gemma3_text", "_sliding_window_pattern": 6, "use_bidirectional_attention": False,
         "sliding_window": 512, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
        {"sliding_window_layers": tuple(i for i in range(18) if i % 6 != 5), "score_scale": 1.0},
    ),
    "Gemma 3 1B": (
        {**_GEMMA3, **sizes(1152, 6912, 26, 4, 1, 262144, 32768), "architectures": ["Gemma3ForCausalLM"],
         "model_type": "gemma3_text", "cache_implementation": "hybrid", "sliding_window_pattern": 6,
         "sliding_window": 512},
        {"activation": "gelu_tanh", "gated": True, "qk_norm": True, "post_norms": True, "tied_embeddings": True},
    ),
    "Gemma 3 4B": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
         "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
         "mm_tokens_per_image": 256, "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                         "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                         "sliding_window": 1024},
         "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "num_hidden_layers": 27}},
        {"rope": "linear", "head_count": 8, "kv_head_count": 4, "head_dim": 256, "vocab_size": 262208,
         "sliding_window": 1024, "hidden_size": 2560},
    ),
    "BitNet b1.58 2B4T": (
        {**_COMMON, **sizes(2560, 6912, 30, 20, 5, 128256, 4096), "architectures": ["BitNetForCausalLM"],
         "model_type": "bitnet", "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"}, "hidden_act": "relu2",
         "bos_token_id": 128000, "eos_token_id": 128001, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
         "tie_word_embeddings": True,
         "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear",
                                 "quantization_mode": "offline"}},
        {"activation": "relu2", "gated": True, "sub_norms": True, "tied_embeddings": True, "kv_head_count": 5},
    ),
    "Jais-2-8B": (
        {**_COMMON, **sizes(3328, 26624, 32, 26, 26, 150272, 8192), "architectures": ["Jais2ForCausalLM"],
         "model_type": "jais2", "attention_bias": True, "mlp_bias": True, "head_dim": 128, "hidden_act": "relu2",
         "bos_token_id": 0, "eos_token_id": 150024, "layer_norm_eps": 1e-5, "rope_theta": 500000.0},
        {"gated": False, "activation": "relu2", "norm": "layer", "ffn_bias": True, "qkv_bias": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_is_taken(name: str) -> None:
    settings, expected = CONFIGS[name]
    config = config_from_hf(settings)
    rope = {"rope": config.rope.scaling, "rotated": config.rope.rotated} if config.rope else {"rope": None}
    found: dict[str, Any] = asdict(config) | rope
    assert {key: found[key] for key in expected} == expected


GENERATION: dict[str, Any] = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False, "dtype": None,
    "use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False, "is_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False,
    "tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False,
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
    "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "finetuning_task": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "tokenizer_class": None, "prefix": None, "sep_token_id": None,
    "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
}  # fmt: skip


def test_what_older_transformers_wrote_into_every_config_is_taken() -> None:
    settings, _ = CONFIGS["Llama 3.1"]
    assert config_from_hf(GENERATION | settings) == config_from_hf(settings)
