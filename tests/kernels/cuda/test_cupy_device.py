"""What CupyDevice asks of CuPy, with a stand-in for CuPy; and the cache of machine code. A GPU is not needed."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_cupy import PinnedMemory, fake_cublas, fake_cupy

from svdengine.errors import DeviceError
from svdengine.kernels.cuda import compilation, device
from svdengine.kernels.cuda.availability import Gpu
from svdengine.kernels.cuda.bandwidth import BLOCKS, THREADS
from svdengine.kernels.cuda.description import measured_bandwidth
from svdengine.kernels.cuda.device import CupyDevice, Gemm, SimulatedDevice
from svdengine.kernels.cuda.elementwise import add_parts, add_parts_to_rows
from svdengine.kernels.cuda.intrinsics import SIMULATED

pytestmark = pytest.mark.skipif(not SIMULATED, reason="with a GPU the other tests use the real CuPy")


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for CuPy and cuBLAS, a GPU that it runs on, and a compiler that names what it compiled."""
    module = fake_cupy()
    libraries: Any = ModuleType("cupy_backends.cuda.libs")
    libraries.cublas = fake_cublas()
    for name in ("cupy_backends", "cupy_backends.cuda"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libraries)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(device, "SIMULATED", False)
    monkeypatch.setattr(device, "find_gpu", lambda index: Gpu("a card", 1 << 30, (9, 0)))
    monkeypatch.setattr(
        device, "machine_code", lambda kernel, capability: ("entry", f"{kernel.name} {capability}".encode())
    )
    return module


def test_arrays_come_and_go(cupy: Any) -> None:
    gpu = CupyDevice()
    array = gpu.upload(np.arange(6, dtype=np.float32).reshape(2, 3))
    gpu.write(array[4:], np.array([9], np.float32))
    np.testing.assert_array_equal(gpu.download(array), [0, 1, 2, 3, 9, 5])
    assert gpu.free_bytes() == (1 << 30) + 7
    with pytest.raises(DeviceError, match="no room for 2147483648 more bytes"):
        gpu.zeros(1 << 31, np.uint8)
    gpu.close()


def test_page_locked_memory_is_given_back_with_its_array(cupy: Any) -> None:
    gpu, before = CupyDevice(), PinnedMemory.held
    array = gpu.pin(np.arange(6, dtype=np.uint32).reshape(2, 3))
    view = array[4:]
    del array
    gc.collect()
    assert PinnedMemory.held == before + 24
    np.testing.assert_array_equal(view, [4, 5])
    del view
    gc.collect()
    assert PinnedMemory.held == before
    with pytest.raises(DeviceError, match=r"refuses to lock 2\.0 MiB more of its memory: cudaErrorMemoryAllocation"):
        gpu.pin(np.zeros(1 << 21, np.uint8))


def test_a_launch_gives_numbers_of_the_declared_types(cupy: Any) -> None:
    gpu = CupyDevice()
    arrays = [gpu.zeros(300, np.float32) for _ in range(3)]
    add_parts(gpu, arrays[0], 1, arrays[1], arrays[2], 300, 300, 1, 0.5)
    ((name, grid, block, arguments),) = cupy.calls
    assert name == "entry of add_parts_to_rows (9, 0, 'a')" and (grid, block) == ((2, 1), (256,))
    assert all(found is given for found, given in zip(arguments, arrays, strict=False))
    assert [type(a) for a in arguments[3:]] == [np.int32] * 4 + [np.float32]
    assert len(arguments) == len(add_parts_to_rows.parameters)


def test_a_recorded_step_runs_when_it_is_replayed(cupy: Any) -> None:
    gpu = CupyDevice()
    array = gpu.zeros(64, np.float32)

    def step() -> None:
        for factor in (1.0, 2.0):
            add_parts(gpu, array, 0, array, array, 64, 64, 1, factor)

    step()
    graph = gpu.record(step)
    assert len(cupy.calls) == 2
    gpu.replay(graph)
    gpu.replay(graph)
    assert [call[3][-1] for call in cupy.calls] == [1.0, 2.0] * 3


def test_a_failed_recording_gives_the_stream_back(cupy: Any) -> None:
    gpu = CupyDevice()
    with pytest.raises(ZeroDivisionError):
        gpu.record(lambda: print(1 // 0))
    gpu.download(gpu.zeros(1, np.float32))


def test_work_is_timed_by_events(cupy: Any) -> None:
    gpu = CupyDevice()
    assert 0.01 < gpu.seconds(lambda: time.sleep(0.01)) < 5


def test_the_bandwidth_of_a_card_is_measured(cupy: Any) -> None:
    assert measured_bandwidth() > 0
    name, grid, block, arguments = cupy.calls[-1]
    assert name.startswith("entry of read_words") and (grid, block) == ((BLOCKS,), (THREADS,))
    assert arguments[0].size == arguments[2] == (1 << 30) // 4 // 4  # words of a quarter of the free memory


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_products_of_the_library_are_those_of_the_simulator(cupy: Any, dtype: Any, transposed: bool, add: bool) -> None:
    random = np.random.default_rng(0)
    gemm = Gemm(5, 7, 3, weight_stride=8, x_stride=9, y_stride=6, transposed=transposed, factor=0.5, add=add)
    weights, x, y = (random.standard_normal(size, np.float32) for size in (8 * 8, 3 * 9, 3 * 6))
    found = []
    for chosen in (SimulatedDevice.__new__(SimulatedDevice), CupyDevice()):
        arrays = [weights.astype(dtype), x.astype(dtype), y.copy()]
        if isinstance(chosen, CupyDevice):
            arrays = [chosen.upload(a) for a in arrays]
        chosen.gemm(*arrays, gemm)
        found.append(np.array(arrays[2]))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(found[0], y)


def test_the_simulator_is_no_gpu() -> None:
    with pytest.raises(DeviceError, match="CUDA cannot be used"):
        CupyDevice()


def test_machine_code_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled: list[Any] = []

    def compile_kernel(kernel: Any, capabilities: list[Any]) -> tuple[str, list[bytes]]:
        compiled.append(capabilities)
        return "entry", [b"\x7fELF\0code"]

    monkeypatch.setattr(compilation, "compile_kernel", compile_kernel)
    monkeypatch.setattr(compilation, "_cache_directory", lambda: tmp_path / "kernels")
    for _ in range(2):
        assert compilation.machine_code(add_parts_to_rows, (9, 0, "a")) == ("entry", b"\x7fELF\0code")
    assert compiled == [[(9, 0, "a")]]
    compilation.machine_code(add_parts_to_rows, (8, 0))
    assert len(compiled) == 2
    (tmp_path / "kernels" / "add_parts_to_rows-sm_80.cubin").write_bytes(b"")
    compilation.machine_code(add_parts_to_rows, (8, 0))
    assert len(compiled) == 3
