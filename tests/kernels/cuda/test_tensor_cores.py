"""What kernels on tensor cores are written with: on a GPU the instructions, in the simulator their twins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda import intrinsics, tensor_cores
from svdengine.kernels.cuda.intrinsics import kernel


@kernel("uint32* a, uint32* b, float32* c")
def multiply(a, b, c):
    """c (16, 8) += a (16, 16) b (8, 16) transposed."""
    lane = intrinsics.lane_index()
    row, column, at = lane >> 2, lane & 3, 8 * (lane >> 2) + 2 * (lane & 3)
    found = tensor_cores.mma_f16(
        a[8 * row + column], a[8 * (row + 8) + column], a[8 * row + column + 4], a[8 * (row + 8) + column + 4],
        b[8 * row + column], b[8 * row + column + 4],
        c[at], c[at + 1], c[at + 64], c[at + 65],
    )  # fmt: skip
    c[at], c[at + 1], c[at + 64], c[at + 65] = found[0], found[1], found[2], found[3]


@kernel("uint32* words, uint32* out, float32* floats")
def load(words, out, floats):
    """Four 8 x 8 matrices through shared memory, as they lie and transposed."""
    shared = cuda.shared.array(128, types.uint32, alignment=16)
    numbers = cuda.shared.array(4, types.float32, alignment=16)
    t, lane = cuda.threadIdx.x, intrinsics.lane_index()
    tensor_cores.copy_async(shared, 4 * t, words, 4, 4 * t - 4)
    if t < 4:
        numbers[t] = floats[t]
    tensor_cores.wait_for_copies()
    cuda.syncthreads()
    plain = tensor_cores.load_matrices(shared, 4 * lane)
    turned = tensor_cores.load_transposed_matrices(shared, 4 * lane)
    for m in range(4):
        out[32 * m + lane] = plain[m]
        out[128 + 32 * m + lane] = turned[m]
    four = tensor_cores.load_four(numbers, 0)
    if t < 4:
        floats[t] = tensor_cores.exp2(four[3 - t])


@kernel("uint32* words, uint32* out")
def forget_to_wait(words, out):
    shared = cuda.shared.array(4, types.uint32, alignment=16)
    tensor_cores.copy_async(shared, 0, words, 0, 0)
    out[0] = shared[0]
    tensor_cores.wait_for_copies()


def test_a_product(device: Any) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((16, 16)).astype(np.float16), random.standard_normal((8, 16)).astype(np.float16)
    c = random.standard_normal((16, 8)).astype(np.float32)
    out = device.upload(c)
    device.launch(multiply, (1,), 32, device.upload(a), device.upload(b), out)
    expected = c + a.astype(np.float32) @ b.T.astype(np.float32)
    np.testing.assert_allclose(device.download(out).reshape(16, 8), expected, rtol=1e-5, atol=1e-5)


def test_matrices_are_loaded_and_transposed(device: Any) -> None:
    matrices = -np.arange(256, dtype=np.float16).reshape(4, 8, 8)
    out, floats = device.zeros(256, np.uint32), device.upload(np.array([-2, 0, 3, -2e30], np.float32))
    device.launch(load, (1,), 32, device.upload(matrices), out, floats)
    found = device.download(out).view(np.float16).reshape(2, 4, 8, 8)
    np.testing.assert_array_equal(found[0], matrices)
    np.testing.assert_array_equal(found[1], matrices.transpose(0, 2, 1))
    np.testing.assert_array_equal(device.download(floats), [0, 8, 1, 0.25])


@pytest.mark.skipif(not intrinsics.SIMULATED, reason="a GPU does not check this")
def test_a_copy_that_is_not_waited_for_is_not_there(device: Any) -> None:
    out = np.zeros(1, np.uint32)
    device.launch(forget_to_wait, (1,), 1, np.ones(4, np.uint32), out)
    assert out[0] != 1
