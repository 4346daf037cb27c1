"""Functions that a model may call: how they are told to it, what it may write, and how its calls are read.

A call is written as many models were trained to: an object with `name` and `arguments` between <tool_call> tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from svdengine.errors import RequestError
from svdengine.text.chat_template import ChatTemplate, Message
from svdengine.text.grammar import Grammar
from svdengine.text.json_schema import schema_text

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_INSTRUCTION = """\
You can call functions. Each line describes one as JSON:
{tools}
To call a function, write its name and its arguments like this, and nothing else:
{open}
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
{close}
What it returns is given to you between <tool_response> tags."""


@dataclass(frozen=True)
class Tool:
    """A function: its name, the JSON schema of its arguments, and the object that describes it to the model."""

    name: str
    parameters: Mapping[str, Any]
    description: Mapping[str, Any]  # {"type": "function", "function": {...}}


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote; the arguments are JSON."""

    name: str
    arguments: str


def tool_prompt(
    messages: Sequence[Message], tools: Sequence[Tool], template: ChatTemplate
) -> tuple[list[Message], dict[str, Any]]:
    """Messages and variables for the chat template, that tell the model of the tools and of earlier calls.

    A template that knows these tags is given the tools; for another they are written into the system prompt.
    """
    if OPEN in template.source and "tools" in template.variables:
        return list(messages), {"tools": [tool.description for tool in tools]} if tools else {}
    plain = _without_tool_roles(messages)
    if not tools:
        return plain, {}
    lines = "\n".join(json.dumps(tool.description["function"], ensure_ascii=False) for tool in tools)
    instruction = _INSTRUCTION.format(tools=lines, open=OPEN, close=CLOSE)
    if plain and plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{instruction}"}
        return [first, *plain[1:]], {}
    return [{"role": "system", "content": instruction}, *plain], {}


def tool_grammar(tools: Sequence[Tool], *, required: bool, several: bool, answer: Grammar | None = None) -> Grammar:
    """What the model may write: calls of these tools, with arguments that fit, or any text unless `required`.

    answer: what a text must keep to that is no call. Raises RequestError when it is not a JSON schema.
    """
    schemas = [schema_text({"type": "object", **tool.parameters}) for tool in tools]
    labels = [f"the parameters of the tool {tool.name!r}" for tool in tools]
    calls = "call (NEXT call)*" if several else "call"
    lines = ["%llguidance {}"]
    named = list(zip(labels, schemas, strict=True))
    if required:
        lines.append(f"start: {calls}")
    elif answer is None:
        lines += ["start: text | " + calls.replace("call", "first", 1), "text: TEXT", "first: head body"]
        lines += [f'head[lazy]: TEXT "{OPEN}"', "TEXT: /(.|\\n)*/"]
    else:
        lines += [f"start: answer | {calls}", f"answer: %json {_json_schema(answer)}"]
        named += answer.schemas
    lines += [
        f'call: "{OPEN}" body',
        f'body: "\\n" ({" | ".join(f"object_{i}" for i in range(len(tools)))}) "\\n{CLOSE}"',
        *(line for i, tool in enumerate(tools) for line in _call_rules(i, tool.name, schemas[i])),
        "space: SPACE?",
        "SPACE: /\\n {0,32}| /",
        'NEXT: "\\n"',
    ]
    return Grammar("lark", "\n".join(lines), tuple(named))


@dataclass
class ToolCallReader:
    """Splits the text of an answer, as it comes, into what is said and the calls."""

    calls: list[ToolCall] = field(default_factory=list)
    _held: str = ""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What is said in the text so far, and the calls that are complete."""
        self._held += text
        said = ""
        found: list[ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            before = self._held[:start]
            end = self._held.find(CLOSE, start)
            if end < 0:
                kept = len(before.rstrip())
                said += before[:kept] if not self.calls else ""
                self._held = self._held[kept:]
                return said, found
            call = _read_call(self._held[start + len(OPEN) : end])
            if call is None:
                said += self._held[: end + len(CLOSE)]
            else:
                said += before.rstrip() if not self.calls else ""
                self.calls.append(call)
                found.append(call)
            self._held = self._held[end + len(CLOSE) :]
        if self.calls:
            return said, found  # after a call only white space is left
        safe = self._safe_length()
        said += self._held[:safe]
        self._held = self._held[safe:]
        return said, found

    def flush(self) -> str:
        """What is left at the end, such as a call that was cut."""
        held, self._held = self._held, ""
        return held if held.strip() or not self.calls else ""

    def _safe_length(self) -> int:
        """Characters before white space or a tag that may go on."""
        text = self._held
        cut = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
        return len(text[: len(text) - cut].rstrip())


def _call_rules(i: int, name: str, schema: str) -> list[str]:
    """The object of a call. The schema of its arguments stands alone, so that pointers into it keep their meaning."""
    fields = ["{", '"name"', ":", json.dumps(name), ",", '"arguments"', ":", f"arguments_{i}", "}"]
    words = [word if word.startswith("arguments_") else json.dumps(word) for word in fields]
    return [f"object_{i}: {' space '.join(words)}", f"arguments_{i}: %json {schema}"]


def _json_schema(answer: Grammar) -> str:
    if answer.kind != "json_schema":
        raise RequestError("an answer beside tools can be held to a JSON schema only, not to another grammar")
    return answer.text


def _read_call(text: str) -> ToolCall | None:
    try:
        value = json.loads(text)
        return ToolCall(str(value["name"]), json.dumps(value["arguments"], ensure_ascii=False))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _without_tool_roles(messages: Sequence[Message]) -> list[Message]:
    """Calls as the model wrote them, and results in messages of the user."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                result = f"{plain.pop()['content']}\n{result}"
            plain.append({"role": "user", "content": result})
        elif message.get("tool_calls"):
            calls = "\n".join(_written(call["function"]) for call in message["tool_calls"])
            text = f"{message['content']}\n{calls}" if message.get("content") else calls
            plain.append({"role": message["role"], "content": text})
        else:
            plain.append(message)
        after_result = message["role"] == "tool"
    return plain


def _written(function: Mapping[str, Any]) -> str:
    call = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"{OPEN}\n{call}\n{CLOSE}"
