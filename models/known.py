"""Published checkpoints whose settings do not say what they compute: what identifies each, and what it computes.

A checkpoint that a case fits gets the case's activation in place of the one that its settings lead to. Where two
published models look alike it is refused, with what to add. `--activation` goes before both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from svdengine.models.config import Activation, ModelConfig
from svdengine.models.settings import Settings, says_activation, with_activation

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class KnownCase:
    """One published model, or several that look alike, and what identifies a checkpoint of it.

    All that is given must fit: the family, the activation that the settings lead to, fields of ModelConfig (`theta` is
    rope's), settings as they stand in the file, and one of the names in what the checkpoint calls itself.
    """

    model: str
    family: str
    leads_to: Activation  # what the settings say, or the family's default
    computes: tuple[str, ...]  # as --activation takes it; several: which one is for the user to say
    source: str  # of the fact
    names: tuple[str, ...] = ()  # any of them, as letters and digits only
    but_not: tuple[str, ...] = ()  # none of them
    fields: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    settings: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    unsaid: bool = False  # only where no activation is named

    def fits(self, config: ModelConfig, settings: Settings, names: Iterable[str]) -> bool:
        """Whether this is a checkpoint of it. `names`: what it is called, with letters and digits only."""
        joined = "\n".join(names)
        return (
            config.family == self.family
            and config.activation == self.leads_to
            and not (self.unsaid and says_activation(settings))
            and all(_field(config, name) == value for name, value in self.fields.items())
            and all(settings.get(name) == value for name, value in self.settings.items())
            and (not self.names or any(name in joined for name in self.names))
            and not any(name in joined for name in self.but_not)
        )


def _field(config: ModelConfig, name: str) -> Any:
    return (config.rope.theta if config.rope else None) if name == "theta" else getattr(config, name)


_SPARSE_QWEN2 = "the code of its model card, ReLU on gate and up (Tiiny/SparseQwen2-7B)"
_MINICPM_1B = {"hidden_size": 1536, "ffn_size": 3840, "layer_count": 52}
_PROSPARSE_MINICPM = "config.json of openbmb/MiniCPM-S-1B-sft: fatrelu, hidden_act_param 0.03"
_PROSPARSE = "config.json of SparseLLM/prosparse-llama-2-7b: fatrelu, hidden_act_param 0.01"
_RELU_FALCON = "the model card of SparseLLM/ReluFalcon-40B; its ReLU may be in its code only"
_FALCON_40B = {"hidden_size": 8192, "layer_count": 60, "kv_head_count": 8}

# The first that fits is taken. A GGUF file of llama.cpp names no activation, so there the name has to do.
CASES: tuple[KnownCase, ...] = (
    # Hugging Face folders, and GGUF files with a key
    KnownCase(
        "SparseQwen2-7B",
        "qwen2",
        "relu",
        ("drelu",),
        _SPARSE_QWEN2,
        fields={"hidden_size": 3584, "ffn_size": 18944, "layer_count": 28, "theta": 10000.0},  # Qwen2-7B: theta 1e6
    ),
    KnownCase("SparseQwen2", "qwen2", "relu", ("drelu",), _SPARSE_QWEN2, names=("sparseqwen2",)),
    KnownCase(
        "Sakana SparseLM",
        "llama",
        "silu",
        ("relu",),
        "the code of SakanaAI/sparser-faster-llms; hidden_act of its config.json is a leftover",
        settings={"model_type": "llama_sparse_relu"},
    ),
    KnownCase(
        "ProSparse-LLaMA2",
        "llama",
        "silu",
        ("fatrelu:0.01",),
        _PROSPARSE,
        settings={"model_type": "sparsellama"},
        unsaid=True,
    ),
    KnownCase(
        "ProSparse-LLaMA2 (fatrelu:0.01) or Sakana SparseLM (relu)",
        "llama",
        "silu",
        ("fatrelu:0.01", "relu"),
        "both call their class SparseLlamaForCausalLM, and neither computes silu",
        settings={"architectures": ["SparseLlamaForCausalLM"]},
    ),
    KnownCase(
        "ProSparse-MiniCPM-1B rewritten as Llama",
        "llama",
        "relu",
        ("fatrelu:0.03",),
        f"{_PROSPARSE_MINICPM}; openbmb/ProSparse-MiniCPM-1B-sft-llama-format has lost the threshold",
        fields={**_MINICPM_1B, "head_count": 24, "kv_head_count": 8},
    ),
    KnownCase("ReluFalcon", "falcon", "gelu", ("relu",), _RELU_FALCON, ("relufalcon", "falcon40brelu"), unsaid=True),
    KnownCase(
        "Falcon-40B (gelu) or ReluFalcon-40B (relu)",
        "falcon",
        "gelu",
        ("relu", "gelu"),
        f"{_RELU_FALCON}. It is published in float32, Falcon-40B in bfloat16",
        fields=_FALCON_40B,
        settings={"torch_dtype": "float32"},
        unsaid=True,
    ),
    # GGUF files without a key
    KnownCase(
        "ProSparse-MiniCPM-1B, MiniCPM-S",
        "minicpm",
        "silu",
        ("fatrelu:0.03",),
        _PROSPARSE_MINICPM,
        names=("prosparse", "minicpms1b"),
        unsaid=True,
    ),
    KnownCase(
        "MiniCPM-1B (silu) or MiniCPM-S-1B (fatrelu:0.03)",
        "minicpm",
        "silu",
        ("fatrelu:0.03", "silu"),
        _PROSPARSE_MINICPM,
        but_not=("minicpm1b",),
        fields=_MINICPM_1B,
        settings={"model_type": None},  # a GGUF file; the class of a config.json has a default
        unsaid=True,
    ),
    KnownCase(
        "ProSparse-MiniCPM",
        "llama",
        "silu",
        ("fatrelu:0.03",),
        _PROSPARSE_MINICPM,
        ("prosparseminicpm",),
        unsaid=True,
    ),
    KnownCase("ProSparse-LLaMA2", "llama", "silu", ("fatrelu:0.01",), _PROSPARSE, ("prosparse",), unsaid=True),
    KnownCase(
        "ReluLLaMA",
        "llama",
        "silu",
        ("relu",),
        "config.json of SparseLLM/ReluLLaMA-7B",
        ("relullama", "llama7brelu", "llama13brelu", "llama70brelu"),
        unsaid=True,
    ),
    KnownCase(
        "TurboSparse-Mistral, Bamboo",
        "llama",
        "silu",
        ("drelu",),
        "arXiv:2406.05955; config.json of Tiiny/TurboSparse-Mistral-Instruct",
        ("turbosparsemistral", "bamboobase", "bamboodpo"),
        unsaid=True,
    ),
    KnownCase("SparseQwen2", "qwen2", "silu", ("drelu",), _SPARSE_QWEN2, ("sparseqwen2",), unsaid=True),
    KnownCase(
        "SparseQwen2-7B",
        "qwen2",
        "silu",
        ("drelu",),
        _SPARSE_QWEN2,
        fields={"hidden_size": 3584, "ffn_size": 18944, "layer_count": 28, "theta": 10000.0},
        unsaid=True,
    ),
)  # fmt: skip


def settled(
    config: ModelConfig,
    settings: Settings,
    names: Iterable[str],
    activation: str | None = None,
    notes: list[str] | None = None,
) -> ModelConfig:
    """The config with the activation that its weights were trained with, as far as that is known.

    `settings` are those of the file, `names` whatever it is called. `activation` is what the user says, and goes before
    all; a known model's threshold of fatrelu is kept where the user names none. `notes` takes a line where the
    activation is another than the settings say. Raises ValueError, with what to add, where two published models look
    alike.
    """
    case = find_case(config, settings, names)
    if activation is not None:
        known = [text for text in case.computes if text.startswith("fatrelu:")] if case is not None else []
        return with_activation(with_activation(config, known[0]) if known else config, activation)
    if case is None:
        return config
    if len(case.computes) > 1:
        raise ValueError(
            f"the checkpoint does not say which activation it has: it is {case.model} ({case.source});"
            f" add {' or '.join(f'--activation {text}' for text in case.computes)}"
        )
    if notes is not None:
        said = "says" if says_activation(settings) else "says nothing, which means"
        notes.append(
            f"this is {case.model}: the file {said} {config.activation}, and the model computes {case.computes[0]}"
            f" ({case.source}); --activation {config.activation} overrides that"
        )
    return with_activation(config, case.computes[0])


def find_case(config: ModelConfig, settings: Settings, names: Iterable[str]) -> KnownCase | None:
    """The case that a checkpoint fits; see `settled`."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    return next((case for case in CASES if case.fits(config, settings, plain)), None)
