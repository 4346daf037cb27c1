"""Reading the settings of a Hugging Face config.json: checked values, activation, rope, sliding window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from svdengine.models.config import Activation, ModelConfig, Rope

Settings = Mapping[str, Any]

FATRELU_THRESHOLD = 0.01  # of the ProSparse models

_ACTIVATION_ALIASES: dict[str, Activation] = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "relu_squared": "relu2",
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def integer(settings: Settings, *keys: str, default: int | None = None) -> int:
    """The positive whole number under the first of `keys` that is set. Raises ValueError if there is none."""
    value = _first(settings, keys, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{keys[0]} must be a positive whole number, found {value!r}")
    return value


def number(settings: Settings, *keys: str, default: float | None = None) -> float:
    """The finite number under the first of `keys` that is set. Raises ValueError if there is none."""
    value = _first(settings, keys, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{keys[0]} must be a number, found {value!r}")
    return float(value)


def flag(settings: Settings, key: str, default: bool) -> bool:
    """The truth value under `key`; null is the default. Raises ValueError on anything else."""
    value = _first(settings, (key,), default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, found {value!r}")
    return value


def texts(settings: Settings, key: str) -> list[str]:
    """The list of texts under `key`; null is an empty one. Raises ValueError on anything else."""
    value = _first(settings, (key,), [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key} must be a list of texts, found {value!r}")
    return value


def _first(settings: Settings, keys: tuple[str, ...], default: Any) -> Any:
    return next((settings[key] for key in keys if settings.get(key) is not None), default)


def activation_named(name: object) -> Activation:
    """Our activation for a name as Hugging Face or we write it. Raises ValueError listing those that are supported."""
    known: dict[str, Activation] = {a: a for a in get_args(Activation)} | _ACTIVATION_ALIASES
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"the activation {name!r} is not supported; supported: {', '.join(known)}")
    return known[name]


def activation_fields(settings: Settings, *keys: str, default: str = "silu") -> dict[str, Any]:
    """`activation` and `activation_threshold` (fatrelu) of a ModelConfig, named under the first of `keys`."""
    activation = activation_named(_first(settings, keys, default))
    threshold = number(settings, "hidden_act_param", default=FATRELU_THRESHOLD) if activation == "fatrelu" else 0.0
    return {"activation": activation, "activation_threshold": threshold}


def refuse_unreadable(settings: Settings) -> None:
    """Raise ValueError for what no family here supports: mixtures of experts and weights quantised by others."""
    for key in _EXPERT_KEYS:
        if isinstance(settings.get(key), int) and settings[key] > 1:
            raise ValueError(f"mixture-of-experts models are not supported (config has {key}={settings[key]})")
    quantization = settings.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"checkpoints quantised with {method} are not supported; use the unquantised checkpoint")


def gated_config(family: str, settings: Settings, **fields: Any) -> ModelConfig:
    """The config of a Llama-like model: RMSNorm, gated FFN, rope. `fields` are set over what `settings` say."""
    hidden, heads = integer(settings, "hidden_size"), integer(settings, "num_attention_heads")
    head_dim = integer(settings, "head_dim", default=hidden // heads)
    common: dict[str, Any] = {
        "vocab_size": integer(settings, "vocab_size"),
        "hidden_size": hidden,
        "layer_count": integer(settings, "num_hidden_layers"),
        "head_count": heads,
        "kv_head_count": integer(settings, "num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "ffn_size": integer(settings, "intermediate_size"),
        "max_position": integer(settings, "max_position_embeddings", default=2048),
        "norm_eps": number(settings, "rms_norm_eps", default=1e-6),
        "rope": rope(settings),
        "tied_embeddings": flag(settings, "tie_word_embeddings", False),
        **activation_fields(settings, "hidden_act"),
    }
    return ModelConfig(family=family, norm="rms", gated=True, **common | fields)


def rope(settings: Settings) -> Rope:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    Raises ValueError for a kind of scaling that is not supported.
    """
    scaling = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        raise ValueError("rope parameters that differ between layers are not supported")
    merged = {**settings, **scaling}
    if number(merged, "partial_rotary_factor", default=1.0) != 1.0:
        raise ValueError(f"partial rotary embedding is not supported (factor {merged['partial_rotary_factor']})")
    theta = number(merged, "rope_theta", default=10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "none"):
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor=number(scaling, "factor"))
    context = integer(settings, "max_position_embeddings", default=2048)
    key = "original_max_position_embeddings"
    original = integer(settings if settings.get(key) else scaling, key, default=context)
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            factor=number(scaling, "factor"),
            original_max_position=original,
            low_freq_factor=number(scaling, "low_freq_factor", default=1.0),
            high_freq_factor=number(scaling, "high_freq_factor", default=4.0),
        )
    if kind == "yarn":
        return _yarn(theta, scaling, original, context)
    raise ValueError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3, yarn")


def _yarn(theta: float, scaling: Settings, original: int, context: int) -> Rope:
    factor = number(scaling, "factor", default=context / original)
    return Rope(
        theta,
        "yarn",
        factor=factor,
        original_max_position=original,
        beta_fast=number(scaling, "beta_fast", default=32.0),
        beta_slow=number(scaling, "beta_slow", default=1.0),
        attention_factor=number(scaling, "attention_factor", default=_yarn_attention(factor, scaling)),
        truncate=flag(scaling, "truncate", True),
    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """How much YaRN scales cosines and sines (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(factor: float, scaling: Settings) -> float:
    """DeepSeek's two `mscale` fields, where both are set, replace the paper's one factor."""
    mscale, all_dim = number(scaling, "mscale", default=0.0), number(scaling, "mscale_all_dim", default=0.0)
    if mscale and all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return yarn_magnitude(factor)


def window_fields(settings: Settings) -> dict[str, Any]:
    """`sliding_window` and its layers where some layers slide and some do not (Qwen).

    `layer_types` says which; without it the layers from `max_window_layers` on. Raises ValueError for other types.
    """
    if not flag(settings, "use_sliding_window", False) or settings.get("sliding_window") is None:
        return {}
    count = integer(settings, "num_hidden_layers")
    first = int(number(settings, "max_window_layers", default=28))
    kinds = texts(settings, "layer_types") or ["full_attention"] * first + ["sliding_attention"] * (count - first)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))} are not supported")
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return {"sliding_window": integer(settings, "sliding_window"), "sliding_window_layers": layers} if layers else {}


def all_layers_window(settings: Settings) -> dict[str, Any]:
    """`sliding_window` over every layer, when one is set (Mistral)."""
    if settings.get("sliding_window") is None:
        return {}
    count = integer(settings, "num_hidden_layers")
    return {"sliding_window": integer(settings, "sliding_window"), "sliding_window_layers": tuple(range(count))}
