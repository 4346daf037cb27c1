"""A model loaded with device="cuda", as programs and commands do it: the same text as from the reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from test_executor import small_blocks

import svdengine
from svdengine.kernels.cuda import availability
from svdengine.kernels.cuda.availability import Gpu
from svdengine.kernels.cuda.intrinsics import SIMULATED

__all__ = ["small_blocks"]  # a fixture: fewer threads in the simulator
SMALL = {"hidden_size": 12, "head_count": 3, "kv_head_count": 1, "head_dim": 4, "ffn_size": 18, "layer_count": 1}


def test_a_seed_means_the_same_on_every_device(device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "engine"))
    from tiny_model import write_tiny_model

    if SIMULATED:
        monkeypatch.setattr(availability, "find_gpu", lambda: Gpu("a card", 1 << 30, (9, 0)))
        monkeypatch.setattr(sys.modules["svdengine.kernels.cuda.cupy_device"], "CupyDevice", lambda: device)
    path = write_tiny_model(tmp_path / "model.svdp", **SMALL)
    found = []
    for name in ("cuda", "reference"):
        with svdengine.load(path, device=name, context=16, kv_dtype="f32") as llm:
            assert llm.executor.name == name
            (done,) = llm.generate([5, 6], temperature=1.2, top_p=0.9, seed=7, max_tokens=2, ignore_eos=True)
            found.append(done.token_ids)
    assert found[0] == found[1] and len(found[0]) == 2
