"""Text of many kinds that every machine has, to calibrate on: no model has to write it.

Passages of our own writing (calibration_passages.txt: each begins with a line `%% kind`), source code and documentation
of Python's standard library, and descriptions of installed packages. Nobody's license is among them, and no file of the
user.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path

import numpy as np

from svdengine.errors import ModelFileError, RequestError
from svdengine.text.chat_template import ChatTemplate
from svdengine.text.tokenizer import Tokenizer

WINDOW = 256  # tokens

CODE, DOCUMENTATION, DESCRIPTIONS = "Python", "documentation", "packages"  # kinds that are not passages
_HEADING = "%% "  # of a passage, before its kind
_USER, _ASSISTANT = "User: ", "Assistant: "
_SIZES = range(8_000, 200_000)  # bytes of source files that are taken
_MOST_FILES = 400
_LEAST = 16  # tokens of a window


def machine_windows(tokenizer: Tokenizer, template: str | None, tokens: int, window: int = WINDOW) -> list[list[int]]:
    """Windows of at most `window` token ids, about `tokens` in all: the kinds in turn, each window of another text.

    Chats are written by the model's `template`, where it has one that works. The same machine and tokenizer give the
    same windows. Raises ModelFileError when there is no tokenizer.
    """
    found = machine_kinds(tokenizer, template, window)
    others = [found.pop(name) for name in (CODE, DOCUMENTATION, DESCRIPTIONS)]
    kinds = [_in_turn(list(found.values())), *others]
    windows: list[list[int]] = []
    count = 0
    for ids in _in_turn(kinds):
        windows.append(ids)
        count += len(ids)
        if count >= tokens:
            break
    return windows


def machine_kinds(tokenizer: Tokenizer, template: str | None, window: int = WINDOW) -> dict[str, Iterator[list[int]]]:
    """Windows of each kind of text by its name: the kinds of passages, then code, documentation and descriptions.

    Raises ModelFileError when there is no tokenizer.
    """
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    cut = _Cutter(tokenizer, start, window)
    chat = _chat_template(template, tokenizer)
    kinds = {kind: _passages(texts, cut, chat) for kind, texts in read_passages().items()}
    return kinds | {
        CODE: _sources(cut, _code),
        DOCUMENTATION: _sources(cut, _documentation),
        DESCRIPTIONS: _descriptions(cut),
    }


def read_passages() -> Mapping[str, Sequence[str]]:
    """The passages of our own by their kind."""
    text = resources.files("svdengine.converters").joinpath("calibration_passages.txt").read_text(encoding="utf-8")
    kinds: dict[str, list[str]] = {}
    for passage in f"\n{text.strip()}".split(f"\n{_HEADING}")[1:]:
        kind, _, body = passage.partition("\n")
        kinds.setdefault(kind, []).append(body)
    return kinds


def _in_turn(kinds: Sequence[Iterator[list[int]]]) -> Iterator[list[int]]:
    """One window of each kind after the other, until all have ended."""
    left = list(kinds)
    while left:
        for kind in list(left):
            ids = next(kind, None)
            if ids is None:
                left.remove(kind)
            else:
                yield ids


class _Cutter:
    """Makes a window of a text."""

    def __init__(self, tokenizer: Tokenizer, start: list[int], window: int) -> None:
        self._tokenizer, self._start, self._window = tokenizer, start, window

    def text(self, text: str) -> list[int] | None:
        """The beginning of `text`; None when that is too short."""
        return self.ids(self._tokenizer.encode(text[: self._window * 16], bos=False))

    def ids(self, ids: Sequence[int]) -> list[int] | None:
        """The beginning of token ids; None when they are too few."""
        return None if len(ids) < _LEAST else [*self._start, *ids][: self._window]


def _chat_template(template: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    if template is None:
        return None
    try:
        return ChatTemplate(template, tokenizer)
    except ModelFileError:  # it is the user's to mend, and no reason not to convert
        return None


def _passages(texts: Sequence[str], cut: _Cutter, chat: ChatTemplate | None) -> Iterator[list[int]]:
    for passage in texts:
        ids = _chat_ids(chat, passage) if chat is not None and passage.startswith(_USER) else None
        found = cut.text(passage) if ids is None else cut.ids(ids)
        if found is not None:
            yield found


def _chat_ids(chat: ChatTemplate, passage: str) -> list[int] | None:
    """A passage of turns as the model reads a chat; None when its template does not take it."""
    messages = []
    for turn in passage.split("\n\n" + _USER):
        question, _, answer = turn.removeprefix(_USER).partition("\n" + _ASSISTANT)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        return chat.encode(messages, add_generation_prompt=False)
    except (ModelFileError, RequestError):
        return None


def _sources(cut: _Cutter, part: Callable[[str], str]) -> Iterator[list[int]]:
    """A part of each file of the standard library, in random order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("**/*.py") if _is_source(path, folder))
    for number in np.random.default_rng(0).permutation(len(files))[:_MOST_FILES]:
        try:
            found = cut.text(part(files[number].read_text(encoding="utf-8")))
        except (OSError, ValueError, SyntaxError, RecursionError):
            continue
        if found is not None:
            yield found


def _is_source(path: Path, folder: Path) -> bool:
    outside = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
    try:
        return not outside & set(path.relative_to(folder).parts) and path.stat().st_size in _SIZES
    except OSError:
        return False


def _code(source: str) -> str:
    """From the middle: the beginning is imports and documentation."""
    lines = source.splitlines(keepends=True)
    return "".join(lines[len(lines) // 2 :])


def _documentation(source: str) -> str:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, holders))
    return "\n\n".join(text for text in found if text)


def _descriptions(cut: _Cutter) -> Iterator[list[int]]:
    """What installed packages say of themselves."""
    texts = {}
    for package in metadata.distributions():
        about = package.metadata
        if about is not None and about["Name"]:
            texts[str(about["Name"]).lower()] = about.get_payload() if hasattr(about, "get_payload") else ""
    for name in sorted(texts):
        text = texts[name]
        found = cut.text(text) if isinstance(text, str) else None
        if found is not None:
            yield found
