"""Every published sparse model by the settings that it is published with: what it computes, or why it is refused.

None may come out with another activation than it was trained with.
"""

from __future__ import annotations

from typing import Any

import pytest
from published_settings import (
    FALCON_40B,
    LLAMA_FORMAT,
    MINICPM_S,
    OPT,
    PROSPARSE,
    RELULLAMA,
    SAKANA_2B,
    SMALLTHINKER_4B,
    SPARSE_QWEN2,
    TURBOSPARSE,
    TURBOSPARSE_MIXTRAL,
    sizes,
)

from svdengine.models import ModelConfig, config_from_gguf, config_from_hf
from svdengine.models.known import CASES, KnownCase
from svdengine.models.settings import activation_text


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


# Name -> settings, family and activation.
FOLDERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "ProSparse-LLaMA2-7B": (PROSPARSE, "llama", "fatrelu:0.01"),
    "ProSparse-LLaMA2-13B": (PROSPARSE | sizes(5120, 13824, 40, 40, 40, 32000, 4096), "llama", "fatrelu:0.01"),
    "ProSparse without architectures": (without(PROSPARSE, "architectures"), "llama", "fatrelu:0.01"),
    "ProSparse without an activation": (without(PROSPARSE, "hidden_act", "hidden_act_param"), "llama", "fatrelu:0.01"),
    "MiniCPM-S-1B-sft": (MINICPM_S, "minicpm", "fatrelu:0.03"),
    "MiniCPM-S in Llama's format": (LLAMA_FORMAT, "llama", "fatrelu:0.03"),
    "MiniCPM-1B": (without(MINICPM_S, "hidden_act_param", "_name_or_path") | {"hidden_act": "silu"}, "minicpm", "silu"),
    "ReluLLaMA-7B": (RELULLAMA, "llama", "relu"),
    "ReluLLaMA-70B": (RELULLAMA | sizes(8192, 28672, 80, 64, 8, 32000, 4096), "llama", "relu"),
    "TurboSparse-Mistral-Instruct": (TURBOSPARSE, "bamboo", "drelu"),
    "Bamboo-base": (TURBOSPARSE | {"vocab_size": 32000}, "bamboo", "drelu"),
    "SparseQwen2-7B": (SPARSE_QWEN2, "qwen2", "drelu"),
    "SparseQwen2, fine-tuned to another size": (
        SPARSE_QWEN2 | {"num_hidden_layers": 20, "_name_or_path": "Tiiny/SparseQwen2-7B"}, "qwen2", "drelu",
    ),
    "a Qwen2 that was made ReGLU": (SPARSE_QWEN2 | sizes(896, 4864, 24, 14, 2, 151936, 32768), "qwen2", "relu"),
    "Qwen2-7B": (SPARSE_QWEN2 | {"hidden_act": "silu", "rope_theta": 1e6}, "qwen2", "silu"),
    "Sakana SparseLM2B": (SAKANA_2B, "llama", "relu"),
    "Sakana without architectures": (without(SAKANA_2B, "architectures"), "llama", "relu"),
    "Falcon-40B": (FALCON_40B, "falcon", "gelu"),
    "ReluFalcon-40B with its name": (
        FALCON_40B | {"_name_or_path": "SparseLLM/ReluFalcon-40B", "torch_dtype": "float32"}, "falcon", "relu",
    ),
    "ReluFalcon-40B with a field": (FALCON_40B | {"hidden_act": "relu", "torch_dtype": "float32"}, "falcon", "relu"),
    "TurboSparse-Mixtral": (TURBOSPARSE_MIXTRAL, "mixtral", "drelu"),
    "SmallThinker-4B": (SMALLTHINKER_4B, "smallthinker", "relu"),
    "OPT-1.3B": (OPT, "opt", "relu"),
    "sparsing-law": (
        without(MINICPM_S, "_name_or_path", "hidden_act_param") | {"hidden_act": "relu"}, "minicpm", "relu",
    ),
}  # fmt: skip

