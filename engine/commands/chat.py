"""svdengine chat: a conversation in the terminal, or over a pipe with one message a line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.options import (
    kept_kv,
    kv_save_option,
    model_options,
    open_model,
    printable,
    sampling_fields,
    sampling_options,
)

if TYPE_CHECKING:
    from svdengine.commands.chat_session import ChatSession
    from svdengine.llm import LLM


@click.command("chat")
@model_options
@sampling_options
@kv_save_option
@click.option("--system", metavar="TEXT", help="The system prompt; by default the model's own.")
def command(system: str | None, kv_save: Path | None, **options: Any) -> None:
    """Talk with MODEL, a .svdp file or a name on a hub (org/name). /help lists what can be typed besides messages."""
    from svdengine.commands.chat_session import ChatSession
    from svdengine.scheduling.sampling import merge_params

    fields = {"max_tokens": None, **sampling_fields(options)}
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with open_model(options) as llm:
        params = merge_params(llm.default_params, fields)
        _ = llm.chat_template  # a model without one is refused before anything is typed
        if interactive:
            _enable_line_editing()
            click.echo(greeting(llm), err=True)  # it decodes, so the KV cache is still empty
        with kept_kv(llm, kv_save):
            _converse(llm, ChatSession(system), params, interactive, options["context_shift"])


def greeting(llm: LLM) -> str:
    """What is said before the first message: of a model with a predictor, also what that brings here, measured."""
    from svdengine.files.advising_executor import AdvisingExecutor
    from svdengine.measuring.benchmark import decoding_against_dense

    lines = [f"{llm.model_file.path.name} on {llm.executor.name}; /help for help, Ctrl-D to leave"]
    from_storage = isinstance(llm.executor, AdvisingExecutor)  # a dense token would read all weights from storage
    row = (
        None if llm.predictor is None or llm.ffn in ("dense", "exact") or from_storage else decoding_against_dense(llm)
    )
    if row is not None:
        if row.speedup is None or row.active_density is None:
            lines.append("its FFNs run dense, which is as fast on this machine")
        else:
            rates = f"{row.tokens_per_second:.0f} tokens/s, dense {row.tokens_per_second / row.speedup:.0f}"
            lines.append(
                f"{100 * row.active_density:.0f} % of the FFN neurons are computed for a token:"
                f" {row.speedup:.2f} times as fast as all of them ({rates})"
            )
    return "\n".join(lines)


def _converse(llm: LLM, session: ChatSession, params: Any, interactive: bool, context_shift: bool) -> None:
    from svdengine.errors import RequestError, SvdEngineError

    for line in _lines(interactive):
        if not line.strip():
            continue
        try:
            if line.lstrip().startswith("/"):
                told = session.command(line)
                if told is None:
                    return
                click.echo(told, err=True)
            else:
                _answer(llm, session, line, params, context_shift)
        except RequestError as error:
            click.echo(f"error: {error}", err=True)
            if not interactive:
                raise SvdEngineError("the conversation ended at a message that cannot be answered") from error


def _answer(llm: LLM, session: ChatSession, text: str, params: Any, context_shift: bool) -> None:
    from svdengine.commands.chat_session import answer_line

    session.ask(text)
    try:
        stream = llm.stream_chat(session.messages, params, context_shift=context_shift)
        with stream, _on_interrupt(stream.cancel):
            for piece in stream:
                click.echo(printable(piece), nl=False)
    except BaseException:
        session.take_back()
        raise
    session.answered(stream.completion)
    click.echo()
    click.secho(answer_line(stream.completion), err=True, dim=True)


def _lines(interactive: bool) -> Iterator[str]:
    """What the user types, or the lines of standard input."""
    if not interactive:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            click.echo(err=True)
            return


def _enable_line_editing() -> None:
    with suppress(ImportError):  # Windows has none
        import readline

        readline.set_auto_history(True)


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
