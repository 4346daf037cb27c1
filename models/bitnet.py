"""BitNet b1.58: ternary weights, and norms before the attention's output projection and before down (2402.17764).

The weights of projections are rounded to -s, 0 and s, s being their mean magnitude, as the model was trained.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from svdengine.models.config import ModelConfig
from svdengine.models.family import Array, Build, Family, GgufFamily, Naming, Source, split_suffix
from svdengine.models.naming import GGUF_STEMS, LLAMA_NAMES
from svdengine.models.settings import Settings, activation_fields, flag, gated_config, number, rope, shown, texts
from svdengine.models.windows import refuse_window

_PROJECTIONS = frozenset(("q", "k", "v", "o", "gate", "up", "down"))
_THETA = 500000.0  # where a config.json says nothing else
_SMALLEST_SCALE = np.float32(1e-5)
_SILU_LAYERS = (24, 26)  # of the models that 1bitLLM published, whose GGUF files say no activation either


def config_from_hf(settings: Settings) -> ModelConfig:
    """Read a BitNet config.json, of master weights or of packed ones. Raises ValueError on another kind of packing."""
    refuse_window(settings)
    _check_packing(settings.get("quantization_config"))
    bias = flag(settings, "attention_bias", False)
    return gated_config(
        "bitnet",
        settings,
        **activation_fields(settings, "hidden_act", default="relu2"),
        rope=rope(ChainMap(cast(dict[str, Any], settings), {"rope_theta": _THETA})),
        norm_eps=number(settings, "rms_norm_eps", default=1e-5),
        qkv_bias=bias,
        output_bias=bias,
        sub_norms=True,
    )


def _check_packing(packing: Any) -> None:
    """Of transformers' kinds of layers, those whose products are multiplied by a scale, and that have no norm."""
    if packing is None:
        return
    if not isinstance(packing, Mapping):
        raise ValueError("quantization_config must be an object")
    layers, mode = packing.get("linear_class", "bitlinear"), packing.get("quantization_mode", "offline")
    if layers != "autobitlinear" or mode not in ("online", "offline") or flag(packing, "use_rms_norm", False):
        raise ValueError(
            f"BitNet weights packed for linear_class {shown(layers)} in mode {shown(mode)} are not supported, only"
            " autobitlinear online or offline, without norms of their own; use the folder with master weights (-bf16)"
        )
    number(packing, "rms_norm_eps", default=1e-6)  # of such norms
    texts(packing, "modules_to_not_convert")  # which tensors have a scale says it too


def ternary(arrays: Sequence[Array]) -> Array:
    """Master weights, rounded; those that have one magnitude and zeros stay as they are. Or packed ones and a scale."""
    if len(arrays) == 2:
        return _unpacked(*arrays)
    w = np.asarray(arrays[0], np.float32)
    size = np.abs(w)
    if ((w == 0) | (size == size.max(initial=0))).all():
        return w
    scale = np.maximum(size.mean(dtype=np.float64).astype(np.float32), _SMALLEST_SCALE)
    return np.clip(np.rint(w / scale), -1, 1) * scale


def _unpacked(packed: Array, scale: Array) -> Array:
    """transformers packs four rows a byte: the first quarter of the rows in the lowest two bits, plus 1."""
    rows = np.asarray(packed).astype(np.uint8)
    if scale.size != 1 or rows.ndim != 2:
        raise ValueError("packed weights must be a matrix with a scale of one number")
    quarters = [(rows >> np.uint8(shift)) & np.uint8(3) for shift in (0, 2, 4, 6)]
    whole: Array = (np.concatenate(quarters).astype(np.float32) - 1) * scale.reshape(())
    return whole


def _build(config: ModelConfig, tensor: str) -> Build:
    stem, suffix = split_suffix(tensor)
    if stem not in _PROJECTIONS or suffix == ".bias":
        return _first
    return (lambda arrays: ternary(arrays).T) if tensor == "down_T" else ternary


def _first(arrays: Sequence[Array]) -> Array:
    return arrays[0]


@dataclass(frozen=True)
class _PackedNaming(Naming):
    """Names of a folder in which packed weights have their scale beside them."""

    def source(self, config: ModelConfig, tensor: str, layer: int | None, available: Container[str]) -> Source:
        """See `Naming`."""
        source = super().source(config, tensor, layer, available)
        scale = f"{source.names[0]}_scale"
        return Source((*source.names, scale), source.build) if scale in available else source


def _gguf_fields(fields: Settings, tensor_names: Container[str]) -> dict[str, Any]:
    silu = fields.get("block_count") in _SILU_LAYERS
    return {"activation": "silu" if silu else "relu2", "sub_norms": True}


_NAMES = {
    **LLAMA_NAMES.stems,
    "attention_sub_norm": ("layers.{layer}.self_attn.attn_sub_norm",),
    "ffn_sub_norm": ("layers.{layer}.mlp.ffn_sub_norm",),
}

FAMILY = Family(
    name="bitnet",
    model_types=("bitnet",),
    architectures=("BitNetForCausalLM", "BitnetForCausalLM"),
    config_from_hf=config_from_hf,
    hf=_PackedNaming(_NAMES, LLAMA_NAMES.prefixes, _build),
    gguf=GgufFamily("bitnet", Naming(GGUF_STEMS, build=_build), _gguf_fields),
)
