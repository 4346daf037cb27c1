"""What an executor takes and gives: one step for any mix of prefill chunks and decode rows, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

BLOCK_SIZE = 16  # tokens in a KV block, on every device


@dataclass(frozen=True)
class Batch:
    """One step. The rows of a sequence are neighbours, in ascending position, and cover what its cache lacks.

    A row at position p of a sequence sees cache positions 0..p of it; position p of a sequence lies in slot
    p % BLOCK_SIZE of block `block_tables[sequence, p // BLOCK_SIZE]`. The executor writes the keys and values of all
    rows before any row attends.
    """

    tokens: NDArray[np.int32]  # (n,)
    positions: NDArray[np.int32]  # (n,)
    sequences: NDArray[np.int32]  # (n,) row of block_tables that the token belongs to
    block_tables: NDArray[np.int32]  # (sequences, most blocks), unused entries 0
    context_lengths: NDArray[np.int32]  # (sequences,) tokens in the cache after this step
    logit_rows: NDArray[np.int32]  # (m,) indices into the n rows
    sparsity_bias: NDArray[np.float32] | None = None  # (sequences,) shifts the predictor's thresholds; None: all 0


def check_batch(
    batch: Batch, *, max_rows: int, max_blocks: int, block_count: int, context: int, vocab_size: int
) -> None:
    """Raise ValueError for a batch that breaks the rules of `Batch`: kernels check nothing.

    max_blocks: of a sequence's table; block_count: of the pool; context: positions that there are.
    """
    n, wanted = len(batch.tokens), len(batch.logit_rows)
    sequences, blocks = batch.block_tables.shape
    if not 1 <= n <= max_rows or wanted > n or sequences > max_rows:
        raise ValueError(f"a batch of {n} rows and {wanted} logits; the most is {max_rows} rows")
    if blocks > max_blocks:
        raise ValueError(f"a block table of {blocks} blocks; the context has {max_blocks}")
    if len(batch.positions) != n or len(batch.sequences) != n:
        raise ValueError("tokens, positions and sequences of a batch differ in length")
    for name, values, limit in (
        ("token", batch.tokens, vocab_size),
        ("position", batch.positions, min(context, blocks * BLOCK_SIZE)),
        ("sequence", batch.sequences, sequences),
        ("block", batch.block_tables, block_count),
        ("logit row", batch.logit_rows, n),
    ):
        if values.size and not (values.min() >= 0 and values.max() < limit):
            raise ValueError(f"a {name} lies outside 0..{limit - 1}")
