"""What CupyDevice asks of CuPy, with a stand-in for CuPy; and the cache of machine code. A GPU is not needed."""

from __future__ import annotations

import gc
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_cupy import (
    CUBLASError,
    CUDADriverError,
    CUDARuntimeError,
    OutOfMemoryError,
    PinnedMemory,
    Stream,
    fake_cublas,
    fake_cupy,
)
from patience import PATIENCE

from svdengine.commands.compile import compile_cuda_kernels
from svdengine.errors import DeviceError, SvdEngineError
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import find_predictor
from svdengine.kernels import brought_along
from svdengine.kernels.cuda import compilation, cupy_device
from svdengine.kernels.cuda.availability import Driver, Gpu
from svdengine.kernels.cuda.bandwidth import BLOCKS, THREADS, read_words
from svdengine.kernels.cuda.cupy_device import CupyDevice
from svdengine.kernels.cuda.description import measured_bandwidth
from svdengine.kernels.cuda.device import Gemm, SimulatedDevice
from svdengine.kernels.cuda.early_launch import EarlyLauncher, why_not_early
from svdengine.kernels.cuda.elementwise import add_parts, add_parts_to_rows, clear
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.kernels.cuda.planned_device import needed_kernels
from svdengine.tools.first_gpu_parts import small_config
from svdengine.tools.planted_model import Sparsity, write_planted

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
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs.cublas", libraries.cublas)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(cupy_device, "SIMULATED", False)
    monkeypatch.setattr(cupy_device, "find_gpu", lambda index: Gpu("a card", 1 << 30, (9, 0)))
    monkeypatch.setattr(
        cupy_device, "machine_code", lambda kernel, capability: ("entry", f"{kernel.name} {capability}".encode())
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
    assert 0.01 < gpu.seconds(lambda: time.sleep(0.01)) < PATIENCE


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


def test_work_goes_to_and_from_page_locked_memory(cupy: Any) -> None:
    gpu, before = CupyDevice(), PinnedMemory.held
    staged = gpu.staging(5, np.int32)
    assert PinnedMemory.held == before + 20 and staged.shape == (5,) and not staged.any()
    staged[:] = range(5)
    array = gpu.zeros(5, np.int32)
    gpu.write(array, staged[:3])
    back = gpu.staging(9, np.int32)
    found = gpu.download(array, back)
    assert found.base is not None and found.tolist() == [0, 1, 2, 0, 0] == back[:5].tolist()
    del staged, back, found
    gc.collect()
    assert PinnedMemory.held == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access"), "stopped: .* start it again"),
        (CUDADriverError("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure"), "stopped: .* start it again"),
        (CUBLASError("CUBLAS_STATUS_ALLOC_FAILED"), "no room left: CUBLAS_STATUS_ALLOC_FAILED; use a smaller context"),
        (OutOfMemoryError("Out of memory allocating 512 bytes"), "no room left: Out of memory .* --gpu-memory"),
        (CUDARuntimeError("cudaErrorInvalidValue:\ninvalid"), "refused: cudaErrorInvalidValue: invalid"),
    ],
)
def test_errors_of_cuda_are_device_errors(cupy: Any, error: Exception, said: str) -> None:
    gpu = CupyDevice()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    array = gpu.zeros(1, np.float32)
    gpu._functions["add_parts_to_rows"] = fail
    cupy.cuda.Event = fail
    for work in (
        lambda: add_parts(gpu, array, 0, array, array, 1, 1, 1, 1.0),
        lambda: gpu.seconds(lambda: None),
        lambda: gpu.record(lambda: add_parts(gpu, array, 0, array, array, 1, 1, 1, 1.0)),
    ):
        with pytest.raises(DeviceError, match=said) as raised:
            work()
        assert raised.value.__cause__ is error and "\n" not in str(raised.value)


