"""Tasks with right answers, one JSON object a line: choices by likelihood, text that must match, code that must work.

    {"prompt": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0}
    {"prompt": "What is 6 times 7?", "match": 42, "kind": "number", "chat": true, "max_tokens": 100}
    {"prompt": "Write a function f(n) that returns n + 1.", "tests": "assert f(1) == 2", "chat": true}

`answer` is the index of the right choice, or its text. `kind` is exact (the text, without space around it), regex
(found anywhere in it), or number (the last one in it); left out, it is number for a `match` that is a number, and exact
otherwise. `tests` are run after the program: the answer's code block or, where `chat` is left out, prompt and answer.
Every task may have `task`, a name under which results are summed, and `chat`: the prompt is a message. Those with
`match` or `tests` may have `max_tokens`, and `stop`, a list of texts.

Some files of tasks are part of the package, and have names instead of paths.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from svdengine.errors import RequestError
from svdengine.files.tensor_file import strict_json

Match = Literal["exact", "regex", "number"]

_COMMON = {"prompt", "task", "chat"}
_CHOICE = _COMMON | {"choices", "answer"}
_GENERATE = _COMMON | {"match", "kind", "max_tokens", "stop"}
_CODE = _COMMON | {"tests", "max_tokens", "stop"}
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass(frozen=True)
class ChoiceTask:
    """The likeliest continuation of the prompt must be the right one."""

    line: int
    task: str
    prompt: str
    chat: bool
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class GenerateTask:
    """What is generated after the prompt must match."""

    line: int
    task: str
    prompt: str
    chat: bool
    match: str
    kind: Match
    max_tokens: int
    stop: tuple[str, ...]

    def matches(self, text: str) -> bool:
        """Whether a generated text is right."""
        if self.kind == "exact":
            return text.strip() == self.match.strip()
        if self.kind == "regex":
            return re.search(self.match, text) is not None
        found = _NUMBER.findall(text)
        return bool(found) and float(found[-1].replace(",", "")) == float(self.match)


@dataclass(frozen=True)
class CodeTask:
    """A program is generated, which must pass tests. `code_runner` runs it."""

    line: int
    task: str
    prompt: str
    chat: bool
    tests: str
    max_tokens: int
    stop: tuple[str, ...]

    def program(self, text: str) -> str:
        """The program in an answer: its first block of code, or all of it; a continued prompt is part of it."""
        if not self.chat:
            return self.prompt + text
        block = _FENCED.search(text)
        return block[1] if block else text


Task = ChoiceTask | GenerateTask | CodeTask


def shipped_tasks() -> dict[str, Path]:
    """The files of tasks that are part of the package, by name."""
    folder = Path(__file__).parent / "task_files"
    return {path.stem: path for path in sorted(folder.glob("*.jsonl"))}


def read_tasks(source: Path) -> list[Task]:
    """The tasks of a file, or of one that is part of the package. Raises RequestError with the line that is wrong."""
    path = source if source.exists() else shipped_tasks().get(str(source), source)
    try:
        data = path.read_bytes()
    except OSError as error:
        names = ", ".join(shipped_tasks())
        raise RequestError(f"cannot read {path}: {error.strerror}; tasks that come with svdengine: {names}") from error
    tasks = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            tasks.append(_task(number, strict_json(line.decode("utf-8-sig"))))
        except ValueError as error:  # of JSON and of UTF-8 too
            raise RequestError(f"{path}, line {number}: {error}") from error
    if not tasks:
        raise RequestError(f"{path} holds no tasks")
    return tasks


def _task(line: int, record: Any) -> Task:
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    prompt, name, chat = record.get("prompt"), record.get("task", ""), record.get("chat", False)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError("prompt must be a text that is not empty")
    if not isinstance(name, str) or not isinstance(chat, bool):
        raise ValueError("task must be a text, and chat true or false")
    kinds = [field for field in ("choices", "match", "tests") if field in record]
    if len(kinds) != 1:
        raise ValueError("expected either choices and answer, or match, or tests")
    known = {"choices": _CHOICE, "match": _GENERATE, "tests": _CODE}[kinds[0]]
    unknown = sorted(record.keys() - known)
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if kinds == ["choices"]:
        choices, answer = _choices(record)
        return ChoiceTask(line, name or "choice", prompt, chat, choices, answer)
    limit, stop = _length(record)
    if kinds == ["tests"]:
        return CodeTask(line, name or "code", prompt, chat, _tests(record["tests"]), limit, stop)
    match, kind = _match(record)
    return GenerateTask(line, name or "generate", prompt, chat, match, kind, limit, stop)


def _length(record: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Where a generated text ends: after so many tokens, or at one of the texts."""
    limit, stop = record.get("max_tokens", 256), record.get("stop", [])
    if type(limit) is not int or limit < 1:
        raise ValueError(f"max_tokens must be a whole number above 0, found {limit!r}")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError("stop must be a list of texts that are not empty")
    return limit, tuple(stop)


def _tests(value: Any) -> str:
    if not isinstance(value, str) or "assert" not in value:
        raise ValueError("tests must be Python code with assertions")
    try:
        compile(value, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"tests are no Python code: {error}") from None
    return value


def _choices(record: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    choices, answer = record["choices"], record.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices must be at least two texts that are not empty")
    if isinstance(answer, str):
        if choices.count(answer) != 1:
            raise ValueError(f"the answer {answer!r} is not one of the choices")
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be an index in 0..{len(choices) - 1} or one of the choices, found {answer!r}")
    return tuple(choices), answer


def _match(record: dict[str, Any]) -> tuple[str, Match]:
    match = record["match"]
    number = isinstance(match, int | float) and not isinstance(match, bool)
    kind = record.get("kind", "number" if number else "exact")
    if kind not in ("exact", "regex", "number"):
        raise ValueError(f"kind must be exact, regex or number, found {kind!r}")
    if not number and (not isinstance(match, str) or not match):
        raise ValueError("match must be a text that is not empty, or a number")
    text = str(match)
    if kind == "number":
        try:
            float(text)
        except ValueError:
            raise ValueError(f"match must be a number, found {text!r}") from None
    if kind == "regex":
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"match is no regular expression: {error}") from None
    return text, kind
