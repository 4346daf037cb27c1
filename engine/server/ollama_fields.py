"""What requests to Ollama's paths may hold."""

from __future__ import annotations

from collections.abc import Mapping

from svdengine.server.body_schema import (
    ANY,
    Schema,
    choice,
    either,
    flag,
    listing,
    mapping,
    number,
    record,
    text,
    whole,
)
from svdengine.server.shared_fields import OWN_FIELDS, PENALTY, SCHEMA, SEED, STOP, TEMPERATURE, TOP_K, TOP_P

_MACHINE = whole(-1, 1 << 31)

# How Ollama loads a model. This one is loaded already: they change nothing.
MACHINE_OPTIONS: Mapping[str, Schema] = {
    "num_ctx": _MACHINE,
    "num_keep": _MACHINE,
    "num_batch": _MACHINE,
    "num_gpu": _MACHINE,
    "main_gpu": _MACHINE,
    "num_thread": _MACHINE,
    "numa": flag(),
    "low_vram": flag(),
    "f16_kv": flag(),
    "logits_all": flag(),
    "vocab_only": flag(),
    "use_mmap": flag(),
    "use_mlock": flag(),
}
# Samplers that we have not: the value that switches each off.
_OFF: Mapping[str, Schema] = {
    "mirostat": whole(0, 0),
    "tfs_z": number(1, 1),
}

_OWN = {name: schema for name, schema in OWN_FIELDS.items() if name != "repetition_penalty"}

OPTIONS = record(
    {
        "num_predict": whole(-2, 1 << 31),
        "temperature": TEMPERATURE,
        "top_k": TOP_K,
        "top_p": TOP_P,
        "seed": SEED,
        "stop": STOP,
        "repeat_penalty": number(0.01, 100),
        "presence_penalty": PENALTY,
        "frequency_penalty": PENALTY,
        **_OWN,
        **_OFF,
        **MACHINE_OPTIONS,
    },
    unsupported=["mirostat_tau", "mirostat_eta", "penalize_newline", "embedding_only"],
)

_NO_IMAGES = listing(ANY, longest=0)
_COMMON: Mapping[str, Schema] = {
    "model": text(1),
    "stream": flag(),
    "format": either(choice("", "json"), SCHEMA),
    "options": OPTIONS,
    "keep_alive": either(text(), number(-1e9, 1e9)),
    "think": {"type": "boolean", "enum": [False]},
}
_UNSUPPORTED = ("logprobs", "top_logprobs")

_CALL = record(
    {
        "id": text(),
        "type": choice("function"),
        "function": record({"name": text(), "arguments": mapping(), "index": whole(0, 1 << 31)}, ["name", "arguments"]),
    },
    ["function"],
)
MESSAGE = record(
    {
        "role": choice("system", "user", "assistant", "tool"),
        "content": text(),
        "thinking": text(),
        "images": _NO_IMAGES,
        "tool_calls": listing(_CALL),
        "tool_name": text(),
        "tool_call_id": text(),
    },
    ["role"],
)
_TOOL = record(
    {
        "type": choice("function"),
        "function": record({"name": text(), "description": text(), "parameters": SCHEMA, "strict": flag()}, ["name"]),
    },
    ["function"],
)

CHAT = record({**_COMMON, "messages": listing(MESSAGE), "tools": listing(_TOOL)}, ["model"], unsupported=_UNSUPPORTED)
GENERATE = record(
    {
        **_COMMON,
        "prompt": text(),
        "system": text(),
        "raw": flag(),
        "images": _NO_IMAGES,
        "suffix": choice(""),
        "template": choice(""),
        "context": listing(ANY, longest=0),
    },
    ["model"],
    unsupported=[*_UNSUPPORTED, "width", "height", "steps"],
)
SHOW = record({"model": text(1), "name": text(1), "verbose": flag()}, unsupported=["system", "template", "options"])
