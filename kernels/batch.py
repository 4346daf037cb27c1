"""What an executor takes and gives: one step for any mix of prefill chunks and decode rows, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

BLOCK_SIZE = 16  # tokens in a KV block, where a device does not take more (Executor.block_size)


@dataclass(frozen=True)
class Batch:
    """One step. The rows of a sequence are neighbours, in ascending position, and cover what its cache lacks.

    A row at position p of a sequence sees cache positions 0..p of it; position p of a sequence lies in slot
    p % size of block `block_tables[sequence, p // size]`, where size is the executor's block_size. The executor writes
    the keys and values of all rows before any row attends.
    """

    tokens: NDArray[np.int32]  # (n,)
    positions: NDArray[np.int32]  # (n,)
    sequences: NDArray[np.int32]  # (n,) row of block_tables that the token belongs to
    block_tables: NDArray[np.int32]  # (sequences, most blocks), unused entries 0
    context_lengths: NDArray[np.int32]  # (sequences,) tokens in the cache after this step
    logit_rows: NDArray[np.int32]  # (m,) indices into the n rows
    sparsity_bias: NDArray[np.float32] | None = None  # (sequences,) shifts the predictor's thresholds; None: all 0
