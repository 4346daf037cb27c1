"""The events of a response, in the order that OpenAI documents, and the response that they amount to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from svdengine.server.api_error import ApiError
from svdengine.server.said import CallPart, Said

Object = dict[str, Any]  # of JSON


class ResponseEvents:
    """Writes a response: its items one after the other, each with its events."""

    def __init__(self, response: Object) -> None:
        """`response`: the object as it is before anything was said."""
        self._response = response
        self._output: list[Object] = []
        self._number = 0

    @property
    def output(self) -> Sequence[Object]:
        """The items so far; the last one may go on."""
        return self._output

    def begin(self) -> list[Object]:
        """Events before anything is said."""
        return [self._event(f"response.{kind}", response=self.response()) for kind in ("created", "in_progress")]

    def say(self, said: Said) -> list[Object]:
        """Events of a piece of the answer."""
        events = []
        if said.text or said.logprobs:
            events += self._say_text(said.text, said.logprobs)
        for part in said.calls:
            events += self._call(part)
        return events

    def end(self, incomplete: str | None, usage: Object) -> list[Object]:
        """Events after all is said; `incomplete`: why the answer is not whole."""
        status = "completed" if incomplete is None else "incomplete"
        events = self._say_text("", ()) if not self._output else []  # an answer has an item, if an empty one
        events += self._close(status)
        self._response |= {
            "status": status,
            "completed_at": int(time.time()) if incomplete is None else None,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
            "usage": usage,
        }
        return [*events, self._event(f"response.{status}", response=self.response())]

    def fail(self, told: ApiError) -> list[Object]:
        """Events when an error ends the answer."""
        code = "rate_limit_exceeded" if told.status == 429 else "server_error"
        self._response |= {"status": "failed", "error": {"code": code, "message": told.message}}
        return [self._event("response.failed", response=self.response())]

    def response(self) -> Object:
        """The response with its items."""
        return {**self._response, "output": [dict(item) for item in self._output]}

    def _event(self, kind: str, **fields: Any) -> Object:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _open(self, item: Object) -> list[Object]:
        """Close the item before, and begin another."""
        events = self._close("completed")
        self._output.append(item)
        return [*events, self._item_event("response.output_item.added", item=_copy(item))]

    def _item_event(self, kind: str, **fields: Any) -> Object:
        return self._event(kind, output_index=len(self._output) - 1, **fields)

    def _last(self) -> Object | None:
        """The item that goes on."""
        return self._output[-1] if self._output and self._output[-1]["status"] == "in_progress" else None

    def _say_text(self, text: str, logprobs: Sequence[Object]) -> list[Object]:
        events = []
        item = self._last()
        if item is None or item["type"] != "message":
            head = {"type": "message", "id": f"msg_{uuid.uuid4().hex}", "role": "assistant"}
            events = self._open(head | {"status": "in_progress", "content": []})
            item = self._output[-1]
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item["content"].append(part)
            events.append(self._part_event("response.content_part.added", item, part=_copy(part)))
        part = item["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text:
            kind = "response.output_text.delta"
            events.append(self._part_event(kind, item, delta=text, logprobs=list(logprobs)))
        return events

    def _part_event(self, kind: str, item: Object, **fields: Any) -> Object:
        return self._item_event(kind, item_id=item["id"], content_index=0, **fields)

    def _call(self, part: CallPart) -> list[Object]:
        events = []
        if part.id is not None:
            head = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": part.id, "name": part.name}
            events = self._open(head | {"arguments": "", "status": "in_progress"})
        item = self._output[-1]
        item["arguments"] += part.arguments
        if part.arguments:
            kind = "response.function_call_arguments.delta"
            events.append(self._item_event(kind, item_id=item["id"], delta=part.arguments))
        return events

    def _close(self, status: str) -> list[Object]:
        """End the item that goes on, if there is one."""
        item = self._last()
        if item is None:
            return []
        if item["type"] == "message":
            part = item["content"][0]
            fields = {"text": part["text"], "logprobs": list(part["logprobs"])}
            events = [
                self._part_event("response.output_text.done", item, **fields),
                self._part_event("response.content_part.done", item, part=_copy(part)),
            ]
        else:
            fields = {"item_id": item["id"], "name": item["name"], "arguments": item["arguments"]}
            events = [self._item_event("response.function_call_arguments.done", **fields)]
        item["status"] = status
        return [*events, self._item_event("response.output_item.done", item=_copy(item))]


def _copy(item: Object) -> Object:
    return {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
