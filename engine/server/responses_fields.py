"""What a request to /v1/responses may hold."""

from __future__ import annotations

from svdengine.server.body_schema import (
    ANY,
    choice,
    constant,
    either,
    flag,
    listing,
    mapping,
    record,
    tagged,
    text,
    whole,
)
from svdengine.server.shared_fields import LENGTH, OWN_FIELDS, SCHEMA, STOP, TEMPERATURE, TOP_K, TOP_P

LOGPROBS = "message.output_text.logprobs"

_STATUS = choice("in_progress", "completed", "incomplete")
_LABELS = {"id": text(), "status": _STATUS}  # of items that an earlier response gave; they change nothing
_PART = tagged(
    "type",
    input_text=record({"text": text()}, ["text"]),
    output_text=record({"text": text(), "annotations": listing(ANY), "logprobs": listing(ANY)}, ["text"]),
    refusal=record({"refusal": text()}, ["refusal"]),
)
_TEXT_PARTS = listing(tagged("type", input_text=record({"text": text()}, ["text"])))
_REASONING_PARTS = listing(tagged("type", reasoning_text=record({"text": text()}, ["text"])))

ITEM = tagged(
    "type",
    "message",
    message=record(
        {
            "role": choice("user", "assistant", "system", "developer"),
            "content": either(text(), listing(_PART)),
            "phase": text(),
            **_LABELS,
        },
        ["role", "content"],
    ),
    function_call=record(
        {"call_id": text(), "name": text(), "arguments": text(), **_LABELS}, ["call_id", "name", "arguments"]
    ),
    function_call_output=record(
        {"call_id": text(), "output": either(text(), _TEXT_PARTS), **_LABELS}, ["call_id", "output"]
    ),
    reasoning=record({"summary": listing(ANY), "content": _REASONING_PARTS, "encrypted_content": text(), **_LABELS}),
)

_TOOL = tagged(
    "type",
    function=record({"name": text(), "description": text(), "parameters": SCHEMA, "strict": flag()}, ["name"]),
)
_TOOL_CHOICE = either(choice("none", "auto", "required"), tagged("type", function=record({"name": text()}, ["name"])))
_FORMAT = tagged(
    "type",
    text=record({}),
    json_object=record({}),
    json_schema=record({"name": text(), "description": text(), "schema": SCHEMA, "strict": flag()}, ["name", "schema"]),
)

CREATE = record(
    {
        "model": text(),
        "input": either(text(), listing(ITEM)),
        "instructions": text(),
        "previous_response_id": text(),
        "store": flag(),
        "stream": flag(),
        "stream_options": record({"include_obfuscation": flag()}),
        "max_output_tokens": LENGTH,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "top_logprobs": whole(0, 20),
        "include": listing(choice(LOGPROBS, "reasoning.encrypted_content")),
        "text": record({"format": _FORMAT, "verbosity": choice("medium")}),
        "tools": listing(_TOOL),
        "tool_choice": _TOOL_CHOICE,
        "parallel_tool_calls": flag(),
        "max_tool_calls": whole(1, 1 << 31),
        "truncation": choice("disabled"),
        "background": constant(False),
        "reasoning": record({"effort": text(), "summary": text(), "generate_summary": text()}),
        "metadata": mapping(text()),
        "service_tier": choice("auto", "default"),
        "user": text(),
        "safety_identifier": text(),
        "prompt_cache_key": text(),
        "prompt_cache_retention": text(),
        "top_k": TOP_K,
        "stop": STOP,
        **OWN_FIELDS,
    },
    ["input"],
    unsupported=["conversation", "prompt", "context_management", "moderation", "image"],
)
