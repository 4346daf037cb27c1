"""RMSNorm and LayerNorm of rows, a block a row."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.intrinsics import block_sum, kernel
from svdengine.kernels.cuda.model import Norm
from svdengine.models import ModelConfig

THREADS = 256


@kernel(
    "float32* x, int32* chosen, float32* weight, float32* bias, float32* out,"
    " int32 columns, int32 stride, float32 eps, float32 factor, int32 centred, int32 choose, int32 add"
)
def normalize_rows(x, chosen, weight, bias, out, columns, stride, eps, factor, centred, choose, add):
    """out = factor * norm(x) of every row, or += with `add`. `centred`: x is taken without its mean.

    With `choose`, rows of x are those in `chosen`.
    """
    row = cuda.blockIdx.x
    source = (chosen[row] if choose else row) * stride
    mean = np.float32(0)
    if centred:
        total = np.float32(0)
        for i in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
            total += x[source + i]
        mean = block_sum(total) / np.float32(columns)
    square = np.float32(0)
    for i in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        v = x[source + i] - mean
        square += v * v
    scale = np.float32(1) / np.float32(math.sqrt(block_sum(square) / np.float32(columns) + eps))
    for i in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
        value = factor * ((x[source + i] - mean) * scale * weight[i] + bias[i])
        out[row * stride + i] = out[row * stride + i] + value if add else value


@kernel(
    "int32* neurons, int32* lengths, float32* gates, float32* hidden, float32* weight,"
    " int32 columns, int32 list_stride, float32 eps"
)
def normalize_listed(neurons, lengths, gates, hidden, weight, columns, list_stride, eps):
    """RMSNorm of rows of `columns` values, in place, of which hidden has those of listed neurons and all others are 0.

    Listed neurons whose gate is not active are 0 too.
    """
    at, length = cuda.blockIdx.x * list_stride, lengths[cuda.blockIdx.x]
    square = np.float32(0)
    for k in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        if gates[at + k] > np.float32(0):
            square += hidden[at + k] * hidden[at + k]
    scale = np.float32(1) / np.float32(math.sqrt(block_sum(square) / np.float32(columns) + eps))
    for k in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        if gates[at + k] > np.float32(0):
            hidden[at + k] *= scale * weight[neurons[at + k]]


def normalize(
    device: Device,
    config: ModelConfig,
    norm: Norm,
    x: Array,
    out: Array,
    stride: int,
    n: int,
    *,
    chosen: Array | None = None,
    factor: float = 1.0,
    add: bool = False,
    columns: int | None = None,
) -> None:
    """out (n, stride) = factor * the model's norm of x (rows, stride), or of the n rows whose numbers are `chosen`.

    With `add`, out += that. `columns` of a row are normed, by default as many as the residual stream has. out may be x.
    """
    device.launch(
        normalize_rows, (n,), THREADS, x, norm.bias.view(np.int32) if chosen is None else chosen,
        norm.weight, norm.bias, out, columns or config.hidden_size, stride, config.norm_eps, factor,
        int(config.norm == "layer"), int(chosen is not None), int(add),
    )  # fmt: skip
