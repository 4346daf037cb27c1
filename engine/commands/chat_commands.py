"""What can be typed in a conversation besides messages: lines that begin with a slash, and how they are completed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from svdengine.commands.chat_session import share_text
from svdengine.commands.conversation import Conversation
from svdengine.commands.line_editor import confirmed
from svdengine.errors import RequestError

_BAR = 24  # characters of the gauge of /context
_SETTINGS: dict[str, type] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "typical_p": float,
    "top_n_sigma": float,
    "xtc_probability": float,
    "xtc_threshold": float,
    "repetition_penalty": float,
    "repeat_last_n": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "dry_multiplier": float,
    "dry_base": float,
    "dry_allowed_length": int,
    "dry_penalty_last_n": int,
    "seed": int,
    "max_tokens": int,
    "sparsity_bias": float,
}
_OTHER_NAMES = {
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "n": "max_tokens",
    "bias": "sparsity_bias",
}
_OPTIONAL = ("seed", "max_tokens")  # they may be "none"


class Leave(Exception):
    """The conversation is to end."""


@dataclass(frozen=True)
class Command:
    """One command. `run` gets what stands after its name, and returns what to tell the user; empty: nothing."""

    usage: str
    help: str
    run: Callable[[Conversation, str], str]
    files: bool = False  # whether it takes the name of a file

    @property
    def name(self) -> str:
        """With its slash."""
        return self.usage.split()[0]


def command_of(line: str) -> tuple[Command, str] | None:
    """The command that a line gives, and what follows its name; None: it is a message.

    Raises RequestError when it looks like a command and is none.
    """
    if not line.startswith("/"):
        return None
    name, *rest = line.split(maxsplit=1)
    name = _SHORT.get(name, name)
    if name in COMMANDS:
        return COMMANDS[name], rest[0].strip() if rest else ""
    if "\n" in line or "/" in name[1:] or len(name) == 1:
        return None  # a path, or a text of several lines
    near = get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RequestError(f"{name} is no command; {hint}/help lists them, and a space before it makes it a message")


def completions(before: str) -> list[str]:
    """What may stand in place of the last word of a line, of which `before` is what comes before the cursor."""
    words = before.split(" ")
    if not before.startswith("/") or "\n" in before:
        return []
    if len(words) == 1:
        return [f"{name} " for name in COMMANDS if name.startswith(before)]
    command = COMMANDS.get(words[0])
    if command is not None and command.files and len(words) == 2:
        return _paths(words[1])
    if words[0] == "/set" and len(words) == 2:
        return [f"{name} " for name in _SETTINGS if name.startswith(words[1])]
    return ["default"] if words[0] == "/set" and len(words) == 3 and "default".startswith(words[2]) else []


def _paths(begin: str) -> list[str]:
    path = Path(begin or ".").expanduser()
    folder, start = (path, "") if begin in ("", ".") or begin.endswith("/") else (path.parent, path.name)
    prefix = begin[: len(begin) - len(start)]
    try:
        found = sorted(p for p in folder.iterdir() if p.name.startswith(start) and (start or p.name[0] != "."))
    except OSError:
        return []
    return [f"{prefix}{p.name}{'/' if p.is_dir() else ''}" for p in found]


def _help(_: Conversation, __: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values()) + 2
    rows = [f"{command.usage:<{width}}{command.help}" for command in COMMANDS.values()]
    return "\n".join(
        [
            *rows,
            "",
            'A message of several lines: paste it, put """ around it, or end each line with a backslash.',
            "Ctrl-C stops an answer or clears the line; twice at the prompt, or Ctrl-D, leaves.",
        ]
    )


def _quit(_: Conversation, __: str) -> str:
    raise Leave


def _regen(conversation: Conversation, _: str) -> str:
    conversation.ask_again()
    if conversation.params.greedy:
        return "temperature is 0, so that the same answer comes; /set temperature 0.7 lets it vary"
    return ""


def _edit(conversation: Conversation, text: str) -> str:
    if not text:
        turns = [turn for turn in conversation.session.turns if turn["role"] == "user"]
        if not turns:
            raise RequestError("there is no question yet")
        if not conversation.editor.interactive:
            raise RequestError("/edit needs the new question after it, where nobody can edit")
        text = conversation.editor.read("edit> ", turns[-1]["content"])
    if not text.strip():
        return "Nothing was changed."
    conversation.ask_again(text)
    return ""


def _clear(conversation: Conversation, _: str) -> str:
    conversation.session.begin_anew(conversation.session.system)
    return "The conversation begins anew."


def _system(conversation: Conversation, text: str) -> str:
    conversation.session.begin_anew(text or None)
    return f"The conversation begins anew, with {'this' if text else 'the default'} system prompt."


def _set(conversation: Conversation, text: str) -> str:
    from svdengine.scheduling.sampling import merge_params

    words = text.split()
    if not words:
        return "\n".join(f"{name:<20}{_shown(conversation, name)}" for name in _SETTINGS)
    name = words[0].lstrip("-").replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in _SETTINGS:
        near = get_close_matches(name, _SETTINGS, 1)
        raise RequestError(
            f"{words[0]} cannot be set; {f'did you mean {near[0]}? ' if near else ''}/set lists what can"
        )
    if len(words) == 1:
        return f"{name} is {_shown(conversation, name)}"
    if len(words) > 2:
        raise RequestError(f"/set takes a name and a value, found {len(words)} words")
    conversation.params = merge_params(conversation.params, {name: _value(conversation, name, words[1])})
    return f"{name} is {_shown(conversation, name)} from now on"


