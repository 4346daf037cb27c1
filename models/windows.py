"""Sliding windows: which layers of a config.json have one."""

from __future__ import annotations

from typing import Any

from svdengine.models.settings import Settings, flag, integer, layer_count, number, texts, window_size

_FULL, _SLIDING = "full_attention", "sliding_attention"


def window_fields(settings: Settings) -> dict[str, Any]:
    """`sliding_window` and its layers where some layers slide and some do not (Qwen).

    `layer_types` says which; without it the layers from `max_window_layers` on. Raises ValueError for other types.
    """
    count, window, kinds = layer_count(settings), window_size(settings), _layer_types(settings)
    first = int(min(max(number(settings, "max_window_layers", default=28), 0), count))
    if not flag(settings, "use_sliding_window", False) or not window:
        _refuse_sliding(kinds)
        return {}
    kinds = kinds or [_FULL] * first + [_SLIDING] * (count - first)
    layers = tuple(i for i, kind in enumerate(kinds) if kind == _SLIDING)
    return {"sliding_window": window, "sliding_window_layers": layers} if layers else {}


def all_layers_window(settings: Settings) -> dict[str, Any]:
    """`sliding_window` over every layer, when one is set (Mistral). Raises ValueError when layers differ."""
    count, window, kinds = layer_count(settings), window_size(settings), _layer_types(settings)
    if not window:
        _refuse_sliding(kinds)
        return {}
    if _FULL in kinds:
        raise ValueError("layer_types: a sliding window in some of the layers of this family is not supported")
    return {"sliding_window": window, "sliding_window_layers": tuple(range(count))}


def every_nth_is_full(settings: Settings, nth: int) -> dict[str, Any]:
    """`sliding_window` and its layers where every nth layer sees everything and the others slide (Gemma).

    `sliding_window_pattern` says another n, and `layer_types` each layer's kind.
    """
    count, window, kinds = layer_count(settings), integer(settings, "sliding_window"), _layer_types(settings)
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    nth = integer(settings, *names, default=nth)
    kinds = kinds or [_SLIDING if (layer + 1) % nth else _FULL for layer in range(count)]
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _SLIDING)
    return {"sliding_window": window, "sliding_window_layers": layers} if layers else {}


def refuse_window(settings: Settings) -> None:
    """Raise ValueError for a sliding window in a family whose layers see everything before them.

    One that is switched off, or as long as the context, is none.
    """
    window, wanted = window_size(settings), flag(settings, "use_sliding_window", True)
    settings.get("max_window_layers")
    _refuse_sliding(_layer_types(settings))
    if wanted and window and window < integer(settings, "max_position_embeddings", default=2048):
        raise ValueError(f"sliding_window {window}: a sliding window in this family is not supported")


def _layer_types(settings: Settings) -> list[str]:
    kinds = texts(settings, "layer_types")
    unknown = set(kinds) - {_FULL, _SLIDING}
    if unknown:
        raise ValueError(f"layers of type {', '.join(sorted(unknown))[:100]} are not supported")
    if kinds and len(kinds) != layer_count(settings):
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers says {layer_count(settings)}")
    return kinds


def _refuse_sliding(kinds: list[str]) -> None:
    if _SLIDING in kinds:
        raise ValueError("layer_types names layers with a sliding window, and there is no sliding_window")
