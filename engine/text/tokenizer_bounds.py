"""What a tokenizer.json may ask for: a hostile one makes a text endless, or a pattern that never ends to look.

The library cannot be interrupted, so what could take for ever is refused when the file is read. No published tokenizer
comes near these limits.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

from svdengine.errors import ModelFileError, quoted

MAX_STEPS = 64  # of one part, such as the normalizer
MAX_GROWTH = 64  # times that the steps may make a text longer, all together
MAX_WORD = 8192  # characters of an entry of the vocabulary
MAX_WORD_PIECE = 1000  # characters of a word that WordPiece looks into, which takes their square
MAX_PATTERN = 20_000  # characters
MAX_REPEATS = 64  # of a group with repeats or choices in it

_INNER = ("normalizers", "pretokenizers", "processors", "decoders")
_REFERENCE = re.compile(r"\\(?:[1-9]|[kg]<)")
_QUANTIFIER = re.compile(r"[*+?][?+]?|\{(\d*)(,?)(\d*)\}\??")


def check_tokenizer(settings: Any) -> None:
    """Raise ModelFileError when encoding or decoding with a tokenizer.json could take for ever, or all memory."""
    if not isinstance(settings, dict):
        return  # the library says what is wrong
    for parts in (("normalizer", "pre_tokenizer"), ("post_processor",), ("decoder",)):
        steps = [step for name in parts for step in _steps(settings.get(name), name)]
        growth = 1
        for step in steps:
            _check_step(step)
            growth *= _growth(step)
            if growth > MAX_GROWTH:
                raise _refused(f"its {parts[-1]} could make a text more than {MAX_GROWTH} times as long")
    model = settings.get("model")
    if isinstance(model, dict):
        _check_model(model)


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """A part and those that it is a sequence of, in order."""
    found: list[dict[str, Any]] = []
    left = [part]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            found.append(step)
            left += [inner for key in _INNER if isinstance(step.get(key), list) for inner in reversed(step[key])]
        if len(found) > MAX_STEPS:
            raise _refused(f"its {name} has more than {MAX_STEPS} steps")
    return found


def _growth(step: dict[str, Any]) -> int:
    """How many times as long a text may be after a step that can be made to grow it."""
    if step.get("type") == "ByteLevel":
        return 2  # a byte becomes a letter, which may be two bytes
    content, pattern = step.get("content"), step.get("pattern")
    if step.get("type") != "Replace" or not isinstance(content, str) or not isinstance(pattern, dict):
        return 1
    plain = pattern.get("String")
    if isinstance(plain, str) and plain:
        return max(1, -(-len(content) // len(plain)))
    return len(content) + 1  # a pattern may match between all characters


def _check_step(step: dict[str, Any]) -> None:
    pattern = step.get("pattern")
    if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
        check_pattern(pattern["Regex"])
    if step.get("type") == "Precompiled" and isinstance(step.get("precompiled_charsmap"), str):
        try:
            table = base64.b64decode(step["precompiled_charsmap"])
        except ValueError:
            return
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        if max(map(len, texts.split(b"\0"))) > MAX_GROWTH:
            raise _refused(f"its normalizer makes more than {MAX_GROWTH} bytes of one character")


def _check_model(model: dict[str, Any]) -> None:
    if max(map(len, _words(model.get("vocab"))), default=0) > MAX_WORD:
        raise _refused(f"its vocabulary has an entry of more than {MAX_WORD} characters")
    most = model.get("max_input_chars_per_word")
    if isinstance(most, int) and most > MAX_WORD_PIECE:
        raise _refused(f"max_input_chars_per_word is {most:.10g}, at most {MAX_WORD_PIECE} are taken")


def _words(vocab: Any) -> Iterator[str]:
    """Of a table from words to ids, or a list of words and scores."""
    if isinstance(vocab, dict):
        yield from vocab
        return
    for entry in vocab if isinstance(vocab, list) else ():
        word = entry[0] if isinstance(entry, list) and entry else entry
        if isinstance(word, str):
            yield word


def check_pattern(pattern: str) -> None:
    r"""Raise ModelFileError when looking for a pattern may take for ever.

    Refused is a repeated group that holds a repeat or a choice, such as `(a+)+` and `(a|a)*`: there may be
    exponentially many ways to match a text, all of which are tried before it is known not to match. References to what
    another group matched are refused too.
    """
    if len(pattern) > MAX_PATTERN:
        raise _refused(f"it has a pattern of {len(pattern)} characters, at most {MAX_PATTERN} are taken")
    loose = [False]  # of each open group, and the whole: whether it holds a repeat or a choice
    at, closed = 0, False  # closed: whether what just ended is loose, if it is repeated now
    while at < len(pattern):
        quantifier = _QUANTIFIER.match(pattern, at)
        if quantifier is not None and not (quantifier[0][0] == "{" and not (quantifier[1] or quantifier[3])):
            if closed and _repeats(quantifier) > MAX_REPEATS:
                raise _refused(f"its pattern {quoted(pattern)} repeats what holds a repeat or a choice")
            closed = closed or _is_loose(quantifier)  # in this dialect a repeat can be repeated
            loose[-1] = loose[-1] or closed
            at = quantifier.end()
            continue
        closed = False
        letter = pattern[at]
        if letter == "\\":
            if _REFERENCE.match(pattern, at):
                raise _refused(f"its pattern {quoted(pattern)} refers to another part of itself")
            at += 2
        elif letter == "[":
            at = _class_end(pattern, at)
        elif letter == "(":
            loose.append(False)
            at += 1 + (pattern[at + 1 : at + 2] == "?")
        else:
            if letter == "|":
                loose[-1] = True
            elif letter == ")" and len(loose) > 1:
                closed = loose.pop()
                loose[-1] = loose[-1] or closed
            at += 1


def _repeats(quantifier: re.Match[str]) -> float:
    if quantifier[0][0] != "{":
        return 1 if quantifier[0][0] == "?" else float("inf")
    least, comma, most = quantifier[1], quantifier[2], quantifier[3]
    return float(most or "inf") if comma else float(least or 0)


def _is_loose(quantifier: re.Match[str]) -> bool:
    """Whether it may match in several ways, or makes the pattern large."""
    fixed = quantifier[0][0] == "{" and (not quantifier[2] or quantifier[1] == quantifier[3])
    return not fixed or _repeats(quantifier) > MAX_REPEATS


def _class_end(pattern: str, at: int) -> int:
    """Behind a class of characters, which may hold others."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += pattern[at + 1 : at + 2] == "^"
            at += pattern[at + 1 : at + 2] == "]"  # the first one is a character
        elif pattern[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at


def _refused(why: str) -> ModelFileError:
    return ModelFileError(f"the model's tokenizer is refused (tokenizer.json): {why}")
