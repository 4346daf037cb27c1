"""Child processes that do what may take long with the text of clients, within limits of time and memory.

Tokenizers and grammars are libraries that hold the interpreter or cannot be interrupted: in the server's process, one
long text would stop the answers of all others. A client has one child at a time, so that it leaves one to the others.
"""

from __future__ import annotations

import base64
import threading
import time
from typing import Any

from svdengine import errors
from svdengine.errors import QueueFullError, RequestError, SvdEngineError
from svdengine.llm import LLM
from svdengine.server.work import Work
from svdengine.text.limited_process import LimitedProcess, Limits, WorkLimitError

CHILDREN = 2
LIMITS = Limits(cpu_seconds=10.0, seconds=30.0, memory=2 << 30)
QUEUE_SECONDS = 30.0  # that work waits for a child
_LOOK_SECONDS = 0.2  # until work that waits sees that it was given up
SHORT = 32_768  # characters that one piece of work may read in the server's own process

_MODULE = "svdengine.server.text_child"
_PACKAGES = ("numpy", "tokenizers", "sentencepiece", "jinja2", "markupsafe", "llguidance")


class _Child(LimitedProcess):
    """A child, which another thread can stop."""

    def stop(self) -> None:
        """Kill the process; who waits for its answer gets WorkLimitError."""
        process = self._process
        if process is not None:
            process.kill()


class WorkPool:
    """Runs work in children. Safe to use from several threads."""

    def __init__(self, llm: LLM, limits: Limits = LIMITS) -> None:
        info = llm.model_file.tokenizer_info
        self._load = {
            "info": info.to_dict(),
            "data": base64.b64encode(llm.model_file.tokenizer_bytes).decode(),
            "template": llm.model_file.chat_template,
            "vocab_size": llm.config.vocab_size,
        }
        self._changed = threading.Condition()
        self._free = [_Child(_MODULE, limits, _installed()) for _ in range(CHILDREN)]
        self._owners: set[str] = set()  # that have a child now
        self._closed = False

    def run(self, name: str, **arguments: Any) -> Any:
        """The result of a function of `text_child`.

        Raises what it raises, RequestError when it took too much (of grammars WorkLimitError), QueueFullError when no
        child was free in time, and NoChildError where there are none.
        """
        work = Work.current() or Work("")
        child = self._take(work)
        try:
            return _result(self._ask(child, [name, arguments]))
        except WorkLimitError as error:
            if name == "grammar":
                raise
            raise RequestError(f"{_WHAT[name]} takes too much time or memory; it was stopped") from error
        finally:
            self._give_back(child, work)

    def close(self) -> None:
        """End the children."""
        with self._changed:
            self._closed = True
            for child in self._free:
                child.close()

    def _ask(self, child: _Child, request: Any) -> Any:
        answer = child.ask(request)
        if answer == ["empty"]:  # a child that was just started
            _result(child.ask(["load", self._load]))
            answer = child.ask(request)
        return answer

    def _take(self, work: Work) -> _Child:
        last = time.monotonic() + QUEUE_SECONDS
        with self._changed:
            while not self._free or work.owner in self._owners:
                left = last - time.monotonic()
                if work.given_up or left <= 0:
                    raise QueueFullError("other long texts and grammars are being read; try again later")
                self._changed.wait(min(left, _LOOK_SECONDS))
            self._owners.add(work.owner)
            child = self._free.pop()
            work.stop_with(child.stop)
            return child

    def _give_back(self, child: _Child, work: Work) -> None:
        with self._changed:
            work.stop_with(None)
            self._owners.discard(work.owner)
            self._free.append(child)
            if self._closed:
                child.close()
            self._changed.notify_all()


_WHAT = {
    "encode": "reading the prompt",
    "encode_chat": "reading the messages",
    "decode": "writing the tokens",
    "pieces": "writing the tokens",
}


def _result(answer: Any) -> Any:
    kind, *values = answer
    if kind == "refused":
        name, message = values
        found = getattr(errors, name, SvdEngineError)
        raise found(message)
    return values[0]


def _installed() -> tuple[str, ...]:
    from importlib.util import find_spec

    return tuple(name for name in _PACKAGES if find_spec(name) is not None)
