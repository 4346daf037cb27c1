"""A predictor laid out anew when it is set, in panels of 16 neurons, for the scores of score.py.

factor A, for each 32 of the rank: 16 float16 scales, then 8 vectors of 16 neurons x 4 ranks, int8
residual Q, for each 64 columns: 16 float16 scales, then 16 steps of 16 neurons x 4 columns in 1 or 2 bits
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.cpu.isa import active_isa, weight_bias
from svdengine.kernels.formats import GROUP
from svdengine.kernels.lowbit import BLOCK

NEURONS = 16  # in a panel
FACTOR_BYTES = 32 + GROUP * NEURONS  # of 32 ranks
RESIDUAL_BYTES = {2: 32 + BLOCK * NEURONS // 4, 1: 32 + BLOCK * NEURONS // 8}  # of 64 columns


def _panels(rows: NDArray) -> NDArray:
    """(f, ...) -> (panels, 16, ...), with zeros for neurons that are not there."""
    panels = -(-len(rows) // NEURONS)
    padded = np.zeros((panels * NEURONS, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return padded.reshape(panels, NEURONS, *rows.shape[1:])


def _with_scales(scales: NDArray[np.float16], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes (panels, parts, bytes) with the scales of each part, (f, parts), before them."""
    before = np.ascontiguousarray(_panels(scales).transpose(0, 2, 1)).view(np.uint8)
    return np.ascontiguousarray(np.concatenate([before, codes], axis=2))


def factor_panels(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """A q8 factor A (f, ranks) in panels, (panels, ranks / 32, FACTOR_BYTES)."""
    groups = values.shape[1] // GROUP
    tiles = _panels(values).reshape(-1, NEURONS, groups, GROUP // 4, 4).transpose(0, 2, 3, 1, 4)
    codes = np.ascontiguousarray(tiles).view(np.uint8).reshape(len(tiles), groups, -1) ^ np.uint8(
        weight_bias(active_isa())
    )
    return _with_scales(scales, codes)


def residual_panels(packed: NDArray[np.uint8], scales: NDArray[np.float16], bits: int) -> NDArray[np.uint8]:
    """A residual Q of 1 or 2 bits, (f, columns * bits / 8), in panels, (panels, columns / 64, RESIDUAL_BYTES)."""
    blocks = scales.shape[1]
    codes = (_two_bit_steps if bits == 2 else _one_bit_steps)(_panels(packed), blocks)
    return _with_scales(scales, codes.reshape(len(codes), blocks, -1))


def _one_bit_steps(packed: NDArray[np.uint8], blocks: int) -> NDArray[np.uint8]:
    """Bits of (panels, 16, blocks * 8) bytes anew: for every 4 columns, those of each neuron one after the other."""
    codes = np.unpackbits(packed, axis=2, bitorder="little")
    steps = codes.reshape(-1, NEURONS, blocks, BLOCK // 4, 4).transpose(0, 2, 3, 1, 4)
    return np.packbits(np.ascontiguousarray(steps).reshape(len(packed), -1), axis=1, bitorder="little")


def _two_bit_steps(packed: NDArray[np.uint8], blocks: int) -> NDArray[np.uint8]:
    """As `_one_bit_steps`, of (panels, 16, blocks * 16) bytes.

    Byte 4 j + c of a block holds columns 4 j + c + 16 q, q = 0..3; here byte 4 n + c of step 4 q + j gets column c of
    the step, of neurons n + 4 p, p = 0..3. Bytes are moved once, and then bit pairs as whole arrays.
    """
    whole = packed.reshape(-1, 4, 4, blocks, 4, 4).transpose(1, 0, 3, 4, 2, 5)  # p, panels, blocks, j, n, c
    by_pair = np.ascontiguousarray(whole)
    out = np.empty((len(packed), blocks, 4, *by_pair.shape[3:]), np.uint8)  # panels, blocks, q, j, n, c
    for q in range(4):
        pairs = by_pair >> np.uint8(2 * q) & np.uint8(3)
        out[:, :, q] = pairs[0] | pairs[1] << np.uint8(2) | pairs[2] << np.uint8(4) | pairs[3] << np.uint8(6)
    return out
