"""Which experts tokens had, counted on every path and shown: of one mixture one always, and one never."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from model_zoo import make_batch
from planted_experts import ALWAYS, NEVER, mixture, write_mixture

from svdengine import SamplingParams, load
from svdengine.cli import main
from svdengine.measuring.expert_use import expert_line, expert_use
from svdengine.server.metrics import Metrics

CONFIG = mixture(dense_layers=(1,), dense_blocks=2)
LAYERS = len(CONFIG.expert_layers)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("use") / "m.svdp", CONFIG)


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_each_row_counts_for_the_experts_that_it_chose(path: Path, device: str) -> None:
    """Prefill, decode, and both paths; what times are measured with does not count, nor does a reset forget."""
    tokens = [5, 9, 40, 41, 42, 17, 3, 300]
    with load(path, device=device, threads=None if device == "reference" else 2, ffn="dense") as llm:  # type: ignore[arg-type]
        executor = llm.executor
        executor.forward(make_batch([(tokens, 0)], [[0]]))
        executor.ffn_inputs(make_batch([(tokens, 0)], [[0]]))
        kept = executor.kept_experts
        executor.ffn = "sparse"
        executor.forward(make_batch([([tokens[0]], 8)], [[0]]))
        _ = executor.ffn_times if device == "cpu" else None
        executor.reset_neuron_counts()
        counts = executor.expert_counts()
    assert kept is not None and len(counts) == LAYERS
    for layer, found in zip(CONFIG.expert_layers, counts, strict=True):
        assert found[ALWAYS] == 17 and found[NEVER] == 0 and found.sum() == 2 * 17
        once = np.bincount(kept[layer].ravel(), minlength=6)
        extra = found - 2 * once  # of the one decoded row
        assert set(extra) == {0, 1} and extra.sum() == 2


def test_use_is_of_tokens_and_of_all_layers() -> None:
    use = expert_use(CONFIG, [[10, 4, 3, 2, 1, 0], [8, 8, 2, 2, 0, 0]])
    assert use is not None and (use.experts, use.unused) == (12, 3)
    assert use.busiest == pytest.approx((1.0 + 0.8) / 2) and use.even == pytest.approx(1 / 3)
    assert "2 of 6 in a layer" in expert_line(CONFIG, use) and "3 of 12 no token had" in expert_line(CONFIG, use)
    assert expert_use(CONFIG, []) is None and expert_use(CONFIG, [[0] * 6] * 2) is None


def test_bench_says_how_evenly_experts_are_used(path: Path) -> None:
    arguments = ["bench", str(path), "-p", "8", "-n", "4", "-r", "1", "--ffn", "both", "--threads", "2"]
    runner = CliRunner(env={"SVDENGINE_DEVICE": "cpu"})
    rows = json.loads(runner.invoke(main, [*arguments, "--json"]).stdout)
    told = [row for row in rows if not row["test"].startswith("ffn")]
    assert told and all(row["busiest_expert"] == 1.0 and row["unused_experts"] >= LAYERS for row in told)
    shown = runner.invoke(main, arguments).stdout
    assert "A token has 2 of 6 experts in a layer; an even choice gives each 33 % of the tokens." in shown
    assert "tg4: the busiest expert of a layer has 100 %, and " in shown


def test_a_server_counts_them_by_layer(path: Path) -> None:
    with load(path, device="cpu", threads=2) as llm:
        llm.generate("hello", SamplingParams(max_tokens=3, ignore_eos=True))
        stats = llm.stats()
        text = Metrics().text(stats, 0, 1)
        rows = sum(stats.rows.values())
    assert len(stats.experts) == LAYERS and stats.experts[0][ALWAYS] == rows
    assert f'svdengine_expert_choices_total{{layer="1"}} {2 * rows}' in text
    assert f'svdengine_busiest_expert_choices_total{{layer="0"}} {rows}' in text and "svdengine_experts_used" in text
