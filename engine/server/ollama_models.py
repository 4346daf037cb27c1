"""What Ollama's clients ask about the model: /api/tags, /api/show and /api/version."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from svdengine import __version__
from svdengine.llm import LLM
from svdengine.server.api_error import ApiError
from svdengine.server.body_schema import read
from svdengine.server.ollama_api import check_name, timestamp
from svdengine.server.ollama_fields import SHOW

Object = dict[str, Any]  # of JSON

# The version of Ollama whose interface is spoken: editors refuse one that is older than what they were written for.
SPOKEN_VERSION = "0.12.0"


def version() -> Object:
    """For /api/version."""
    return {"version": SPOKEN_VERSION, "svdengine": __version__}


def tags(llm: LLM, name: str) -> Object:
    """For /api/tags: the one model."""
    tag = f"{name}:latest"
    model = {
        "name": tag,
        "model": tag,
        "modified_at": _modified(llm),
        "size": llm.model_file.size_bytes,
        "digest": _digest(llm),
        "details": _details(llm),
    }
    return {"models": [model]}


def show(llm: LLM, name: str, value: Any) -> Object:
    """For /api/show. Raises ApiError."""
    fields = read(value, SHOW)
    asked = fields.get("model", fields.get("name"))
    if asked is None:
        raise ApiError(400, "model is missing", "model", "missing_required_parameter")
    check_name(asked, name)
    config, params = llm.config, llm.default_params
    stated = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    template = llm.model_file.chat_template
    return {
        "modelfile": "",
        "parameters": "\n".join(f"{key} {figure:g}" for key, figure in stated.items()),
        "template": template or "",
        "license": "",
        "details": _details(llm),
        "model_info": {
            "general.architecture": config.family,
            "general.parameter_count": _parameter_count(llm),
            f"{config.family}.block_count": config.layer_count,
            f"{config.family}.context_length": llm.context,
            f"{config.family}.embedding_length": config.hidden_size,
            f"{config.family}.feed_forward_length": config.ffn_size,
            f"{config.family}.attention.head_count": config.head_count,
            f"{config.family}.attention.head_count_kv": config.kv_head_count,
            f"{config.family}.vocab_size": config.vocab_size,
        },
        "capabilities": ["completion"] if template is None else ["completion", "tools"],
        "modified_at": _modified(llm),
    }


def _details(llm: LLM) -> Object:
    family = llm.config.family
    count = _parameter_count(llm)
    formats = Counter(llm.model_file.formats.values())
    return {
        "parent_model": "",
        "format": "svdp",
        "family": family,
        "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M",
        "quantization_level": formats.most_common(1)[0][0] if formats else "f32",
    }


def _parameter_count(llm: LLM) -> int:
    return llm.model_file.parameter_count


def _modified(llm: LLM) -> str:
    return timestamp(datetime.fromtimestamp(llm.model_file.path.stat().st_mtime, UTC))


def _digest(llm: LLM) -> str:
    """Tells model files from each other: of what the header says, not of all weights."""
    file = llm.model_file
    header = [str(file.size_bytes), repr(asdict(file.config)), *(f"{k}={v}" for k, v in sorted(file.metadata.items()))]
    return hashlib.sha256("\n".join(header).encode()).hexdigest()
