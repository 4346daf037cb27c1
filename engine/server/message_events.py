"""The events of a message, in the order that Anthropic documents, and the message that they amount to."""

from __future__ import annotations

from typing import Any

from svdengine.server.said import CallPart, Said, arguments_object

Object = dict[str, Any]  # of JSON


class MessageEvents:
    """Writes a message: its content blocks one after the other, each with its events."""

    def __init__(self, message: Object) -> None:
        """`message`: the object as it is before anything was said."""
        self._message = message
        self._content: list[Object] = []
        self._arguments = ""  # of the block that goes on
        self._open = False

    def begin(self) -> list[Object]:
        """Events before anything is said."""
        return [{"type": "message_start", "message": self.message()}]

    def say(self, said: Said) -> list[Object]:
        """Events of a piece of the answer."""
        events = self._say_text(said.text) if said.text else []
        for part in said.calls:
            events += self._call(part)
        return events

    def end(self, stop_reason: str, stop_sequence: str | None, usage: Object) -> list[Object]:
        """Events after all is said."""
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        events = [*self._close(), {"type": "message_delta", "delta": delta, "usage": usage}]
        self._message |= {**delta, "usage": usage}
        return [*events, {"type": "message_stop"}]

    def message(self) -> Object:
        """The message with its content."""
        return {**self._message, "content": [dict(block) for block in self._content]}

    @property
    def called(self) -> bool:
        """Whether there is a call in it."""
        return any(block["type"] == "tool_use" for block in self._content)

    def _event(self, kind: str, **fields: Any) -> Object:
        return {"type": f"content_block_{kind}", "index": len(self._content) - 1, **fields}

    def _begin_block(self, block: Object) -> list[Object]:
        events = self._close()
        self._content.append(block)
        self._arguments, self._open = "", True
        return [*events, self._event("start", content_block=dict(block))]

    def _say_text(self, text: str) -> list[Object]:
        going_on = self._open and self._content[-1]["type"] == "text"
        events = [] if going_on else self._begin_block({"type": "text", "text": ""})
        self._content[-1]["text"] += text
        return [*events, self._event("delta", delta={"type": "text_delta", "text": text})]

    def _call(self, part: CallPart) -> list[Object]:
        events = []
        if part.id is not None:
            events = self._begin_block(
                {"type": "tool_use", "id": f"toolu_{part.id.removeprefix('call_')}", "name": part.name, "input": {}}
            )
        self._arguments += part.arguments
        if part.arguments:
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
            events.append(self._event("delta", delta=delta))
        return events

    def _close(self) -> list[Object]:
        """End the block that goes on, if there is one."""
        if not self._open:
            return []
        self._open = False
        if self._content[-1]["type"] == "tool_use":
            self._content[-1]["input"] = arguments_object(self._arguments)
        return [self._event("stop")]
