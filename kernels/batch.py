"""What an executor takes and gives: one step for any mix of prefill chunks and decode rows, as plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from svdengine.kernels.predictor import Predictor

Logits = NDArray[np.float32]  # (rows asked for, vocabulary)

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


NOT_FINITE = -1  # instead of a token, where the logits that it would be chosen from are not finite


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from a row of logits, as `SamplingParams` defines it (engine/sampling.py)."""

    temperature: float  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    draw: float = 0.0  # in [0, 1), of the request's own random generator; not used where the likeliest is taken


def check_ffn_inputs(inputs: NDArray[np.float32], layers: int, *, layer_count: int, max_rows: int, hidden: int) -> None:
    """Raise ValueError unless `inputs`, (n, hidden) or (layers, n, hidden), are what `layers` FFNs can run on."""
    if not 1 <= layers <= layer_count or not 1 <= inputs.shape[-2] <= max_rows or inputs.shape[-1] != hidden:
        raise ValueError(f"{layers} layers of FFNs on inputs of shape {inputs.shape}")
    if inputs.ndim == 3 and len(inputs) < layers:
        raise ValueError(f"{layers} layers of FFNs, inputs of {len(inputs)}")


FfnMode = Literal["dense", "sparse", "auto"]
FfnPath = Literal["dense", "predict", "skip_zeros"]  # the last computes every gate, and skips what is exactly 0


@dataclass(frozen=True)
class NeuronCounts:
    """FFN neurons of rows on the sparse path, summed over rows and layers."""

    predicted: int  # whose gate was computed
    active: int  # whose gate was not 0: their rows of up and down were read
    total: int


class Executor(Protocol):
    """Owns the device's copy of the weights and of the KV block pool."""

    name: str  # cpu, cuda, ascend, reference
    block_count: int  # KV blocks in the pool
    max_batch_rows: int  # most rows that one forward takes
    ffn: FfnMode  # how the next steps run their FFNs: every neuron, those predicted active, or what costs less
    predictor: Predictor | None  # of the sparse path

    def forward(self, batch: Batch) -> Logits:
        """Run one step and return the logits of `batch.logit_rows`, (m, vocabulary) float32.

        The array may be the executor's own buffer: it holds until the next call.
        """
        ...

    def ffn_path(self, n: int) -> FfnPath:
        """How a step of n rows runs its FFNs now."""
        ...

    def neuron_counts(self) -> NeuronCounts:
        """Neurons of rows that took the sparse path since the last reset."""
        ...

    def reset_neuron_counts(self) -> None:
        """Start counting anew."""
        ...

    def close(self) -> None:
        """Give back threads and device memory; the executor cannot be used afterwards."""
        ...


@runtime_checkable
class SamplingExecutor(Executor, Protocol):
    """An executor that can choose tokens where the logits are, so that these need not be copied to the host."""

    def forward_and_sample(self, batch: Batch, choices: Sequence[Choice | None]) -> tuple[NDArray[np.int32], Logits]:
        """Run one step; `choices` has an entry for each of `batch.logit_rows`, None where the logits are wanted.

        Returns a token for each entry, NOT_FINITE where the logits are damaged and anything where there was no choice;
        and the logits of the rows without a choice, in their order, (rows without, vocabulary) float32.
        """
        ...


@runtime_checkable
class BlockStore(Protocol):
    """An executor whose KV blocks can be taken out and put back. Between steps only."""

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """A copy of keys, after rope, and values: (blocks, 2, layers, BLOCK_SIZE, kv heads, head_dim).

        It is float16 or float32, as they are cached.
        """
        ...

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """Put back what `read_blocks` gave, into these blocks. Raises ValueError on another shape or type."""
        ...
