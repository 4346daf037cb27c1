"""The first residual stream: embedding rows of the tokens, in any weight format."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from numba import cuda

from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.formats.table import KERNELS, kernels_of
from svdengine.kernels.cuda.intrinsics import Kernel, kernel
from svdengine.kernels.cuda.model import Model
from svdengine.kernels.cuda.rows import matrix_parameters
from svdengine.kernels.cuda.workspace import Workspace
from svdengine.kernels.formats import WeightFormat

THREADS = 256


@cache
def embed_kernel(weight_format: WeightFormat) -> Kernel:
    """x = factor * embedding row of each token (+ row of the position)."""
    weight = kernels_of(weight_format).weight

    @kernel(
        matrix_parameters(weight_format) + ", int32* tokens, int32* positions, float32* table, float32* x,"
        " int32 columns, int32 stride, float32 factor, int32 learned",
        name=f"embed_{weight_format}",
    )
    def embed(words, scale, low, row, tokens, positions, table, x, columns, stride, factor, learned):
        at = cuda.blockIdx.x
        token = tokens[at]
        for i in range(cuda.threadIdx.x, columns, cuda.blockDim.x):
            value = factor * weight(words, scale, low, row, token, i, stride)
            if learned:
                value += table[positions[at] * columns + i]
            x[at * stride + i] = value

    return embed


def embed_tokens(device: Device, model: Model, work: Workspace, n: int) -> None:
    """work.x of n rows, from their tokens and positions."""
    config, matrix = model.config, model.embedding
    device.launch(
        embed_kernel(matrix.format), (n,), THREADS, matrix.words, matrix.scale, matrix.low, matrix.row,
        work.tokens, work.positions, model.positions, work.x, config.hidden_size, work.sizes.hidden,
        config.embedding_scale, int(config.learned_positions),
    )  # fmt: skip


def every_kernel() -> Iterator[Kernel]:
    """The kernels of all formats."""
    yield from map(embed_kernel, KERNELS)
