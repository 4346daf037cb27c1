"""Calibration text: windows of files and of chats, and what the model writes itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svdengine.converters.calibration_text import chat_windows, sampled_windows, split_files, text_windows
from svdengine.errors import ConversionError, RequestError
from svdengine.scheduling.sampling import SamplingParams


class Words:
    """One token a character; 1 begins a text where `add_bos`."""

    def __init__(self, add_bos: bool) -> None:
        self.add_bos, self.bos_id = add_bos, 1

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return ([1] if bos and self.add_bos else []) + [ord(c) for c in text]


class Template:
    def encode(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> list[int]:
        if any("role" not in m for m in messages):
            raise RequestError("a message has no role")
        return [2] + [ord(c) for m in messages for c in m["content"]] + [3] * add_generation_prompt


def model(add_bos: bool = False, chats: bool = True) -> Any:
    def generate(prompts: list[list[int]], params: list[SamplingParams]) -> list[SimpleNamespace]:
        assert all(p.ignore_eos and p.temperature > 0 for p in params)
        return [SimpleNamespace(token_ids=[p.seed + 1000] * p.max_tokens) for p in params]  # type: ignore[operator]

    return SimpleNamespace(
        tokenizer=Words(add_bos),
        chat_template=Template(),
        model_file=SimpleNamespace(chat_template="{{ messages }}" if chats else None),
        generate=generate,
    )


def test_a_text_is_cut_and_spread_over_its_length(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("".join(chr(200 + i) for i in range(1000)), encoding="utf-8")
    windows = text_windows(model(), path, tokens=100, window=20)
    assert len(windows) == 5 and all(len(w) == 20 for w in windows)
    assert windows[0][0] == 200 and windows[-1][-1] == 1199
    whole = text_windows(model(add_bos=True), path, tokens=10_000, window=64)
    assert all(w[0] == 1 and len(w) <= 64 for w in whole)
    assert [t for w in whole for t in w[1:]] == list(range(200, 1200))


def test_files_share_the_tokens_and_the_held_out_windows(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c", "d", "e")]
    for path in paths:
        path.write_text(path.name * 1000)
    text = split_files(model(), paths, tokens=1000, window=20)
    assert [sum(w[0] == ord(p.name) for w in text.windows) for p in paths] == [10] * 5
    assert all(window[0] == ord(kind) for window, kind in zip(text.windows, text.kinds, strict=True))
    held_out = text.held_out_kinds(10_000)
    assert sum(map(len, held_out.values())) == 10 and len(held_out) > 2 and len(text.fitting) == 40
    assert text == split_files(model(), paths, tokens=1000, window=20)


def test_chats_are_written_by_the_template(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "x" * 30}]
    path.write_text(json.dumps(chat) + "\n\n" + json.dumps({"messages": chat[:1]}) + "\n")
    windows = chat_windows(model(), path, tokens=1000, window=20)
    assert [len(w) for w in windows] == [20, 16, 6] and windows[0][0] == windows[2][0] == 2
    assert windows[2] == [2, *map(ord, "hello")]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("nonsense", "line 2: is not JSON"),
        ("{}", "line 2: expected a list"),
        ('[{"content": "x"}]', "line 2: a message"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_line(line: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('[{"role": "user", "content": "hi"}]\n' + line)
    with pytest.raises(ConversionError, match=what):
        chat_windows(model(), path)


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\xff")
    for read in (text_windows, chat_windows):
        for path in (empty, binary, tmp_path / "missing"):
            with pytest.raises(ConversionError, match=str(path) if path != empty else "empty|no chat"):
                read(model(), path)


def test_the_model_writes_its_own_text() -> None:
    done: list[tuple[int, int]] = []
    windows = sampled_windows(model(), tokens=640, window=64, progress=lambda *step: done.append(step))
    assert len(windows) == 10 and all(len(w) == 64 for w in windows)
    assert windows == sampled_windows(model(), tokens=640, window=64)
    assert len({w[-1] for w in windows}) == 10  # each has its own seed
    assert sum(w[0] == 2 for w in windows) == 5  # every other one is a chat
    assert done[-1] == (640, 640)
    assert not any(w[0] == 2 for w in sampled_windows(model(chats=False), tokens=640, window=64))
