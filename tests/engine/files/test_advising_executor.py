"""A model larger than memory: what the system is told before each step, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_predictor import write_sparse_model

import svdengine
from svdengine import LLM
from svdengine.files.advising_executor import AdvisingExecutor
from svdengine.kernels.reference import ReferenceExecutor
from svdengine.measuring.benchmark import run_benchmark

ROWS = {"gate", "up", "down_T"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_model(tmp_path_factory.mktemp("paged") / "sparse.svdp")


@pytest.fixture
def llm(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    with monkeypatch.context() as patch:
        patch.setattr("svdengine.files.residency.usable_memory", lambda: path.stat().st_size // 2)
        loaded = svdengine.load(path, device="reference", ffn="sparse", context=64)
    with loaded as llm:
        yield llm


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """(advice, arrays) of all that the system is told."""
    made: list[tuple[str, set[str]]] = []

    def advise(_: object, names: list[str], advice: str) -> None:
        if names:
            made.append((advice, set(names)))

    monkeypatch.setattr("svdengine.files.model_file.ModelFile.advise", advise)
    return made


def test_only_a_model_that_does_not_fit_is_paged(path: Path, llm: LLM) -> None:
    assert isinstance(llm.executor, AdvisingExecutor)
    with svdengine.load(path, device="reference") as roomy:
        assert not isinstance(roomy.executor, AdvisingExecutor)
        roomy.ffn = "sparse"
        np.testing.assert_array_equal(roomy.logits([1, 2, 3]), llm.logits([1, 2, 3]))


def test_a_prompt_is_read_in_order_and_sparse_decoding_at_random(llm: LLM, told: list[tuple[str, set[str]]]) -> None:
    prompt = list(range(1, 8))
    llm.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True)
    assert told == [("normal", ROWS), ("random", ROWS)]  # once each, not once a token
    told.clear()
    llm.ffn = "dense"
    llm.generate(prompt, max_tokens=4, temperature=0, ignore_eos=True)
    assert told == [("normal", ROWS)]


def test_without_a_predictor_all_gates_are_read_in_order(
    llm: LLM, told: list[tuple[str, set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.executor.predictor = None
    monkeypatch.setattr(ReferenceExecutor, "ffn_path", lambda _, n: "skip_zeros" if n == 1 else "dense")
    llm.ffn = "auto"
    llm.generate([1, 2, 3], max_tokens=3, temperature=0, ignore_eos=True)
    assert told == [("normal", ROWS), ("random", {"up", "down_T"})]


def test_the_benchmark_counts_pages_of_both_paths(llm: LLM, told: list[tuple[str, set[str]]]) -> None:
    rows = run_benchmark(llm, 0, 3, 2, paths=("dense", "sparse"), faults=True)
    assert [row.ffn for row in rows] == ["dense", "sparse"]
    assert [advice for advice, _ in told] == ["normal", "random"]  # paths do not take turns
    assert all(row.major_faults_per_token is not None for row in rows)
