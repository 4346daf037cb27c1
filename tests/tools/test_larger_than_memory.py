"""Measuring with little memory: how much is taken and given back, and what the table says. No memory is taken here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from svdengine.tools import larger_than_memory as tool
from svdengine.tools.larger_than_memory import GIB, Holder


class Machine:
    """Available memory that goes down with what is held."""

    def __init__(self, free: int, holder: Holder) -> None:
        self.free, self.holder = free, holder

    def available(self) -> int:
        return self.free - self.holder.size


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(tool, "_PIECE", 4096)
    machine = Machine(100 * 4096, Holder())
    monkeypatch.setattr(tool, "_available", machine.available)
    return machine


def test_memory_is_taken_down_to_what_is_left_and_given_back_when_others_need_it(machine: Machine) -> None:
    machine.holder.take(leave=40 * 4096)
    assert machine.holder.size == 60 * 4096
    machine.free -= 20 * 4096
    machine.holder.yield_to(floor=30 * 4096)
    assert machine.available() == 30 * 4096
    machine.free -= 80 * 4096
    machine.holder.yield_to(floor=30 * 4096)
    assert machine.holder.size == 0  # no more than there is


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "m.svdp"
    model.write_bytes(b"x" * 8192)
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        row = {"test": "tg4", "ffn": "dense", "tokens_per_second": 0.25, "bytes_per_token": 9e6}
        faults = {"major_faults_per_token": 1234.0, "disk_bytes_per_token": 8192.0 * 1000}
        return subprocess.CompletedProcess(command, 0, json.dumps([row | faults]))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(tool, "usable_memory", lambda: 4096)
    tool.main([str(model), "--ffn", "dense"])
    assert "--faults" in asked[0] and asked[0][asked[0].index("--ffn") + 1] == "dense"
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]][4:] == ["0.250", "1,234", "2,000", "8", "9"]
    monkeypatch.setattr(tool, "usable_memory", lambda: 4097)
    with pytest.raises(SystemExit, match="expected twice"):
        tool.main([str(model)])
    with pytest.raises(SystemExit, match="less than the floor"):
        tool.main([str(model), "--leave", "1"])
    monkeypatch.setattr(tool, "usable_memory", lambda: GIB)
    with pytest.raises(SystemExit, match="name a model"):
        tool.main([])
