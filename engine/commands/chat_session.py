"""A conversation on the command line: its history, and the commands that begin with a slash."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdengine.errors import RequestError
from svdengine.scheduling.completion import Completion

HELP = """\
/system TEXT   begin anew with this system prompt; without TEXT, with the model's own
/clear         begin anew
/save FILE     write the conversation to FILE as JSON
/stats         show what the conversation took
/help          show this
/quit          leave (so does Ctrl-D; Ctrl-C stops an answer)"""


@dataclass
class ChatSession:
    """The messages so far, and totals over all answers."""

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def messages(self) -> list[dict[str, Any]]:
        """What the chat template gets."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *self.turns]

    def ask(self, text: str) -> None:
        """Add what the user says."""
        self.turns.append({"role": "user", "content": text})

    def take_back(self) -> None:
        """Forget the last question, which got no answer."""
        self.turns.pop()

    def answered(self, completion: Completion) -> None:
        """Add the answer."""
        self.turns.append({"role": "assistant", "content": completion.text})
        stats = completion.stats
        self.answers += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.generated_tokens += stats.generated_tokens
        self.seconds += stats.seconds

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with a slash and return what to tell the user; None: leave.

        Raises RequestError when it is no command, or its file cannot be written.
        """
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit", "/bye"):
            return None
        if name == "/help":
            return HELP
        if name == "/clear":
            self.turns.clear()
            return "The conversation begins anew."
        if name == "/system":
            self.system = rest or None
            self.turns.clear()
            return f"The conversation begins anew, with {'this' if rest else 'the default'} system prompt."
        if name == "/stats":
            return self._totals()
        if name == "/save":
            return self._save(rest)
        raise RequestError(f"{name} is no command; /help lists them")

    def _totals(self) -> str:
        return (
            f"{self.answers} answers: {self.prompt_tokens} prompt tokens, {self.cached_tokens} of them reused; "
            f"{self.generated_tokens} generated in {self.seconds:.1f} s"
        )

    def _save(self, name: str) -> str:
        if not name:
            raise RequestError("/save needs the name of a file")
        path = Path(name).expanduser()
        try:
            path.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror}") from error
        return f"{len(self.messages)} messages written to {path}"


def answer_line(completion: Completion) -> str:
    """One line about what an answer took."""
    stats = completion.stats
    reused = f", {stats.cached_tokens} reused" if stats.cached_tokens else ""
    end = {"length": "; the length limit was reached", "abort": "; stopped"}.get(completion.finish_reason, "")
    share = ""
    if stats.predicted_density is not None and stats.active_density is not None:
        share = f", FFN {100 * stats.predicted_density:.0f} % predicted and {100 * stats.active_density:.0f} % computed"
    return (
        f"[{stats.prompt_tokens} prompt tokens{reused}, first token after {stats.time_to_first_token:.2f} s; "
        f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{share}{end}]"
    )
