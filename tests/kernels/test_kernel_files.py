"""Files of compiled kernels: brought along or in the user's cache, checked, and only what a model needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from model_zoo import zoo
from numpy.typing import NDArray

from svdengine.cli import main
from svdengine.kernels import brought_along
from svdengine.kernels.cpu.formats.dispatch import ALL
from svdengine.kernels.cpu.isa import active_isa, compilable_isas
from svdengine.kernels.cpu.kernel_files import find_kernels, folder_name, read_kernels, write_kernels
from svdengine.kernels.cpu.library import loaded
from svdengine.kernels.cpu.parts import BANDWIDTH, PARTS, needed_parts
from svdengine.kernels.cpu.record import packed
from svdengine.kernels.formats import FORMATS


@pytest.fixture
def brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is brought along, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(brought_along.ENVIRONMENT, str(tmp_path / "brought"))
    return tmp_path / "brought"


def test_what_is_brought_along_comes_before_the_cache(brought: Path, tmp_path: Path) -> None:
    name = folder_name("avx2")
    assert find_kernels("ffn", "avx2") is None
    write_kernels(tmp_path / "cache" / "svdengine" / "kernels" / name, "ffn", b"cached")
    assert find_kernels("ffn", "avx2") == b"cached"
    write_kernels(brought / name, "ffn", b"brought")
    assert find_kernels("ffn", "avx2") == b"brought" and find_kernels("ffn", "portable") is None


def test_an_installed_package_brings_kernels_along(
    brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    write_kernels(tmp_path / "installed" / brought_along.PACKAGE / folder_name("avx2"), "ffn", b"installed")
    assert find_kernels("ffn", "avx2") == b"installed"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"x" + data[1:], lambda data: b""])
def test_damaged_files_are_not_there(brought: Path, damage) -> None:
    write_kernels(brought, "ffn", b"code")
    path = brought / "ffn.o"
    assert read_kernels(brought, "ffn") == b"code" and [path] == list(brought.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    assert read_kernels(brought, "ffn") is None


def test_every_instruction_set_has_a_folder_of_its_own() -> None:
    assert len({folder_name(isa) for isa in compilable_isas()}) == len(compilable_isas())


def test_only_what_a_model_needs_is_compiled() -> None:
    configs = zoo()
    dense, sparse = configs["llama_silu_biases"], next(c for c in configs.values() if c.sparse_ffn and c.gated)
    every = {"q", "k", "v", "o", "gate", "up", "down", "embedding", "lm_head"}
    assert needed_parts(dense, every, deterministic=True) == {"step", "attention", "ffn", "panels", "interleave"}
    assert "rows" in needed_parts(dense, every - {"o"}, deterministic=False)
    assert "rows_alike" in needed_parts(dense, (), deterministic=True)
    found = needed_parts(sparse, ["q", "k", "v", "o", "embedding", "lm_head"], deterministic=False)
    assert {"rows", "sparse", "neuron_rows"} <= found <= set(PARTS)


def test_the_table_has_every_piece_and_every_format_has_kernels() -> None:
    import svdengine.kernels.cpu.interleaving
    import svdengine.kernels.cpu.read_range
    import svdengine.kernels.cpu.step  # noqa: F401
    from svdengine.kernels.cpu.pieces import ENTRIES

    assert sorted(ENTRIES) == sorted(piece for part in PARTS.values() for piece in part.pieces)
    assert {kernels.name for kernels in ALL} == set(FORMATS)


def test_a_piece_is_called_with_integers() -> None:
    values, total = np.arange(128, dtype=np.float32), np.zeros(1, np.float32)
    start = values.ctypes.data
    loaded(frozenset({BANDWIDTH})).function("read_range", 3)(start, start + values.nbytes, total.ctypes.data)
    assert total[0] == values.sum()


class Sample(NamedTuple):
    number: int
    share: float
    flag: bool
    table: Annotated[NDArray[np.int32], 2]
    last: int


def test_a_record_is_slots() -> None:
    table = np.zeros((2, 3), np.int32)
    slots = packed(Sample(-7, 0.5, True, table, 9))
    assert slots.tolist()[0] == -7 and slots[1:2].view(np.float64)[0] == 0.5
    assert slots[2:].tolist() == [1, table.ctypes.data, 2, 3, 9]
    for wrong in (table.T, table[0], table.astype(np.int64)):
        with pytest.raises(ValueError, match="table: found"):
            packed(Sample(0, 0.0, False, wrong, 0))


def test_the_command_compiles_what_is_missing(brought: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def compile_parts(parts: list[str], isa: str, folder: Path) -> None:
        asked.append((parts, isa))
        for part in parts:
            write_kernels(folder, part, part.encode())

    monkeypatch.setattr("svdengine.kernels.cpu.compilation.compile_parts", compile_parts)
    for _ in range(2):
        done = CliRunner().invoke(main, ["compile", "--isa", "portable", "-o", str(brought)])
        assert done.exit_code == 0 and done.stdout == f"{brought / folder_name('portable')}\n", done.output
    assert asked == [(sorted(PARTS), "portable")]
    assert find_kernels("step", "portable") == b"step" and find_kernels("step", active_isa()) is None
