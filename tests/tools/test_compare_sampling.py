"""The table of samplings: what counts as a loop and as right, and that a run gives a row a setting."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from svdengine.tools import compare_sampling


def test_loops_and_right_answers() -> None:
    line = "I am a model that says the same again. "
    assert compare_sampling.loops(line * 3) and not compare_sampling.loops(line * 2)
    assert not compare_sampling.loops("a short answer") and not compare_sampling.loops("")
    assert compare_sampling.is_right("It is Paris.", "paris") and compare_sampling.is_right("seven days", "7|seven")
    assert not compare_sampling.is_right("London", "paris")
    assert len(compare_sampling.QUESTIONS) == 24


def test_a_row_for_each_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SVDENGINE_DEVICE", "reference")
    monkeypatch.setattr(compare_sampling, "QUESTIONS", (("hello", "x"), ("once", "")))
    monkeypatch.setattr(compare_sampling, "_MOST_TOKENS", 5)
    model = write_tiny_model(tmp_path / "tiny.svdp", max_position=1024)
    assert compare_sampling.main([str(model), "--seeds", "2"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(compare_sampling.SETTINGS)
    assert all(row.count("|") == head.count("|") and "/2 |" in row for row in rows)
    assert compare_sampling.main([str(tmp_path / "none.svdp")]) == 1
