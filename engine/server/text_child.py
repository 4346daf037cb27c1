"""Work on the text of clients that may take long, in a child process: see `work_pool`.

It answers one request after the other; the first loads the tokenizer and the template, which later ones use.
"""

from __future__ import annotations

import base64
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the child may start no threads

from svdengine.errors import SvdEngineError
from svdengine.scheduling.constraint import ConstraintMaker
from svdengine.text import grammar_check
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.grammar import Grammar
from svdengine.text.tokenizer import Tokenizer
from svdengine.text.tokenizer_info import TokenizerInfo

GRAMMAR_SECONDS = 2.0  # of CPU time, to read a grammar
GRAMMAR_MEMORY = 256 << 20  # bytes that reading one may take

_FIRST_STEPS = 2  # masks that are computed of a new grammar, to see whether they can be

_loaded: _Text | None = None


class _Text:
    """What the work is done with."""

    def __init__(self, given: dict[str, Any]) -> None:
        info = TokenizerInfo.from_dict(given["info"], given["vocab_size"])
        self.tokenizer = Tokenizer(info, base64.b64decode(given["data"]))
        self._source = given["template"]
        self._vocab_size = given["vocab_size"]
        self._template: ChatTemplate | None = None
        self._maker: ConstraintMaker | None = None

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self._source, self.tokenizer)
        return self._template

    @property
    def maker(self) -> ConstraintMaker:
        if self._maker is None:
            self._maker = ConstraintMaker(self.tokenizer, self._vocab_size, check=lambda grammar: None)
        return self._maker


def handle(request: Any) -> Any:
    """The child's part; see `limited_process`. A request is the name of the work and its arguments, as JSON.

    Returns ["done", result], ["refused", name of the error, message], or ["empty"] when nothing was loaded.
    """
    global _loaded
    name, arguments = request
    try:
        if name == "load":
            _loaded = _Text(arguments)
            return ["done", None]
        if _loaded is None:
            return ["empty"]
        return ["done", _WORK[name](_loaded, **arguments)]
    except SvdEngineError as error:
        return ["refused", type(error).__name__, str(error)]


def _encode(text: _Text, prompt: str, special: bool, bos: bool) -> list[int]:
    return text.tokenizer.encode(prompt, special, bos=bos)


def _encode_chat(text: _Text, messages: list[Any], variables: dict[str, Any]) -> list[int]:
    return text.template.encode(messages, **variables)


def _check_grammar(text: _Text, kind: Any, grammar: str) -> str:
    """Read a grammar, and see what may come first: what is wrong with it, or ""."""
    import resource

    maker = text.maker
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_PROF, GRAMMAR_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (min(_address_space() + GRAMMAR_MEMORY, soft), hard))
    problem = grammar_check.handle({"kind": kind, "text": grammar})
    if problem:
        return problem
    try:
        constraint = maker.make(Grammar(kind, grammar))
        for _ in range(_FIRST_STEPS):
            allowed = constraint.allowed()
            constraint.accept(int(allowed[len(allowed) // 2]))
            if constraint.complete:
                break
    except SvdEngineError as error:
        return str(error).removeprefix("the grammar cannot be used: ")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return ""


def _address_space() -> int:
    import resource

    statistics = Path("/proc/self/statm").read_text(encoding="ascii")
    return int(statistics.split()[0]) * resource.getpagesize()


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The text of each token, looked up once for equal ones."""
    texts = {token: tokenizer.token_text(token) for token in set(tokens)}
    return [texts[token] for token in tokens]


def _decode(text: _Text, tokens: list[int]) -> str:
    return text.tokenizer.decode(tokens, special=True)


def _pieces(text: _Text, tokens: list[int]) -> list[str]:
    return pieces(text.tokenizer, tokens)


_WORK: dict[str, Callable[..., Any]] = {
    "encode": _encode,
    "encode_chat": _encode_chat,
    "grammar": _check_grammar,
    "decode": _decode,
    "pieces": _pieces,
}
