"""An answer on a terminal as it comes: wrapped at words, Markdown lightly rendered, code as it is."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator

Write = Callable[[str], None]

_BOLD, _ITALIC, _CODE, _FAINT, _END = "\x1b[1m", "\x1b[3m", "\x1b[36m", "\x1b[2m", "\x1b[0m"
_LONGEST_WAIT = 300  # characters that are held back for the end of an emphasis

# An emphasis begins before a letter and after none, so that x**2, 2 * 3 and snake_case stay as they are.
_SPAN = re.compile(
    r"(?P<ticks>`+)(?P<code>[^`]+)(?P=ticks)(?!`)"
    r"|(?<![\w*])\*\*(?=[^\s*])(?P<bold>[^*]*[^\s*])\*\*(?![\w*])"
    r"|(?<![\w*])\*(?=[^\s*])(?P<italic>[^*]*[^\s*])\*(?![\w*])"
)
_OPENING = re.compile(r"(?<![\w*])\*{1,2}(?=[^\s*]|$)|`+")
_BLOCK = re.compile(
    r"(?P<fence>\s{0,12}(?:```+|~~~+).*)|(?P<head>#{1,6} +)|(?P<item>\s*(?:[-*+]|\d{1,3}[.)]) +)|(?P<quote>(?:> ?)+)"
)
_MAYBE_BLOCK = re.compile(r"\s*(?:`{0,2}|~{0,2}|#{0,6} *|[-*+] *|\d{0,3}[.)]? *|>[> ]*)$")
_WORD = re.compile(r"\s+|\S+")


class AnswerWriter:
    """Takes pieces of an answer and writes what is certain of them. `close` writes the rest.

    write: where text goes. width: columns of the terminal; None: text goes out as it comes. styled: whether Markdown is
    rendered, which needs a terminal with colours; without it text is only wrapped.
    """

    def __init__(self, write: Write, *, width: int | None, styled: bool) -> None:
        self._write = write
        self._width = width
        self._styled = styled and width is not None
        self._held = ""  # of the line at hand, not written yet
        self._fence = ""  # that ends the code at hand; empty: this is no code
        self._verbatim = False  # the line at hand is code, or part of a table
        self._begun = False  # whether the kind of the line at hand is known
        self._style = ""  # of the whole line, such as a heading's
        self._indent = 0  # of lines that go on from it
        self._column = 0

    def push(self, text: str) -> None:
        """Take a piece."""
        if self._width is None:
            self._write(text)
            return
        *lines, rest = (self._held + text).split("\n")
        self._held = ""
        for line in lines:
            self._take(line, ended=True)
            self._end_line()
        self._held = self._take(rest, ended=False)

    def close(self) -> None:
        """Write what was held back; the cursor is left at the end of the text."""
        if self._width is not None:
            self._held = self._take(self._held, ended=True)
            self._write(_END if self._style else "")
            self._style = ""

    def _take(self, text: str, *, ended: bool) -> str:
        """Write what is certain of the line at hand, and return the rest."""
        if not self._begun:
            if not ended and (self._fence or _MAYBE_BLOCK.fullmatch(text) or _is_fence(text) or _is_table(text)):
                return text  # what kind of line it is shows later
            text = self._begin(text)
        if self._verbatim:
            self._write(text)
            return ""
        cut = len(text) if ended else self._certain(text)
        self._flow(text[:cut])
        return text[cut:]

    def _begin(self, line: str) -> str:
        """Decide on the kind of a line, write its beginning, and return what follows."""
        self._begun = True
        found = _BLOCK.match(line)
        fence = (found["fence"] or "").strip() if found else ""
        if self._fence or fence:
            self._verbatim = True
            mark = fence[:3]
            code = bool(self._fence) and not (mark == self._fence and not fence.strip("`~"))
            if not code:
                self._fence = "" if self._fence else mark
            return f"{_CODE if code else _FAINT}{line}{_END}" if self._styled and line else line
        if _is_table(line):
            self._verbatim = True
            return line
        if found is None:
            self._indent = min(len(line) - len(line.lstrip(" ")), 12)
            return line
        mark = found.group()
        if found["head"]:
            self._style = _BOLD if self._styled else ""
            self._write(self._style)
            return line[len(mark) :] if self._styled else line
        self._indent = self._column = len(mark)
        self._write(f"{_FAINT}{mark}{_END}" if self._styled and found["quote"] else mark)
        return line[len(mark) :]

    def _end_line(self) -> None:
        self._write((_END if self._style else "") + "\n")
        self._style, self._indent, self._column, self._begun, self._verbatim = "", 0, 0, False, False

    def _certain(self, text: str) -> int:
        """How much of an unfinished line can be written: whole words, before an emphasis that has not ended."""
        cut = next((i + 1 for i in range(len(text) - 1, -1, -1) if text[i].isspace() or _wide(text[i])), 0)
        if not self._styled:
            return cut
        at = 0
        for found in _SPAN.finditer(text):
            opening = _OPENING.search(text[at : found.start()])
            if opening is not None:
                return self._waiting(text, at + opening.start(), cut)
            at = found.end()
            if at > cut:
                return min(cut, found.start())
        opening = _OPENING.search(text, at)
        return cut if opening is None else self._waiting(text, opening.start(), cut)

    def _waiting(self, text: str, opening: int, cut: int) -> int:
        return cut if len(text) - opening > _LONGEST_WAIT else min(cut, opening)

    def _runs(self, text: str) -> Iterator[tuple[str, str]]:
        """Text by its style, without the marks of Markdown."""
        at = 0
        for found in _SPAN.finditer(text) if self._styled else ():
            if found.start() > at:
                yield "", text[at : found.start()]
            style = _CODE if found["code"] else _BOLD if found["bold"] else _ITALIC
            yield style, found["code"] or found["bold"] or found["italic"]
            at = found.end()
        if at < len(text):
            yield "", text[at:]

    def _flow(self, text: str) -> None:
        """Write text, each word on the next line where this one has no room; its parts may differ in style."""
        word: list[tuple[str, str]] = []
        for style, run in self._runs(text):
            for part in _words(run):
                if not part.isspace() and not _wide(part[0]):
                    word.append((style, part))
                    continue
                self._put(word)
                word = []
                if not part.isspace():
                    self._put([(style, part)])
                elif self._column + len(part) < (self._width or 0):
                    self._out(style, part)
        self._put(word)

    def _put(self, word: list[tuple[str, str]]) -> None:
        size = sum(_columns(part) for _, part in word)
        if self._column + size > (self._width or 0) and self._column > self._indent:
            self._write("\n" + " " * self._indent)
            self._column = self._indent
        for style, part in word:
            self._out(style, part)

    def _out(self, style: str, text: str) -> None:
        self._write(f"{style}{text}{_END}{self._style}" if style else text)
        self._column += _columns(text)


def terminal_width() -> int:
    """Columns that text may fill: wide lines are hard to read."""
    return max(20, min(shutil.get_terminal_size().columns - 1, 100))


def _words(text: str) -> Iterator[str]:
    """Words and the white space between them. A line may be broken before any wide character."""
    for found in _WORD.findall(text):
        if not any(map(_wide, found)):
            yield found
            continue
        narrow = ""
        for character in found:
            if not _wide(character):
                narrow += character
                continue
            if narrow:
                yield narrow
            narrow = ""
            yield character
        if narrow:
            yield narrow


def _is_fence(text: str) -> bool:
    return text.lstrip(" ").startswith(("```", "~~~"))


def _is_table(text: str) -> bool:
    return text.lstrip(" ").startswith("|")


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _columns(text: str) -> int:
    """Columns that text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if _wide(c) else 1 for c in text)
