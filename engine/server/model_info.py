"""What the server says of its model: for /v1/models, and for the chat page, which shows it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from svdengine import __version__
from svdengine.llm import LLM

Object = dict[str, Any]  # of JSON

_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "sparsity_bias")


def model_info(llm: LLM) -> Object:
    """What runs, on what, and with which sampling where a request does not say."""
    file, config, params = llm.model_file, llm.config, llm.default_params
    formats = Counter(file.formats.values())
    return {
        "version": __version__,
        "family": config.family,
        "parameters": file.parameter_count,
        "size_bytes": file.size_bytes,
        "formats": [name for name, _ in formats.most_common()] or ["f32"],
        "layers": config.layer_count,
        "hidden_size": config.hidden_size,
        "ffn_size": config.ffn_size,
        "experts": config.expert_count or None,
        "active_experts": config.active_experts or None,
        "activation": config.activation,
        "context": llm.context,
        "trained_context": config.max_position,
        "device": llm.executor.name,
        "threads": getattr(llm.executor, "threads", None),
        "kv_dtype": llm.kv_dtype,
        "ffn": llm.ffn,
        "sparse": config.sparse_ffn,
        "predictor": _predictor(llm),
        "deterministic": llm.deterministic,
        "defaults": {name: getattr(params, name) for name in _DEFAULTS},
    }


def _predictor(llm: LLM) -> Object | None:
    """The kind, and the shares of neurons that calibration found, where there is a predictor."""
    if llm.predictor is None:
        return None
    predicted, active = llm.predictor.densities
    return {
        "kind": str(llm.predictor.about.get("kind", "unknown")),
        "predicted_density": round(predicted, 4),
        "active_density": round(active, 4),
    }
