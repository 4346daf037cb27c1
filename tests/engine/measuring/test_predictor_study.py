"""Studies of predictors: layers weighted by the tokens that reach each expert, on models whose answer is known."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_experts import ALWAYS, NEVER, SPARSITY, mixture, write_mixture

from svdengine import load
from svdengine.cli import main
from svdengine.converters.ffn_layer import Neurons, read_ffn_layer
from svdengine.converters.predictor_quality import Selection, pooled, select
from svdengine.kernels.predictor import layer_predictor_bytes
from svdengine.measuring.predictor_study import study_predictors
from svdengine.measuring.study_results import OWN, LayerStudy, PredictorStudy, exact_experts, mean_aurocs

TEXT = "".join(f"hello {chr(97 + i * 7 % 26)}{chr(97 + i * i % 26)} world, {i} was a user. " for i in range(120))
CONFIG = mixture()


def neurons_of(random: np.random.Generator, n: int, f: int = 5) -> tuple[np.ndarray, Neurons]:
    """A choice and a truth of n tokens."""
    active = random.random((n, f)) < random.random()
    energy = np.where(active, random.random((n, f)), 0).astype(np.float32)
    return random.random((n, f)) < random.random(), Neurons(energy, active, energy)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), st.integers(0, 2**32))
def test_pooled_is_what_all_tokens_together_would_give(rows: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [neurons_of(random, n) for n in rows if n]
    found = pooled([(len(choice), select(choice, truth)) for choice, truth in parts])
    choice = np.concatenate([one for one, _ in parts])
    fields = (np.concatenate([getattr(truth, name) for _, truth in parts]) for name in ("gates", "active", "energy"))
    assert found is not None
    assert asdict(found) == pytest.approx(asdict(select(choice, Neurons(*fields))), abs=1e-6)


def test_what_no_token_reaches_counts_for_nothing() -> None:
    good = Selection(0.9, 0.5, 0.36, 0.2, 0.18, 0.01)
    found = pooled([(7, good), (0, Selection(0, 0, 1, 1, 0, 1))])
    assert found is not None and asdict(found) == pytest.approx(asdict(good)) and pooled([(0, good)]) is None


def studied(path: Path) -> PredictorStudy:
    with load(path, device="reference", ffn="dense") as llm:
        return study_predictors(llm, TEXT)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> PredictorStudy:
    """Of a model with an expert that all tokens have and whose predictor finds nothing, and one that is exact."""
    path = tmp_path_factory.mktemp("study") / "m.svdp"
    return studied(write_mixture(path, CONFIG, blind=(ALWAYS,), exact=(2,)))


def test_the_tokens_of_each_expert_are_those_that_the_router_gave_it(found: PredictorStudy) -> None:
    for layer in found.layers:
        assert [block.expert for block in layer.blocks] == list(range(6))
        assert layer.blocks[ALWAYS].rows == found.held_out_tokens and layer.blocks[NEVER].rows == 0
        assert sum(block.rows for block in layer.blocks) == 2 * found.held_out_tokens


def test_a_layer_is_weighted_by_the_tokens_that_reach_each_expert(found: PredictorStudy) -> None:
    """Half of all rows are of the expert whose predictor finds nothing: so half of what is active is missed."""
    for layer in found.layers:
        blind, selection = layer.blocks[ALWAYS], layer.selections[OWN]
        assert blind.selections[OWN].recall == 0 and blind.active_density == pytest.approx(0.2, abs=0.06)
        hits = sum(b.rows * b.selections[OWN].computed_density for b in layer.blocks if b.rows)
        active = sum(b.rows * b.active_density for b in layer.blocks)
        assert selection.recall == pytest.approx(hits / active)
        assert 0.35 < selection.recall < 0.6 and 0.45 < selection.relative_error < 0.55
        unweighted = np.mean([b.selections[OWN].recall for b in layer.blocks if b.rows])
        assert unweighted > selection.recall + 0.1  # what a plain mean of the experts would have claimed


def test_an_expert_that_is_left_out_is_exact_and_says_so(found: PredictorStudy) -> None:
    for layer in found.layers:
        exact = layer.blocks[2]
        assert exact.exact == (OWN,) and exact_experts(layer, OWN) == 1 and exact.rows
        chosen = exact.selections[OWN]
        assert (chosen.recall, chosen.predicted_density, chosen.relative_error) == (1.0, 1.0, 0.0)
        assert OWN not in exact.auroc and all(OWN in b.auroc for b in layer.blocks if b.rows and b.expert != 2)


def test_bytes_are_those_of_the_experts_that_a_token_has(tmp_path: Path) -> None:
    path = write_mixture(tmp_path / "m.svdp", CONFIG)
    found = studied(path)
    with load(path, device="reference", ffn="dense") as llm:
        layer = read_ffn_layer(llm.model_file, 0)
        assert llm.predictor is not None
        scoring = layer_predictor_bytes(llm.predictor.layers[0])
    for one in found.layers:
        chosen = one.selections[OWN]
        assert one.dense_bytes == pytest.approx(2 * layer.read_bytes(1, 1))
        assert one.exact_bytes == pytest.approx(2 * layer.read_bytes(1, one.active_density))
        expected = scoring + layer.read_bytes(chosen.predicted_density, chosen.computed_density)
        assert one.read[OWN] == pytest.approx(2 * expected)
        assert chosen.predicted_density == pytest.approx(SPARSITY.predicted, abs=0.06)
        assert chosen.computed_density == pytest.approx(SPARSITY.active, abs=0.06) and chosen.recall > 0.9


def test_planted_gates_are_found_by_their_rank_and_noisy_ones_are_not(tmp_path: Path) -> None:
    """A gate of rank 32 and a little noise: an SVD of rank 32 that knows the inputs is nearly the oracle."""
    planted = mean_aurocs(studied(write_mixture(tmp_path / "m.svdp", CONFIG)))
    assert planted["oracle"] == 1.0 and planted["random"] == pytest.approx(0.5, abs=0.1)
    assert planted[OWN] > 0.95 and planted["svd, rank 32"] > 0.95
    noisy = replace(SPARSITY, noise=0.9)
    poor = mean_aurocs(studied(write_mixture(tmp_path / "n.svdp", CONFIG, sparsity=noisy)))
    assert poor[OWN] < 0.8 and poor["svd-naive, rank 32"] < 0.9 < poor["lowbit, 2 bits"]


def test_without_a_predictor_others_are_compared_on_the_experts_that_tokens_reach(tmp_path: Path) -> None:
    found = studied(write_mixture(tmp_path / "m.svdp", CONFIG, predictor=False))
    assert found.neuron is None and all(x.compared and not x.selections for x in found.layers)
    assert all(1 <= x.compared_blocks <= 5 for x in found.layers) and mean_aurocs(found)["oracle"] == 1.0


def test_layers_without_experts_count_once(tmp_path: Path) -> None:
    config = mixture(dense_layers=(1,), dense_blocks=2)
    found = studied(write_mixture(tmp_path / "m.svdp", config))
    wide = found.layers[1]
    assert [(b.expert, b.rows) for b in wide.blocks] == [(None, found.held_out_tokens)] * 2
    assert wide.dense_bytes == pytest.approx(found.layers[0].dense_bytes)


def test_all_layers_exact_are_told_and_drawn(tmp_path: Path) -> None:
    found = studied(write_mixture(tmp_path / "m.svdp", CONFIG, exact=tuple(range(6))))
    layer: LayerStudy = found.layers[0]
    assert found.neuron is None and OWN not in layer.auroc and math.isnan(mean_aurocs(found).get(OWN, math.nan))
    assert exact_experts(layer, OWN) == 6 and layer.selections[OWN].recall == 1.0


def test_the_report_of_a_mixture(tmp_path: Path) -> None:
    path, text = write_mixture(tmp_path / "m.svdp", CONFIG, exact=(2,)), tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    common = ("eval", path, "--perplexity", text, "--window", 64)
    runner = CliRunner(env={"SVDENGINE_DEVICE": "cpu"})
    result = runner.invoke(main, list(map(str, (*common, "--report", tmp_path / "r.html"))))
    assert result.exit_code == 0, result.output
    assert "1 of 6" in result.stdout and "experts as often as tokens choose them" in result.stdout
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 8 and "3 of 18 experts have no predictor" in page
    assert page.count('class="dot"') == 3 and "3 of 18 were never chosen" in page
    rows = list(csv.DictReader((tmp_path / "r.experts.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 18 and [row["exact"] for row in rows].count("exact") == 3
    assert {row["share"] for row in rows if row["expert"] == str(ALWAYS)} == {"1.0"}
    assert {row["recall"] for row in rows if row["expert"] == str(NEVER)} == {""}
    numbers = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["measured"]["study"]["layers"]
    assert len(numbers) == 3 and len(numbers[0]["blocks"]) == 6
    record = json.loads(runner.invoke(main, list(map(str, (*common, "--predictors", "--json")))).stdout)
    layers = record["predictors"]["layers"]
    assert [x["experts"][NEVER]["rows"] for x in layers] == [0, 0, 0]
    assert layers[0]["selections"][OWN]["exact_experts"] == 1
