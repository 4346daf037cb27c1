"""What is kept in memory: advice, prefetching and locking of the pages of a model file."""

import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

import svdengine
from svdengine import DeviceError
from svdengine.machine import memory_bytes
from svdengine.model_file import ModelFile, read_model_file
from svdengine.residency import arrange_memory, ffn_row_names, usable_memory


@pytest.fixture
def file(tmp_path: Path) -> Iterator[ModelFile]:
    with read_model_file(write_tiny_model(tmp_path / "tiny.svdp")) as file:
        yield file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(what, bytes) of everything that the system is asked for."""
    made: list[tuple[str, int]] = []
    monkeypatch.setattr("svdengine.page_map.advise", lambda _, start, end, advice: made.append((advice, end - start)))
    monkeypatch.setattr("svdengine.page_map.prefetch", lambda _, start, end: made.append(("prefetch", end - start)))
    monkeypatch.setattr("svdengine.page_map.lock", lambda _, start, end: made.append(("lock", end - start)))
    return made


def test_a_model_that_fits_is_taken_whole(file: ModelFile, calls: list[tuple[str, int]]) -> None:
    arrange_memory(file, sparse=True, mlock=True, prefetch=True, memory=1 << 40)
    assert {what for what, _ in calls} == {"prefetch", "lock"}
    weights = sum(array.nbytes for array in file.arrays.values())
    for what in ("prefetch", "lock"):
        assert weights <= sum(size for name, size in calls if name == what) <= file.size_bytes


def test_of_a_larger_one_only_what_every_token_reads(file: ModelFile, calls: list[tuple[str, int]]) -> None:
    arrange_memory(file, sparse=True, mlock=True, prefetch=True, memory=file.size_bytes // 2)
    rows = sum(file.arrays[name].nbytes for name in ffn_row_names(file))
    assert sum(size for name, size in calls if name == "random") >= rows
    weights = sum(array.nbytes for array in file.arrays.values())
    assert sum(size for name, size in calls if name == "lock") < weights - rows + mmap.PAGESIZE
    calls.clear()
    arrange_memory(file, sparse=False, memory=file.size_bytes // 2)
    assert calls == []


def test_the_system_takes_the_advice(file: ModelFile) -> None:
    for advice in ("random", "sequential", "willneed", "normal"):
        file.advise(file.arrays, advice)  # type: ignore[arg-type]
    file.prefetch(file.arrays)
    file.prefetch([])


def test_only_models_that_can_be_sparse_have_rows(tmp_path: Path) -> None:
    with read_model_file(write_tiny_model(tmp_path / "silu.svdp", activation="silu")) as file:
        assert ffn_row_names(file) == []


def test_a_refused_lock_is_explained(file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("svdengine.page_map._mlock", lambda address, size: 12)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    with pytest.raises(DeviceError, match=r"does not let this process lock .* MB .*limit is 0.1 MB.*leave mlock out"):
        file.lock(file.arrays)


def test_load_takes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdengine.page_map._mlock", lambda address, size: 0)
    path = write_tiny_model(tmp_path / "tiny.svdp")
    with svdengine.load(path, device="reference", prefetch=True, mlock=True) as llm:
        assert llm.generate("hello", max_tokens=1)


def test_memory_is_known() -> None:
    usable, there = usable_memory(), memory_bytes()
    assert usable is None or there is None or 0 < usable <= there
