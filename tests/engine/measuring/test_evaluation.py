"""Sparse execution against dense: what is told while it runs."""

from pathlib import Path

from tiny_predictor import write_sparse_model

from svdengine import load
from svdengine.measuring.evaluation import compare_predictors


def test_progress_counts_every_run_of_a_window(tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    with load(write_sparse_model(tmp_path / "sparse.svdp"), device="reference", ffn="sparse") as llm:
        predictors, biases = {"a": llm.predictor, "b": llm.predictor}, (0.0, 0.2, 0.4)
        text = "once upon a time there was a system. " * 4
        found = compare_predictors(llm, text, predictors, 32, biases, lambda *state: told.append(state))
    windows = found["a"].dense.windows
    assert [(done, total) for done, total, _ in told] == [(i + 1, 7 * windows) for i in range(7 * windows)]
    assert windows > 1 and told[-1][2] == found["a"].dense.perplexity
