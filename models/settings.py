"""Reading the settings of a Hugging Face config.json: checked values, activation, rope."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast, get_args

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
_ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation", "activation_function")
_LARGEST = (1 << 31) - 1  # of any size; what executors index with has 32 bits
MOST_LAYERS = 4096
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_primary_experts")


def integer(settings: Settings, *keys: str, default: int | None = None) -> int:
    """The positive whole number under the first of `keys` that is set. Raises ValueError if there is none."""
    value = _first(settings, keys, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{keys[0]} must be a positive whole number, found {shown(value)}")
    if value > _LARGEST:
        raise ValueError(f"{keys[0]} must be at most {_LARGEST}, found {shown(value)}")
    return value


def layer_count(settings: Settings, key: str = "num_hidden_layers") -> int:
    """The number of layers, small enough to make a list of. Raises ValueError."""
    count = integer(settings, key)
    if count > MOST_LAYERS:
        raise ValueError(f"{key} must be at most {MOST_LAYERS}, found {count}")
    return count


def window_size(settings: Settings, key: str = "sliding_window") -> int:
    """Tokens of the sliding window; 0: there is none. Raises ValueError on anything but a whole number."""
    return 0 if settings.get(key) in (None, 0) else integer(settings, key)


def number(settings: Settings, *keys: str, default: float | None = None) -> float:
    """The finite number under the first of `keys` that is set. Raises ValueError if there is none."""
    value = _first(settings, keys, default)
    found = finite(value)
    if found is None:
        raise ValueError(f"{keys[0]} must be a number, found {shown(value)}")
    return found


def finite(value: object) -> float | None:
    """A number as a float; None for anything else, and for what no float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def flag(settings: Settings, key: str, default: bool) -> bool:
    """The truth value under `key`; null is the default. Raises ValueError on anything else."""
    value = _first(settings, (key,), default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, found {shown(value)}")
    return value


def texts(settings: Settings, key: str) -> list[str]:
    """The list of texts under `key`; null is an empty one. Raises ValueError on anything else."""
    value = _first(settings, (key,), [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key} must be a list of texts, found {shown(value)}")
    return value


def _first(settings: Settings, keys: tuple[str, ...], default: Any) -> Any:
    """The value under several names for one thing. Raises ValueError when two of them say different things."""
    found = [(key, value) for key in keys if (value := settings.get(key)) is not None]
    for key, value in found[1:]:
        if value != found[0][1]:
            raise ValueError(f"{found[0][0]} is {shown(found[0][1])} and {key} is {shown(value)}, which disagree")
    return found[0][1] if found else default


def shown(value: Any, longest: int = 80) -> str:
    """A value for a message; Python refuses to write out a whole number of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a whole number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= longest else text[:longest] + "..."


def activation_named(name: object) -> Activation:
    """Our activation for a name as Hugging Face or we write it. Raises ValueError listing those that are supported."""
    known: dict[str, Activation] = {a: a for a in get_args(Activation)} | _ACTIVATION_ALIASES
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"the activation {shown(name)} is not supported; supported: {', '.join(known)}")
    return known[name]


def activation_parts(text: str) -> tuple[Activation, float | None]:
    """Name and threshold of an activation as --activation takes it: relu, or fatrelu:0.03. Raises ValueError."""
    name, colon, threshold = text.partition(":")
    if not colon:
        return activation_named(name), None
    try:
        return activation_named(name), float(threshold)
    except ValueError as error:
        raise ValueError(f"an activation is a name, or fatrelu:0.03 with its threshold; found {shown(text)}") from error


def activation_text(config: ModelConfig) -> str:
    """The activation of a config as --activation takes it."""
    threshold = f":{config.activation_threshold:g}" if config.activation == "fatrelu" else ""
    return config.activation + threshold


def with_activation(config: ModelConfig, name: str, threshold: float | None = None) -> ModelConfig:
    """The config with another FFN activation, named as Hugging Face or we do.

    `threshold` is that of fatrelu, which the name may have too (fatrelu:0.03): the config's own if it has one, else
    0.01, where it is not given. Raises ValueError for an unknown activation or an unsuitable threshold.
    """
    activation, named = activation_parts(name)
    threshold = named if threshold is None else threshold
    if activation == "drelu" and not config.gated:
        raise ValueError("drelu needs a gated FFN")
    if activation != "fatrelu":
        if threshold is not None:
            raise ValueError(f"only fatrelu has a threshold, not {name}")
        return replace(config, activation=activation, activation_threshold=0.0)
    if threshold is None:
        threshold = config.activation_threshold if config.activation == "fatrelu" else FATRELU_THRESHOLD
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"the threshold of fatrelu must be a number from 0 up, found {threshold}")
    return replace(config, activation=activation, activation_threshold=threshold)


def says_activation(settings: Settings) -> bool:
    """Whether a config.json, or the metadata of a GGUF file, names an activation at all."""
    return any(settings.get(key) is not None for key in _ACTIVATION_KEYS)


def activation_fields(settings: Settings, *keys: str, default: str = "silu") -> dict[str, Any]:
    """`activation` and `activation_threshold` (fatrelu) of a ModelConfig, named under the first of `keys`."""
    activation = activation_named(_first(settings, keys, default))
    threshold = number(settings, "hidden_act_param", default=FATRELU_THRESHOLD) if activation == "fatrelu" else 0.0
    return {"activation": activation, "activation_threshold": threshold}


def refuse_unreadable(settings: Settings) -> None:
    """Raise ValueError for what no family here supports: weights quantised by others."""
    method = foreign_quantization(settings)
    if method is not None:
        raise ValueError(f"checkpoints quantised with {method[:40]} are not supported; use the unquantised checkpoint")


def refuse_experts(settings: Settings) -> None:
    """Raise ValueError for a mixture of experts, in a family or architecture that has none here."""
    for key in _EXPERT_KEYS:
        count = settings.get(key)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"this kind of mixture-of-experts model is not supported (config has {key}={shown(count)})"
            )
        if not isinstance(count, int | None):
            raise ValueError(f"{key} must be a whole number, found {shown(count)}")


def foreign_quantization(settings: Settings) -> str | None:
    """The name of the method that the weights are quantised with, where no family reads it."""
    quantization = settings.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    return None if method == settings.get("model_type") == "bitnet" else str(method)


def decoder_config(family: str, settings: Settings, **fields: Any) -> ModelConfig:
    """The config of a decoder whose settings have Llama's names. `fields` are set over what `settings` say.

    Of those, `norm`, `norm_eps` and `gated` must be given.
    """
    hidden, heads = integer(settings, "hidden_size"), integer(settings, "num_attention_heads")
    common: dict[str, Any] = {
        "vocab_size": integer(settings, "vocab_size"),
        "hidden_size": hidden,
        "layer_count": layer_count(settings),
        "head_count": heads,
        "kv_head_count": integer(settings, "num_key_value_heads", default=heads),
        "head_dim": head_size(settings),
        "max_position": integer(settings, "max_position_embeddings", default=2048),
        "tied_embeddings": flag(settings, "tie_word_embeddings", False),
    }
    if "ffn_size" not in fields:
        fields["ffn_size"] = integer(settings, "intermediate_size")
    if "rope" not in fields:
        fields["rope"] = rope(settings)
    if "activation" not in fields:
        fields |= activation_fields(settings, "hidden_act")
    return ModelConfig(family=family, **common | fields)


def gated_config(family: str, settings: Settings, **fields: Any) -> ModelConfig:
    """The config of a Llama-like model: RMSNorm, gated FFN, rope. `fields` are set over what `settings` say."""
    eps = number(settings, "rms_norm_eps", default=1e-6)
    return decoder_config(family, settings, **{"norm": "rms", "norm_eps": eps, "gated": True} | fields)


def head_size(settings: Settings) -> int:
    """Dimensions of a head: its own setting, or an even share of the hidden size."""
    share = integer(settings, "hidden_size") // integer(settings, "num_attention_heads")
    return integer(settings, "head_dim", default=share)


def rope(settings: Settings, share: float | None = None) -> Rope:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `share` of each head turns where the settings say nothing else; None: in this family all of it does, always.
    Raises ValueError for a kind of scaling that is not supported, and for a share in a family that has none.
    """
    scaling = _first(settings, ("rope_parameters", "rope_scaling"), {})
    if not isinstance(scaling, Mapping) or any(name.endswith("_attention") for name in scaling):
        raise ValueError("rope parameters that differ between layers are not supported")
    merged = ChainMap(cast(dict[str, Any], scaling), cast(dict[str, Any], settings))
    rotated = _rotated(settings, scaling, share)
    settings.get("rope_theta")  # the one in rope_parameters is preferred
    theta = number(merged, "rope_theta", default=10000.0)
    kind = _first(scaling, ("rope_type", "type"), "default")
    if kind in ("default", "none"):
        return Rope(theta, rotated=rotated)
    if kind == "linear":
        return Rope(theta, "linear", factor=number(scaling, "factor"), rotated=rotated)
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
            rotated=rotated,
        )
    if kind == "yarn":
        return replace(_yarn(theta, scaling, original, context), rotated=rotated)
    raise ValueError(f"rope scaling {shown(kind)} is not supported; supported: default, linear, llama3, yarn")


def _rotated(settings: Settings, scaling: Settings, share: float | None) -> int:
    """Dimensions of a head that turn, as `Rope.rotated` has them."""
    key = "partial_rotary_factor"
    named = [number(place, key) for place in (settings, scaling) if place.get(key) is not None]
    found = named[0] if named else 1.0 if share is None else share
    if any(value != found for value in named):
        raise ValueError(f"{key} is {named[0]} in one place and {named[1]} in another, which disagree")
    if found == 1.0:
        return 0
    if share is None:
        raise ValueError(f"partial rotary embedding is not supported in this family (factor {found})")
    head_dim = head_size(settings)
    rotated = int(head_dim * found) if 0 < found < 1 else 0
    if rotated < 2 or rotated % 2:
        raise ValueError(f"{key} {found} of {head_dim} dimensions: expected an even number of them, at most all")
    return rotated


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
