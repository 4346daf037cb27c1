"""Offline work: a file of requests, one a line, to a file of answers in the same order, which can be gone on with."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from svdengine.errors import RequestError, SvdEngineError
from svdengine.llm import LLM
from svdengine.server.api_error import ApiError, api_error
from svdengine.server.body import Body, parse_json
from svdengine.server.chat_job import ChatJob
from svdengine.server.completion_job import CompletionJob
from svdengine.server.job import Job

_AHEAD = 4  # times the requests at a time that may be begun before the first of them is written
_JOBS: Mapping[str, type[ChatJob] | type[CompletionJob]] = {
    "/v1/chat/completions": ChatJob,
    "/v1/completions": CompletionJob,
}


@dataclass
class _Item:
    """A line that was begun: its identity, and its job or what is wrong with it."""

    head: dict[str, Any]
    job: Job | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.job is None or all(request.done for request in self.job.requests)

    def result(self) -> dict[str, Any]:
        """The line to write."""
        errors = [self.error, *(request.error for request in (self.job.requests if self.job else ()))]
        error = next((e for e in errors if e is not None), None)
        if error is not None or self.job is None:
            told = api_error(error or SvdEngineError("the line was not run"))
            return {**self.head, "response": {"status_code": told.status, "body": told.body}, "error": told.message}
        body = self.job.answer([request.completion() for request in self.job.requests])
        return {**self.head, "response": {"status_code": 200, "body": body}, "error": None}


class BatchRun:
    """Runs lines, several at a time."""

    def __init__(self, llm: LLM, name: str, defaults: Mapping[str, Any], parallel: int) -> None:
        """`name`: what the model is called in answers. `defaults`: fields for lines that do not give them."""
        self._llm = llm
        self._name = name
        self._defaults = dict(defaults)
        self._parallel = parallel

    def results(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
        """A result for each line, given with its number, in order. Raises what ends the whole run."""
        source = iter(lines)
        window: deque[_Item] = deque()
        try:
            while True:
                running = sum(not item.done for item in window)
                room = min(self._parallel - running, _AHEAD * self._parallel - len(window))
                window.extend(self._begin(number, line) for number, line in islice(source, room))
                if not window:
                    return
                while window and window[0].done:
                    yield window.popleft().result()
                if any(not item.done for item in window):
                    self._llm.step()
        finally:
            for item in window:
                for request in item.job.requests if item.job is not None else ():
                    self._llm.abort(request)

    def _begin(self, number: int, line: bytes) -> _Item:
        head = {"line": number, "input": line_hash(line), "custom_id": None}
        try:
            value = parse_json(line)
            if isinstance(value, dict):
                head["custom_id"] = value.get("custom_id")
            job = self._job(value)
        except (ApiError, RequestError) as error:
            return _Item(head, error=error)
        for request in job.requests:
            self._llm.add(request)
        return _Item(head, job)

    def _job(self, value: Any) -> Job:
        line = Body(value)
        line.ignore("custom_id")
        url, method, body = line.take("url", str), line.take("method", str), line.take("body", dict)
        if body is None:
            body = {name: item for name, item in value.items() if name not in ("custom_id", "url", "method")}
            url = url or ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        else:
            line.finish()
        if url is None or url not in _JOBS:
            raise ApiError(400, f"url must be one of {', '.join(_JOBS)}, found {url!r:.100}", "url")
        if method not in (None, "POST"):
            raise ApiError(400, f"method must be POST, found {method!r:.100}", "method")
        if body.get("stream"):
            raise ApiError(400, "stream is not for a file of requests", "stream")
        given = {name: item for name, item in body.items() if name != "model"}  # there is one, whatever it is called
        return _JOBS[url](self._llm, self._name, {**self._defaults, **given})


def line_hash(line: bytes) -> str:
    """What tells one line of requests from another."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, and their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def finished_lines(source: Path, output: Path) -> int:
    """How many lines of requests have their answer already. A last answer that was not written whole is cut off.

    Raises RequestError when the answers are not those of these requests.
    """
    if not output.exists():
        return 0
    count = end = 0
    with output.open("rb") as file:
        requests = read_lines(source)
        for line in file:
            if not line.endswith(b"\n"):
                break
            number, request = next(requests, (0, b""))
            if _hash_of(line) != line_hash(request):
                where = f"line {count + 1} of {output} is no answer to line {number} of {source}"
                raise RequestError(f"{where}; remove {output} to begin anew, or write to another file")
            count, end = count + 1, end + len(line)
    if end < output.stat().st_size:
        with output.open("r+b") as file:
            file.truncate(end)
    return count


def _hash_of(line: bytes) -> Any:
    try:
        return json.loads(line)["input"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
