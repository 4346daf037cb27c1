"""What a request to /v1/messages may hold."""

from __future__ import annotations

from svdengine.server.body_schema import ANY, Schema, choice, either, flag, listing, mapping, record, tagged, text
from svdengine.server.shared_fields import LENGTH, OWN_FIELDS, SCHEMA, TEMPERATURE, TOP_K, TOP_P

_CACHED = {"cache_control": mapping()}  # what prompts have in common is kept anyway
_TEXT = record({"text": text(), "citations": listing(ANY), **_CACHED}, ["text"])
_TEXTS = listing(tagged("type", text=_TEXT))

_BLOCK = tagged(
    "type",
    text=_TEXT,
    thinking=record({"thinking": text(), "signature": text()}, ["thinking"]),
    redacted_thinking=record({"data": text()}),
    tool_use=record(
        {"id": text(), "name": text(), "input": mapping(), "caller": mapping(), **_CACHED}, ["id", "name", "input"]
    ),
    tool_result=record(
        {"tool_use_id": text(), "content": either(text(), _TEXTS), "is_error": flag(), **_CACHED}, ["tool_use_id"]
    ),
)
_MESSAGE = record(
    {"role": choice("user", "assistant"), "content": either(text(), listing(_BLOCK))}, ["role", "content"]
)
_TOOL = tagged(
    "type",
    "custom",
    custom=record(
        {"name": text(), "description": text(), "input_schema": SCHEMA, "strict": flag(), **_CACHED},
        ["name", "input_schema"],
        unsupported=["defer_loading", "allowed_callers", "input_examples"],
    ),
)
_ONE_AT_A_TIME = {"disable_parallel_tool_use": flag()}
_TOOL_CHOICE = tagged(
    "type",
    auto=record(_ONE_AT_A_TIME),
    any=record(_ONE_AT_A_TIME),
    tool=record({"name": text(), **_ONE_AT_A_TIME}, ["name"]),
    none=record({}),
)

_COUNTED: dict[str, Schema] = {
    "model": text(),
    "messages": listing(_MESSAGE, 1),
    "system": either(text(), _TEXTS),
    "tools": listing(_TOOL),
    "tool_choice": _TOOL_CHOICE,
    "thinking": tagged("type", disabled=record({}), adaptive=record({"display": text()})),
    "output_config": record(
        {"format": tagged("type", json_schema=record({"schema": SCHEMA}, ["schema"])), "effort": text()}
    ),
    **_CACHED,
}
_UNSUPPORTED = ["container", "context_management", "diagnostics", "inference_geo", "mcp_servers", "prefill", "speed"]

COUNT_TOKENS = record(_COUNTED, ["messages"], unsupported=_UNSUPPORTED)

CREATE = record(
    {
        **_COUNTED,
        "max_tokens": LENGTH,
        "stop_sequences": listing(text(1), longest=64),
        "stream": flag(),
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "top_k": TOP_K,
        "metadata": mapping(),
        "service_tier": choice("auto", "standard_only"),
        **OWN_FIELDS,
    },
    ["messages", "max_tokens"],
    unsupported=_UNSUPPORTED,
)
