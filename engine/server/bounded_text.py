"""A model's tokenizer, template and grammars for a server: what may take long is done in a child process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svdengine.server.text_child import GRAMMAR_MEMORY, GRAMMAR_SECONDS, pieces
from svdengine.server.work import Work
from svdengine.server.work_pool import SHORT, WorkPool
from svdengine.text.chat_template import ChatTemplate, Message
from svdengine.text.grammar_check import GrammarChecker
from svdengine.text.limited_process import NoChildError, WorkLimitError
from svdengine.text.tokenizer import Tokenizer

_VALUE_SIZE = 16  # characters that a value of a message stands for, beside its text


class BoundedTokenizer(Tokenizer):
    """Another tokenizer, whose long texts are read elsewhere."""

    def __init__(self, inner: Tokenizer, pool: WorkPool) -> None:
        self.__dict__.update(inner.__dict__)
        self._pool = pool

    def encode(
        self, text: str, special: bool = False, *, bos: bool = True, literals: Mapping[str, str] | None = None
    ) -> list[int]:
        """See `Tokenizer.encode`."""
        if literals or not isinstance(text, str) or not _is_long(len(text)):
            return super().encode(text, special, bos=bos, literals=literals)
        try:
            found: list[int] = self._pool.run("encode", prompt=text, special=special, bos=bos)
        except NoChildError:
            return super().encode(text, special, bos=bos)
        return found

    def pieces(self, tokens: list[int]) -> list[str]:
        """The text of each token."""
        if not _is_long(len(tokens)):
            return pieces(self, tokens)
        try:
            found: list[str] = self._pool.run("pieces", tokens=tokens)
        except NoChildError:
            return pieces(self, tokens)
        return found

    def whole_text(self, tokens: list[int]) -> str:
        """Text of token ids, control tokens included."""
        if not _is_long(len(tokens)):
            return self.decode(tokens, special=True)
        try:
            found: str = self._pool.run("decode", tokens=tokens)
        except NoChildError:
            return self.decode(tokens, special=True)
        return found


class BoundedTemplate(ChatTemplate):
    """Another template, whose long conversations are written elsewhere."""

    def __init__(self, inner: ChatTemplate, pool: WorkPool) -> None:
        self.__dict__.update(inner.__dict__)
        self._pool = pool

    def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """See `ChatTemplate.encode`."""
        work = Work.current()
        if work is None:
            return super().encode(messages, **variables)
        if work.prompt is None or work.prompt[0] is not messages or work.prompt[1] != variables:  # one for all choices
            work.prompt = messages, variables, self._encode(messages, variables)
        return list(work.prompt[2])

    def _encode(self, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
        if not _is_long(sum(_sizes([messages, variables]))):
            return super().encode(messages, **variables)
        try:
            found: list[int] = self._pool.run("encode_chat", messages=messages, variables=variables)
        except NoChildError:
            return super().encode(messages, **variables)
        return found


class BoundedGrammarChecker(GrammarChecker):
    """Grammars of clients are read by a child of the server's, which is theirs for that time."""

    def __init__(self, pool: WorkPool) -> None:
        super().__init__()
        self._pool = pool

    def ask(self, kind: str, text: str) -> str:
        """See `GrammarChecker.ask`."""
        if Work.current() is None:
            return super().ask(kind, text)
        try:
            return str(self._pool.run("grammar", kind=kind, grammar=text))
        except WorkLimitError as error:
            most = f"it takes more than {GRAMMAR_SECONDS:g} s or {GRAMMAR_MEMORY >> 20} MB"
            raise WorkLimitError(most) from error


def _is_long(size: int) -> bool:
    """Whether a client's work has read so much here that what comes is to be read elsewhere."""
    work = Work.current()
    if work is None:
        return False
    work.size += size
    return work.size > SHORT


def _sizes(value: Any) -> Iterator[int]:
    """Of every value of a conversation, its length in characters and more."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        yield _VALUE_SIZE
        if isinstance(each, str):
            yield len(each)
        elif isinstance(each, Mapping):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
