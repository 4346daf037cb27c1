"""What executors have in common: what they are opened with, their predictor, and the path that a step's FFNs take."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.executor import FfnMode, FfnPath, KvDtype, LayerCounts, Logits, NeuronCounts
from svdengine.kernels.ffn_times import FfnTimes, choose_path, measure_ffn_times
from svdengine.kernels.formats import WeightFormat, gather_parts
from svdengine.kernels.norm import normalize
from svdengine.kernels.predictor import Predictor, check_predictor
from svdengine.models import ModelConfig


@dataclass(frozen=True)
class ExecutorSetup:
    """What every executor is opened with. `arrays` and `formats` must match `config`: ValueError otherwise."""

    config: ModelConfig
    arrays: Mapping[str, NDArray]  # stored parts of the model file by name, layers stacked
    formats: Mapping[str, WeightFormat]  # of each matrix
    block_count: int  # KV blocks of BLOCK_SIZE tokens that the pool has room for; the executor's own may be larger
    max_batch_rows: int = 256
    context: int | None = None  # tokens of the longest sequence; None: as many as the model was made for
    sequences: int = 1  # of that length, which the pool has to hold whatever the size of blocks
    kv_dtype: KvDtype = "f16"
    predictor: Predictor | None = None
    ffn: FfnMode = "dense"
    deterministic: bool = False  # a row gets the same bits whatever rows are beside it; only the CPU can do so
    interleave: bool = True  # the CPU copies matrices that are read whole, to where they are read faster
    let_go: Callable[[str], None] | None = None  # told of each copied matrix, so that both never lie in memory


class BaseExecutor(ABC):
    """An `Executor` but for what its device does. Not for use from several threads at once: one step at a time.

    The executor of a device adds `forward`, which begins with `_check`, and what is abstract here. When it is ready to
    place a predictor it sets its first one. A device that counts neurons itself has `layer_counts` and
    `_set_layer_counts` of its own.
    """

    name: str
    block_size = BLOCK_SIZE  # tokens in a KV block

    def __init__(self, setup: ExecutorSetup) -> None:
        config = setup.config
        self.config = config
        self.max_batch_rows = setup.max_batch_rows
        self.context = min(setup.context or config.max_position, setup.block_count * BLOCK_SIZE)
        self.ffn: FfnMode = setup.ffn
        self.deterministic = setup.deterministic
        self._max_blocks = -(-self.context // self.block_size)  # of a sequence
        room = setup.block_count * BLOCK_SIZE // self.block_size
        self.block_count = max(room, setup.sequences * self._max_blocks)
        self._can_skip = config.sparse_ffn
        self._predictor: Predictor | None = None
        self._times: FfnTimes | None = None
        self._measured_layers: int | None = None  # that times are measured on; None: enough
        # Of a layer, as they lie on the device; of experts, those that one row reads.
        # Numbers of the experts that rows of the latest `ffn_inputs` had, (layers, n, chosen_blocks): 0 in a layer
        # without experts, and None in a model without.
        self.kept_experts: NDArray[np.int32] | None = None
        self._ffn_layer_bytes = _ffn_bytes(setup.arrays) / config.ffn_blocks * _neurons(config) / config.ffn_size
        norm = {name: array for name, array in setup.arrays.items() if name.startswith("output_norm.")}
        self._output_norm = {name: np.array(array, np.float32) for name, array in norm.items()}
        self._counted: LayerCounts = np.zeros((config.layer_count, 3), np.int64)
        self._chosen: NDArray[np.int64] = np.zeros(config.ffn_blocks, np.int64)  # rows that chose each FFN block
        self._closed = False
        self.copied: tuple[str, ...] = ()  # matrices that steps read as copies, not where they were given
        self.copies: tuple[NDArray, ...] = ()  # what is read in their place
        self._common = {*vars(self), "_common"}

    @abstractmethod
    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor`. Raises ValueError for a batch that breaks the rules of `Batch`."""

    @property
    def predictor(self) -> Predictor | None:
        """What `ffn` "sparse" and "auto" list neurons with. Setting one raises ValueError when it does not fit."""
        return self._predictor

    @predictor.setter
    def predictor(self, predictor: Predictor | None) -> None:
        if predictor is not None:
            config = self.config
            check_predictor(predictor, config.ffn_blocks, config.ffn_size, config.hidden_size)
        self._predictor = self._times = None  # also where there turns out to be no room for the new one
        self._place_predictor(predictor)
        self._predictor = predictor

    @property
    def ffn_times(self) -> FfnTimes:
        """What "auto" chooses by where there is a predictor: measured with it, when they are first asked for."""
        if self._times is None:
            config, counted, chosen = self.config, self.layer_counts(), self.block_rows()
            share = config.chosen_blocks / (config.expert_count + config.shared_blocks) if config.expert_count else 1.0
            self._times = measure_ffn_times(
                self,
                config.layer_count,
                round(_neurons(config) / share),
                self._ffn_layer_bytes,
                config.hidden_size,
                self._measured_layers,
                gated=config.gated,
                share=share,
            )
            self._set_layer_counts(counted)
            self._set_block_rows(chosen)
        return self._times

    def ffn_path(self, n: int) -> FfnPath:
        """How a step of n rows runs its FFNs."""
        if not self._can_skip:
            return "dense"
        # What is faster depends on how many rows there are, so a row that is to be deterministic is exact on "auto".
        predictor = None if self.deterministic and self.ffn == "auto" else self._predictor
        return choose_path(self.ffn, n, predictor, lambda: self.ffn_times)

    def ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """Run a step with dense FFNs; what each layer's FFN read, after its norm: (layers, n, hidden) float32."""
        ffn, self.ffn = self.ffn, "dense"
        try:
            return self._keep_ffn_inputs(batch)
        finally:
            self.ffn = ffn

    def run_ffns(
        self, inputs: NDArray[np.float32], layers: int | None = None, sparsity_bias: float = 0.0
    ) -> NDArray[np.float32]:
        """Run FFNs without the rest of a step: the sum of what those of the first `layers` give, (n, hidden) float32.

        `inputs` are what enters them after the norm, (n, hidden) for all or (layers, n, hidden) for each. The result
        may be the executor's own buffer: it holds until the next call. Raises ValueError for inputs that do not fit.
        """
        self._check_open()
        config = self.config
        layers, n = config.layer_count if layers is None else layers, inputs.shape[-2]
        if (
            not 1 <= layers <= config.layer_count
            or not 1 <= n <= self.max_batch_rows
            or inputs.shape[-1] != config.hidden_size
        ):
            raise ValueError(f"{layers} layers of FFNs on inputs of shape {inputs.shape}")
        if inputs.ndim == 3 and len(inputs) < layers:
            raise ValueError(f"{layers} layers of FFNs, inputs of {len(inputs)}")
        return self._run_ffns(inputs, layers, sparsity_bias)

    def read_ahead(self, gap: int) -> None:  # noqa: B027
        """Have steps ask the system for listed FFN rows before they read them, up to `gap` apart at once; 0: do not.

        Of no effect where the weights are not read from the model file's memory map.
        """

    def place_block(self, block: int, arrays: Mapping[str, NDArray]) -> None:  # noqa: B027
        """Read the matrices of an FFN block in `arrays` from the next step on: stored parts by name, without layers.

        They must be what the block had before, and outlive it there. Of no effect on an executor with weights of its
        own.
        """

    def block_rows(self) -> NDArray[np.int64]:
        """How many rows of a mixture chose each FFN block since the model was loaded: (ffn_blocks,), a copy."""
        return self._chosen.copy()

    def neuron_counts(self) -> NeuronCounts:
        """Neurons of rows that took the sparse path since the last reset."""
        return NeuronCounts(*map(int, self.layer_counts().sum(0)))

    def layer_counts(self) -> LayerCounts:
        """See `Executor`."""
        return self._counted.copy()

    def expert_counts(self) -> tuple[NDArray[np.int64], ...]:
        """How many rows chose each expert since the model was loaded, on any path: an array a layer with experts."""
        config, rows = self.config, self.block_rows()
        firsts = [config.blocks_of(layer).start for layer in config.expert_layers]
        return tuple(rows[first : first + config.expert_count].copy() for first in firsts)

    def reset_neuron_counts(self) -> None:
        """Start counting anew."""
        self._set_layer_counts(np.zeros_like(self.layer_counts()))

    def close(self) -> None:
        """Give back threads and memory; the executor cannot be used afterwards. Calling it twice is fine.

        Memory goes now, and not with the last one who knows the executor: its own threads know it, in a circle.
        """
        if not self._closed:
            self._closed = True
            self._release()
            self._predictor = self._times = None
            for name in [name for name in vars(self) if name.startswith("_") and name not in self._common]:
                delattr(self, name)

    @abstractmethod
    def _place_predictor(self, predictor: Predictor | None) -> None:
        """Put a predictor that fits the model where steps read it, in place of the one before; None: take it out."""

    @abstractmethod
    def _keep_ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """See `ffn_inputs`; `ffn` is "dense" meanwhile."""

    @abstractmethod
    def _run_ffns(self, inputs: NDArray[np.float32], layers: int, sparsity_bias: float) -> NDArray[np.float32]:
        """See `run_ffns`; the inputs fit."""

    @abstractmethod
    def _release(self) -> None:
        """Give back threads and device memory."""

    def _set_layer_counts(self, counts: LayerCounts) -> None:
        """Count on from these."""
        self._counted = counts

    def _set_block_rows(self, rows: NDArray[np.int64]) -> None:
        """Count on from these."""
        self._chosen = rows

    def _check(self, batch: Batch) -> None:
        """Raise ValueError for a closed executor and for a batch that breaks the rules: kernels check nothing."""
        self._check_open()
        n, wanted = len(batch.tokens), len(batch.logit_rows)
        sequences, blocks = batch.block_tables.shape
        if not 1 <= n <= self.max_batch_rows or wanted > n or sequences > self.max_batch_rows:
            raise ValueError(f"a batch of {n} rows and {wanted} logits; the most is {self.max_batch_rows} rows")
        if blocks > self._max_blocks:
            raise ValueError(f"a block table of {blocks} blocks; the context has {self._max_blocks}")
        if len(batch.positions) != n or len(batch.sequences) != n:
            raise ValueError("tokens, positions and sequences of a batch differ in length")
        for name, values, limit in (
            ("token", batch.tokens, self.config.vocab_size),
            ("position", batch.positions, min(self.context, blocks * self.block_size)),
            ("sequence", batch.sequences, sequences),
            ("block", batch.block_tables, self.block_count),
            ("logit row", batch.logit_rows, n),
        ):
            if values.size and not (values.min() >= 0 and values.max() < limit):
                raise ValueError(f"a {name} lies outside 0..{limit - 1}")

    def _normed(self, residual: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the head reads of rows (n, hidden) of the residual stream, in a new array of that shape."""
        return normalize(self.config, self._output_norm, "output_norm", residual)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the executor is closed")


def _neurons(config: ModelConfig) -> int:
    """Neurons of a layer's FFN, or of the experts that a token has of it, on average."""
    return round(config.token_neurons / config.layer_count)


def _ffn_bytes(arrays: Mapping[str, NDArray]) -> int:
    """Stored bytes of the FFN rows that can be skipped."""
    return sum(part.nbytes for name in ("gate", "up", "down_T") for part in gather_parts(arrays, name).values())
