"""What can be typed in a chat besides messages, told to a conversation with a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_tiny_model
from tiny_predictor import write_sparse_model

from svdengine import LLM, SamplingParams, load
from svdengine.commands.chat import _converse
from svdengine.commands.chat_commands import COMMANDS, Leave, command_of, completions
from svdengine.commands.chat_session import ChatSession
from svdengine.commands.conversation import Conversation
from svdengine.errors import RequestError

TALK = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


class Script:
    """A user who enters these lines; None is Ctrl-C, and the end Ctrl-D."""

    interactive = True

    def __init__(self, *lines: str | None) -> None:
        self.lines = list(lines)
        self.prompts: list[str] = []
        self.edited = ""

    def read(self, prompt: str, text: str = "", *, keep: bool = True) -> str:
        self.prompts.append(prompt)
        self.edited = text or self.edited
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with load(write_tiny_model(tmp_path_factory.mktemp("chat") / "tiny.svdp"), device="reference", context=160) as llm:
        yield llm


@pytest.fixture
def talk(llm: LLM) -> Conversation:
    return Conversation(llm, ChatSession(), TALK, Script(), quiet=True)


def give(talk: Conversation, line: str) -> str:
    found = command_of(line)
    assert found is not None
    return found[0].run(talk, found[1])


def contents(talk: Conversation) -> list[str]:
    return [turn["content"] for turn in talk.session.turns]


def test_help_names_every_command(talk: Conversation) -> None:
    told = give(talk, "/help")
    assert all(command.usage in told for command in COMMANDS.values())
    assert {"/regen", "/edit", "/set", "/load", "/read", "/dense", "/sparse", "/bias", "/context"} <= set(COMMANDS)


def test_what_is_a_command_and_what_a_message() -> None:
    for message in ("hello", " /help", "/usr/bin/env is what?", "/etc\nand more", "/"):
        assert command_of(message) is None
    found = command_of("/system be  brief\nand kind")
    assert found is not None and found[1] == "be  brief\nand kind"
    assert command_of("/bye") == command_of("/quit")
    with pytest.raises(RequestError, match=r"/hlep is no command; did you mean /help\? /help lists them"):
        command_of("/hlep")
    with pytest.raises(Leave):
        COMMANDS["/quit"].run(None, "")  # type: ignore[arg-type]


def test_regen_and_edit(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    talk.ask("hello")
    first = contents(talk)
    assert "temperature is 0" in give(talk, "/regen") and contents(talk) == first
    talk.editor = script = Script("what is a user?")
    give(talk, "/edit")
    assert script.edited == "hello" and contents(talk)[0] == "what is a user?" and len(contents(talk)) == 2
    give(talk, "/edit once upon a time")
    assert contents(talk)[0] == "once upon a time"
    assert capsys.readouterr().out
    talk.editor = Script(" ")
    assert give(talk, "/edit") == "Nothing was changed."
    give(talk, "/clear")
    for line in ("/regen", "/edit", "/edit hello"):
        with pytest.raises(RequestError, match="no question yet"):
            give(talk, line)


def test_a_question_that_fails_leaves_the_conversation_as_it_was(talk: Conversation) -> None:
    talk.ask("hello")
    before = contents(talk)
    for again in (lambda: talk.ask("hello " * 400), lambda: talk.ask_again("hello " * 400)):
        with pytest.raises(RequestError, match="maximum context length"):
            again()
        assert contents(talk) == before


def test_set(talk: Conversation) -> None:
    assert give(talk, "/set temperature 0.7") == "temperature is 0.7 (by default 0.0) from now on"
    assert give(talk, "/set temp") == "temperature is 0.7 (by default 0.0)"
    assert give(talk, "/set --top-k 5").startswith("top_k is 5") and talk.params.top_k == 5
    assert give(talk, "/set top_k default") == "top_k is 0 from now on"
    assert give(talk, "/set max_tokens none").startswith("max_tokens is none") and talk.params.max_tokens is None
    assert "seed" in give(talk, "/set")
    for line, message in (
        ("/set temprature 1", "did you mean temperature"),
        ("/set nothing", "cannot be set"),
        ("/set top_k 0.5", "takes a whole number"),
        ("/set temperature hot", "takes a number, or `default`"),
        ("/set temperature none", "takes a number"),
        ("/set temperature -1", "must lie between"),
        ("/set temperature 1 2", "a name and a value"),
    ):
        with pytest.raises(RequestError, match=message):
            give(talk, line)


def test_save_asks_before_it_overwrites_and_load_goes_on(talk: Conversation, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    give(talk, "/system be kind")
    talk.ask("hello")
    assert talk.session.unsaved and "3 messages written" in give(talk, f"/save {path}") and not talk.session.unsaved
    saved = path.read_text(encoding="utf-8")
    talk.ask("and again")
    talk.editor = script = Script("", "y")
    assert give(talk, f"/save {path}") == "Nothing was written." and path.read_text(encoding="utf-8") == saved
    assert "Overwrite it? [y/N]" in script.prompts[0]
    assert "5 messages written" in give(talk, f"/save {path}")
    talk.ask("more")
    talk.editor = Script("n", "yes")
    assert "as it was" in give(talk, f"/load {path}") and len(contents(talk)) == 6
    assert "5 messages of" in give(talk, f"/load {path}")
    assert talk.session.system == "be kind" and len(contents(talk)) == 4
    talk.editor.interactive = False
    with pytest.raises(RequestError, match="is there already"):
        give(talk, f"/save {path}")
    for line in ("/save", f"/save {tmp_path}", "/load", f"/load {tmp_path / 'none'}"):
        with pytest.raises(RequestError):
            give(talk, line)


@pytest.mark.parametrize(
    "text",
    [
        *("", "no json", "[]", "{}", '["a"]', '[{"role": "user"}]', '[{"role": "tool", "content": "x"}]'),
        *('[{"role": "user", "content": null}]', '[{"role": "system", "content": 3}]'),
    ],
)
def test_load_refuses_what_is_no_conversation(talk: Conversation, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    talk.ask("hello")
    before = contents(talk)
    talk.session.unsaved = False
    with pytest.raises(RequestError, match=re.escape(str(tmp_path / "x.json"))):
        give(talk, f"/load {tmp_path / 'x.json'}")
    assert contents(talk) == before


def test_read_puts_a_file_before_the_next_message(talk: Conversation, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once upon\n", encoding="utf-8")
    assert "tokens, which go before your next message" in give(talk, f"/read {tmp_path / 'a.txt'}")
    talk.ask("what is that?")
    assert contents(talk)[0] == "a.txt:\n```\nonce upon\n```\n\nwhat is that?"
    talk.ask("and now?")
    assert contents(talk)[2] == "and now?"
    give(talk, "/clear")
    give(talk, f"/read {tmp_path / 'a.txt'} what is it?")
    assert contents(talk)[0].endswith("```\n\nwhat is it?")
    (tmp_path / "b.bin").write_bytes(b"\0\1")
    with pytest.raises(RequestError, match="zero bytes"):
        give(talk, f"/read {tmp_path / 'b.bin'}")


def test_a_full_context_goes_on_and_is_told_once(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        talk.ask(f"hello world, user number {number}")
    told = capsys.readouterr().err
    assert told.count("is full") == 1 and "the oldest messages are left out" in told
    assert talk.session.left_out > 0 and talk.session.sent[0]["role"] == "user"
    assert talk.tokens() < talk.llm.context and len(contents(talk)) == 18
    gauge = give(talk, "/context")
    assert re.match(r"\[#+\.+\] \d+ of 160 tokens, \d+ %; 18 messages; the oldest \d+ are left out", gauge)
    talk.shift = False
    with pytest.raises(RequestError, match="maximum context length"):
        for _ in range(9):
            talk.session.left_out = 0
            talk.ask("hello world, user")


def test_an_answer_that_fills_the_context_goes_on(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    talk = Conversation(llm, ChatSession(), params, Script(), quiet=True)
    talk.ask("hello")
    assert capsys.readouterr().err.count("is full") == 1 and talk.session.generated_tokens == 200
    ends = Conversation(llm, ChatSession(), params, Script(), quiet=True, shift=False)
    ends.ask("hello")
    assert ends.session.generated_tokens < 160


def test_paths_and_bias(tmp_path: Path, talk: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    with load(write_sparse_model(tmp_path / "sparse.svdp"), device="reference", ffn="sparse") as llm:
        sparse = Conversation(llm, ChatSession(), TALK, Script())
        sparse.ask("hello")
        give(sparse, "/dense")
        assert llm.ffn == "dense"
        sparse.ask("hello")
        give(sparse, "/sparse")
        assert "sparsity_bias is 50 (by default 0.0) from now on; above 0" in give(sparse, "/bias 50")
        sparse.ask("hello")
        lines = capsys.readouterr().err.splitlines()
        assert ["predicted" in line for line in lines] == [True, False, True]
        assert "0 % of FFN neurons predicted, 0 % computed" in lines[2]
        assert "of steps that ran sparse: " in give(sparse, "/stats")
        give(sparse, "/auto")
        assert llm.ffn == "auto"
    with pytest.raises(RequestError, match="sparse path needs"):
        give(talk, "/sparse")
    with pytest.raises(RequestError, match="this model has none"):
        give(talk, "/bias 1")
    assert talk.llm.ffn == "auto"


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (["/quit", "x"], ["x"]),
        ([None, "hello", None, None, "n", "/quit", "x"], ["x"]),  # Ctrl-C clears; a second one asks
        (["hello", None, None, "y", "x"], ["x"]),
        (["hello", None, None, None, "x"], ["x"]),  # a third one says yes
        ([None, None, "x"], ["x"]),  # nothing is lost: there is no question
        (["/fly", "hello"], []),  # an error is told, and the conversation goes on
    ],
)
def test_leaving(talk: Conversation, lines: list[str | None], left: list[str]) -> None:
    talk.editor = script = Script(*lines)
    _converse(talk)
    assert script.lines == left
    assert len(contents(talk)) == 2 * ("hello" in lines)


def test_messages_of_several_lines(talk: Conversation) -> None:
    talk.editor = Script('"""one', "two", 'three"""', "a \\", "b", "pasted\nlines", '"""short"""', "/quit")
    _converse(talk)
    assert contents(talk)[::2] == ["one\ntwo\nthree", "a \nb", "pasted\nlines", "short"]


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completions("/re") == ["/regen ", "/read "]
    assert completions("/set te") == ["temperature "] and completions("/set temperature d") == ["default"]
    assert completions("hello /re") == [] == completions("")
    (tmp_path / "talk.json").write_text("[]")
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden").write_text("")
    monkeypatch.chdir(tmp_path)
    assert completions("/load ") == ["folder/", "talk.json"] and completions("/load t") == ["talk.json"]
    assert completions(f"/read {tmp_path}/fo") == [f"{tmp_path}/folder/"]
    assert completions("/load nowhere/x") == []


def test_saved_conversations_are_lists_of_messages(talk: Conversation, tmp_path: Path) -> None:
    talk.ask("hello")
    give(talk, f"/save {tmp_path / 'x.json'}")
    assert [m["role"] for m in json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))] == ["user", "assistant"]
