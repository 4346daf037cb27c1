"""Experts that are kept in memory: which they are, that the budget holds, that answers do not change, and counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from expert_zoo import expert_zoo
from hypothesis import given
from hypothesis import strategies as st

import svdengine
from svdengine import LLM, DeviceError
from svdengine.cli import main
from svdengine.files import kept_experts
from svdengine.files.advising_executor import AdvisingExecutor, memory_use
from svdengine.files.kept_experts import ExpertPlan, KeptExperts, plan_experts
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.residency import block_arrays
from svdengine.measuring.benchmark import run_benchmark
from svdengine.tools.random_model import write_svdp

CONFIG = expert_zoo()["mixtral"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "experts.svdp"
    write_svdp(path, CONFIG, "q8")
    return path


@pytest.fixture
def file(path: Path) -> Iterator[ModelFile]:
    with read_model_file(path) as file:
        yield file


class Counting:
    """An executor that only says how often each block was chosen, and is told where to read it."""

    name = "counting"

    def __init__(self, blocks: int) -> None:
        self.counts = np.zeros(blocks, np.int64)
        self.placed: dict[int, dict[str, np.ndarray]] = {}

    def block_rows(self) -> np.ndarray:
        return self.counts.copy()

    def place_block(self, block: int, arrays: dict[str, np.ndarray]) -> None:
        self.placed[block] = arrays


def keeper(file: ModelFile, kept: int) -> tuple[KeptExperts, Counting]:
    executor: Any = Counting(CONFIG.ffn_blocks)
    plan = plan_experts(file, 1 << 40, 0)
    return KeptExperts(executor, file, ExpertPlan(kept, plan.total, plan.expert_bytes)), executor


def run(kept: KeptExperts, executor: Counting, uses: dict[int, int], steps: int = 16) -> None:
    """Steps of one row, in each of which every block is chosen as often as `uses` says."""
    for _ in range(steps):
        for block, count in uses.items():
            executor.counts[block] += count
        kept.after_step(1)


def test_those_that_are_used_most_are_kept(file: ModelFile) -> None:
    kept, executor = keeper(file, 2)
    run(kept, executor, {0: 1, 3: 4, 5: 2})
    assert kept.blocks == {3, 5}
    for block, copies in executor.placed.items():
        assert set(copies) == set(block_arrays(file))
        for name, copy in copies.items():
            np.testing.assert_array_equal(copy, file.arrays[name][block])
            assert not np.shares_memory(copy, file.arrays[name])


def test_another_text_changes_them_and_a_small_difference_does_not(file: ModelFile) -> None:
    kept, executor = keeper(file, 1)
    run(kept, executor, {1: 10})
    run(kept, executor, {1: 0, 2: 11})
    assert kept.blocks == {1}  # as often, but for what a use counts less now
    run(kept, executor, {2: 11}, 64)
    assert kept.blocks == {2}
    for name, array in executor.placed[1].items():  # the other is read in the file again
        assert np.shares_memory(array, file.arrays[name])


def test_what_was_used_once_is_not_kept(file: ModelFile) -> None:
    kept, executor = keeper(file, 4)
    executor.counts[:4] += 1
    run(kept, executor, {})
    assert kept.blocks == frozenset()


@given(st.lists(st.lists(st.integers(0, CONFIG.ffn_blocks - 1), max_size=6), max_size=12), st.integers(0, 5))
def test_there_are_never_more_than_planned(path: Path, steps: list[list[int]], most: int) -> None:
    with read_model_file(path) as file:
        kept, executor = keeper(file, most)
        used = 0
        for blocks in steps:
            for block in blocks:
                executor.counts[block] += 3
                used += 3
            run(kept, executor, {})
            assert len(kept.blocks) <= most
            copied = [b for b, a in executor.placed.items() if not np.shares_memory(a["up"], file.arrays["up"])]
            assert set(copied) == kept.blocks
        chosen, found = kept.uses()
        assert chosen == used and 0 <= found <= chosen


@given(st.integers(0, 1 << 24), st.integers(0, 1 << 24))
def test_a_plan_stays_within_its_memory(path: Path, memory: int, taken: int) -> None:
    with read_model_file(path) as file:
        plan = plan_experts(file, memory, taken)
        around = sum(a.nbytes for name, a in file.arrays.items() if name not in block_arrays(file))
        assert 0 <= plan.kept <= plan.total == CONFIG.ffn_blocks
        token = CONFIG.chosen_blocks * len(CONFIG.expert_layers) * plan.expert_bytes
        assert plan.kept == 0 or plan.kept * plan.expert_bytes + token + around + taken <= memory
        assert plan_experts(file, memory + (1 << 20), taken).kept >= plan.kept


@pytest.fixture
def small(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """The model where half of its experts are kept, chosen anew after every fourth step."""
    monkeypatch.setattr(kept_experts, "own_bytes", lambda: -(1 << 30))
    monkeypatch.setattr(kept_experts, "_PERIOD", 4)
    monkeypatch.setattr(
        kept_experts, "plan_experts", lambda file, *_: ExpertPlan(CONFIG.ffn_blocks // 2, *plan_experts_of(file))
    )
    with svdengine.load(path, device="cpu", threads=2, context=64, memory=path.stat().st_size // 2) as llm:
        yield llm


def plan_experts_of(file: ModelFile) -> tuple[int, int]:
    plan = plan_experts(file, 1 << 40, 0)
    return plan.total, plan.expert_bytes


def test_answers_are_those_of_the_whole_model(path: Path, small: LLM) -> None:
    prompt = list(range(3, 20))
    with svdengine.load(path, device="cpu", threads=2, context=64) as whole:
        expected = whole.generate(prompt, max_tokens=30, temperature=0, ignore_eos=True)[0].token_ids
    assert small.generate(prompt, max_tokens=30, temperature=0, ignore_eos=True)[0].token_ids == expected
    assert isinstance(small.executor, AdvisingExecutor) and small.executor.kept is not None
    assert small.executor.kept.blocks
    chosen, found = small.executor.kept.uses()
    assert chosen == (17 + 29) * CONFIG.chosen_blocks * len(CONFIG.expert_layers)
    assert 0 < found < chosen


def test_the_benchmark_counts_experts(small: LLM) -> None:
    row = run_benchmark(small, 0, 16, 2, faults=True)[0]
    assert row.experts_per_token == CONFIG.chosen_blocks * len(CONFIG.expert_layers)
    assert row.kept_experts is not None and 0 < row.kept_experts < 1
    assert row.read_experts is not None and 0 <= row.read_experts <= 1
    assert run_benchmark(small, 0, 4, 1)[0].kept_experts is None


def test_memory_above_the_bound_is_let_go(path: Path, small: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with read_model_file(path) as file:
        token = sum(file.arrays[name][0].nbytes for name in block_arrays(file)) * CONFIG.token_neurons / CONFIG.ffn_size
    limit = path.stat().st_size // 2 - min(path.stat().st_size // 4, round(token))  # or a step would pass the bound
    monkeypatch.setattr(ModelFile, "advise", lambda _, names, advice: told.extend(advice for _ in names))
    monkeypatch.setattr("svdengine.files.advising_executor.resident_bytes", lambda: limit)
    small.generate([1, 2], max_tokens=3, temperature=0, ignore_eos=True)
    assert "dontneed" not in told
    monkeypatch.setattr("svdengine.files.advising_executor.resident_bytes", lambda: limit + 1)
    small.generate([1, 2], max_tokens=3, temperature=0, ignore_eos=True)
    assert "dontneed" in told


def test_it_says_what_it_does(path: Path, small: LLM) -> None:
    kept = CONFIG.ffn_blocks // 2
    assert memory_use(small.executor).startswith(f"{kept} of {CONFIG.ffn_blocks} experts are kept, 0.00 GB")
    options = ["--memory", "8G", "-p", "0", "-n", "2", "-r", "1", "--device", "cpu"]
    done = CliRunner().invoke(main, ["bench", str(path), *options])
    assert done.exit_code == 0 and "the model fits into that memory" in done.output
    with pytest.raises(svdengine.RequestError, match="memory"):
        svdengine.load(path, device="cpu", memory=0)


def test_a_device_with_weights_of_its_own_has_no_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdengine.loading._READ_THE_MAP", ("reference",))
    with pytest.raises(DeviceError, match=r"found the device cpu; leave memory out"):
        svdengine.load(path, device="cpu", threads=1, memory=1 << 30)


def test_a_bound_that_cannot_be_kept_is_told(path: Path, small: LLM) -> None:
    assert "more than that memory" in memory_use(small.executor)  # half a tiny file: less than Python itself takes
    enough = AdvisingExecutor(small.executor.inner, small.model_file, 1 << 40)  # type: ignore[attr-defined]
    assert enough.missing == 0 and "more than that memory" not in memory_use(enough)
