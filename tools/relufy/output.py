"""Write the student as a Hugging Face folder, with a card that says how it was made and how good it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from svdengine.converters.checkpoint import Checkpoint, read_json
from svdengine.models.config import ModelConfig, Rope
from svdengine.models.family import split_suffix
from svdengine.models.naming import LLAMA_NAMES
from svdengine.models.tensors import tensor_specs
from svdengine.tools.relufy.decoder import Decoder, parameter
from svdengine.tools.relufy.report import Report, card

# What of a folder belongs to the tokenizer and to how the model is used; weights and config are written anew.
_KEPT = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja"),
)
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_model(student: Decoder, checkpoint: Checkpoint, threshold: float, report: Report, folder: Path) -> None:
    """Write weights (float16), config, tokenizer and card. `folder` appears only when all is written."""
    partial = folder.with_name(folder.name + ".writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_tensors(student), partial / "model.safetensors", metadata={"format": "pt"})
    config = _config(checkpoint)
    config |= {"hidden_act": "fatrelu", "hidden_act_param": threshold} if threshold else {"hidden_act": "relu"}
    config["dtype"] = "float16"
    config.pop("torch_dtype", None)
    _write_json(partial / "config.json", config)
    if checkpoint.path.is_dir():
        for name in _KEPT:
            if (checkpoint.path / name).exists():
                shutil.copyfile(checkpoint.path / name, partial / name)
    else:
        _write_tokenizer(checkpoint, partial)
    (partial / "README.md").write_text(card(report), encoding="utf-8")
    partial.rename(folder)


def tensor_names(config: ModelConfig) -> dict[tuple[str, int | None], str]:
    """(canonical tensor, layer) -> the name that transformers gives it."""
    names = {}
    for spec in tensor_specs(config):
        stem, suffix = split_suffix(spec.name)
        prefix = "" if stem == "lm_head" else "model."
        for layer in range(config.layer_count) if spec.stacked else (None,):
            names[spec.name, layer] = prefix + LLAMA_NAMES.stems[stem][0].format(layer=layer) + suffix
    return names


def _tensors(student: Decoder) -> dict[str, torch.Tensor]:
    return {
        name: parameter(student, tensor, layer).detach().to("cpu", torch.float16).contiguous()
        for (tensor, layer), name in tensor_names(student.config).items()
    }


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.path.is_dir():
        return read_json(checkpoint.path / "config.json")
    config, info = checkpoint.config, checkpoint.tokenizer.info
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias} if config.family == "llama" else {}
    window = config.sliding_window or None
    return {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layer_count,
        "num_attention_heads": config.head_count,
        "num_key_value_heads": config.kv_head_count,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": info.bos_id,
        "eos_token_id": info.eos_id,
        **biases,
        **({"sliding_window": window, **_sliding(config)} if window else {}),
        **_rope(config.rope),
    }


def _sliding(config: ModelConfig) -> dict[str, Any]:
    slides = [
        "sliding_attention" if i in config.sliding_window_layers else "full_attention"
        for i in range(config.layer_count)
    ]
    return {"use_sliding_window": True, "layer_types": slides}


def _rope(rope: Rope | None) -> dict[str, Any]:
    """Settings of both generations of transformers: the older reads rope_theta and rope_scaling."""
    assert rope is not None
    if rope.scaling == "none":
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scaling["attention_factor"] = rope.attention_factor
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer that was rebuilt from a GGUF file."""
    stored = checkpoint.tokenizer
    info = stored.info
    (folder / "tokenizer.json").write_bytes(stored.data)
    texts = {id_: text for text, id_ in info.special_tokens.items()}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"add_bos_token": info.add_bos, "add_eos_token": info.add_eos}
    for role, id_ in (("bos", info.bos_id), ("eos", info.eos_id), ("pad", info.pad_id)):
        if id_ is not None and id_ in texts:
            settings[f"{role}_token"] = texts[id_]
    if stored.chat_template is not None:
        settings["chat_template"] = stored.chat_template
    _write_json(folder / "tokenizer_config.json", settings)
    generation = {**checkpoint.generation, "bos_token_id": info.bos_id, "eos_token_id": list(info.eos_token_ids)}
    _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
