"""Which device runs a model, and what is said where the GPU cannot."""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_model import write_tiny_model

from svdengine.commands.devices import command
from svdengine.errors import DeviceError
from svdengine.executors import create_executor, resolve_device
from svdengine.files.model_file import read_model_file
from svdengine.kernels.ascend import availability as ascend_availability
from svdengine.kernels.ascend.availability import Npu
from svdengine.kernels.cuda import availability, description
from svdengine.kernels.cuda.availability import Gpu, find_gpu
from svdengine.measuring import machine


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


def test_auto_is_the_npu_where_there_is_one_and_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("SVDENGINE_DEVICE", raising=False)
    monkeypatch.setattr(availability, "find_gpu", lambda: availability.NO_DRIVER)
    monkeypatch.setattr(ascend_availability, "find_npu", lambda: Npu("Ascend910B3", 64 << 30, 40, "8.1.RC1"))
    assert resolve_device("auto") == "ascend"
    monkeypatch.setattr(availability, "find_gpu", lambda: Gpu("a card", 1 << 30, (9, 0)))
    assert resolve_device("auto") == "cuda"
    monkeypatch.setattr(availability, "find_gpu", lambda: availability.NO_DRIVER)
    monkeypatch.setattr(ascend_availability, "find_npu", lambda: "CANN 8.1.RC1 was found, but no NPU")
    assert resolve_device("auto") == "cpu"
    assert capsys.readouterr().err == "running on the CPU: CANN 8.1.RC1 was found, but no NPU\n"


def test_a_gpu_that_was_asked_for_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.delenv("SVDENGINE_DEVICE", raising=False)
    monkeypatch.setattr(availability, "find_gpu", lambda: "no luck")
    model_file = read_model_file(write_tiny_model(tmp_path / "model.svdp"))
    with pytest.raises(DeviceError, match="CUDA cannot be used: no luck"):
        create_executor(model_file, device="cuda", context=16, block_count=4)
    create_executor(model_file, device="auto", threads=1, context=16, block_count=4).close()
    assert capsys.readouterr().err.startswith("running on the CPU: no luck\n")  # perhaps kernels are compiled then
    model_file.close()


def test_what_does_not_fit_on_the_gpu_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'svdengine[test]'")
    from svdengine.kernels.cuda import cupy_device, device
    from svdengine.kernels.cuda.memory_split import RESERVE

    if not device.SIMULATED:
        pytest.skip("there is a GPU, whose memory is its own")
    monkeypatch.setattr(availability, "find_gpu", lambda: Gpu("a card", 1 << 30, (9, 0)))
    monkeypatch.setattr(cupy_device, "CupyDevice", device.SimulatedDevice)
    with read_model_file(write_tiny_model(tmp_path / "model.svdp")) as model_file:
        whole: Any = create_executor(model_file, device="cuda", context=16, block_count=4)
        assert whole.memory.host == 0 and capsys.readouterr().err == ""
        budget = whole.memory.device + RESERVE - 20_000
        split: Any = create_executor(model_file, device="cuda", context=16, block_count=4, gpu_memory=budget)
        assert 20_000 <= split.memory.host < 25_000
        assert "in host memory" in capsys.readouterr().err
        with pytest.raises(DeviceError, match="without any FFN rows"):
            create_executor(model_file, device="cuda", context=16, block_count=4, gpu_memory=RESERVE)


def pretend(
    monkeypatch: pytest.MonkeyPatch, missing: str = "", count: int = 1, major: int = 9, error: str = ""
) -> None:
    """A driver, packages but `missing`, and `count` GPUs of compute capability `major`.0; or a driver that fails."""

    def device_count() -> int:
        if error:
            raise RuntimeError(error)
        return count

    runtime = SimpleNamespace(
        getDeviceCount=device_count,
        getDeviceProperties=lambda index: properties,
        memGetInfo=lambda: (1 << 29, 1 << 30),
        driverGetVersion=lambda: 13020,
        runtimeGetVersion=lambda: 13000,
        deviceGetAttribute=lambda attribute, index: {36: 2_619_000, 37: 5120}[attribute],
    )
    properties = {"name": b"a card", "major": major, "minor": 0, "totalGlobalMem": 1 << 30}
    cupy: Any = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(runtime=runtime, Device=lambda index: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", cupy)
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


class OldDriver:
    """The driver's library, as far as it is asked for the newest CUDA that it accepts."""

    def __init__(self, cuda: int) -> None:
        self.cuda = cuda

    def cuDriverGetVersion(self, to: Any) -> int:
        to._obj.value = self.cuda
        return 0


@pytest.mark.parametrize(
    ("accepted", "reason"),
    [
        (
            12040,
            "the driver (550.54.15) accepts CUDA 12.4, and CUDA 13 is installed here, which needs a driver of version"
            ' 580 or newer: update it, or in a new environment pip install "svdengine[cuda12]"',
        ),
        (
            11080,
            "the driver (550.54.15) accepts CUDA 11.8, and CUDA 13 is installed here, which needs a driver of version"
            " 580 or newer: update it",
        ),
        (13000, None),
        (14010, None),
    ],
)
def test_a_driver_that_is_too_old_is_named_with_what_suits_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accepted: int, reason: str | None
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(availability.ctypes, "CDLL", lambda name: OldDriver(accepted))
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    monkeypatch.setattr(availability, "_VERSION_FILE", version)
    found = find_gpu()
    assert found == (reason or Gpu("a card", 1 << 30, (9, 0)))


def test_a_missing_package_is_named_with_the_extra_that_suits_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, missing="cupy")
    monkeypatch.setattr(availability.ctypes, "CDLL", lambda name: OldDriver(12060))
    monkeypatch.setattr(availability, "_VERSION_FILE", tmp_path / "none")
    assert find_gpu() == 'a driver was found, but CuPy is missing; pip install "svdengine[cuda12]"'


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, count=2)
    assert find_gpu() == Gpu("a card", 1 << 30, (9, 0))
    monkeypatch.setattr(description, "measured_bandwidth", lambda index: 3000.0 + index)
    described = machine.describe_machine(measure=False)
    assert described.accelerators[0] == machine.Accelerator("CUDA", True, "2 GPUs")
    assert [gpu.read_gb_per_second for gpu in described.gpus] == [None, None]
    (first, second) = description.describe_gpus(measure=True)
    assert (first.driver_cuda, first.runtime_cuda, first.capability) == ("13.2", "13.0", "9.0")
    assert (first.memory_bytes, first.free_bytes) == (1 << 30, 1 << 29)
    assert first.peak_gb_per_second == pytest.approx(3352.3, abs=0.1)
    assert (first.read_gb_per_second, second.read_gb_per_second) == (3000, 3001)


def test_a_driver_that_does_not_tell_the_clock_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.delattr(sys.modules["cupy"].cuda.runtime, "deviceGetAttribute")
    assert description.describe_gpus()[0].peak_gb_per_second is None


def test_the_command_shows_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    shown = CliRunner().invoke(command, ["--no-measure"]).output
    assert "CUDA            available: 1 GPU\n" in shown
    assert "GPU 0           a card, compute capability 9.0\n" in shown
    assert "1.0 GiB, 0.5 GiB free\n" in shown and "13.2 of the driver, 13.0 of CuPy\n" in shown
    assert "not measured; by clock and width 3352 GB/s\n" in shown
    found = json.loads(CliRunner().invoke(command, ["--no-measure", "--json"]).output)
    assert found["gpus"][0]["driver_cuda"] == "13.2"
