"""The tool that times kernels, without a GPU: what it runs is what it says, and its table holds together."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from svdengine.kernels.cuda import attention_rows, bandwidth, elementwise, gemv, sparse
from svdengine.kernels.cuda.availability import Gpu
from svdengine.kernels.cuda.description import GpuDescription
from svdengine.kernels.cuda.device import SimulatedDevice
from svdengine.kernels.cuda.intrinsics import SIMULATED
from svdengine.tools import cuda_kernel_timings as timings
from svdengine.tools import time_cuda_kernels as tool
from svdengine.tools.cuda_kernel_timings import FfnStack, Shape, Timing, attention_work, time_kernels

SHAPE = Shape(
    hidden=70, ffn=40, heads=2, head_dim=8, context=40, layers=2, rank=5, predicted=0.3, active=0.2, gathered=0.25
)
SHALLOW = replace(SHAPE, layers=1)


@pytest.fixture(autouse=True)
def little_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if SIMULATED:
        monkeypatch.setattr(bandwidth, "BLOCKS", 1)
        for module in (bandwidth, elementwise):
            monkeypatch.setattr(module, "THREADS", 32)
        monkeypatch.setattr(sparse, "COMPACT_THREADS", 64)
        monkeypatch.setattr(attention_rows, "THREADS", 64)
        monkeypatch.setattr(attention_rows, "_WARPS", 2)
        monkeypatch.setattr(gemv, "LEAST_NEURONS", 20)


def test_dense_and_sparse_ffns_are_the_same_function_at_the_shares_asked_for(device: Any) -> None:
    stack = FfnStack(device, SHAPE, "f16")
    found = []
    for path in ("dense", "predict"):
        device.write(stack.work.x, np.zeros(stack.work.sizes.hidden, np.float32))
        stack._ffn(path)
        found.append(device.download(stack.work.x)[: SHAPE.hidden])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)
    assert np.abs(found[0]).max() > 1
    predicted, active, total = device.download(stack.work.counts)[:3].tolist()
    assert (predicted / total, active / total) == (SHAPE.predicted, SHAPE.active)


def test_gathered_rows_are_each_read_once(device: Any) -> None:
    stack = FfnStack(device, SHAPE, "f16")
    rows: list[int] = []
    launch = device.launch

    def note(kernel: Any, grid: Any, threads: int, *arguments: Any) -> None:
        launch(kernel, grid, threads, *arguments)
        neurons, lengths = (arguments[kernel_names(kernel).index(name)] for name in ("neurons", "lengths"))
        rows.extend(device.download(neurons)[: device.download(lengths)[0]].tolist())

    device.launch = note
    work = next(work for work in stack.works() if work.name.startswith("gathered"))
    work.run()
    assert sorted(rows) == sorted([*range(SHAPE.ffn)] * SHAPE.layers) and work.count == 4 * SHAPE.layers
    assert work.bytes == 10 * 128 * 2


def kernel_names(kernel: Any) -> tuple[str, ...]:
    code = (kernel.dispatcher.fn if SIMULATED else kernel.dispatcher.py_func).__code__
    return tuple(code.co_varnames[: code.co_argcount])


def test_attention_reads_the_whole_context(device: Any) -> None:
    work = attention_work(device, SHAPE)
    work.run()
    assert work.bytes == 2 * SHAPE.context * SHAPE.heads * SHAPE.head_dim * 2


def test_every_work_is_timed_and_compared(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    if not SIMULATED:
        pytest.skip("the simulator's library stands for cuBLAS")
    device = SimulatedDevice(memory=1 << 16, has_blas=True)
    read, found = time_kernels(device, SHALLOW, ["f16"], repetitions=1)
    names = [timing.name for timing in found]
    assert len(set(names)) == len(names) == 6 + 1
    for timing in found:
        assert timing.of_bandwidth == pytest.approx(timing.floor_microseconds / timing.microseconds)
        assert timing.floor_microseconds == pytest.approx(1e3 * timing.megabytes / read)
    compared = {timing.name.split(" GEMV")[0].split(",")[0]: timing.against for timing in found if timing.against}
    assert compared == {"dense f16": "cuBLAS", "sparse f16 FFN": "dense f16 FFN"}
    card = GpuDescription("a card", 1, 1, "9.0", "13.0", "13.0", 3352.3, None)
    lines = tool.markdown(card, read, found).splitlines()
    assert len({line.count("|") for line in lines[: 2 + len(names)]}) == 1
    assert "3352 by clock and width" in lines[-1]


def test_the_command_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    if not SIMULATED:
        pytest.skip("a stand-in for the GPU is used")
    card = GpuDescription("a card", 1, 1, "9.0", "13.0", "13.0", None, None)
    monkeypatch.setattr(tool, "find_gpu", lambda: Gpu("a card", 1, (9, 0)))
    monkeypatch.setattr(tool, "describe_gpus", lambda: (card,))
    monkeypatch.setattr("svdengine.kernels.cuda.cupy_device.CupyDevice", lambda: SimulatedDevice(memory=1 << 16))
    timing = Timing("a product", 20.0, 50.0, 15.0, 0.75, "another", 1.5, "80 %")
    asked: list[Any] = []

    def timed(device: Any, *arguments: Any) -> tuple[float, list[Timing]]:
        asked.extend(arguments[:3])
        return 3000.0, [timing]

    monkeypatch.setattr(timings, "time_kernels", timed)
    tool.main(["--formats", "q8", "--layers", "3", "--json"])
    assert asked == [Shape(layers=3), ["q8"], 21]
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"]["name"] == "a card" and found["timings"] == [asdict(timing)]
    tool.main([])
    assert "| a product | 20.0 | 15.0 | 50.0 | 2500 | 75 % | 1.50 x another | 80 % |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so() -> None:
    if not SIMULATED:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="error: CUDA cannot be used"):
        tool.main([])
