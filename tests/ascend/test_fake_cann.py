"""The emulated NPU notices each broken rule, and lets sound use pass."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_cann import Npu
from fake_operators import OPERATORS
from model_zoo import zoo

from svdengine.errors import DeviceError
from svdengine.kernels.ascend import signatures
from svdengine.kernels.ascend.attention import FUSED
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.operators import needed_operators
from svdengine.kernels.ascend.soc import ATLAS_310P, ATLAS_A2_A3
from svdengine.kernels.ascend.tensor import Tensor, whole

HALF = np.float16


class Bench:
    """A device with two small vectors, and the C functions behind it."""

    def __init__(self) -> None:
        self.npu = Npu()
        self.device = AscendDevice(self.npu.cann)
        self.a, self.b = (self.device.upload(np.arange(16, dtype=HALF)) for _ in range(2))

    def c(self, symbol: str, *arguments: Any) -> Any:
        """Call a C function."""
        return self.npu.cann.function(symbol)(*arguments)

    def tensor(self, tensor: Tensor) -> int:
        """An aclTensor."""
        shape = (ctypes.c_int64 * len(tensor.shape))(*tensor.shape)
        strides = (ctypes.c_int64 * len(tensor.shape))(*tensor.strides)
        storage = (ctypes.c_int64 * 1)(tensor.storage)
        dtype = {"float16": 1, "float32": 0}[tensor.dtype]
        count = len(tensor.shape)
        return int(
            self.c("aclCreateTensor", shape, count, dtype, strides, tensor.offset, 2, storage, 1, tensor.address) or 0
        )

    def planned(self, symbol: str, *arguments: Any) -> tuple[ctypes.c_void_p, int]:
        """An executor and the workspace that it needs."""
        size, executor = ctypes.c_uint64(), ctypes.c_void_p()
        self.c(f"{symbol}GetWorkspaceSize", *arguments, ctypes.byref(size), ctypes.byref(executor))
        return executor, size.value


def use_after_free(bench: Bench) -> None:
    bench.device.run("aclnnSilu", bench.a, bench.b)
    bench.npu.acl.rt.free(bench.a.address)
    bench.device.synchronize()


def free_twice(bench: Bench) -> None:
    bench.npu.acl.rt.free(bench.a.address)
    bench.npu.acl.rt.free(bench.a.address)


def free_inside(bench: Bench) -> None:
    bench.npu.acl.rt.free(bench.a.address + 2)


def write_beyond(bench: Bench) -> None:
    bench.device.write(whole(bench.a.address, (17,), HALF), np.zeros(17, HALF))


def copy_into_less(bench: Bench) -> None:
    data = np.zeros(16, HALF)
    bench.npu.acl.rt.memcpy(bench.a.address, 16, data.ctypes.data, 32, 1)


def copy_the_wrong_way(bench: Bench) -> None:
    bench.npu.acl.rt.memcpy(bench.a.address, 32, bench.b.address, 32, 1)


def copy_to_the_host_as_device(bench: Bench) -> None:
    data = np.zeros(16, HALF)
    bench.npu.acl.rt.memcpy(data.ctypes.data, 32, bench.a.address, 32, 1)


def view_beyond(bench: Bench) -> None:
    bench.tensor(replace(bench.a, shape=(4, 5), strides=(4, 1)))


def storage_beyond(bench: Bench) -> None:
    bench.tensor(replace(bench.a, storage=17))


def unaligned(bench: Bench) -> None:
    bench.tensor(whole(bench.a.address + 2, (8,), HALF))


def tensor_destroyed_twice(bench: Bench) -> None:
    tensor = bench.tensor(bench.a)
    bench.c("aclDestroyTensor", tensor)
    bench.c("aclDestroyTensor", tensor)


def tensor_of_a_list_destroyed(bench: Bench) -> None:
    tensor = bench.tensor(bench.a)
    made = bench.c("aclCreateTensorList", (ctypes.c_void_p * 1)(tensor), 1)
    bench.c("aclDestroyTensorList", made)
    bench.c("aclDestroyTensor", tensor)


def tensor_destroyed_as_scalar(bench: Bench) -> None:
    bench.c("aclDestroyScalar", bench.tensor(bench.a))


def tensor_destroyed_before_the_run(bench: Bench) -> None:
    x, y = bench.tensor(bench.a), bench.tensor(bench.b)
    executor, _ = bench.planned("aclnnRelu", x, y)
    bench.c("aclDestroyTensor", x)
    bench.c("aclnnRelu", None, 0, executor, bench.device._stream)


def executor_run_twice(bench: Bench) -> None:
    executor, _ = bench.planned("aclnnRelu", bench.tensor(bench.a), bench.tensor(bench.b))
    for _ in range(2):
        bench.c("aclnnRelu", None, 0, executor, bench.device._stream)


def executor_of_another_operator(bench: Bench) -> None:
    executor, _ = bench.planned("aclnnRelu", bench.tensor(bench.a), bench.tensor(bench.b))
    bench.c("aclnnSilu", None, 0, executor, bench.device._stream)


def small_workspace(bench: Bench) -> None:
    executor, size = bench.planned("aclnnSilu", bench.tensor(bench.a), bench.tensor(bench.b))
    bench.c("aclnnSilu", bench.a.address, size - 1, executor, bench.device._stream)


def workspace_beyond(bench: Bench) -> None:
    executor, size = bench.planned("aclnnSilu", bench.tensor(bench.a), bench.tensor(bench.b))
    bench.c("aclnnSilu", bench.a.address, size, executor, bench.device._stream)
    bench.device.synchronize()


def wrong_stream(bench: Bench) -> None:
    executor, _ = bench.planned("aclnnRelu", bench.tensor(bench.a), bench.tensor(bench.b))
    bench.c("aclnnRelu", None, 0, executor, bench.device._stream + 1)


def destroyed_stream(bench: Bench) -> None:
    bench.npu.acl.rt.destroy_stream(bench.device._stream)
    bench.device.synchronize()


def stream_with_work(bench: Bench) -> None:
    bench.device.run("aclnnSilu", bench.a, bench.b)
    bench.npu.acl.rt.destroy_stream(bench.device._stream)


def no_context(bench: Bench) -> None:
    bench.npu.thread.context = None
    bench.device.run("aclnnSilu", bench.a, bench.b)


def overlap(bench: Bench) -> None:
    bench.device.run("aclnnSilu", bench.a, replace(bench.a, shape=(8,), offset=8))


def wrong_type(bench: Bench) -> None:
    wide = bench.device.zeros((4, 4), np.float32)
    bench.device.run("aclnnMm", bench.a.reshape(4, 4), wide, bench.b.reshape(4, 4), 0)
    bench.device.synchronize()


RULES: dict[Callable[[Bench], None], str] = {
    use_after_free: "memory is used after it was freed",
    free_twice: "memory is freed twice",
    free_inside: "what is freed was never allocated",
    write_beyond: "34 bytes from byte 0 of 32",
    copy_into_less: "32 bytes are copied into 16",
    copy_the_wrong_way: "a copy of kind 1 within the device",
    copy_to_the_host_as_device: "within the device|no address of device memory",
    view_beyond: "a view reaches element 16 of a storage of 16",
    storage_beyond: "34 bytes from byte 0 of 32",
    unaligned: "is not a multiple of 32",
    tensor_destroyed_twice: "a Tensor is used after it was destroyed",
    tensor_of_a_list_destroyed: "a Tensor is used after it was destroyed",
    tensor_destroyed_as_scalar: "is no Scalar",
    tensor_destroyed_before_the_run: "a descriptor was destroyed before its executor ran",
    executor_run_twice: "a Executor is used after it was destroyed",
    executor_of_another_operator: "an executor of aclnnRelu runs again, or as aclnnSilu",
    small_workspace: r"a workspace of \d+ bytes, \d+ are needed",
    workspace_beyond: r"\d+ bytes from byte 0 of 32",
    wrong_stream: "is no stream",
    destroyed_stream: "is no stream",
    stream_with_work: "a stream is destroyed with work that it has not done",
    no_context: "the thread has no context",
    overlap: "an output overlaps an input",
    wrong_type: "not all float16",
}


@pytest.mark.parametrize("broken", RULES, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_noticed(broken: Callable[[Bench], None]) -> None:
    bench = Bench()
    try:
        broken(bench)
    except DeviceError as error:
        assert "500000" in str(error) or "returned nothing" in str(error)
    assert any(re.search(RULES[broken], line) for line in bench.npu.broken), bench.npu.broken


def test_what_is_not_given_back_is_noticed() -> None:
    bench = Bench()
    bench.tensor(bench.a)
    bench.planned("aclnnRelu", bench.tensor(bench.a), bench.tensor(bench.b))
    kinds = " ".join(bench.npu.left())
    for left in (
        "a Tensor was",
        "a Executor was",
        "64 bytes were never freed",
        "stream",
        "context",
        "device 0 was not",
    ):
        assert left in kinds


def test_sound_use_leaves_nothing() -> None:
    bench = Bench()
    bench.device.run("aclnnSilu", bench.a, bench.b)
    expected = np.arange(16) / (1 + np.exp(-np.arange(16.0)))
    np.testing.assert_allclose(bench.device.read(bench.b), expected, rtol=1e-3)
    bench.device.close()
    assert bench.npu.left() == []


def test_work_waits_for_the_stream() -> None:
    bench = Bench()
    bench.device.run("aclnnRelu", bench.a, bench.b)
    bench.device.write(bench.a, np.full(16, 7, HALF))  # too early: the operator has not read it
    assert (bench.device.read(bench.b) == 7).all()
    bench.device.close()


def test_the_emulator_has_every_operator_that_is_used() -> None:
    socs = (ATLAS_A2_A3, ATLAS_310P)
    used = {name for config in zoo().values() for soc in socs for name in needed_operators(config, soc)}
    assert used | {FUSED, "aclnnWeightQuantBatchMatmulV2"} == set(signatures.OPERATORS) == set(OPERATORS)
