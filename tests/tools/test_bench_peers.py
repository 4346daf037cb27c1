"""The comparison with llama.cpp: its table, its errors, and one small run of each engine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from svdengine.errors import SvdEngineError
from svdengine.tools import bench_peers, peer_models
from svdengine.tools.peer_models import Pair
from svdengine.tools.peer_run import measure, timed
from svdengine.tools.peer_table import Row, Side, as_dicts, markdown
from svdengine.tools.random_gguf import write_gguf
from svdengine.tools.random_model import SHAPES, RandomWeights, write_svdp

ROWS = [
    Row("7B, decode 32", Side((4.0, 2.0, 3.2), 32, 2_000_000_000), Side((2.0, 2.0, 1.6), 32, 1_000_000_000)),
    Row("7B, prefill 256", Side((2.0,), 256, None), Side((4.0,), 256, None)),
]


def test_the_table_has_medians_deviations_ratios_and_shares_of_the_bandwidth() -> None:
    lines = markdown(ROWS, 40.0, ["some processor"]).splitlines()
    assert lines[2] == "| 7B, decode 32 | 10.00 ± 4.16 | 16.00 ± 2.31 | 1.60 | 20.0 (50%) | 16.0 (40%) |"
    assert lines[3] == "| 7B, prefill 256 | 128.00 ± 0.00 | 64.00 ± 0.00 | 0.50 |  |  |"
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "40.0 GB/s" in lines[5]
    assert lines[-1] == "some processor"


def test_rows_become_json() -> None:
    decode, prefill = json.loads(json.dumps(as_dicts(ROWS, 40.0)))
    assert decode["ratio"] == 1.6
    assert decode["svdengine"] == {
        "tokens_per_second": 16.0,
        "stddev": pytest.approx(2.309, abs=1e-3),
        "repetitions": [16.0, 16.0, 20.0],
        "bytes_per_token": 1_000_000_000,
        "gb_per_second": 16.0,
    }
    assert prefill["llama_cpp"]["gb_per_second"] is None


def test_only_steps_are_timed_and_each_decoded_token_is_the_likeliest_of_the_step_before() -> None:
    calls: list[tuple[list[int], int]] = []

    def step(tokens, position):
        calls.append((list(tokens), position))
        logits = np.zeros(50, np.float32)
        logits[position + 7] = 1
        return logits

    result = timed(step, 50, decode=3, prefill=8)
    assert set(result) == {"decode", "prefill"}
    prompt = calls[0][0]
    assert [position for _, position in calls] == [0, 0, 1, 2, 3, 0, 1, 2, 0]
    assert calls[5:8] == [(prompt[:1], 0), ([7], 1), ([8], 2)]
    assert calls[-1] == (prompt, 0) and len(prompt) == 8


def test_without_llama_cpp_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install 'svdengine\[peers\]'$"):
        bench_peers.main(["--threads", "1"])


def test_a_failing_measurement_is_explained(tmp_path: Path) -> None:
    with pytest.raises(SvdEngineError, match="svdengine failed on"):
        measure("svdengine", 1, tmp_path / "missing.svdp", decode=1)


def test_both_engines_run_the_same_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp")
    config = replace(SHAPES["smollm2-135m"], layer_count=1, vocab_size=512)
    weights = RandomWeights(config)
    write_gguf(tmp_path / "m.gguf", config, "q8_0", weights.tensor)
    write_svdp(tmp_path / "m.svdp", config, "q8")
    pair = Pair("tiny", tmp_path / "m.gguf", tmp_path / "m.svdp", decode=16, prefill=32)
    monkeypatch.setattr(bench_peers, "prepare", lambda work, report: [pair])
    bench_peers.main(["--work", "smollm2", "--threads", "1", "--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["work"] for row in rows] == ["tiny, decode 4", "tiny, prefill 8"]
    assert rows[0]["ratio"] > 0
    assert rows[0]["bandwidth_gb_per_second"] > 0
    sizes = [rows[0][engine]["bytes_per_token"] for engine in ("llama_cpp", "svdengine")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_models_are_made_once_and_again_when_they_cannot_be_read(tmp_path: Path) -> None:
    written: list[Path] = []

    def write(path: Path) -> None:
        written.append(path)
        write_svdp(path, replace(SHAPES["smollm2-135m"], layer_count=1, vocab_size=64), "q8")

    path, reports = tmp_path / "m.svdp", []
    path.write_bytes(b"of another version")
    for _ in range(2):
        peer_models._make(path, 3, reports.append, write)
    assert len(written) == 1
    assert reports == [f"writing {path} (3 MB)"]
    assert list(tmp_path.iterdir()) == [path]
