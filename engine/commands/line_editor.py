"""Where a conversation's lines come from: prompt_toolkit, Python's readline, or a pipe; and the history of input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from svdengine.errors import RequestError

Complete = Callable[[str], Sequence[str]]  # the text before the cursor, to what may stand in place of its last word

PROMPT, MORE = "> ", ". "
_QUOTES = '"""'
_MOST_ENTRIES = 1000  # of the history that are kept


class LineEditor(Protocol):
    """Reads what a user enters. Text that was pasted comes as one, with its line breaks."""

    interactive: bool

    def read(self, prompt: str, text: str = "", *, keep: bool = True) -> str:
        """One entry; `text` stands there already, to be edited. `keep`: it goes to the history.

        Raises EOFError at the end of the input, KeyboardInterrupt at Ctrl-C.
        """
        ...


class History:
    """What was entered, one JSON string a line in a file of this user; without a file, of this run alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.entries: list[str] = []
        with suppress(OSError, UnicodeDecodeError):
            lines = path.read_text(encoding="utf-8").splitlines() if path is not None else []
            self.entries = [entry for line in lines[-_MOST_ENTRIES:] if (entry := _entry(line)) is not None]
            if len(lines) > 2 * _MOST_ENTRIES and path is not None:
                _write(path, self.entries)

    def add(self, entry: str) -> None:
        """Keep an entry, unless it is the one before it again. A file that cannot be written is no error."""
        if not entry.strip() or self.entries[-1:] == [entry]:
            return
        self.entries.append(entry)
        if self._path is None:
            return
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", opener=_private) as file:
                file.write(json.dumps(entry) + "\n")  # in one write: two chats share the file


def history_file() -> Path | None:
    """Where the history lies, after the XDG base directories; None where the user has no place for it."""
    state = os.environ.get("XDG_STATE_HOME")
    try:
        base = Path(state) if state else Path.home() / ".local" / "state"
    except (RuntimeError, KeyError):  # no HOME, and a user that the system does not know
        return None
    return base / "svdengine" / "chat_history"


class PipeEditor:
    """Lines of standard input."""

    interactive = False

    def read(self, prompt: str, text: str = "", *, keep: bool = True) -> str:
        """The next line."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class ReadlineEditor:
    """Python's own input, with readline where there is one: arrow keys, history, completion, bracketed paste."""

    interactive = True

    def __init__(self, history: History, complete: Complete) -> None:
        self._history = history
        self._complete = complete
        self._found: Sequence[str] = ()
        self._readline = _readline()
        if self._readline is not None:
            self._set_up(self._readline)

    def read(self, prompt: str, text: str = "", *, keep: bool = True) -> str:
        """One entry."""
        readline = self._readline
        if readline is not None and text:
            readline.set_startup_hook(lambda: readline.insert_text(text))
        try:
            entry = input(prompt)
        finally:
            if readline is not None:
                readline.set_startup_hook(None)
        if keep:
            self._history.add(entry)
            if readline is not None and entry.strip():
                readline.add_history(entry)
        return entry

    def _set_up(self, readline: Any) -> None:
        readline.set_auto_history(False)
        for entry in self._history.entries:
            readline.add_history(entry)
        readline.set_completer(self._completion)
        readline.set_completer_delims(" \t\n")
        libedit = "libedit" in (readline.__doc__ or "") or getattr(readline, "backend", "") == "editline"
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        if not libedit:
            readline.parse_and_bind("set enable-bracketed-paste on")

    def _completion(self, word: str, state: int) -> str | None:
        if state == 0 and self._readline is not None:
            self._found = self._complete(self._readline.get_line_buffer()[: self._readline.get_endidx()])
        return self._found[state] if state < len(self._found) else None


def _readline() -> Any:
    try:
        import readline
    except ImportError:  # Windows has none
        return None
    return readline


class PromptEditor:
    """prompt_toolkit: lines that are edited over several rows, Alt-Enter for a new one, search with Ctrl-R."""

    interactive = True

    def __init__(self, history: History, complete: Complete) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        @keys.add("enter")
        def _accept(event: Any) -> None:
            event.current_buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _new_line(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        self._history = history
        self._session: Any = PromptSession(
            multiline=True,
            key_bindings=keys,
            history=_prompt_history(history.entries),
            completer=_prompt_completer(complete),
            complete_while_typing=False,
            enable_open_in_editor=True,
            prompt_continuation=MORE,
        )
        self._plain: Any = PromptSession()

    def read(self, prompt: str, text: str = "", *, keep: bool = True) -> str:
        """One entry."""
        if not keep:
            return str(self._plain.prompt(prompt))
        entry = str(self._session.prompt(prompt, default=text))
        self._history.add(entry)
        return entry


def _prompt_history(entries: Iterable[str]) -> Any:
    from prompt_toolkit.history import InMemoryHistory

    return InMemoryHistory(list(entries))


def _prompt_completer(complete: Complete) -> Any:
    from prompt_toolkit.completion import Completer, Completion

    class Commands(Completer):
        """Commands and their arguments."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Any]:
            before = document.text_before_cursor
            size = len(before) - 1 - max(before.rfind(c) for c in " \t\n") if before else 0
            for word in complete(before):
                yield Completion(word, start_position=-size)

    return Commands()


def make_editor(complete: Complete, *, keep_history: bool) -> LineEditor:
    """The best editor there is; that of a pipe where standard input or output is none of a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return PipeEditor()
    history = History(history_file() if keep_history else None)
    if os.environ.get("TERM") != "dumb":
        with suppress(ImportError):
            return PromptEditor(history, complete)
    return ReadlineEditor(history, complete)


def read_message(editor: LineEditor, text: str = "") -> str:
    """A message: an entry, and those after it while one ends with a backslash, or up to the closing three quotes.

    `text` stands there already. Raises EOFError where nothing was begun, KeyboardInterrupt at Ctrl-C.
    """
    entry = editor.read(PROMPT, text)
    if entry.startswith(_QUOTES):
        return _quoted(editor, entry.removeprefix(_QUOTES))
    lines = [entry]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(editor.read(MORE))
        except EOFError:
            break
    return "\n".join(lines)


def confirmed(editor: LineEditor, question: str) -> bool:
    """Whether the user says yes. Without a user: no. Ctrl-D and Ctrl-C are taken for `yes` by who asks to leave."""
    return editor.interactive and editor.read(f"{question} [y/N] ", keep=False).strip().lower() in ("y", "yes")


def _quoted(editor: LineEditor, first: str) -> str:
    """Text up to a line that ends with three quotes."""
    lines = [first]
    while not lines[-1].rstrip().endswith(_QUOTES):
        try:
            lines.append(editor.read(MORE))
        except EOFError:
            raise RequestError(f"the message that {_QUOTES} began has no {_QUOTES} at its end") from None
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _entry(line: str) -> str | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _write(path: Path, entries: Iterable[str]) -> None:
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", encoding="utf-8", opener=_private) as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    new.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