# Name -> settings, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ReluFalcon-40B without a name or a field": (
        FALCON_40B | {"torch_dtype": "float32"}, "--activation relu or --activation gelu",
    ),
    "SparseLlamaForCausalLM of nobody": (
        SAKANA_2B | {"model_type": "llama"}, "--activation fatrelu:0.01 or --activation relu",
    ),
    "Sakana without gates": (SAKANA_2B | {"sparsity_gated_mlp": False}, "sparsity_gated_mlp"),
    "shiftrelu": (PROSPARSE | {"hidden_act": "shiftrelu"}, "the activation 'shiftrelu' is not supported"),
    "Nemotron-H-8B": (
        sizes(4096, 21504, 52, 32, 8, 131072, 8192) | {"architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h", "mlp_hidden_act": "relu2"}, "NemotronHForCausalLM .*not supported",
    ),
    "PLM-1.8B": (
        sizes(2048, 8192, 32, 16, 16, 151936, 4096) | {"architectures": ["PLMForCausalLM"], "model_type": "plm",
        "hidden_act": "relu2"}, "PLMForCausalLM .*not supported",
    ),
    "persimmon-8b": (
        sizes(4096, 16384, 36, 64, 64, 262144, 16384) | {"architectures": ["PersimmonForCausalLM"],
        "model_type": "persimmon", "hidden_act": "relu2", "partial_rotary_factor": 0.5}, "Persimmon.*not supported",
    ),
    "nanochat-d32": (
        sizes(2048, 8192, 32, 16, 16, 65536, 2048) | {"architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat", "hidden_act": "relu2"}, "NanoChatForCausalLM .*not supported",
    ),
    "Gemma 3n": (
        {"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"}, "Gemma3n.*not supported",
    ),
    "RWKV-7": ({"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7"}, "RWKV7ForCausalLM .*not supported"),
    "BlockFFN": ({"architectures": ["BlockFFNForCausalLM"], "num_experts": 80}, "mixture-of-experts"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_run_is_what_was_trained(name: str) -> None:
    settings, family, activation = FOLDERS[name]
    found = config_from_hf(settings)
    assert (found.family, activation_text(found)) == (family, activation)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_what_to_do(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        config_from_hf(settings)


@pytest.mark.parametrize("name", [name for name, (_, message) in REFUSED.items() if "--activation" in message])
def test_what_the_refusal_says_to_add_is_taken(name: str) -> None:
    settings, _ = REFUSED[name]
    assert config_from_hf(settings, "relu").activation == "relu"


@pytest.mark.parametrize("name", FOLDERS)
def test_what_the_user_says_goes_before_all(name: str) -> None:
    notes: list[str] = []
    assert config_from_hf(FOLDERS[name][0], "relu2", ["ReluFalcon-40B", "SparseQwen2"], notes).activation == "relu2"
    assert notes == []


def test_a_folder_is_known_by_its_name_too() -> None:
    found = config_from_hf(FALCON_40B | {"torch_dtype": "float32"}, names=["ReluFalcon-40B"])
    assert found.activation == "relu"


def test_a_note_says_what_was_settled_and_why() -> None:
    notes: list[str] = []
    config_from_hf(SPARSE_QWEN2, notes=notes)
    assert len(notes) == 1
    for part in ("SparseQwen2-7B", "says relu", "computes drelu", "model card", "--activation relu"):
        assert part in notes[0]
    notes.clear()
    config_from_hf(RELULLAMA, notes=notes)
    assert notes == []


def gguf(architecture: str, config: dict[str, Any], **general: str) -> dict[str, Any]:
    """Metadata as llama.cpp's converter writes it of a config.json: without an activation."""
    names = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length"}
    names |= {"num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count"}
    names |= {"num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length"}
    names |= {"rope_theta": "rope.freq_base", "num_kv_heads": "attention.head_count_kv"}
    fields = {f"{architecture}.{ours}": config[theirs] for theirs, ours in names.items() if theirs in config}
    if architecture == "falcon":
        fields |= {"falcon.feed_forward_length": 32768, "falcon.attention.layer_norm_epsilon": 1e-5}
    return fields | {"general.architecture": architecture} | {f"general.{key}": text for key, text in general.items()}


def read(fields: dict[str, Any], activation: str | None = None, file: str = "ggml-model-q4.gguf") -> ModelConfig:
    return config_from_gguf(fields, {"token_embd.weight", "output.weight"}, 32000, activation, names=[file])


@pytest.mark.parametrize(
    ("fields", "activation"),
    [
        (gguf("llama", PROSPARSE, name="prosparse-llama-2-7b"), "fatrelu:0.01"),
        (gguf("llama", PROSPARSE, name="Prosparse Llama 2 7b Q4"), "fatrelu:0.01"),
        (gguf("llama", PROSPARSE, name="LLaMA v2"), "silu"),  # Llama 2 itself looks so; measuring tells
        (gguf("llama", RELULLAMA, name="ReluLLaMA 7B"), "relu"),
        (gguf("llama", RELULLAMA, **{"base_model.0.repo_url": "hub/SparseLLM/ReluLLaMA-7B"}), "relu"),
        (gguf("llama", LLAMA_FORMAT, name="ProSparse MiniCPM 1B sft llama format"), "fatrelu:0.03"),
        (gguf("llama", TURBOSPARSE, name="TurboSparse-Mistral-Instruct"), "drelu"),
        (gguf("qwen2", SPARSE_QWEN2, name="model"), "drelu"),  # by its shape and theta
        (gguf("qwen2", SPARSE_QWEN2 | {"rope_theta": 1e6}, name="Qwen2 7B"), "silu"),
        (gguf("qwen2", SPARSE_QWEN2 | {"rope_theta": 1e6}, name="SparseQwen2 7B"), "drelu"),
        (gguf("minicpm", MINICPM_S, name="MiniCPM-S-1B-sft"), "fatrelu:0.03"),
        (gguf("minicpm", MINICPM_S, name="ProSparse MiniCPM 1B sft"), "fatrelu:0.03"),
        (gguf("minicpm", MINICPM_S, name="MiniCPM-1B-sft-bf16"), "silu"),
        (gguf("falcon", FALCON_40B, name="Falcon"), "gelu"),
        (gguf("falcon", FALCON_40B, name="falcon-40b-relu"), "relu"),
    ],
)
def test_a_gguf_file_is_known_by_its_name_or_shape(fields: dict[str, Any], activation: str) -> None:
    assert activation_text(read(fields)) == activation


def test_a_gguf_file_is_known_by_its_file_name() -> None:
    fields = gguf("llama", PROSPARSE, name="LLaMA v2")
    assert activation_text(read(fields, file="prosparse-llama-2-7b.Q4_K_M.gguf")) == "fatrelu:0.01"


def test_a_gguf_file_of_either_minicpm_1b_is_refused() -> None:
    fields = gguf("minicpm", MINICPM_S, name="Model")
    with pytest.raises(ValueError, match=r"add --activation fatrelu:0\.03 or --activation silu"):
        read(fields)
    assert activation_text(read(fields, "fatrelu:0.03")) == "fatrelu:0.03"
    assert activation_text(read(fields, "fatrelu")) == "fatrelu:0.03"  # the threshold of the one that has it
    assert read(fields, "silu").activation == "silu"


@pytest.mark.parametrize("key", ["hidden_act", "hidden_activation"])
def test_a_key_for_the_activation_is_read(key: str) -> None:
    fields = gguf("llama", PROSPARSE, name="prosparse") | {f"llama.{key}": "relu"}
    assert activation_text(read(fields)) == "relu"
    assert read(gguf("llama", RELULLAMA) | {f"llama.{key}": "gelu_pytorch_tanh"}).activation == "gelu_tanh"
    with pytest.raises(ValueError, match="the activation 'swish9' is not supported"):
        read(fields | {f"llama.{key}": "swish9"})


def test_two_keys_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="disagree"):
        read(gguf("llama", PROSPARSE) | {"llama.hidden_act": "relu", "llama.hidden_activation": "silu"})


@pytest.mark.parametrize("text", ["fatrelu:much", "fatrelu:-1", "fatrelu:nan", "relu:0.5", "fatrelu:", ":0.1"])
def test_a_threshold_must_be_a_number_of_fatrelu(text: str) -> None:
    with pytest.raises(ValueError, match=r"threshold|0\.03"):
        config_from_hf(RELULLAMA, text)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.model}")
def test_every_case_names_its_source_and_something_that_identifies_it(case: KnownCase) -> None:
    assert case.source and (case.names or case.fields or case.settings)
    for text in case.computes:
        assert config_from_hf(RELULLAMA, text)
    assert set(case.fields) <= set(ModelConfig.__dataclass_fields__) | {"theta"}
