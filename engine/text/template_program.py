"""A compiled chat template, which runs in a child process with limits where the platform has them.

The sandbox bounds nearly all that a template can do, and no bound of its own stops a library that is busy in C, or the
compiler. So a model's template runs beside this process: a request costs a fraction of a millisecond more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from jinja2 import meta

from svdengine.text.limited_process import LimitedProcess, Limits, NoChildError, WorkLimitError
from svdengine.text.template_bounds import TemplateLimitError
from svdengine.text.template_sandbox import BoundedSandbox

LIMITS = Limits(cpu_seconds=2.0, seconds=60.0, memory=512 << 20)

_FAILURES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, AssertionError)


@dataclass(frozen=True)
class Outcome:
    """What came of compiling a template or of rendering it.

    kind: text, with what was rendered, or why there is none: it does not compile, it was stopped by a limit, it
        refused the messages, or it failed on them.
    text: the text, or the reason in a line.
    variables: names that the template reads and does not set itself.
    """

    kind: Literal["text", "broken", "stopped", "refused", "failed"]
    text: str = ""
    variables: tuple[str, ...] = ()


class TemplateProgram:
    """One template of a model. Safe to use from several threads."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._child: LimitedProcess | None = LimitedProcess(__name__, LIMITS, ("jinja2", "markupsafe"))
        self._local: _Compiled | None = None
        self._lock = threading.Lock()

    def compile(self) -> Outcome:
        """Compile it, to see whether it can be and what it reads."""
        return self._run(None)

    def render(self, variables: dict[str, Any]) -> Outcome:
        """Render it with variables of JSON's kinds. Raises ValueError when they are of other kinds."""
        return self._run(variables)

    def _run(self, variables: dict[str, Any] | None) -> Outcome:
        if self._child is not None:
            try:
                return _outcome(self._child.ask({"source": self._source, "variables": variables}))
            except WorkLimitError as error:
                return Outcome("stopped", str(error))
            except NoChildError:
                self._child = None  # it is not tried again: the sandbox's own bounds stay
        with self._lock:
            try:
                self._local = self._local or _Compiled(self._source)
                return self._local.run(variables)
            except MemoryError:
                return Outcome("stopped", "it needs too much memory")


class _Compiled:
    def __init__(self, source: str) -> None:
        self.source = source
        self._sandbox = BoundedSandbox()
        self._broken: Outcome | None = None
        try:
            self._template = self._sandbox.from_string(source)
            self._names = tuple(sorted(meta.find_undeclared_variables(self._sandbox.parse(source))))
        except (jinja2.TemplateError, SyntaxError, *_FAILURES) as error:
            self._broken = Outcome("broken", _first_line(error))
        except MemoryError:  # Python's parser says so when its stack is full
            self._broken = Outcome("broken", "it is nested too deeply")

    def run(self, variables: dict[str, Any] | None) -> Outcome:
        if self._broken is not None or variables is None:
            return self._broken or Outcome("text", variables=self._names)
        try:
            return Outcome("text", self._sandbox.render(self._template, variables))
        except TemplateLimitError as error:
            return Outcome("stopped", _first_line(error))
        except jinja2.TemplateError as error:
            return Outcome("refused", _first_line(error))
        except _FAILURES as error:
            return Outcome("failed", f"{type(error).__name__}: {_first_line(error)}")


_last: _Compiled | None = None  # in the child: the template of its model


def handle(request: Any) -> list[Any]:
    """The child's part; see `limited_process`."""
    global _last
    if _last is None or _last.source != request["source"]:
        _last = _Compiled(request["source"])
    done = _last.run(request["variables"])
    return [done.kind, done.text, done.variables]


def _outcome(answer: Any) -> Outcome:
    kind, text, names = answer
    return Outcome(kind, text, tuple(names))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
