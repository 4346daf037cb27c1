"""What kernels are written with, and that the simulator finds the mistakes that it should."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import simulator
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda import intrinsics
from svdengine.kernels.cuda.intrinsics import block_max, block_sum, kernel, lane_index, warp_max, warp_sum, warp_sum_int
from svdengine.kernels.formats import to_bfloat16

simulated = pytest.mark.skipif(not intrinsics.SIMULATED, reason="a GPU does not check this")


@kernel("float32* x, float32* sums, float32* block, int32* ints")
def reduce(x, sums, block, ints):
    i = cuda.threadIdx.x
    sums[i] = warp_sum(x[i]) + warp_max(x[i])
    block[i] = block_sum(x[i]) + block_max(x[i])
    ints[i] = warp_sum_int(np.int32(i))


@kernel("uint32* words, float32* out")
def unpack(words, out):
    i = cuda.threadIdx.x
    w = intrinsics.ldg128(words, 4 * i)
    halves, bfloats = intrinsics.h2f(w[0]), intrinsics.bf2f(w[1])
    out[32 * i], out[32 * i + 1] = halves[0], halves[1]
    out[32 * i + 2], out[32 * i + 3] = bfloats[0], bfloats[1]
    signed, unsigned = intrinsics.s8x4(w[2]), intrinsics.u8x4(w[3])
    for k in range(4):
        out[32 * i + 4 + k], out[32 * i + 8 + k] = signed[k], unsigned[k]
    out[32 * i + 12] = np.float32(intrinsics.dp4a(w[2], w[3], np.int32(5)))
    out[32 * i + 13] = np.float32(intrinsics.dp4a_su(w[2], w[3], np.int32(5)))
    out[32 * i + 14] = intrinsics.as_float(intrinsics.f2h(halves[0], halves[1]))
    out[32 * i + 15] = np.float32(intrinsics.to_int(halves[0] * np.float32(10)))
    out[32 * i + 16] = intrinsics.as_float(intrinsics.as_word(halves[1]))
    two = intrinsics.ldg64(words, 2 * i)
    out[32 * i + 17] = np.float32(two[0] & np.uint32(255)) + np.float32(two[1] & np.uint32(255))
    out[32 * i + 18] = np.float32(intrinsics.dp4a_us(w[3], w[2], np.int32(5)))
    out[32 * i + 19] = np.float32(intrinsics.dp4a_uu(w[2], w[3], np.int32(5)))
    intrinsics.stg128(out, 32 * i + 20, halves[0], halves[1], bfloats[0], bfloats[1])


@kernel("float32* x, int32 at")
def write_at(x, at):
    x[at] = np.float32(1)


@kernel("float32* x")
def part_of_a_block_waits(x):
    if cuda.threadIdx.x < 32:
        cuda.syncthreads()
    else:
        x[0] = warp_sum(x[0]) if lane_index() < 16 else np.float32(0)


@kernel("uint32* words")
def load_between(words):
    intrinsics.ldg128(words, 2)


def test_sums_and_maxima_of_warps_and_blocks(device: Any) -> None:
    x = np.random.default_rng(0).standard_normal(96).astype(np.float32)
    sums, block = device.zeros(96, np.float32), device.zeros(96, np.float32)
    ints = device.zeros(96, np.int32)
    device.launch(reduce, (1,), 96, device.upload(x), sums, block, ints)
    warps = x.reshape(3, 32)
    np.testing.assert_allclose(
        device.download(sums).reshape(3, 32), (warps.sum(1) + warps.max(1))[:, None].repeat(32, 1), rtol=1e-5
    )
    np.testing.assert_allclose(device.download(block), np.full(96, x.sum() + x.max()), rtol=1e-5)
    np.testing.assert_array_equal(device.download(ints).reshape(3, 32)[:, 0], np.arange(96).reshape(3, 32).sum(1))


def test_words_are_unpacked_as_numpy_does(device: Any) -> None:
    random = np.random.default_rng(1)
    halves = random.standard_normal((3, 2)).astype(np.float16)
    bfloats = to_bfloat16(random.standard_normal((3, 2)).astype(np.float32))
    signed, unsigned = random.integers(-128, 128, (3, 4), np.int8), random.integers(0, 256, (3, 4), np.uint8)
    parts = [halves.view(np.uint32), bfloats.view(np.uint32), signed.view(np.uint32), unsigned.view(np.uint32)]
    words = np.concatenate(parts, 1)
    out = device.zeros(96, np.float32)
    device.launch(unpack, (1,), 3, device.upload(words), out)
    found = device.download(out).reshape(3, 32)
    wide = (bfloats.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(found[:, :4], np.concatenate([halves, wide], 1, dtype=np.float32))
    np.testing.assert_array_equal(found[:, 4:12], np.concatenate([signed, unsigned], 1, dtype=np.float32))
    whole = signed.astype(int)
    np.testing.assert_array_equal(found[:, 12], 5 + (whole * unsigned.view(np.int8)).sum(1))
    np.testing.assert_array_equal(found[:, 13], 5 + (whole * unsigned).sum(1))
    np.testing.assert_array_equal(found[:, 18], 5 + (unsigned * whole).sum(1))
    np.testing.assert_array_equal(found[:, 19], 5 + (signed.view(np.uint8).astype(int) * unsigned).sum(1))
    np.testing.assert_array_equal(found[:, 14].view(np.uint32), words[:, 0])
    np.testing.assert_array_equal(found[:, 15], np.rint(halves[:, 0].astype(np.float32) * 10))
    np.testing.assert_array_equal(found[:, 16], halves[:, 1])
    flat = words.reshape(-1) & 255
    np.testing.assert_array_equal(found[:, 17], flat[0:6:2] + flat[1:6:2])
    np.testing.assert_array_equal(found[:, 20:24], found[:, :4])


@simulated
@pytest.mark.parametrize("at", [-1, 4])
def test_writing_outside_an_array_is_found(device: Any, at: int) -> None:
    with pytest.raises(IndexError, match=r"thread \(0, 0, 0\) of block \(0, 0, 0\)"):
        device.launch(write_at, (1,), 1, np.zeros(4, np.float32), at)


@simulated
def test_waiting_for_threads_that_do_not_come_is_found(device: Any) -> None:
    with pytest.raises(RuntimeError, match="do not come"):
        device.launch(part_of_a_block_waits, (1,), 64, np.zeros(4, np.float32))


@kernel("float32* x, float32* y")
def forget_to_wait(x, y):
    shared = cuda.shared.array(64, types.float32)
    i = cuda.threadIdx.x
    shared[i] = x[i]
    y[i] = shared[63 - i]


@simulated
def test_a_missing_barrier_gives_another_result_backwards(device: Any) -> None:
    x, found = np.arange(64, dtype=np.float32), []
    for order in (contextlib.nullcontext(), simulator.backwards()):
        y = np.zeros(64, np.float32)
        with order:
            device.launch(forget_to_wait, (1,), 64, x, y)
        found.append(y)
    assert (found[0] != found[1]).any()


@simulated
def test_loads_that_are_not_aligned_are_found(device: Any) -> None:
    with pytest.raises(AssertionError, match="16-byte load from word 2"):
        device.launch(load_between, (1,), 1, np.zeros(8, np.uint32))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_unrolled_bodies_are_called_in_order(device: Any, count: int) -> None:
    @intrinsics.jit(device=True)
    def body(i, x):
        x[i] = np.float32(i) + (x[i - 1] if i > 3 else np.float32(0))

    run = intrinsics.unrolled(body, count)

    @kernel("float32* x", name=f"call_{count}")
    def call(x):
        run(3, x)

    x = device.zeros(10, np.float32)
    device.launch(call, (1,), 1, x)
    np.testing.assert_array_equal(device.download(x)[3 : 3 + count], np.cumsum(np.arange(3, 3 + count)))
    assert not device.download(x)[3 + count :].any()


def test_parameters_must_be_those_of_the_function() -> None:
    with pytest.raises(ValueError, match=r"takes \('x', 'n'\), declared are \('x', 'm'\)"):
        kernel("float32* x, int32 m")(lambda x, n: None)
