"""svdengine chat: a conversation in the terminal, over a pipe with one message a line, or a single question."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svdengine.commands.arguments import ModelOrQuestion, Question
from svdengine.commands.help_pages import SAMPLING, Command, option
from svdengine.commands.options import (
    kept_kv,
    kv_save_option,
    model_options,
    open_model,
    system_option,
    verbosity_options,
)
from svdengine.commands.sampling_options import grammar_options, sampling_fields, sampling_options

if TYPE_CHECKING:
    from svdengine.commands.conversation import Conversation

EXAMPLES = (
    'svdengine chat "Name three rivers."   one answer of the demo model, and back to the shell',
    "svdengine chat smollm2.svdp           a conversation with a model",
)


@click.command("chat", cls=Command, examples=EXAMPLES)
@partial(model_options, model=ModelOrQuestion())
@click.argument("question", nargs=-1, metavar="[QUESTION]")
@option("-p", "--prompt", metavar="TEXT", help="The same as QUESTION, where no MODEL stands before it.")
@system_option
@sampling_options
@grammar_options
@option(
    "--context-shift/--no-context-shift",
    default=None,
    group=SAMPLING,
    help="What a full context does: it loses whatever is oldest, or ends the answer; by default whole messages are left"
    " out, the oldest first.",
)
@kv_save_option
@option("--plain", is_flag=True, help="Write answers as they come: not wrapped, and Markdown as it is.")
@option("--no-history", is_flag=True, help="Keep no history of what is entered.")
@verbosity_options
def command(
    question: tuple[str, ...],
    prompt: str | None,
    system: str | None,
    kv_save: Path | None,
    plain: bool,
    no_history: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Talk with MODEL, a .svdp file or a name on a hub (org/name), or ask it one QUESTION.

    Without a MODEL it is the demo model: `svdengine chat "What is a river?"`.

    /help lists what can be typed besides messages.
    """
    from svdengine.commands.chat_commands import completions
    from svdengine.commands.chat_session import ChatSession
    from svdengine.commands.conversation import Conversation
    from svdengine.commands.greeting import greeting
    from svdengine.commands.line_editor import PipeEditor, make_editor
    from svdengine.scheduling.sampling import merge_params

    asked = _asked(options, question, prompt)
    if asked is not None and not asked.strip():
        raise click.UsageError("the question is empty")
    fields = {"max_tokens": None, **sampling_fields(options)}
    editor = PipeEditor() if asked is not None else make_editor(completions, keep_history=not no_history)
    with open_model(options) as llm:
        params = merge_params(llm.default_params, fields)
        _ = llm.chat_template  # a model without one is refused before anything is typed
        conversation = Conversation(
            llm,
            ChatSession(system),
            params,
            editor,
            shift=options["context_shift"],
            plain=plain,
            quiet=quiet or (asked is not None and not verbose),
        )
        if (editor.interactive and not quiet) or verbose:
            click.echo(greeting(llm), err=True)  # it decodes, so the KV cache is still empty
        with kept_kv(llm, kv_save):
            if asked is not None:
                conversation.ask(asked)
            else:
                _converse(conversation)


def _asked(options: dict[str, Any], question: tuple[str, ...], prompt: str | None) -> str | None:
    """The one question, if there is one. Words that stand in the place of MODEL go to the demo model."""
    model = options["model"]
    if isinstance(model, Question):
        question, options["model"] = (model, *question), None
        if not model.sure:
            words = shlex.quote(" ".join(question))
            raise click.UsageError(
                f"there is no file {str(model)!r} here, and a model on a hub is called ORG/NAME. What did you mean?\n"
                "  svdengine list   shows the models that are here\n"
                f"  svdengine chat -p {words}   asks the demo model"
            )
    if question and prompt is not None:
        raise click.UsageError("give the question once: after MODEL, or with -p")
    return " ".join(question) if question else prompt


def _converse(conversation: Conversation) -> None:
    """Messages and commands, one after the other, until the user leaves or the input ends."""
    from svdengine.cli import in_words
    from svdengine.commands.chat_commands import Leave
    from svdengine.commands.line_editor import read_message
    from svdengine.errors import RequestError, SvdEngineError

    editor, interrupted = conversation.editor, False
    while True:
        try:
            message = read_message(editor)
            interrupted = False
            _take(conversation, message)
        except Leave:
            return
        except EOFError:
            if not editor.interactive or _may_leave(conversation):
                return
        except KeyboardInterrupt:
            if not editor.interactive:
                raise
            click.echo(err=True)
            if interrupted and _may_leave(conversation):
                return
            if not interrupted:
                conversation.tell("Ctrl-C once more to leave; /help for help")
            interrupted = not interrupted
        except RequestError as error:
            click.echo(f"error: {in_words(str(error))}", err=True)
            if not editor.interactive:
                raise SvdEngineError("the conversation ended at a message that cannot be answered") from error


def _take(conversation: Conversation, message: str) -> None:
    """Carry out a command, or answer a message."""
    from svdengine.commands.chat_commands import command_of

    given = command_of(message)
    if given is not None:
        told = given[0].run(conversation, given[1])
        if told:
            conversation.tell(told)
    elif message.strip():
        conversation.ask(message.strip("\n"))


def _may_leave(conversation: Conversation) -> bool:
    """Whether to leave: where something would be lost, the user is asked. Ctrl-C and Ctrl-D say yes."""
    from svdengine.commands.line_editor import confirmed

    if not conversation.session.unsaved:
        click.echo(err=True)
        return True
    try:
        return confirmed(conversation.editor, "Leave? The conversation is not saved (/save FILE).")
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return True
