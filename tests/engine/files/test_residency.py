"""What is kept in memory: advice, prefetching and locking of the pages of a model file."""

import mmap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expert_zoo import expert_zoo
from model_zoo import zoo
from tiny_model import write_tiny_model

import svdengine
from svdengine import DeviceError
from svdengine.files import residency
from svdengine.files.model_file import ModelFile, read_model_file
from svdengine.files.residency import ffn_row_names, memory_bytes, read_by_every_token, room_for, settle, usable_memory
from svdengine.files.tensor_file import read_header
from svdengine.files.tensor_writer import PAGE
from svdengine.kernels import control_groups
from svdengine.tools.random_model import write_svdp


@pytest.fixture
def file(tmp_path: Path) -> Iterator[ModelFile]:
    with read_model_file(write_tiny_model(tmp_path / "tiny.svdp")) as file:
        yield file


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(what, bytes) of everything that the system is asked for."""
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(
        "svdengine.files.memory_advice.advise", lambda _, start, end, advice: made.append((advice, end - start))
    )
    monkeypatch.setattr(
        "svdengine.files.memory_advice.prefetch", lambda _, start, end: made.append(("prefetch", end - start))
    )
    monkeypatch.setattr("svdengine.files.memory_advice.lock", lambda _, start, end: made.append(("lock", end - start)))
    return made


def arrange(file: ModelFile, memory: int, copied: tuple[str, ...] = ()) -> bool:
    """Prefetch and lock as `load` does; whether the file fits."""
    room = room_for(file, memory)
    file.prefetch(read_by_every_token(file, room))
    settle(file, room, copied, (), mlock=True)
    return room.whole


def test_a_model_that_fits_is_taken_whole(file: ModelFile, calls: list[tuple[str, int]]) -> None:
    assert arrange(file, 1 << 40)
    assert {what for what, _ in calls} == {"prefetch", "lock"}
    weights = sum(array.nbytes for array in file.arrays.values())
    for what in ("prefetch", "lock"):
        assert weights <= sum(size for name, size in calls if name == what) <= file.size_bytes


def test_of_a_larger_one_only_what_every_token_reads(file: ModelFile, calls: list[tuple[str, int]]) -> None:
    assert not arrange(file, file.size_bytes // 2)
    rows = sum(file.arrays[name].nbytes for name in ffn_row_names(file))
    weights = sum(array.nbytes for array in file.arrays.values())
    assert rows > weights // 3
    for what in ("prefetch", "lock"):
        assert sum(size for name, size in calls if name == what) < weights - rows + mmap.PAGESIZE
    assert {what for what, _ in calls} == {"prefetch", "lock"}


def test_what_was_copied_is_let_go_and_its_copy_locked(
    file: ModelFile, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert arrange(file, 1 << 40)
    before = sum(size for name, size in calls if name == "lock")
    calls.clear()
    locked: list[int] = []
    monkeypatch.setattr("svdengine.files.residency.lock_array", lambda array: locked.append(array.nbytes))
    room = room_for(file, 1 << 40)
    settle(file, room, ("q", "o"), (np.zeros(100, np.uint8),), mlock=True)
    copied = sum(array.nbytes for name, array in file.arrays.items() if name.split(".")[0] in ("q", "o"))
    assert copied <= sum(size for name, size in calls if name == "dontneed") < copied + 4 * mmap.PAGESIZE
    assert sum(size for name, size in calls if name == "lock") <= before - copied
    assert locked == [100]


def test_room_for_copies_is_more_than_room(file: ModelFile) -> None:
    size = file.size_bytes
    assert room_for(file, 2 * size).copies and not room_for(file, size * 5 // 4).copies
    assert room_for(file, size * 5 // 4).whole and not room_for(file, size // 2).whole


def test_the_system_takes_the_advice(file: ModelFile) -> None:
    for advice in ("random", "sequential", "willneed", "normal", "dontneed"):
        file.advise(file.arrays, advice)  # type: ignore[arg-type]
    file.prefetch(file.arrays)
    file.prefetch([])


def test_only_models_that_can_be_sparse_have_rows(tmp_path: Path) -> None:
    with read_model_file(write_tiny_model(tmp_path / "silu.svdp", activation="silu")) as file:
        assert ffn_row_names(file) == []


@pytest.mark.skipif(mmap.PAGESIZE != PAGE, reason="pages of another size")
def test_rows_of_a_pages_size_lie_in_one_page(tmp_path: Path) -> None:
    """Elsewhere a row would cost two reads."""
    config = replace(
        zoo()["llama_relu_tied"], hidden_size=4096, head_count=1, kv_head_count=1, head_dim=16, ffn_size=3, vocab_size=5
    )
    write_svdp(tmp_path / "m.svdp", config, "q8")
    entries = read_header(tmp_path / "m.svdp").entries
    assert [entries[name].start % mmap.PAGESIZE for name in ("gate", "up", "down_T", "embedding")] == [0] * 4
    assert {entry.start % 64 for entry in entries.values() if entry.end - entry.start >= 64} == {0}


def test_a_refused_lock_is_explained(file: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("svdengine.files.memory_advice._mlock", lambda address, size: 12)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    with pytest.raises(DeviceError, match=r"does not let this process lock .* MB .*limit is 0.1 MB.*leave mlock out"):
        file.lock(file.arrays)


def test_a_refused_lock_leaves_no_thread_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdengine.files.memory_advice._mlock", lambda address, size: 12)
    path = write_tiny_model(tmp_path / "tiny.svdp")
    before = threading.active_count()
    with pytest.raises(DeviceError, match="lock"):
        svdengine.load(path, device="cpu", threads=3, mlock=True)
    assert threading.active_count() == before


def test_an_embedding_whose_copy_is_the_head_stays_locked(
    tmp_path: Path, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdengine.files.residency.lock_array", lambda array: None)
    with read_model_file(write_tiny_model(tmp_path / "tied.svdp")) as file:
        settle(file, room_for(file, 1 << 40), ("embedding", "q"), (), mlock=True)
        parts = [name for name in file.arrays if name.split(".")[0] != "q"]
        assert sum(size for name, size in calls if name == "lock") >= sum(file.arrays[name].nbytes for name in parts)


def test_load_takes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdengine.files.memory_advice._mlock", lambda address, size: 0)
    path = write_tiny_model(tmp_path / "tiny.svdp")
    with svdengine.load(path, device="reference", prefetch=True, mlock=True) as llm:
        assert llm.generate("hello", max_tokens=1)


def test_memory_is_known() -> None:
    usable, there = usable_memory(), memory_bytes()
    assert usable is None or there is None or 0 < usable <= there


@pytest.mark.parametrize(
    ("membership", "limits", "expected"),
    [
        ("0::/user/app\n", {"user/app/memory.max": "max", "user/memory.max": "5000"}, 5000),
        ("0::/user/app\n", {"user/app/memory.max": "3000", "user/memory.max": "5000"}, 3000),
        ("0::/\n", {"memory.max": "4000"}, 4000),
        ("2:cpu:/a\n1:memory:/a\n", {"memory/a/memory.limit_in_bytes": "2000", "a/memory.max": "1"}, 2000),
        ("0::/gone\n", {}, 8192),
    ],
)
def test_limits_of_control_groups_and_what_others_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, limits: dict[str, str], expected: int
) -> None:
    (tmp_path / "membership").write_text(membership)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 8 kB\n")
    for name, text in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    monkeypatch.setattr(control_groups, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(control_groups, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(residency, "_MEMORY", tmp_path / "meminfo")
    assert usable_memory() == expected


def test_what_is_forgotten_is_read_again(file: ModelFile, calls: list[tuple[str, int]]) -> None:
    before = {name: array.copy() for name, array in file.arrays.items()}
    names = residency.block_arrays(file)
    assert {"gate", "up", "down_T"} <= set(names)
    file.forget_block(names, 1)
    assert calls == [("dontneed", file.arrays[name][1].nbytes) for name in names]
    for name, array in file.arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_memory_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "statm").write_text("1000 300 100 1 0 700 0\n")
    monkeypatch.setattr(residency, "_RESIDENT", tmp_path / "statm")
    assert residency.resident_bytes() == 300 * mmap.PAGESIZE
    assert 200 * mmap.PAGESIZE < residency.own_bytes() < 200 * mmap.PAGESIZE + (1 << 27)
    monkeypatch.setattr(residency, "_RESIDENT", tmp_path / "none")
    assert residency.resident_bytes() is None and residency.own_bytes() > 1 << 27


def test_a_bound_does_not_make_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "usable_memory", lambda: 100)
    assert residency.bounded_memory(70) == 70 and residency.bounded_memory(170) == 100
    monkeypatch.setattr(residency, "usable_memory", lambda: None)
    assert residency.bounded_memory(170) == 170


def test_of_experts_nothing_is_locked(tmp_path: Path) -> None:
    write_svdp(tmp_path / "m.svdp", expert_zoo()["mixtral"], "q4")
    with read_model_file(tmp_path / "m.svdp") as file:
        around = read_by_every_token(file, room_for(file, file.size_bytes // 2))
        assert {"embedding", "q", "q.scale", "router"} <= set(around)
        assert not {name for name in around if name.split(".")[0] in ("gate", "up", "down", "down_T")}
