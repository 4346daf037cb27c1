"""The timing of transformers, on the CPU with a model that is as small as they get."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from svdengine.tools import time_transformers
from svdengine.tools.random_model import SHAPES


def test_both_ways_decode(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'svdengine[test]'")
    pytest.importorskip("transformers", reason="needs transformers: pip install 'svdengine[test]'")
    small = replace(
        SHAPES["llama2-7b"], vocab_size=64, hidden_size=32, head_count=2, kv_head_count=2, head_dim=16, ffn_size=48,
        max_position=64,
    )  # fmt: skip
    monkeypatch.setitem(time_transformers.SHAPES, "llama2-7b", small)
    time_transformers.main(["--device", "cpu", "--layers", "1", "--tg", "1", "--repetitions", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in found] == ["eager", "static"]
    assert all(row["tokens_per_second"] > 0 for row in found)


def test_numbers_below_one_are_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        time_transformers.main(["--tg", "0"])
    assert "--tg" in capsys.readouterr().err
