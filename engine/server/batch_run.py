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
from svdengine.server.body import Body, encode_json, parse_json
from svdengine.server.chat_job import ChatJob
from svdengine.server.completion_job import CompletionJob
from svdengine.server.job import Job

_AHEAD = 4  # times the requests at a time that may be begun before the first of them is written
_MOST_FAILURES = 3  # of steps, one after the other, until it is no line's fault
_PROMPTS = "/v1/completions"
_JOBS: Mapping[str, type[ChatJob] | type[CompletionJob]] = {
    "/v1/chat/completions": ChatJob,
    _PROMPTS: CompletionJob,
}


@dataclass
class _Item:
    """A line that was begun: its identity, and its job or what is wrong with it."""

    head: dict[str, Any]
    job: Job | None = None
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.job is None or self.error is not None or all(request.done for request in self.job.requests)

    def result(self) -> dict[str, Any]:
        """The line to write."""
        errors = [self.error, *(request.error for request in (self.job.requests if self.job else ()))]
        error = next((e for e in errors if e is not None), None)
        if error is not None or self.job is None:
            told = _told(error or SvdEngineError("the line was not run"))
            return {**self.head, "response": {"status_code": told.status, "body": told.body}, "error": told.message}
        try:
            body = self.job.answer([request.completion() for request in self.job.requests])
        except Exception as unforeseen:
            return _Item(self.head, error=unforeseen).result()
        return {**self.head, "response": {"status_code": 200, "body": body}, "error": None}


class BatchRun:
    """Runs lines, several at a time."""

    def __init__(
        self, llm: LLM, name: str, defaults: Mapping[str, Any], parallel: int, *, special: bool = False
    ) -> None:
        """`name`: what the model is called in answers. `defaults`: fields for lines that do not give them.

        special: control tokens that are written in a prompt are tokens, where its line does not say.
        """
        self._llm = llm
        self._name = name
        prompts = {**defaults, "parse_special": True} if special else dict(defaults)
        self._defaults: Mapping[str, dict[str, Any]] = {url: dict(defaults) for url in _JOBS} | {_PROMPTS: prompts}
        self._parallel = parallel
        self._failures = 0  # of steps, one after the other

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
                    self._step(window)
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
        except Exception as error:  # whatever it is, the line has it and not the run
            return _Item(head, error=error)
        for request in job.requests:
            try:
                self._llm.add(request)
            except Exception as error:
                for other in job.requests:
                    self._llm.abort(other)
                return _Item(head, error=error)
        return _Item(head, job)

    def _step(self, window: Iterable[_Item]) -> None:
        """Advance what runs. A step that fails is the error of the lines that were in it; many, the end of the run."""
        try:
            self._llm.step()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                raise
            for item in window:
                if not item.done:
                    item.error = error
                    for request in item.job.requests if item.job is not None else ():
                        self._llm.abort(request)

    def _job(self, value: Any) -> Job:
        line = Body(value)
        line.ignore("custom_id")
        url, method, body = line.take("url", str), line.take("method", str), line.take("body", dict)
        if body is None:
            body = {name: item for name, item in value.items() if name not in ("custom_id", "url", "method")}
            url = url or ("/v1/chat/completions" if "messages" in body else _PROMPTS)
        else:
            line.finish()
        if url is None or url not in _JOBS:
            raise ApiError(400, f"url must be one of {', '.join(_JOBS)}, found {url!r:.100}", "url")
        if method not in (None, "POST"):
            raise ApiError(400, f"method must be POST, found {method!r:.100}", "method")
        if body.get("stream"):
            raise ApiError(400, "stream is not for a file of requests", "stream")
        given = {name: item for name, item in body.items() if name != "model"}  # there is one, whatever it is called
        return _JOBS[url](self._llm, self._name, {**self._defaults[url], **given})


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
            number, request = next(requests, (0, b""))
            if _hash_of(line) == line_hash(request):
                count, end = count + 1, end + len(line)
            elif line.endswith(b"\n") or not _begins_answer(line, number, request):
                where = f"line {count + 1} of {output} is no answer to line {number} of {source}"
                raise RequestError(f"{where}; remove {output} to begin anew, or write to another file")
    with output.open("r+b") as file:
        file.truncate(end)
        file.seek(max(end - 1, 0))
        if file.read(1) not in (b"", b"\n"):  # an editor took the last line's end away
            file.write(b"\n")
    return count


def _begins_answer(line: bytes, number: int, request: bytes) -> bool:
    """Whether a line is what an answer begins with, as one that was being written when the run ended."""
    head = encode_json({"line": number, "input": line_hash(request)})[:-1]
    return line[: len(head)] == head[: len(line)]


def _told(error: Exception) -> ApiError:
    """How the error of a line is told. Nobody reads a log beside the answers: one that nobody foresaw is in them."""
    if isinstance(error, ApiError | SvdEngineError):
        return api_error(error)
    return ApiError(500, f"the line failed with {type(error).__name__}: {str(error)[:300]}", code="internal_error")


def _hash_of(line: bytes) -> Any:
    try:
        return json.loads(line)["input"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
