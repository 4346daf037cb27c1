"""The body of a request to /v1/responses, as the chat job takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from svdengine.server.responses_fields import LOGPROBS
from svdengine.server.shared_fields import OWN_FIELDS

Message = dict[str, Any]

# What fields of the chat job are called here, for its errors.
NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}

_SAME = ("model", "temperature", "top_p", "tool_choice", "parallel_tool_calls", "top_k", "stop", *OWN_FIELDS)


def chat_body(fields: Mapping[str, Any], messages: Sequence[Message]) -> dict[str, Any]:
    """A chat completion that gives the answer. `messages`: the whole conversation, but for the instructions."""
    body: dict[str, Any] = {name: fields[name] for name in _SAME if name in fields}
    body["messages"] = _instructed(fields.get("instructions"), messages)
    if "max_output_tokens" in fields:
        body["max_tokens"] = fields["max_output_tokens"]
    if LOGPROBS in fields.get("include", ()):
        body |= {"logprobs": True, "top_logprobs": fields.get("top_logprobs", 0)}
    if form := fields.get("text", {}).get("format"):
        body["response_format"] = _chat_format(form)
    if fields.get("tools"):
        body["tools"] = [_chat_tool(tool) for tool in fields["tools"]]
    choice = body.pop("tool_choice", None)
    if isinstance(choice, dict):
        body["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    elif choice is not None and (choice == "required" or fields.get("tools")):
        body["tool_choice"] = choice
    return body


def input_messages(given: str | list[dict[str, Any]]) -> list[Message]:
    """Messages of the input: a text of the user, or items. Calls that follow each other are one turn."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    reasoning = ""
    for item in given:
        kind = item.get("type", "message")
        if kind == "reasoning":
            reasoning += "".join(part["text"] for part in item.get("content", ()))
            continue
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _content(item["output"])})
        elif kind == "message":
            messages.append({"role": item["role"], "content": _content(item["content"])})
        else:
            _add_call(messages, item)
        if reasoning and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = reasoning
        reasoning = ""
    return messages


def output_message(output: Sequence[Mapping[str, Any]]) -> Message:
    """The turn of the conversation that the items of an answer are."""
    texts = [part["text"] for item in output if item["type"] == "message" for part in item["content"]]
    message: Message = {"role": "assistant", "content": "".join(texts)}
    calls = [_chat_call(item) for item in output if item["type"] == "function_call"]
    return {**message, "tool_calls": calls} if calls else message


def _add_call(messages: list[Message], item: Mapping[str, Any]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(_chat_call(item))


def _chat_call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.get("text", part.get("refusal"))} for part in content]


def _instructed(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """The conversation with the instructions, in one message with a first one of the system: templates take one."""
    if not instructions:
        return list(messages)
    content: list[Any] = [{"type": "text", "text": instructions}]
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": instructions}, *messages]
    more = messages[0]["content"]
    content += [{"type": "text", "text": more}] if isinstance(more, str) else more
    return [{"role": "system", "content": content}, *messages[1:]]


def _chat_format(form: Mapping[str, Any]) -> dict[str, Any]:
    kind = form["type"]
    if kind != "json_schema":
        return {"type": kind}
    return {"type": kind, kind: {name: value for name, value in form.items() if name != "type"}}


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
