"""How the kernels of kernels/ascend/ops share their work: what the host must know to allocate and launch them.

The constants are those of ops/sizes.h and of the kernels' sources. A launch takes as many blocks as the device has
vector cores, 40 or 48 on 910B; every kernel is right for any number from 1 to MAX_BLOCKS.
"""

from __future__ import annotations

LANES = 64  # rows are padded to a multiple of it, and blocks share neurons in units of it
COUNT_INTS = 8  # int32 in the count record of a block
CHUNK = 512  # neurons of a list that a block holds at once
MAX_BLOCKS = 64
MAX_COLUMNS = 8192  # of a row, padded
UB_BYTES = 188_160  # of the 192 KB of a vector core of 910B, what a kernel may use

_SCORE_SLOT, _SCORE_SLOTS = 16384, 2  # float16 in a slot of rows on their way into UB, and slots
_ROW_SLOT, _ROW_SLOTS = 8192, 3  # of listed rows
_SUM_COLUMNS = 256  # of all partial sums that are in UB at once
_WRITER_BYTES = CHUNK // 8 + 4 * CHUNK + 4 * COUNT_INTS  # mask, packed list, count record
_READER_BYTES = 4 * MAX_BLOCKS * COUNT_INTS + 4 * CHUNK  # counts, staging
_WINDOW = 2048  # entries of a bias on their way into UB


def padded(columns: int) -> int:
    """Columns of a row in memory."""
    return -(-columns // LANES) * LANES


def list_capacity(neurons: int, blocks: int) -> int:
    """Entries of a block's segment of a list: a list (blocks, capacity) holds any selection of the neurons."""
    return -(-neurons // (LANES * blocks)) * LANES


def score_ub_bytes(rank: int) -> int:
    """UB bytes of a block of svd_score: slots, their float32 copy, z, a chunk's scores and what they are made of."""
    slots = _SCORE_SLOT * (2 * _SCORE_SLOTS + 4)
    return slots + 4 * padded(rank) + (4 * 4 + 2 + 4) * CHUNK + _WRITER_BYTES


def gate_ub_bytes(hidden_size: int) -> int:
    """UB bytes of a block of svd_gate: slots, their float32 copy, x, a chunk's neurons, gates and biases, lists."""
    slots = _ROW_SLOT * (2 * _ROW_SLOTS + 4)
    chunk = 3 * 4 * CHUNK + 4 * _WINDOW
    return slots + 4 * padded(hidden_size) + chunk + _READER_BYTES + _WRITER_BYTES + 4 * CHUNK


def up_down_ub_bytes(hidden_size: int) -> int:
    """UB bytes of a block of svd_up_down: slots, their float32 copy, x, the sum, and a chunk's neurons and values."""
    slots = _ROW_SLOT * (2 * _ROW_SLOTS + 4)
    return slots + 2 * 4 * padded(hidden_size) + 4 * 4 * CHUNK + 4 * _WINDOW + _READER_BYTES


def sum_ub_bytes(parts: int) -> int:
    """UB bytes of a block of svd_sum: two tiles of all partial sums, bias, sum and result."""
    return _SUM_COLUMNS * (2 * 4 * parts + 4 + 4 + 2)


def check_shape(hidden_size: int, rank: int, blocks: int) -> None:
    """Raise ValueError where the kernels do not take inputs of that size, a predictor of that rank, or the blocks."""
    if not 1 <= blocks <= MAX_BLOCKS:
        raise ValueError(f"{blocks} vector cores, the kernels take 1 to {MAX_BLOCKS}")
    for name, columns in (("hidden size", hidden_size), ("predictor rank", rank)):
        if not 1 <= columns <= MAX_COLUMNS:
            raise ValueError(f"{name} {columns}, the kernels take 1 to {MAX_COLUMNS}")
