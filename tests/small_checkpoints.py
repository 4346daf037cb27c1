"""Checkpoints of a small random model, as a Hugging Face folder and as a GGUF file."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from model_zoo import random_weights, zoo
from numpy.typing import NDArray
from tokenizers import AddedToken, pre_tokenizers

from svdengine.converters.byte_level_bpe import PRE_TOKENIZERS, build_byte_level
from svdengine.models.config import ModelConfig
from svdengine.models.family import split_suffix
from svdengine.models.naming import GGUF_STEMS, LLAMA_NAMES
from svdengine.models.tensors import tensor_specs

CONFIG = replace(zoo()["llama"], vocab_size=300, activation="relu", layer_count=3)
SPECIALS = ["<unk>", "<s>", "</s>"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u0120", "w")]
TOKENS = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": CONFIG.vocab_size,
    "hidden_size": CONFIG.hidden_size,
    "intermediate_size": CONFIG.ffn_size,
    "num_hidden_layers": CONFIG.layer_count,
    "num_attention_heads": CONFIG.head_count,
    "num_key_value_heads": CONFIG.kv_head_count,
    "head_dim": CONFIG.head_dim,
    "max_position_embeddings": CONFIG.max_position,
    "hidden_act": "relu",
    "rms_norm_eps": CONFIG.norm_eps,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def checkpoint_weights(config: ModelConfig = CONFIG) -> dict[str, NDArray]:
    """Canonical weights that bfloat16 and float16 hold exactly."""
    return {name: np.round(w * 16) / 16 for name, w in random_weights(config).items()}


def hf_tensors(weights: dict[str, NDArray], config: ModelConfig = CONFIG) -> dict[str, NDArray]:
    return _named(weights, config, {stem: names[0] for stem, names in LLAMA_NAMES.stems.items()}, "model.")


def gguf_tensors(weights: dict[str, NDArray], config: ModelConfig = CONFIG) -> dict[str, NDArray]:
    tensors = _named(weights, config, {stem: names[0] for stem, names in GGUF_STEMS.items()}, "")
    for name, w in tensors.items():
        if "attn_q." in name or "attn_k." in name:  # rope on neighbouring dimensions
            heads = config.head_count if "attn_q" in name else config.kv_head_count
            tensors[name] = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
    return tensors


def _named(weights: dict[str, NDArray], config: ModelConfig, stems: dict[str, str], prefix: str) -> dict[str, NDArray]:
    tensors = {}
    for spec in tensor_specs(config):
        stem, suffix = split_suffix(spec.name)
        for layer in range(config.layer_count) if spec.stacked else [None]:
            w = weights[spec.name] if layer is None else weights[spec.name][layer]
            name = (prefix if stem != "lm_head" else "") + stems[stem].format(layer=layer) + suffix
            tensors[name] = np.ascontiguousarray(w.T if spec.name == "down_T" else w, np.float32)
    return tensors


def tokenizer_json() -> str:
    vocabulary = {text: index for index, text in enumerate(TOKENS)}
    added = [AddedToken(text, special=True, normalized=False) for text in SPECIALS]
    return build_byte_level(vocabulary, MERGES, PRE_TOKENIZERS["smollm"], added).to_str()


def write_hf(folder: Path, tensors: dict[str, NDArray] | None = None, **config: Any) -> Path:
    """A folder with everything; `config` changes config.json."""
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(hf_tensors(checkpoint_weights()) if tensors is None else tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**HF_CONFIG, **config}))
    (folder / "tokenizer.json").write_text(tokenizer_json())
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": [2, 0]}))
    return folder


def gguf_fields() -> dict[str, Any]:
    """Fields of a GGUF file of CONFIG; those of the tokenizer included."""
    return {
        "llama.block_count": CONFIG.layer_count,
        "llama.context_length": CONFIG.max_position,
        "llama.embedding_length": CONFIG.hidden_size,
        "llama.feed_forward_length": CONFIG.ffn_size,
        "llama.attention.head_count": CONFIG.head_count,
        "llama.attention.head_count_kv": CONFIG.kv_head_count,
        "llama.attention.layer_norm_rms_epsilon": CONFIG.norm_eps,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": CONFIG.head_dim,
        "llama.hidden_act": "relu",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(path: Path, tensors: dict[str, Any], architecture: str = "llama", **fields: Any) -> Path:
    """A GGUF file of CONFIG. A tensor is an array, or (bytes, GGMLQuantizationType); a field of None is left out."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**gguf_fields(), **fields}.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