def _value(conversation: Conversation, name: str, word: str) -> Any:
    if word == "default":
        return getattr(conversation.own, name)
    if word == "none" and name in _OPTIONAL:
        return None
    kind = _SETTINGS[name]
    try:
        return kind(word)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name} takes {what}, or `default`; found {word!r}") from None


def _shown(conversation: Conversation, name: str) -> str:
    value, own = getattr(conversation.params, name), getattr(conversation.own, name)
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if value == own else f"{text} (by default {'none' if own is None else own})"


def _save(conversation: Conversation, text: str) -> str:
    path = _path("/save", text)
    if path.exists() and not path.is_dir():
        if not conversation.editor.interactive:
            raise RequestError(f"{path} is there already; give another name, or remove it first")
        if not confirmed(conversation.editor, f"{path} is there already. Overwrite it?"):
            return "Nothing was written."
    return conversation.session.save(path)


def _load(conversation: Conversation, text: str) -> str:
    path = _path("/load", text)
    session = conversation.session
    if session.unsaved and conversation.editor.interactive:
        question = "This conversation is not saved. Leave it for the other?"
        if not confirmed(conversation.editor, question):
            return "The conversation goes on as it was."
    return session.load(path)


def _read(conversation: Conversation, text: str) -> str:
    from svdengine.commands.options import read_text

    name, _, question = text.partition(" ")
    path = _path("/read", name)
    content = read_text(path)
    conversation.session.attached.append(f"{path.name}:\n```\n{content.rstrip()}\n```")
    if question.strip():
        conversation.ask(question.strip())
        return ""
    count = len(conversation.llm.tokenizer.encode(content, bos=False))
    return f"{path}: {count} tokens, which go before your next message"


def _dense(conversation: Conversation, _: str) -> str:
    conversation.llm.ffn = "dense"
    return "All FFN neurons are computed from now on. /regen answers once more, to compare; /sparse goes back."


def _sparse(conversation: Conversation, _: str) -> str:
    conversation.llm.ffn = "sparse"
    return (
        "Neurons that the predictor calls active are computed from now on. /regen answers once more; /dense goes back."
    )


def _auto(conversation: Conversation, _: str) -> str:
    conversation.llm.ffn = "auto"
    return "Each step takes what is faster from now on, dense or sparse."


def _bias(conversation: Conversation, text: str) -> str:
    predictor = conversation.llm.predictor
    if predictor is None or predictor.scores_nothing:
        raise RequestError("/bias shifts the thresholds of a predictor, and this model has none")
    told = _set(conversation, f"sparsity_bias {text}".strip())
    return f"{told}; above 0, fewer neurons are computed"


def _stats(conversation: Conversation, _: str) -> str:
    from svdengine.measuring.expert_use import expert_line, expert_use

    stats, counts = conversation.llm.stats(), conversation.llm.executor.neuron_counts()
    shares = share_text(counts.predicted_density, counts.active_density)
    steps = ", ".join(f"{count} {path.replace('_', ' ')}" for path, count in stats.steps.items())
    lines = [conversation.session.totals(), f"steps: {steps or 'none'}"]
    lines += [f"of steps that ran sparse: {shares}"] if shares else []
    config = conversation.llm.config
    if (use := expert_use(config, stats.experts)) is not None:
        lines.append(expert_line(config, use))
    return "\n".join(lines)


def _context(conversation: Conversation, _: str) -> str:
    session, context = conversation.session, conversation.llm.context
    count = conversation.tokens()
    filled = min(_BAR, round(_BAR * count / context))
    out = f"; the oldest {session.left_out} are left out" if session.left_out else ""
    return (
        f"[{'#' * filled}{'.' * (_BAR - filled)}] {count} of {context} tokens, {100 * count / context:.0f} %;"
        f" {len(session.messages)} messages{out}"
    )


def _path(command: str, text: str) -> Path:
    if not text:
        raise RequestError(f"{command} needs the name of a file")
    return Path(text).expanduser()


COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("/regen", "answer the last question once more", _regen),
        Command("/edit [TEXT]", "change the last question, and answer it", _edit),
        Command("/clear", "begin anew", _clear),
        Command("/system [TEXT]", "begin anew with this system prompt; without TEXT, with the model's own", _system),
        Command("/set [NAME [VALUE]]", "show or change how tokens are sampled: /set temperature 0.7", _set),
        Command("/read FILE [QUESTION]", "put a text file before the next message", _read, files=True),
        Command("/save FILE", "write the conversation to FILE as JSON", _save, files=True),
        Command("/load FILE", "go on with a conversation that was saved", _load, files=True),
        Command("/context", "show how full the context is", _context),
        Command("/dense", "compute all FFN neurons", _dense),
        Command("/sparse", "compute those that the predictor calls active", _sparse),
        Command("/auto", "take what is faster, step by step", _auto),
        Command("/bias X", "shift the predictor's thresholds: above 0, fewer neurons are computed", _bias),
        Command("/stats", "show what the conversation took", _stats),
        Command("/help", "show this", _help),
        Command("/quit", "leave", _quit),
    )
}
_SHORT = {"/exit": "/quit", "/bye": "/quit", "/?": "/help", "/q": "/quit", "/reset": "/clear"}
