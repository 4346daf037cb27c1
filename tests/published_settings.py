"""Settings of published sparse models, typed from their pages: what their config.json says."""

from __future__ import annotations

from typing import Any


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


PROSPARSE = {
    **sizes(4096, 11008, 32, 32, 32, 32000, 4096), "architectures": ["SparseLlamaForCausalLM"],
    "model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "auto_map": {"AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM"},
}  # fmt: skip
MINICPM_S = {
    **sizes(1536, 3840, 52, 24, 8, 73440, 4096), "_name_or_path": "SparseLLM/ProSparse-MiniCPM-1B-sft",
    "architectures": ["MiniCPMForCausalLM"], "hidden_act": "fatrelu", "hidden_act_param": 0.03, "rms_norm_eps": 1e-5,
    "scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4,
}  # fmt: skip
SPARSE_QWEN2 = {
    **sizes(3584, 18944, 28, 28, 4, 152064, 131072), "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
    "hidden_act": "relu", "rope_theta": 10000.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6,
}  # fmt: skip
SAKANA_2B = {
    **sizes(2048, 5632, 38, 32, 32, 49152, 2048), "architectures": ["SparseLlamaForCausalLM"], "head_dim": 64,
    "model_type": "llama_sparse_relu", "hidden_act": "silu", "rope_theta": 1e5, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "sparsity_gated_mlp": True,
    "sparsity_l1_coeff": 2e-5, "transformers_version": "4.56.2",
}  # fmt: skip
TURBOSPARSE = {
    **sizes(4096, 14336, 32, 32, 8, 32064, 32768), "architectures": ["BambooForCausalLM"], "model_type": "bamboo",
    "hidden_act": "relu", "rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-5,
}  # fmt: skip
RELULLAMA = {
    **sizes(4096, 11008, 32, 32, 32, 32000, 2048), "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "hidden_act": "relu", "pad_token_id": 0, "torch_dtype": "float32", "rms_norm_eps": 1e-5,
}  # fmt: skip
FALCON_40B = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60,
    "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True, "parallel_attn": True,
    "bias": False, "alibi": False, "vocab_size": 65024, "torch_dtype": "bfloat16",
}  # fmt: skip
OPT = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "activation_function": "relu", "ffn_dim": 8192,
    "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "max_position_embeddings": 2048,
    "vocab_size": 50272, "word_embed_proj_dim": 2048, "do_layer_norm_before": True,
}  # fmt: skip
LLAMA_FORMAT = MINICPM_S | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu", "hidden_act_param": None,
}  # fmt: skip
SMALLTHINKER_4B = {
    "architectures": ["SmallThinkerForCausalLM"], "model_type": "smallthinker", "hidden_size": 1536,
    "num_hidden_layers": 32, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128,
    "vocab_size": 151936, "moe_num_primary_experts": 32, "moe_num_active_primary_experts": 4,
    "moe_ffn_hidden_size": 768, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
SMALLTHINKER_21B = SMALLTHINKER_4B | {
    "hidden_size": 2560, "num_hidden_layers": 52, "num_attention_heads": 28, "num_key_value_heads": 4,
    "moe_num_primary_experts": 64, "moe_num_active_primary_experts": 6,
}  # fmt: skip
TURBOSPARSE_MIXTRAL = TURBOSPARSE | {
    "architectures": ["TurboSparseMixtralForCausalLM"], "model_type": "turbosparsemixtral", "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
AFM = {
    **sizes(2560, 18432, 36, 20, 4, 128005, 65536), "architectures": ["ArceeForCausalLM"], "model_type": "arcee",
    "head_dim": 128, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON_MINI = {
    **sizes(3072, 9216, 32, 24, 8, 256000, 4096), "architectures": ["NemotronForCausalLM"], "model_type": "nemotron",
    "head_dim": 128, "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
BITNET = {
    **sizes(2560, 6912, 30, 20, 5, 128256, 4096), "architectures": ["BitNetForCausalLM"], "model_type": "bitnet",
    "hidden_act": "relu2", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
