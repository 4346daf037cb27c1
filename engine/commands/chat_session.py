"""A conversation on the command line: its messages, as a file and as the model gets them, and what its answers took."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdengine.errors import RequestError
from svdengine.scheduling.completion import Completion
from svdengine.text.chat_template import check_messages


@dataclass
class ChatSession:
    """The messages so far, and totals over all answers.

    system: the system prompt; None: the model's own. turns: messages of user and assistant, the oldest first. left_out:
    how many of the oldest the model gets no longer, because the context is full. attached: texts that go before the
    next question. unsaved: whether there is something that no file has.
    """

    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    attached: list[str] = field(default_factory=list)
    unsaved: bool = False
    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The whole conversation."""
        return [*self._first, *self.turns]

    @property
    def sent(self) -> list[dict[str, Any]]:
        """What the chat template gets: without turns that are left out."""
        return [*self._first, *self.turns[self.left_out :]]

    @property
    def _first(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system is not None else []

    def begin_anew(self, system: str | None) -> None:
        """Forget all messages. The totals stay."""
        self.system, self.left_out, self.unsaved = system, 0, False
        self.turns.clear()
        self.attached.clear()

    def ask(self, text: str) -> None:
        """Add what the user says, after the texts that were attached."""
        self.turns.append({"role": "user", "content": "\n\n".join([*self.attached, text])})

    def take_back(self) -> str:
        """Forget the last question and its answer, if it has one; the question. Raises RequestError without one."""
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        if not self.turns:
            raise RequestError("there is no question yet")
        question = str(self.turns.pop()["content"])
        self.left_out = min(self.left_out, len(self.turns))
        return question

    def answered(self, completion: Completion) -> None:
        """Add the answer."""
        self.turns.append({"role": "assistant", "content": completion.text})
        self.attached.clear()
        self.unsaved = True
        stats = completion.stats
        self.answers += 1
        self.prompt_tokens += stats.prompt_tokens
        self.cached_tokens += stats.cached_tokens
        self.generated_tokens += stats.generated_tokens
        self.seconds += stats.seconds

    def leave_out_oldest(self) -> bool:
        """Leave out the oldest question that is still sent, and its answer. False: only the last one is left."""
        later = [i for i in range(self.left_out + 1, len(self.turns)) if self.turns[i]["role"] == "user"]
        if later:
            self.left_out = later[0]
        return bool(later)

    def totals(self) -> str:
        """What all answers took, in a line."""
        return (
            f"{self.answers} answers: {self.prompt_tokens} prompt tokens, {self.cached_tokens} of them reused; "
            f"{self.generated_tokens} generated in {self.seconds:.1f} s"
        )

    def save(self, path: Path) -> str:
        """Write the messages as JSON; what to tell the user. Raises RequestError."""
        try:
            path.write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error.strerror}") from error
        self.unsaved = False
        return f"{len(self.messages)} messages written to {path}"

    def load(self, path: Path) -> str:
        """Go on with the messages of a file that `save` wrote; what to tell the user. Raises RequestError."""
        system, turns = _read(path)
        self.begin_anew(system)
        self.turns += turns
        return f"{len(self.messages)} messages of {path}; the conversation goes on from there"


def _read(path: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """The system prompt and the turns of a saved conversation."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no JSON; expected a conversation that /save wrote") from error
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"{path} holds no list of messages; expected a conversation that /save wrote")
    try:
        check_messages(messages)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = messages if system is None else messages[1:]
    if not all(m["role"] in ("user", "assistant") and isinstance(m.get("content"), str) for m in turns):
        raise RequestError(f"{path}: expected messages of user and assistant, with text")
    return system, turns


def answer_line(completion: Completion) -> str:
    """One line about what an answer took."""
    stats = completion.stats
    reused = f", {stats.cached_tokens} reused" if stats.cached_tokens else ""
    end = {"length": "; the length limit was reached", "abort": "; stopped"}.get(completion.finish_reason, "")
    shares = share_text(stats.predicted_density, stats.active_density)
    shares = f", {shares}" if shares else ""
    return (
        f"[{stats.prompt_tokens} prompt tokens{reused}, first token after {stats.time_to_first_token:.2f} s; "
        f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s{shares}{end}]"
    )


def share_text(predicted: float | None, computed: float | None) -> str:
    """How sparse tokens are, in the words and with the meaning that all commands share; empty: all ran dense.

    predicted: share of FFN neurons whose gate was read. computed: of those whose rows of up and down were read too. Of
    steps that ran sparse, which a prompt's do not.
    """
    if predicted is None or computed is None:
        return ""
    return f"{100 * predicted:.0f} % of FFN neurons predicted, {100 * computed:.0f} % computed"
