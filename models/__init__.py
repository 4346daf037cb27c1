"""Model families: what a checkpoint calls its settings and tensors, mapped to ModelConfig and canonical tensors."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.models import (
    arcee,
    bamboo,
    bitnet,
    falcon,
    gemma3,
    jais2,
    llama,
    minicpm,
    mistral,
    mixtral,
    nemotron,
    olmoe,
    opt,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smallthinker,
)
from svdengine.models.config import ModelConfig, Rope
from svdengine.models.family import Family, Source
from svdengine.models.gguf_settings import gguf_config, strip_architecture
from svdengine.models.known import settled
from svdengine.models.leftovers import refuse_unread, refuse_unread_tensors
from svdengine.models.naming import scaled, turned_first
from svdengine.models.noted import Noted
from svdengine.models.settings import refuse_experts, refuse_unreadable, texts, with_activation
from svdengine.models.tensors import TensorSpec, tensor_specs

__all__ = [
    "FAMILIES",
    "ModelConfig",
    "Rope",
    "Source",
    "TensorSpec",
    "config_from_gguf",
    "config_from_hf",
    "gguf_source",
    "hf_source",
    "refuse_unread_tensors",
    "tensor_specs",
    "with_activation",
]

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        *(llama, mistral, bamboo, qwen2, qwen3, minicpm, opt, falcon, arcee, nemotron, jais2, gemma3, bitnet),
        *(mixtral, qwen2_moe, qwen3_moe, olmoe, smallthinker),
    )
}


def config_from_hf(
    config: Mapping[str, Any],
    activation: str | None = None,
    names: Iterable[str] = (),
    notes: list[str] | None = None,
) -> ModelConfig:
    """Read the contents of a config.json.

    `activation` goes before the one that the settings name, and before what is known of published checkpoints
    (models/known.py), which `names` help to identify: what the checkpoint is called. `notes` takes lines for people.
    Raises ValueError, in one line, for an architecture or a setting that is not supported, a setting that is missing
    or out of range, and one that was not read and is not known to be harmless.
    """
    settings = Noted(config)
    refuse_unreadable(settings)
    family = _family_of(settings)
    found = family.config_from_hf(settings)
    found.validate()
    refuse_unread(settings.unread(), found, family.harmless, gguf=False)
    called = config.get("_name_or_path")
    return settled(found, config, [*names, called] if isinstance(called, str) else names, activation, notes)


def hf_source(config: ModelConfig, tensor: str, layer: int | None, available: Container[str]) -> Source:
    """Where the canonical `tensor` (of `layer`, None outside the layers) is in a Hugging Face checkpoint.

    `available` are the names of the checkpoint's tensors. Raises ValueError when it lacks the tensor.
    """
    return turned_first(config, tensor, FAMILIES[config.family].hf.source(config, tensor, layer, available))


def config_from_gguf(
    fields: Mapping[str, object],
    tensor_names: Container[str],
    vocab_size: int,
    activation: str | None = None,
    rope_factors: NDArray[np.float32] | None = None,
    names: Iterable[str] = (),
    notes: list[str] | None = None,
) -> ModelConfig:
    """Read the metadata of a GGUF file, whose values are plain numbers, texts and lists.

    `activation` overrides the one of the architecture and of the keys `<architecture>.hidden_act` and
    `.hidden_activation`. `rope_factors` are the values of the tensor rope_freqs.weight where there is one (Llama 3.1).
    `names` and `notes` are as of config_from_hf, whose errors it raises.
    """
    architecture = fields.get("general.architecture")
    experts = bool(fields.get(f"{architecture}.expert_count"))
    for family in FAMILIES.values():
        if family.gguf is not None and family.gguf.architecture == architecture and family.experts == experts:
            stripped = Noted(strip_architecture(fields, family.gguf.architecture))
            config = gguf_config(family.name, family.gguf, stripped, tensor_names, vocab_size, rope_factors)
            plain = strip_architecture(fields, family.gguf.architecture)
            config = settled(config, plain, [*names, *_names_in(fields)], activation, notes)
            config.validate()
            refuse_unread(stripped.unread(), config, family.harmless, gguf=True)
            return config
    known = ", ".join(dict.fromkeys(family.gguf.architecture for family in FAMILIES.values() if family.gguf))
    if experts and str(architecture) in known.split(", "):
        raise ValueError(f"mixture-of-experts models of the GGUF architecture {architecture} are not supported")
    raise ValueError(f"the GGUF architecture {str(architecture)[:100]!r} is not supported; supported: {known}")


def gguf_source(config: ModelConfig, tensor: str, layer: int | None, available: Container[str]) -> Source:
    """Where the canonical `tensor` (of `layer`, None outside the layers) is in a GGUF file with `available` tensors.

    Raises ValueError when the file lacks the tensor, or GGUF has no such family.
    """
    family = FAMILIES[config.family].gguf
    if family is None:
        raise ValueError(f"GGUF has no architecture for the family {config.family}")
    return scaled(turned_first(config, tensor, family.naming.source(config, tensor, layer, available)), available)


def _names_in(fields: Mapping[str, object]) -> list[str]:
    """What a GGUF file says of its own name, and of the models that it was made from."""
    return [
        value
        for key, value in fields.items()
        if key.startswith("general.") and key.endswith(("name", "finetune", "repo_url")) and isinstance(value, str)
    ]


def _with_experts_or_without(family: Family, config: Mapping[str, Any]) -> Family:
    if not family.experts:
        refuse_experts(config)
    return family


def _family_of(config: Mapping[str, Any]) -> Family:
    """By architecture, which is the more specific: there are derived models whose model_type is their base's."""
    architectures, model_type = texts(config, "architectures"), config.get("model_type")
    for family in FAMILIES.values():
        if set(family.architectures) & set(architectures):
            return _with_experts_or_without(family, config)
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return _with_experts_or_without(family, config)
    refuse_experts(config)
    found = ", ".join(architectures) or "unnamed"
    supported = ", ".join(FAMILIES)
    raise ValueError(f"the architecture {found} (model_type {model_type!r}) is not supported; supported: {supported}")
