"""Activation functions, and sums of what was computed in parts."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.intrinsics import jit, kernel
from svdengine.models import ModelConfig
from svdengine.models.config import Activation

THREADS = 256
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
RELU, FATRELU, DRELU, RELU2, SILU, GELU, GELU_TANH = range(7)  # their numbers, in the order of ACTIVATIONS

_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)
_ROOT_HALF = np.float32(math.sqrt(0.5))
_TANH_SCALE = np.float32(2 * math.sqrt(2 / math.pi))
_CUBE = np.float32(0.044715)


@jit(device=True)
def sigmoid(x):
    """1 / (1 + e^-x) of a float32."""
    return _ONE / (_ONE + np.float32(math.exp(-max(x, np.float32(-80)))))


@jit(device=True)
def activate(x, kind, threshold):
    """The activation function of a float32 (for dReLU, of one of its two factors)."""
    if kind == SILU:
        return x * sigmoid(x)
    if kind == FATRELU:
        return x if x > threshold else np.float32(0)
    if kind == GELU:
        return x * _HALF * (_ONE + np.float32(math.erf(x * _ROOT_HALF)))
    if kind == GELU_TANH:
        # tanh(z) = 2 sigmoid(2 z) - 1
        return x * sigmoid(_TANH_SCALE * (x + _CUBE * x * x * x))
    v = max(x, np.float32(0))
    return v * v if kind == RELU2 else v


@jit(device=True)
def up_product(gate, up, kind):
    """gate * up, or gate * ReLU(up) for dReLU; gate: activated."""
    return gate * (max(up, np.float32(0)) if kind == DRELU else up)


@jit(device=True)
def activated(gate_up, at, ffn, kind, gated, threshold):
    """act(gate) * up of a neuron, or act(up) where there is no gate; at: its gate in gate_up, `ffn` before its up."""
    value = activate(gate_up[at], kind, threshold)
    return up_product(value, gate_up[at + ffn], kind) if gated else value


@kernel(
    "float32* gate_up, float32* hidden, int32 ffn, int32 from_stride, int32 to_stride, int32 kind, int32 gated,"
    " float32 threshold"
)
def activate_rows(gate_up, hidden, ffn, from_stride, to_stride, kind, gated, threshold):
    """hidden (n, to_stride) = act(gate) * up, or act(up) where there is no gate."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i >= ffn:
        return
    row = cuda.blockIdx.y
    hidden[row * to_stride + i] = activated(gate_up, row * from_stride + i, ffn, kind, gated, threshold)


@kernel(
    "float32* partial, float32* bias, float32* x, int32 columns, int32 stride, int32 parts, int32 biased,"
    " float32 factor"
)
def add_parts_to_rows(partial, bias, x, columns, stride, parts, biased, factor):
    """x (n, stride) += factor * (bias, if `biased`, + the sum of the parts), for partial (n, parts, stride)."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i >= columns:
        return
    row = cuda.blockIdx.y
    total = bias[i] if biased else np.float32(0)
    for part in range(parts):
        total += partial[(row * parts + part) * stride + i]
    x[row * stride + i] += factor * total


@kernel("float32* x, int32 columns, int32 stride")
def clear_rows(x, columns, stride):
    """x (n, stride) = 0 in its columns."""
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < columns:
        x[cuda.blockIdx.y * stride + i] = np.float32(0)


def clear(device: Device, x: Array, columns: int, stride: int, n: int) -> None:
    """x (n, stride) = 0 in its columns."""
    device.launch(clear_rows, (-(-columns // THREADS), n), THREADS, x, columns, stride)


def activate_ffn(
    device: Device, config: ModelConfig, gate_up: Array, from_stride: int, hidden: Array, to_stride: int, n: int
) -> None:
    """hidden (n, to_stride) of the gates and ups in gate_up (n, from_stride)."""
    kind = ACTIVATIONS.index(config.activation)
    device.launch(
        activate_rows, (-(-config.ffn_size // THREADS), n), THREADS, gate_up, hidden, config.ffn_size,
        from_stride, to_stride, kind, int(config.gated), config.activation_threshold,
    )  # fmt: skip


def add_parts(
    device: Device,
    partial: Array,
    parts: int,
    bias: Array | None,
    x: Array,
    columns: int,
    stride: int,
    n: int,
    factor: float,
) -> None:
    """x (n, stride) += factor * (bias + the parts of each row), for partial (n, parts, stride)."""
    grid, biased = (-(-columns // THREADS), n), bias is not None
    device.launch(
        add_parts_to_rows, grid, THREADS, partial, bias if biased else partial, x, columns, stride, parts, int(biased),
        factor,
    )  # fmt: skip
