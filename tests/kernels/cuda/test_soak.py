"""Long runs: memory that does not grow, and a process that NVIDIA's compute-sanitizer watches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import soak
from test_executor import gpu, small_blocks

from svdengine.kernels.cuda.intrinsics import SIMULATED

__all__ = ["small_blocks"]  # a fixture: fewer threads in the simulator
SLACK = 4 << 20  # bytes of the GPU's memory that others may take meanwhile
TOOLS = ("memcheck", "racecheck", "synccheck")


@pytest.mark.parametrize("count", [8, pytest.param(10_000, marks=gpu)])
def test_decoding_takes_no_more_memory_as_it_goes_on(device: Any, count: int) -> None:
    found = soak.run(device, count)
    assert found.tokens >= count and found.graphs == 0
    assert found.lost <= (0 if SIMULATED else SLACK)


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tool", TOOLS)
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = sanitizer()
    if program is None:
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit, on the PATH or in CUDA_HOME")
    found = subprocess.run(
        [*watching(program, tool), sys.executable, str(Path(soak.__file__))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert "tokens=24" in found.stdout


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    paths = [os.environ.get("PATH", ""), *([str(Path(home) / "bin")] if home else [])]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(paths))


def watching(program: str, tool: str) -> list[str]:
    """The beginning of a command that fails when the tool finds an error."""
    return [program, "--tool", tool, "--error-exitcode", "9"]


def test_the_sanitizer_is_found_where_cuda_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert sanitizer() is None
    program = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitizer() == str(program)
