"""A tour of every chat command in a real terminal (tmux), with prompt_toolkit and with Python's own readline."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from patience import PATIENCE, eventually
from tiny_predictor import write_sparse_model

from svdengine.commands.chat_commands import COMMANDS

pytestmark = [
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
    pytest.mark.slow,
]

Start = Callable[..., "Terminal"]


class Terminal:
    """A terminal of 100 columns with one program."""

    def __init__(self, socket: Path, command: str) -> None:
        self._socket = str(socket)
        self._tmux("-f", os.devnull, "new-session", "-d", "-x", "100", "-y", "50", command)

    def type(self, text: str, *keys: str) -> None:
        """Type a text, then keys by tmux's names."""
        if text:
            self._tmux("send-keys", "-l", text)
        for key in keys:
            self._tmux("send-keys", key)

    def enter(self, text: str) -> None:
        self.type(text, "Enter")

    def paste(self, text: str) -> None:
        """As a terminal does on a paste."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p")

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-J", "-S", "-500")

    def wait_for(self, text: str, times: int = 1) -> str:
        """The screen, once the text stands there so often."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            seen = self.screen()
            if seen.count(text) >= times:
                return seen
            time.sleep(0.1)
        raise AssertionError(f"{text!r} did not appear {times} times:\n{self.screen()}")

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], capture_output=True, check=False)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(["tmux", "-S", self._socket, *arguments], capture_output=True, text=True, check=True)
        return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("tour") / "tiny.svdp")


@pytest.fixture(params=["prompt_toolkit", "readline"])
def start(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Start]:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        without = "" if request.param == "prompt_toolkit" else "sys.modules['prompt_toolkit'] = None; "
        given = ["chat", str(model), "--device", "reference", "-n", "4", "--ignore-eos", "--temp", "0", *arguments]
        code = f"import sys; {without}from svdengine.cli import main; main({given!r})"
        variables = {"XDG_STATE_HOME": str(tmp_path / "state"), "PYTHONPATH": os.pathsep.join(sys.path)}
        setting = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        command = f"cd {shlex.quote(str(tmp_path))}; {setting} {sys.executable} -c {shlex.quote(code)}"
        opened.append(Terminal(tmp_path / f"tmux{len(opened)}", f"{command}; echo left with $?; sleep 600"))
        opened[-1].wait_for("Ctrl-D to leave")
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_every_command(start: Start, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("once upon a time", encoding="utf-8")
    terminal = start("--ffn", "sparse")
    terminal.enter("hello world")
    terminal.wait_for("tokens/s, ", 1)
    tour = [
        ("/regen", "temperature is 0, so that the same answer comes"),
        ("/set temperature 0.7", "temperature is 0.7"),
        ("/dense", "All FFN neurons are computed"),
        ("/sparse", "calls active are computed from now on"),
        ("/auto", "what is faster from now on"),
        ("/bias 0.5", "sparsity_bias is 0.5"),
        ("/read note.txt", "which go before your next message"),
        ("/context", "of 512 tokens"),
        ("/stats", "2 answers: "),
        ("/save talk.json", "2 messages written to talk.json"),
        ("/clear", "The conversation begins anew."),
        ("/load talk.json", "2 messages of talk.json"),
        ("/system be kind", "with this system prompt"),
        ("/help", "Ctrl-C stops an answer or clears the line"),
    ]
    for line, told in tour:
        terminal.enter(line)
        terminal.wait_for(told)
    assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))] == [
        "user",
        "assistant",
    ]
    terminal.enter("first")
    terminal.wait_for("tokens/s", 4)  # two answers before, and the greeting's line
    terminal.enter("/edit")
    terminal.wait_for("edit> first")
    terminal.enter(" and last")
    terminal.wait_for("tokens/s", 5)
    terminal.enter("/save talk.json")
    terminal.wait_for("Overwrite it? [y/N]")
    terminal.enter("y")
    terminal.wait_for("3 messages written")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))[1]["content"] == "first and last"
    terminal.enter("/quit")
    terminal.wait_for("left with 0")
    assert {line.split()[0] for line, _ in tour} | {"/edit", "/save", "/quit"} == set(COMMANDS)


def test_a_paste_is_one_message_and_is_in_the_history(start: Start, tmp_path: Path) -> None:
    terminal = start()
    terminal.paste("first line\nsecond line")
    terminal.wait_for("second line")
    assert "[" not in terminal.screen().partition("second line")[2]
    terminal.type("", "Enter")
    terminal.wait_for("prompt tokens")
    terminal.enter("/save pasted.json")
    terminal.wait_for("2 messages written")
    saved = json.loads((tmp_path / "pasted.json").read_text(encoding="utf-8"))
    assert saved[0]["content"] == "first line\nsecond line"
    terminal.enter("/quit")
    terminal.wait_for("left with 0")
    history = (tmp_path / "state" / "svdengine" / "chat_history").read_text(encoding="utf-8")
    assert json.loads(history.splitlines()[0]) == "first line\nsecond line"
    again = start()
    again.type("", "Up", "Up", "Up")
    again.wait_for("second line")


def test_keys(start: Start) -> None:
    terminal = start()
    terminal.type("/sta", "Tab")
    terminal.wait_for("> /stats")
    terminal.type("", "Enter")
    terminal.wait_for("0 answers")
    terminal.type("never sent", "C-c")
    terminal.wait_for("Ctrl-C once more to leave")
    terminal.enter("hello")
    terminal.wait_for("tokens/s")
    terminal.type("", "C-c")
    terminal.wait_for("Ctrl-C once more to leave", 2)
    terminal.type("", "C-c")
    terminal.wait_for("Leave? The conversation is not saved")
    terminal.enter("n")
    terminal.type("", "C-d")
    terminal.wait_for("Leave? The conversation is not saved", 2)
    terminal.enter("y")
    terminal.wait_for("left with 0")
    assert "Traceback" not in terminal.screen() and "1 answers" not in terminal.screen()


def test_ctrl_c_stops_an_answer(start: Start) -> None:
    terminal = start("-n", "20000", "--context-shift", "--temp", "1")  # what is likeliest cannot be seen
    terminal.type("hello world")
    before = len(terminal.wait_for("hello world").strip())
    terminal.type("", "Enter")
    eventually(lambda: len(terminal.screen().strip()) > before + 9)  # it answers
    terminal.type("", "C-c")
    terminal.wait_for("; stopped]")
    terminal.enter("/quit")
    terminal.wait_for("left with 0")
