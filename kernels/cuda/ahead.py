"""The next decode step, launched before the host has seen the tokens of this one.

While the host turns tokens into text, looks for stop strings and plans the next step, the GPU would have nothing to do.
So it goes on with what is most likely: every sequence takes the token that was chosen for it, at the next place. If
the next batch is that one, only tokens have to be chosen from the logits that are there. If not, since a sequence
ended, say, nothing is lost but the GPU's time: what was written to the KV cache lies where a sequence's next token
goes, and is written again before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import cuda
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.cuda.device import Device
from svdengine.kernels.cuda.intrinsics import kernel
from svdengine.kernels.cuda.step import Shape
from svdengine.kernels.cuda.workspace import Workspace

THREADS = 128


@dataclass(frozen=True)
class Ahead:
    """A step on its way: that of the tokens (n,) which were chosen for a batch, without choosing further ones."""

    before: Batch
    tokens: NDArray[np.int32]
    shape: Shape

    def is_step_of(self, batch: Batch) -> bool:
        """Whether it is what this batch asks for, but for how its FFNs run."""
        before = self.before
        pairs: list[tuple[NDArray[Any], NDArray[Any]]] = [
            (batch.tokens, self.tokens),
            (batch.positions, before.positions + 1),
            (batch.sequences, before.sequences),
            (batch.block_tables, before.block_tables),
            (batch.logit_rows, before.logit_rows),
        ]
        if (batch.sparsity_bias is None) != (before.sparsity_bias is None):
            return False
        if batch.sparsity_bias is not None and before.sparsity_bias is not None:
            pairs.append((batch.sparsity_bias, before.sparsity_bias))
        return all(np.array_equal(found, expected) for found, expected in pairs)


def has_room_ahead(batch: Batch, context: int) -> bool:
    """Whether each row is a sequence whose next token has its place in the KV block of the last one."""
    n, following = len(batch.tokens), batch.positions + 1
    alone = np.array_equal(batch.logit_rows, np.arange(n)) and len(np.unique(batch.sequences)) == n
    return bool(alone and (following % BLOCK_SIZE).all() and following.max() < context)


@kernel("int32* tokens, int32* positions, int32* chosen, int32 n")
def take_next(tokens, positions, chosen, n):
    """tokens = chosen, at the next positions. Where none could be chosen it is any token: nobody asks for more then."""
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    if i < n:
        tokens[i] = max(chosen[i], 0)
        positions[i] += 1


def take_chosen(device: Device, work: Workspace, n: int) -> None:
    """Turn the batch in the workspace into its next one."""
    device.launch(take_next, (-(-n // THREADS),), THREADS, work.tokens, work.positions, work.chosen, n)
