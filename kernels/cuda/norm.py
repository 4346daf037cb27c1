"""RMSNorm and LayerNorm of rows, a block a row; and with what comes before or after them, in one launch.

A norm may also round what it gives, as the predictor's scores and its listed rows read it (kernels/cuda/rounding.py).
And it may follow a sum of parts, which takes more blocks than a norm: the last of a row's blocks to be done has the
whole row before it, and norms it. Which one that is, no result shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import cuda
from numba.cuda import types

from svdengine.kernels.cuda.atomics import is_last_block
from svdengine.kernels.cuda.device import Array, Device
from svdengine.kernels.cuda.intrinsics import block_sum, jit, kernel, lane_index, warp_index
from svdengine.kernels.cuda.model import Norm
from svdengine.kernels.cuda.rounding import store_coarse, store_fine
from svdengine.kernels.cuda.workspace import Workspace
from svdengine.kernels.formats import padded_columns
from svdengine.models import ModelConfig

THREADS = 256
ROUNDED = "uint8* fine_codes, float32* fine_values, uint8* coarse_codes, float32* coarse_values"


@jit(device=True)
def normalize_row(
    x, source, weight, bias, out, to, fine_codes, fine_values, coarse_codes, coarse_values,
    columns, padded, eps, factor, centred, add, rounded,
):  # fmt: skip
    """Norm the row of x that begins at `source`, to where `to` is in out; with `rounded` round that too, there."""
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
    for i in range(cuda.threadIdx.x, padded, cuda.blockDim.x):  # whole warps, where something is rounded
        value = np.float32(0)
        if i < columns:
            value = factor * ((x[source + i] - mean) * scale * weight[i] + bias[i])
            out[to + i] = out[to + i] + value if add else value
        if rounded:
            store_fine(value, fine_codes, fine_values, to, padded, i)
            store_coarse(value, coarse_codes, coarse_values, to, padded, i)


@kernel(
    f"float32* x, int32* chosen, float32* weight, float32* bias, float32* out, {ROUNDED},"
    " int32 columns, int32 padded, int32 stride, float32 eps, float32 factor, int32 centred, int32 choose, int32 add,"
    " int32 rounded"
)
def normalize_rows(
    x, chosen, weight, bias, out, fine_codes, fine_values, coarse_codes, coarse_values,
    columns, padded, stride, eps, factor, centred, choose, add, rounded,
):  # fmt: skip
    """out = factor * norm(x) of every row, or += with `add`. `centred`: x is taken without its mean.

    With `choose`, rows of x are those in `chosen`. With `rounded`, what is given is rounded to 16 and to 8 bits too.
    """
    row = cuda.blockIdx.x
    normalize_row(
        x, (chosen[row] if choose else row) * stride, weight, bias, out, row * stride,
        fine_codes, fine_values, coarse_codes, coarse_values, columns, padded, eps, factor, centred, add, rounded,
    )  # fmt: skip


@kernel(
    f"float32* partial, float32* down_bias, float32* x, int32* tickets, float32* weight, float32* bias, float32* out,"
    f" {ROUNDED}, int32 columns, int32 padded, int32 stride, int32 parts, int32 biased, float32 eps,"
    " float32 factor, int32 centred, int32 rounded"
)
def add_parts_then_normalize(
    partial, down_bias, x, tickets, weight, bias, out, fine_codes, fine_values, coarse_codes, coarse_values,
    columns, padded, stride, parts, biased, eps, factor, centred, rounded,
):  # fmt: skip
    """x (n, stride) += factor * (bias + the sum of the parts); then out = norm(x). Grid: (columns / 32, n).

    tickets: (n,) zeros, and zeros again afterwards.
    """
    sums = cuda.shared.array(THREADS, types.float32)
    row, lane, warp, warps = cuda.blockIdx.y, lane_index(), warp_index(), cuda.blockDim.x >> 5
    i = cuda.blockIdx.x * 32 + lane
    total = np.float32(0)
    for part in range(warp, parts, warps):  # warps share the parts: all would be many loads one after another
        total += partial[(row * parts + part) * stride + i]
    sums[cuda.threadIdx.x] = total
    cuda.syncthreads()
    if warp == 0 and i < columns:
        total = down_bias[i] if biased else np.float32(0)
        for other in range(warps):
            total += sums[32 * other + lane]
        x[row * stride + i] += factor * total
    if not is_last_block(tickets, row, cuda.gridDim.x):
        return
    normalize_row(
        x, row * stride, weight, bias, out, row * stride, fine_codes, fine_values, coarse_codes, coarse_values,
        columns, padded, eps, np.float32(1), centred, 0, rounded,
    )  # fmt: skip


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
        neuron = at + neurons[at + k]
        if gates[neuron] > np.float32(0):
            square += hidden[neuron] * hidden[neuron]
    scale = np.float32(1) / np.float32(math.sqrt(block_sum(square) / np.float32(columns) + eps))
    for k in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        neuron = at + neurons[at + k]
        if gates[neuron] > np.float32(0):
            hidden[neuron] *= scale * weight[neuron - at]


@dataclass(frozen=True)
class Following:
    """A norm that is to follow a sum in the same launch: `norm` of x, to `out`, rounded where that is asked for."""

    norm: Norm
    out: Array
    rounded: bool


def normalize(
    device: Device,
    config: ModelConfig,
    work: Workspace,
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
    rounded: bool = False,
    centred: bool | None = None,
) -> None:
    """out (n, stride) = factor * the model's norm of x (rows, stride), or of the n rows whose numbers are `chosen`.

    With `add`, out += that. `columns` of a row are normed, by default as many as the residual stream has. out may be x.
    `rounded`: leave it in work.fine and work.coarse too, for which it has the residual stream's size. `centred`: for a
    norm that is not of the model's kind.
    """
    columns, centred = columns or config.hidden_size, config.norm == "layer" if centred is None else centred
    device.launch(
        normalize_rows, (n,), THREADS, x, norm.bias.view(np.int32) if chosen is None else chosen,
        norm.weight, norm.bias, out, work.fine, work.fine, work.coarse, work.coarse,
        columns, padded_columns(columns) if rounded else columns, stride, config.norm_eps, factor,
        int(centred), int(chosen is not None), int(add), int(rounded),
    )  # fmt: skip


def add_parts_and_normalize(
    device: Device, config: ModelConfig, work: Workspace, parts: int, bias: Array | None, n: int, following: Following
) -> None:
    """work.x (n, hidden) += factor * (bias + the parts in work.partial); then the norm that follows."""
    columns, norm, biased = config.hidden_size, following.norm, bias is not None
    device.launch(
        add_parts_then_normalize, (-(-columns // 32), n), THREADS, work.partial, bias if biased else work.partial,
        work.x, work.tickets, norm.weight, norm.bias, following.out, work.fine, work.fine, work.coarse, work.coarse,
        columns, padded_columns(columns) if following.rounded else columns, work.sizes.hidden, parts, int(biased),
        config.norm_eps, config.residual_scale, int(config.norm == "layer"), int(following.rounded),
    )  # fmt: skip
