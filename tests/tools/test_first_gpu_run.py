"""The first run on a GPU, without one: parts under their limits, what is written, and what it compares."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svdengine.errors import SvdEngineError
from svdengine.kernels.brought_along import ENVIRONMENT
from svdengine.tools import first_gpu_parts
from svdengine.tools.first_gpu_run import Part, Setting, every_part, main, run_parts

DEVICES = {"gpus": [{"name": "a card", "driver_cuda": "13.0", "read_gb_per_second": 3000.0}]}
ROWS = [{"test": "tg4", "ffn": "dense", "tokens_per_second": 12.5, "gb_per_second": 100.0}]


def program(text: str) -> tuple[str, ...]:
    return sys.executable, "-c", text


def part(name: str, *programs: str, limit: float = 600) -> Part:
    return Part(name, limit, "something", lambda setting: [program(text) for text in programs])


def run(tmp_path: Path, *parts: Part) -> tuple[dict[str, Any], list[str]]:
    run_parts(Setting(tmp_path, None), parts, lambda line: None)
    found = json.loads((tmp_path / "first_gpu_run.json").read_text())
    return found, (tmp_path / "first_gpu_run.md").read_text().splitlines()


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    begin = time.monotonic()
    left_out = Part("gone", 5, "something", lambda setting: "there is no ncu here")
    found, lines = run(
        tmp_path,
        part("machine", f"print('a warning'); print({json.dumps(DEVICES)!r})"),
        part("fails", "raise SystemExit('error: no | luck')", "print('[1]')"),
        part("hangs", "print('begun', flush=True); import time; time.sleep(600)", "print(1)", limit=5),
        left_out,
        part("bench", f"print({json.dumps(ROWS)!r})"),
    )
    assert time.monotonic() - begin < 500
    assert [one["result"] for one in found["parts"]] == ["done", "failed", "out of time", "left out", "done"]
    assert found["device"] == "a card, CUDA 13.0 of the driver" and found["date"].startswith("20")
    assert found["parts"][1]["said"] == ["error: no | luck\n", [1]] and found["parts"][2]["said"] == ["begun\n"]
    assert lines[0].startswith("a card, CUDA 13.0 of the driver, 20") and len(lines) == 4 + 5
    assert {line.count("|") for line in lines[2:]} == {6}
    assert "3000 GB/s" in lines[4] and "tg4 dense 12.5 t/s, 100 GB/s" in lines[8]


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    child = "import time; time.sleep(4); open('left', 'w')"
    text = f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.run([sys.executable, '-c', {child!r}])"
    run(tmp_path, part("hangs", text, limit=1))
    time.sleep(4)
    assert not (tmp_path / "left").exists()


def test_results_are_written_after_each_part(tmp_path: Path) -> None:
    look = f"import json; print(json.dumps(len(json.load(open({str(tmp_path / 'first_gpu_run.json')!r}))['parts'])))"
    found, _ = run(tmp_path, part("one", "print(1)"), part("two", f"print([{{}}]); {look}"))
    assert found["parts"][1]["said"][0].split()[-1] == "1"


def test_kernels_that_were_brought_along_are_used(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    found, _ = run(tmp_path, part("one", f"import os, json; print(json.dumps([os.environ[{ENVIRONMENT!r}]]))"))
    assert found["parts"][0]["said"] == [[str(tmp_path / "kernels")]]


def test_parts_come_in_order_and_know_what_they_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    setting, parts = Setting(tmp_path, None), every_part()
    assert [part.name for part in parts][:3] == ["machine", "formats", "kernel tests"]
    assert sum(part.limit for part in parts) <= 15 * 60
    lacking = {part.name for part in parts if isinstance(part.commands(setting), str)}
    assert lacking == {"kernel tests", "model tests", "sanitizers", "profile"}
    tests = Path(__file__).parents[1] / "kernels" / "cuda"
    named = [
        w for p in parts for c in _commands(p, replace(setting, tests=tests)) for w in c if w.startswith(str(tests))
    ]
    assert named and all(Path(word).exists() for word in named)


def _commands(part: Part, setting: Setting) -> Sequence[tuple[str, ...]]:
    found = part.commands(setting)
    return () if isinstance(found, str) else found


def test_formats_are_compared_with_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = first_gpu_parts.formats(tmp_path, "reference", ["q8"])
    assert found["largest"] == 0 and len(found) == 9
    logits = first_gpu_parts._logits

    def wrong(path: Path, device: Any, ffn: Any) -> Any:
        made = logits(path, "reference", ffn)
        return made if device == "reference" else {**made, "decode": made["decode"] * 1.1}

    monkeypatch.setattr(first_gpu_parts, "_logits", wrong)
    with pytest.raises(
        SvdEngineError, match=r"differ from the reference's: q8 dense decode 1\.0e-01, q8 sparse decode"
    ):
        first_gpu_parts.formats(tmp_path, "another", ["q8"])


def test_a_little_is_generated_on_every_path(tmp_path: Path) -> None:
    assert first_gpu_parts.generation(tmp_path, "reference") == {"tokens": 2 * 2 * 2 * 6}


def test_the_command_names_its_parts(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["-o", str(tmp_path), "--only", "nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["-o", str(tmp_path), "--only", "profile"])
    assert ended.value.code == 0 and "| profile | left out |" in capsys.readouterr().out


def test_memory_cannot_be_looked_at_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_gpu_parts, "find_gpu", lambda: "no NVIDIA driver was found")
    with pytest.raises(SvdEngineError, match="CUDA cannot be used: no NVIDIA driver was found"):
        first_gpu_parts.memory(tmp_path, "cuda")


def test_models_that_were_brought_along_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def write(path: Path, *_: Any) -> None:
        written.append(path.name)
        path.write_bytes(b"12345")

    monkeypatch.setattr(first_gpu_parts, "write_planted", write)
    first_gpu_parts.measured_path(tmp_path, "q4").write_bytes(b"123")
    assert first_gpu_parts.models(tmp_path, None) == {"f16": 5, "q4": 3} and written == ["planted-f16.svdp"]
