"""The bodies of requests to Ollama's paths, as the chat job and the completion job take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svdengine.server.shared_fields import OWN_FIELDS

# What fields of the jobs are called here, for their errors.
NAMES: Mapping[str, str] = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    "response_format": "format",
    **{name: f"options.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "logit_bias")},
}

_SAME = ("temperature", "top_k", "top_p", "seed", "stop", *OWN_FIELDS)


def chat_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion that gives the answer."""
    body = _sampling(fields)
    body["messages"] = [_message(message) for message in fields["messages"]]
    if fields.get("tools"):
        body["tools"] = [{"type": "function", "function": tool["function"]} for tool in fields["tools"]]
    return body


def generate_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A completion of the prompt as it is."""
    # A completion has a short default; here it is as long as it wants to be.
    return {"max_tokens": 1 << 31, **_sampling(fields), "prompt": fields["prompt"]}


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    options = fields.get("options", {})
    body: dict[str, Any] = {name: options[name] for name in _SAME if name in options}
    if options.get("num_predict", -1) > 0:  # below: without a limit
        body["max_tokens"] = options["num_predict"]
    if "repeat_penalty" in options:
        body["repetition_penalty"] = options["repeat_penalty"]
    form = fields.get("format")
    if form == "json":
        body["response_format"] = {"type": "json_object"}
    elif form:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form}}
    return body


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message["role"], "content": message.get("content", "")}
    if "thinking" in message:
        found["reasoning_content"] = message["thinking"]
    if "tool_name" in message:
        found["name"] = message["tool_name"]
    if "tool_call_id" in message:
        found["tool_call_id"] = message["tool_call_id"]
    if message.get("tool_calls"):
        found["tool_calls"] = [{"id": None, "type": "function", **call} for call in message["tool_calls"]]
    return found
