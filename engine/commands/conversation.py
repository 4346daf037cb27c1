"""A conversation with a loaded model: answers on standard output, and a context that is kept from filling."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from svdengine.commands.answer_writer import AnswerWriter, terminal_width
from svdengine.commands.chat_session import ChatSession, answer_line
from svdengine.commands.line_editor import LineEditor
from svdengine.commands.options import printable

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.scheduling.sampling import SamplingParams

_ROOM = 4  # a quarter of the context is kept free for an answer


class Conversation:
    """Who talks: the model, its parameters, what was said, and where lines come from.

    own: the parameters that the model and the command line set; `/set NAME default` goes back to them.
    shift: what a full context does. None: the oldest turns are left out. True: a message that is too long loses its
    middle, too. False: answers end there.
    plain: answers are written as they come, and nothing is said of what they took where `quiet`.
    """

    def __init__(
        self,
        llm: LLM,
        session: ChatSession,
        params: SamplingParams,
        editor: LineEditor,
        *,
        shift: bool | None = None,
        plain: bool = False,
        quiet: bool = False,
    ) -> None:
        self.llm = llm
        self.session = session
        self.params = self.own = params
        self.editor = editor
        self.shift = shift
        self.plain = plain
        self.quiet = quiet
        self._told_of_shift = False

    def ask(self, text: str) -> None:
        """Answer a question. One that cannot be answered is forgotten."""
        before = list(self.session.turns)
        self.session.ask(text)
        try:
            self._answer()
        except BaseException:
            self.session.turns[:] = before
            raise

    def ask_again(self, text: str | None = None) -> None:
        """Answer the last question anew, or another one in its place. Raises RequestError where there is none."""
        before = list(self.session.turns)
        question = self.session.take_back()
        self.session.turns.append({"role": "user", "content": question if text is None else text})
        try:
            self._answer()
        except BaseException:
            self.session.turns[:] = before
            raise

    def tokens(self) -> int:
        """Tokens of what the model gets now. Raises RequestError where its template refuses it."""
        return len(self.llm.chat_template.encode(self.session.sent)) if self.session.sent else 0

    def tell(self, text: str) -> None:
        """Say something that is no answer."""
        click.echo(text, err=True)

    def _answer(self) -> None:
        cut = self._make_room()
        shift = self.shift is True or (self.shift is None and not cut)
        styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        wrapped = sys.stdout.isatty() and not self.plain
        writer = AnswerWriter(_write, width=terminal_width() if wrapped else None, styled=styled)
        stream = self.llm.stream_chat(self.session.sent, self.params, context_shift=shift)
        try:
            with stream, _on_interrupt(stream.cancel):
                for piece in stream:
                    writer.push(printable(piece))
        finally:
            writer.close()
        done = stream.completion
        self.session.answered(done)
        click.echo()
        if not self.quiet:
            click.secho(answer_line(done), err=True, dim=True)
        if shift and done.stats.prompt_tokens + done.stats.generated_tokens > self.llm.context:
            self._tell_of_shift("its beginning was left out while the answer grew")

    def _make_room(self) -> bool:
        """Leave out the oldest turns where the context is nearly full; whether even the last question is too long."""
        if self.shift is False:
            return False
        context = self.llm.context
        count = self.tokens()
        if count <= context - context // _ROOM:
            return False
        while count > context // 2 and self.session.leave_out_oldest():  # half: so that it is not done every time
            count = self.tokens()
            self._tell_of_shift("the oldest messages are left out from now on")
        return count >= context

    def _tell_of_shift(self, what: str) -> None:
        if not self._told_of_shift:
            self._told_of_shift = True
            self.tell(
                f"the context of {self.llm.context} tokens is full: {what};"
                " /context shows it, /clear begins anew, --context makes it larger"
            )


def _write(text: str) -> None:
    click.echo(text, nl=False)


@contextmanager
def _on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `action`; raising in the middle of a step would leave it half done."""
    try:
        before = signal.signal(signal.SIGINT, lambda *_: action())
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
