"""The body of a request to /v1/messages, as the chat job takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdengine.server.api_error import unsupported
from svdengine.server.shared_fields import OWN_FIELDS

Message = dict[str, Any]

# What fields of the chat job are called here, for its errors.
NAMES: Mapping[str, str] = {"stop": "stop_sequences", "response_format": "output_config.format"}

_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", *OWN_FIELDS)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion that gives the message."""
    body: dict[str, Any] = {name: fields[name] for name in _SAME if name in fields}
    body["messages"] = _messages(fields)
    if "stop_sequences" in fields:
        body["stop"] = fields["stop_sequences"]
    if form := fields.get("output_config", {}).get("format"):
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": form["schema"]}}
    if fields.get("tools"):
        body["tools"] = [_chat_tool(tool) for tool in fields["tools"]]
    choice = fields.get("tool_choice", {"type": "auto"})
    if choice.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False
    if choice["type"] == "tool":
        body["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    elif fields.get("tools") or choice["type"] == "any":
        body["tool_choice"] = _CHOICES[choice["type"]]
    return body


def _messages(fields: Mapping[str, Any]) -> list[Message]:
    given = fields["messages"]
    if given[-1]["role"] == "assistant":
        raise unsupported(
            f"messages[{len(given) - 1}].role", " as 'assistant' in the last message; end with the user's"
        )
    messages: list[Message] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": _text(fields["system"])})
    for message in given:
        for turn in _turns(message):
            _add(messages, turn)
    return messages


def _add(messages: list[Message], turn: Message) -> None:
    """Add a turn; texts that follow each other in one role are one turn, as Anthropic has it."""
    last = messages[-1] if messages else None
    plain = last is not None and last["role"] == turn["role"] and turn["role"] != "tool"
    if last is None or not plain or "tool_calls" in last or "tool_calls" in turn:
        messages.append(turn)
    else:
        last["content"] = f"{last['content']}\n{turn['content']}"


def _turns(message: Mapping[str, Any]) -> list[Message]:
    """A message as the chat job knows them: each result of a tool is one of its own."""
    role, content = message["role"], message["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    results = [_result(block) for block in blocks if block["type"] == "tool_result"]
    turn: Message = {"role": role}
    if calls := [_chat_call(block) for block in blocks if block["type"] == "tool_use"]:
        turn["tool_calls"] = calls
    if thinking := "".join(block["thinking"] for block in blocks if block["type"] == "thinking"):
        turn["reasoning_content"] = thinking
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    turn["content"] = "\n".join(texts)
    return [*results, turn] if texts or calls or not results else results


def _result(block: Mapping[str, Any]) -> Message:
    content = _text(block.get("content", ""))
    said = f"error: {content}" if block.get("is_error") else content
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": said}


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(block["text"] for block in content)


def _chat_call(block: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": block["input"]}}


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    if "description" in tool:
        function["description"] = tool["description"]
    return {"type": "function", "function": function}
