"""Which device runs a model, and what is said where the GPU cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_model import write_tiny_model

from svdengine import machine
from svdengine.errors import DeviceError
from svdengine.executors import create_executor, resolve_device
from svdengine.kernels.cuda import availability
from svdengine.kernels.cuda.availability import Gpu, find_gpu
from svdengine.model_file import read_model_file


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("SVDENGINE_DEVICE", raising=False)
    monkeypatch.setattr(availability, "find_gpu", lambda: Gpu("a card", 1 << 30, (9, 0)))
    assert resolve_device("auto") == "cuda"
    monkeypatch.setattr(availability, "find_gpu", lambda: availability.NO_DRIVER)
    assert resolve_device("auto") == "cpu"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(availability, "find_gpu", lambda: "a driver was found, but no GPU")
    assert resolve_device("auto") == "cpu"
    assert capsys.readouterr().err == "running on the CPU: a driver was found, but no GPU\n"


def test_a_gpu_that_was_asked_for_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.delenv("SVDENGINE_DEVICE", raising=False)
    monkeypatch.setattr(availability, "find_gpu", lambda: "no luck")
    model_file = read_model_file(write_tiny_model(tmp_path / "model.svdp"))
    with pytest.raises(DeviceError, match="CUDA cannot be used: no luck"):
        create_executor(model_file, device="cuda", context=16, block_count=4)
    create_executor(model_file, device="auto", threads=1, context=16, block_count=4).close()
    assert capsys.readouterr().err == "running on the CPU: no luck\n"
    model_file.close()


def pretend(
    monkeypatch: pytest.MonkeyPatch, missing: str = "", count: int = 1, major: int = 9, error: str = ""
) -> None:
    """A driver, packages but `missing`, and `count` GPUs of compute capability `major`.0; or a driver that fails."""

    def device_count() -> int:
        if error:
            raise RuntimeError(error)
        return count

    properties = {"name": b"a card", "major": major, "minor": 0, "totalGlobalMem": 1 << 30}
    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=device_count, getDeviceProperties=lambda index: properties)
    )
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    monkeypatch.setattr(availability.ctypes, "CDLL", lambda name: None)
    found = importlib.util.find_spec
    specs = {"cupy": object(), "numba_cuda": object(), missing: None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name] if name in specs else found(name))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"missing": "cupy"}, 'CuPy is missing; pip install "svdengine[cuda]"'),
        ({"missing": "numba_cuda"}, "numba-cuda is missing"),
        ({"count": 0}, "a driver was found, but no GPU"),
        ({"major": 7}, "a card has compute capability 7.0, and 8.0 is needed"),
        ({"error": "the driver\nis too old"}, "the GPU cannot be used: the driver is too old"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    pretend(monkeypatch, **changes)
    found = find_gpu()
    assert isinstance(found, str) and reason in found and "\n" not in found


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert find_gpu() == Gpu("a card", 1 << 30, (9, 0))
    monkeypatch.setattr(availability, "measured_bandwidth", lambda: 1234.5)
    described = machine.describe_machine(measure=False).accelerators[0]
    assert described.available and described.reason == "a card, 1.0 GiB, compute capability 9.0"
    assert "copies at 1234 GB/s" in machine._cuda(measure=True).reason
