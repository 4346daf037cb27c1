"""The interface of every device: an executor takes a `Batch` and gives logits; and what else goes in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import Batch

if TYPE_CHECKING:
    from svdengine.kernels.predictor import Predictor

Logits = NDArray[np.float32]  # (rows asked for, vocabulary)
LayerCounts = NDArray[np.int64]  # (layers, 3): predicted, active and all neurons, as in `NeuronCounts`

KvDtype = Literal["f16", "f32", "q8"]
FfnMode = Literal["dense", "exact", "sparse", "auto"]
FfnPath = Literal["dense", "predict", "skip_zeros"]  # the last computes every gate, and skips what is exactly 0


@dataclass(frozen=True)
class NeuronCounts:
    """FFN neurons of rows on the sparse path, summed over rows and layers."""

    predicted: int  # whose gate was computed
    active: int  # whose gate was not 0: their rows of up and down were read
    total: int

    def __add__(self, other: NeuronCounts) -> NeuronCounts:
        return NeuronCounts(self.predicted + other.predicted, self.active + other.active, self.total + other.total)

    def __sub__(self, before: NeuronCounts) -> NeuronCounts:
        return NeuronCounts(self.predicted - before.predicted, self.active - before.active, self.total - before.total)

    @property
    def predicted_density(self) -> float | None:
        """Share of neurons whose gate was computed; None where nothing ran sparse."""
        return self.predicted / self.total if self.total else None

    @property
    def active_density(self) -> float | None:
        """Share of neurons whose up and down rows were read; None where nothing ran sparse."""
        return self.active / self.total if self.total else None


NO_NEURONS = NeuronCounts(0, 0, 0)


NOT_FINITE = -1  # instead of a token, where the logits that it would be chosen from are not finite


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen from a row of logits, as `SamplingParams` defines it (scheduling/sampling.py)."""

    temperature: float  # 0: the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    draw: float = 0.0  # in [0, 1), of the request's own random generator; not used where the likeliest is taken


class Executor(Protocol):
    """Owns the device's copy of the weights and of the KV block pool."""

    name: str  # cpu, cuda, ascend, reference
    block_size: int  # tokens in a KV block
    block_count: int  # KV blocks in the pool
    max_batch_rows: int  # most rows that one forward takes
    # How the next steps run their FFNs: every neuron, all but those that are exactly 0, those predicted active, or what
    # takes less time.
    ffn: FfnMode
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

    def layer_counts(self) -> LayerCounts:
        """The same by layer."""
        ...

    def expert_counts(self) -> tuple[NDArray[np.int64], ...]:
        """Of a mixture how many rows chose each expert: an array a layer with experts; none where it is not counted."""
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
class HiddenStates(Protocol):
    """An executor that can also tell the hidden states of the step that it ran last."""

    def hidden_states(self) -> NDArray[np.float32]:
        """Of every row of the latest batch: what the last layer leaves, after the final norm, (n, hidden) float32.

        It is the `last_hidden_state` of transformers, in an array of the caller's own. Nothing but `forward` or
        `forward_and_sample` may come between the step and this.
        """
        ...


@runtime_checkable
class BlockStore(Protocol):
    """An executor whose KV blocks can be taken out and put back. Between steps only."""

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """A copy of keys, after rope, and values: (blocks, 2, layers, block_size, kv heads, head_dim).

        It is float16 or float32, as they are cached. In 8 bits it is uint8, and the head's items are (groups, PACKED)
        bytes: what `pack_kv` makes of them (kernels/kv_q8.py).
        """
        ...

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """Put back what `read_blocks` gave, into these blocks. Raises ValueError on another shape or type."""
        ...