def test_a_gpu_that_stopped_can_be_closed(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = CupyDevice()

    def fail(*_: Any) -> None:
        raise CUDARuntimeError("cudaErrorIllegalAddress: an illegal memory access")

    monkeypatch.setattr(Stream, "synchronize", fail)
    monkeypatch.setattr(cupy.get_default_memory_pool(), "free_all_blocks", fail)
    gpu.close()


def test_the_library_is_opened_and_tried_before_memory_is_planned(cupy: Any) -> None:
    from cupy_backends.cuda.libs import cublas

    gpu = CupyDevice()
    assert gpu.has_blas and not gpu.without_blas and cublas.handles == ["handle"]
    gpu.close()
    assert not cublas.handles and cupy.get_default_memory_pool().freed == 1


def test_a_library_without_code_for_the_gpu_is_not_used(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cupy_backends.cuda.libs import cublas

    def fail(*_: Any) -> None:
        raise CUBLASError("CUBLAS_STATUS_ARCH_MISMATCH")

    right = cublas.gemmEx
    monkeypatch.setattr(cublas, "gemmEx", fail)
    gpu = CupyDevice()
    assert not gpu.has_blas and "cannot be used: the GPU refused: CUBLAS_STATUS_ARCH_MISMATCH" in gpu.without_blas
    gpu.close()
    monkeypatch.setattr(cublas, "gemmEx", lambda *arguments: right(*arguments[:3], arguments[3] - 1, *arguments[4:]))
    assert CupyDevice().without_blas == "cuBLAS gave wrong results"
    monkeypatch.delattr(cublas, "gemmEx")
    assert CupyDevice().without_blas == "cuBLAS is not installed"


def test_what_steps_need_is_compiled_before_they_run(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = CupyDevice()
    array = gpu.zeros(64, np.float32)
    asked: list[list[str]] = []

    def machine_codes(kernels: Any, capability: Any) -> dict[str, tuple[str, bytes]]:
        asked.append([kernel.name for kernel in kernels])
        return {name: ("entry", name.encode()) for name in asked[-1]}

    monkeypatch.setattr(cupy_device, "machine_codes", machine_codes)
    monkeypatch.setattr(cupy_device, "machine_code", lambda *_: pytest.fail("compiled while a step ran"))
    step = lambda: add_parts(gpu, array, 0, array, array, 64, 64, 1, 1.0)  # noqa: E731
    gpu.prepare([step, step])
    gpu.prepare([step])
    assert asked == [["add_parts_to_rows"], []] and not cupy.calls
    step()
    assert len(cupy.calls) == 1


def test_the_simulator_is_no_gpu() -> None:
    with pytest.raises(DeviceError, match="CUDA cannot be used"):
        CupyDevice()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """An empty cache, no folder that was brought along, and a compiler that notes what it compiled."""
    found: list[Any] = []

    def compile_kernel(kernel: Any, capabilities: list[Any]) -> tuple[str, list[bytes]]:
        found.append((kernel.name, capabilities))
        return "entry", [b"\x7fELF\0code"] * len(capabilities)

    monkeypatch.setattr(compilation, "compile_kernel", compile_kernel)
    monkeypatch.setattr(compilation, "folder_name", lambda: "of-these-sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(brought_along.ENVIRONMENT, str(tmp_path / "brought"))
    return found


def test_machine_code_is_compiled_once(compiled: list[Any], capsys: Any) -> None:
    for _ in range(2):
        assert compilation.machine_code(add_parts_to_rows, (9, 0, "a")) == ("entry", b"\x7fELF\0code")
    assert compiled == [("add_parts_to_rows", ((9, 0, "a"),))]
    assert capsys.readouterr().err == "compiling 1 CUDA kernel for sm_90a, once on this machine ...\n"
    compilation.machine_code(add_parts_to_rows, (8, 0))
    assert len(compiled) == 2
    path = compilation.user_folder() / "add_parts_to_rows-sm_80.cubin"
    for damaged in (b"", path.read_bytes()[:-1], path.read_bytes()[:-1] + b"?"):
        path.write_bytes(damaged)
        compilation.machine_code(add_parts_to_rows, (8, 0))
    assert len(compiled) == 5


def test_machine_code_that_was_brought_along_is_not_compiled(compiled: list[Any], tmp_path: Path, capsys: Any) -> None:
    compilation.compile_into(tmp_path / "brought" / "of-these-sources", [add_parts_to_rows], (8, 0), must_keep=True)
    assert compilation.machine_codes([add_parts_to_rows], (8, 0)).keys() == {"add_parts_to_rows"}
    assert len(compiled) == 1 and not capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        compilation.compile_into(tmp_path / "file", [add_parts_to_rows], (8, 0), must_keep=True)


def test_several_kernels_are_compiled_in_threads(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=PATIENCE)  # broken unless two are compiled at once
    one = compilation.compile_kernel

    def wait_and_compile(kernel: Any, capabilities: Any) -> Any:
        together.wait()
        return one(kernel, capabilities)

    monkeypatch.setattr(compilation, "compile_kernel", wait_and_compile)
    monkeypatch.setattr(compilation, "default_threads", lambda: 2)
    codes = compilation.machine_codes([add_parts_to_rows, read_words], (8, 0))
    assert codes.keys() == {"add_parts_to_rows", "read_words"}


def test_the_command_compiles_what_is_missing_for_a_gpu_that_is_not_there(
    compiled: list[Any], tmp_path: Path, capsys: Any
) -> None:
    kernels = {kernel.name: kernel for kernel in (add_parts_to_rows, read_words)}
    for _ in range(2):
        folder = compile_cuda_kernels(kernels, ["sm_87", "sm_90a"], tmp_path / "brought")
    assert folder == tmp_path / "brought" / "of-these-sources"
    assert [capabilities for _, capabilities in compiled] == [((8, 7), (9, 0, "a"))] * 2
    assert capsys.readouterr().err.count("compiling 2 CUDA kernels for sm_87, sm_90a ...") == 1
    assert compilation.machine_codes(kernels.values(), (8, 7)).keys() == kernels.keys() and len(compiled) == 2
    (folder / "read_words-sm_87.cubin").unlink()
    compile_cuda_kernels(kernels, ["sm_87", "sm_90a"], tmp_path / "brought")
    assert compiled[2:] == [("read_words", ((8, 7),))]
    with pytest.raises(SvdEngineError, match="found the target sm_70, expected one of sm_80, sm_86"):
        compile_cuda_kernels(kernels, ["sm_70"], tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SvdEngineError, match="cannot write"):
        compile_cuda_kernels(kernels, ["sm_80"], tmp_path / "file")


def test_kernels_of_a_model_are_known_without_a_gpu(tmp_path: Path) -> None:
    """Those that an executor launches are among them."""
    path = tmp_path / "model.svdp"
    write_planted(path, small_config(), "q4", Sparsity(rank=64, predicted=0.4, active=0.2))
    with read_model_file(path) as file:
        found = needed_kernels(file.config, file.arrays, file.formats, find_predictor(file))
    for name in (
        "heads_q4_f16",
        "normed_q4",
        "take_next",
        "predicted_q8_0_q4",
        "down_q4",
        "gate_up_q4",
        "widen_q4",
        "list_every",
        "choose",
    ):
        assert name in found
    assert any(name.startswith("attention_32_") for name in found) and "gemv_q6_1x1" not in found


def test_a_recording_may_let_kernels_start_early(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []

    class Launcher:
        def launch(self, function: int, grid: Any, threads: int, arguments: list[Any], stream: int) -> None:
            sizes = [argument.dtype.itemsize for argument in arguments]
            launched.append((function, grid, threads, sizes, arguments[0][0], stream))

    monkeypatch.setattr(cupy_device, "EarlyLauncher", Launcher)
    monkeypatch.setattr(cupy_device, "find_driver", lambda: Driver(13000))
    gpu = CupyDevice()
    assert gpu.launches_early
    array = gpu.zeros(300, np.float32)
    gpu._functions["add_parts_to_rows"] = SimpleNamespace(ptr=77)
    gpu._stream.ptr = 5

    def step() -> None:
        clear(gpu, array, 300, 300, 1)  # the first of a recording follows nothing
        add_parts(gpu, array, 1, array, array, 300, 300, 1, 0.5)

    graph = gpu.record(step, early=True)
    assert launched == [(77, (2, 1), 256, [8, 8, 8, 4, 4, 4, 4, 4], array.data.ptr, 5)] and not cupy.calls
    gpu.replay(graph)
    assert len(cupy.calls) == 1 and cupy.calls[0][0].startswith("entry of clear_rows")
    assert gpu._early is None


@pytest.mark.parametrize(
    ("capability", "driver", "why"), [((8, 9), 13000, "older than compute"), ((9, 0), 12020, "older than CUDA 12.3")]
)
def test_kernels_start_early_only_where_it_is_known_to_work(capability: Any, driver: int, why: str) -> None:
    assert why in why_not_early(capability, driver)
    assert why_not_early((9, 0), 12030) == ""


def test_attributes_of_a_launch_can_be_set_by_the_installed_bindings() -> None:
    launcher = EarlyLauncher()
    assert launcher._attributes[0].value.programmaticStreamSerializationAllowed == 1
    with pytest.raises(Exception, match="cuda"):  # all is packed, and then there is no driver
        launcher.launch(1, (2, 3), 64, [np.array([5], np.int32), np.array([9], np.uint64)], 7)
