"""The chat template: a list of messages to the text of a prompt, in which what users typed stays text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svdengine.errors import ModelFileError, RequestError
from svdengine.text.null_content import with_content
from svdengine.text.template_bounds import MAX_BITS
from svdengine.text.template_program import TemplateProgram
from svdengine.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role, content and whatever else the template reads

MAX_TEMPLATE = 256 * 1024  # characters
MAX_DEPTH = 32  # of lists and objects inside a message

_END_MARK = "\U0010fffd"  # the last private-use character, far from the others
_MARKS = range(0xE000, 0xF900)  # the private use area: no meaning of their own, no case, no white space


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt to be encoded with control tokens.

    text: the prompt, with marks, single characters, in place of text that looks like a control token and is none.
    literals: what each of the marks stands for.
    """

    text: str
    literals: Mapping[str, str]

    @property
    def plain(self) -> str:
        """The prompt as people read it."""
        return self.text.translate({ord(mark): meaning for mark, meaning in self.literals.items()})


class ChatTemplate:
    """A compiled template. Raises ModelFileError when it is too long or does not compile.

    source: the template.
    variables: names that it reads and does not set itself, such as messages or tools.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ModelFileError(f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are taken")
        self._tokenizer = tokenizer
        self.source = source
        self._program = TemplateProgram(source)
        compiled = self._program.compile()
        if compiled.kind != "text":
            raise ModelFileError(f"the model's chat template does not compile: {compiled.text}")
        self.variables = frozenset(compiled.variables)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **extra: Any
    ) -> RenderedPrompt:
        """The prompt of a conversation. `extra`: further variables of the template, such as tools.

        Text inside messages that spells a control token is replaced by a private-use character before the template
        runs, so that it can be told from what the template itself writes; trimming, splitting and looking into the
        content work as ever on the rest. Raises RequestError when the messages are unusable or the template refuses.
        """
        check_messages(messages)
        messages = with_content(messages, self.source)
        marked, literals = self._mark(_plain(messages), _plain(_without_none(extra)))
        values = {"messages": marked[0], **marked[1]}
        # Templates are written for transformers, where tools and documents that are not given are none.
        values = {"tools": None, "documents": None, **values, "add_generation_prompt": add_generation_prompt}
        values = {**self._tokenizer.template_tokens, **values}
        values |= {name: self._tokenizer.special_text(id_) for name, id_ in self._named_tokens()}
        done = self._program.render(values)
        if done.kind == "text":
            return RenderedPrompt(done.text, literals)
        if done.kind in ("broken", "stopped"):
            raise ModelFileError(f"the model's chat template was stopped: {done.text}")
        what = "refused" if done.kind == "refused" else "failed on"
        raise RequestError(f"the model's chat template {what} the messages: {done.text}")

    def encode(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **extra: Any,
    ) -> list[int]:
        """Token ids of the prompt of a conversation; see `render`.

        continue_final_message: the prompt ends with the last message's text, for an answer that goes on with it.
        """
        if continue_final_message:
            rendered = self._render_open(messages, extra)
        else:
            rendered = self.render(messages, add_generation_prompt=add_generation_prompt, **extra)
        return self._tokenizer.encode(rendered.text, special=True, bos=False, literals=rendered.literals)

    def _render_open(self, messages: Sequence[Message], extra: dict[str, Any]) -> RenderedPrompt:
        """The prompt up to the end of the last message's text, which is marked while the template runs."""
        check_messages(messages)
        last = messages[-1].get("content")
        if not isinstance(last, str):
            raise RequestError("only a last message whose content is text can be continued")
        marked = [*messages[:-1], {**messages[-1], "content": last + _END_MARK}]
        rendered = self.render(marked, add_generation_prompt=False, **extra)
        if rendered.text.count(_END_MARK) != 1:
            raise RequestError("the model's chat template does not write the last message once; it cannot be continued")
        return RenderedPrompt(rendered.text[: rendered.text.index(_END_MARK)], rendered.literals)

    def _named_tokens(self) -> Iterable[tuple[str, int | None]]:
        return (("bos_token", self._tokenizer.named_id("bos")), ("eos_token", self._tokenizer.named_id("eos")))

    def _mark(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> tuple[Any, dict[str, str]]:
        texts = list(_strings([messages, extra]))
        found = [s for s in self._tokenizer.special_texts if any(s in text for text in texts)]
        if not found:
            return [messages, extra], {}
        used = set("".join(texts)).union(self.source)
        free = (chr(code) for code in _MARKS if chr(code) not in used)
        marks = dict(zip(sorted(found, key=len, reverse=True), free, strict=False))
        if len(marks) < len(found):
            raise RequestError("the messages use too many private-use characters")
        return _replaced([messages, extra], marks), {mark: text for text, mark in marks.items()}


def check_messages(messages: Any) -> None:
    """Raise RequestError unless `messages` is a list of objects with a role, at least one."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of objects with role and content, found {type(messages).__name__}")
    if not messages:
        raise RequestError("the list of messages is empty")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {i} must be an object with role and content, found {type(message).__name__}")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise RequestError(f"message {i} has no role")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"message {i} has no content")
        if not isinstance(message.get("content"), str | list | None):
            raise RequestError(f"the content of message {i} must be a string")


def _plain(value: Any, depth: int = 0) -> Any:
    """A value of JSON's kinds, which is all that a template gets: an object of a program would bring its methods.

    Raises RequestError when there is none, or it is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise RequestError(f"a message is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, int | float):
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise RequestError(f"a number in the chat template's messages or variables has over {MAX_BITS} bits")
        return value
    raise RequestError(f"messages and variables of a chat template are JSON, which {type(value).__name__} is not")


def _strings(value: Any, depth: int = 0) -> Iterable[str]:
    if depth > MAX_DEPTH:
        raise RequestError(f"a message is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key, depth + 1)
            yield from _strings(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, depth + 1)


def _replaced(value: Any, marks: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for text, mark in marks.items():
            value = value.replace(text, mark)
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, marks): _replaced(item, marks) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, marks) for item in value]
    return value


def _without_none(extra: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in extra.items() if value is not None}
