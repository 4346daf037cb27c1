"""Llama 2 and 3, SmolLM2, TinyLlama, ReluLLaMA, and ProSparse-LLaMA2 (whose `hidden_act` is fatrelu)."""

from __future__ import annotations

from svdengine.models.config import ModelConfig
from svdengine.models.family import Family, GgufFamily
from svdengine.models.naming import GGUF_NEIGHBOURS, LLAMA_NAMES
from svdengine.models.settings import Settings, flag, gated_config
from svdengine.models.windows import refuse_window


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a Llama config.json."""
    refuse_window(settings)
    attention_bias = flag(settings, "attention_bias", False)
    return gated_config(
        "llama",
        settings,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        ffn_bias=flag(settings, "mlp_bias", False),
    )


FAMILY = Family(
    name="llama",
    model_types=("llama", "sparsellama", "llama_sparse_relu"),
    architectures=("LlamaForCausalLM", "SparseLlamaForCausalLM"),
    config_from_hf=config_from_hf,
    hf=LLAMA_NAMES,
    gguf=GgufFamily("llama", GGUF_NEIGHBOURS),
    harmless=(
        # Left over in MiniCPM checkpoints that were rewritten as Llama: the weights hold these scales already.
        "scale_emb",
        "scale_depth",
        "dim_model_base",
        "sparsity_l1_coeff",  # of Sakana's training
    ),
)
