"""Whether a grammar can be used, found out in a child process: compiling one may take all memory, and for ever.

llguidance bounds what it does with a compiled grammar, and not the work of compiling a JSON schema: twenty patterns
that a text must fit at once take gigabytes. A grammar that compiles here within the limits does so anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from svdengine.errors import GrammarError
from svdengine.text.grammar import Grammar
from svdengine.text.json_schema import subschemas
from svdengine.text.limited_process import LimitedProcess, Limits, NoChildError, WorkLimitError

LIMITS = Limits(cpu_seconds=3.0, seconds=60.0, memory=1 << 30)

_MOST_TRIED = 64  # keywords that are tried one by one to find the one to name
_PLACE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")  # a line of a grammar that no user wrote
_UNKNOWN = re.compile(r"[Uu]nimplemented keys: \[(.*?)\]")
_TRIED_ALONE = ("pattern", "format", "patternProperties", "multipleOf", "enum", "const", "oneOf", "allOf", "$ref")


@dataclass(frozen=True)
class Problem:
    """Why a grammar cannot be used; stopped: reading it reached a limit."""

    message: str
    stopped: bool = False


class GrammarChecker:
    """Checks grammars, one at a time. Safe to use from several threads."""

    def __init__(self) -> None:
        self._child: LimitedProcess | None = LimitedProcess(__name__, LIMITS, ("llguidance",))

    def check(self, grammar: Grammar) -> None:
        """Raise GrammarError, with the schema and the keyword where they can be told, when it cannot be used."""
        problem = self._problem(grammar.kind, grammar.text)
        if problem is None:
            return
        for i, (whose, schema) in enumerate(grammar.schemas):
            found = problem if schema == grammar.text else self._problem("json_schema", schema)
            if found is not None:
                keyword = "" if found.stopped else self._keyword(schema, found.message)
                raise GrammarError(f"the grammar cannot be used: {whose}{keyword}: {found.message}", i)
        raise GrammarError(f"the grammar cannot be used: {problem.message}")

    def ask(self, kind: str, text: str) -> str:
        """What is wrong with a grammar, or "". Raises WorkLimitError, and NoChildError where no process has limits."""
        if self._child is None:
            raise NoChildError
        return str(self._child.ask({"kind": kind, "text": text}))

    def _problem(self, kind: str, text: str) -> Problem | None:
        try:
            found = self.ask(kind, text)
        except WorkLimitError as error:
            return Problem(f"compiling it was stopped, {error}; a simpler schema is needed", stopped=True)
        except NoChildError:
            self._child = None  # it is not tried again
            found = handle({"kind": kind, "text": text})
        return Problem(found) if found else None

    def _keyword(self, text: str, problem: str) -> str:
        """Where the keyword stands that cannot be held, or ""."""
        schema = json.loads(text)
        unknown = _UNKNOWN.search(problem)
        if unknown:
            names = set(re.findall(r'"(.*?)"', unknown[1]))
            for path, part in subschemas(schema):
                for name in names.intersection(part):
                    return _place(path, name)
        for tried, (path, name, alone) in enumerate(_alone(schema)):
            if tried >= _MOST_TRIED:
                break
            if self._problem("json_schema", json.dumps(alone)) is not None:
                return _place(path, name)
        return ""


def handle(request: Any) -> str:
    """The child's part; see `limited_process`."""
    from llguidance import LLMatcher

    try:
        if request["kind"] == "json_schema":
            source = LLMatcher.grammar_from_json_schema(request["text"])
        else:
            source = LLMatcher.grammar_from_lark(request["text"])
    except ValueError as error:
        return short(error)
    broken, messages = LLMatcher.validate_grammar_with_warnings(source)
    return short(messages[0]) if broken else ""


def _alone(schema: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Keywords, each in a schema of its own with the definitions that it may point to."""
    around = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    parts = sorted(subschemas(schema), key=lambda found: -found[0].count("/"))  # the innermost first
    for name in _TRIED_ALONE:
        for path, part in parts:
            if name in part:
                kind = {"type": part["type"]} if "type" in part else {}
                yield path, name, {**around, **kind, name: part[name]}


def _place(path: str, keyword: str) -> str:
    return f" has the keyword {keyword!r} at {path[:200] or '/'}, which cannot be held"


def short(message: object) -> str:
    """What llguidance says, in a line: of a pattern, the pattern and what is wrong with it."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()] or ["unknown"]
    first = _PLACE.sub("", lines[0])
    if first.startswith("regex parse error") and len(lines) > 1:
        why = next((line for line in lines if line.startswith("error: ")), "error: it is no regular expression")
        first = f"pattern {lines[1]:.100}: {why.removeprefix('error: ')}"
    return first[:300]
