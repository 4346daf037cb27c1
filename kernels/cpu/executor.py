"""CpuExecutor: weights where they lie in the file, a KV block pool, and a thread team that runs compiled steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.batch import BLOCK_SIZE, Batch, check_batch
from svdengine.kernels.cpu.aligned import aligned
from svdengine.kernels.cpu.compilation import compile_entry
from svdengine.kernels.cpu.kv_blocks import KvBlocks
from svdengine.kernels.cpu.model import build_model
from svdengine.kernels.cpu.place import place_predictor
from svdengine.kernels.cpu.quantize import quantized_bytes
from svdengine.kernels.cpu.sparse import ACTIVE, COUNTS, PREDICTED, TOTAL
from svdengine.kernels.cpu.step import run
from svdengine.kernels.cpu.team import Team
from svdengine.kernels.cpu.workspace import (
    DENSE,
    GAP,
    KEPT,
    MODE,
    N_ROWS,
    ONLY_FFNS,
    PREDICT,
    SIZES,
    SKIP_ZEROS,
    SOURCE,
    SOURCE_LAYER,
    STAGES,
    WANTED,
    Inputs,
    Workspace,
)
from svdengine.kernels.executor import FfnMode, FfnPath, Logits, NeuronCounts, check_ffn_inputs
from svdengine.kernels.ffn_costs import FfnCosts, choose_path, measure_ffn_costs
from svdengine.kernels.formats import WeightFormat, gather_parts, padded_columns
from svdengine.kernels.predictor import Predictor, largest_rank
from svdengine.kernels.rope import rope_tables
from svdengine.models import ModelConfig

KvDtype = Literal["f32", "f16"]
_KV_DTYPES: Mapping[KvDtype, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16)}


def default_threads() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


class CpuExecutor:
    """Runs a model on the CPU. Not for use from several threads at once: one `forward` at a time.

    `arrays` are the stored parts of the model file by name, layers stacked, and `formats` the format of each matrix;
    both must match `config` (ValueError otherwise). `context` is the longest sequence. Raises DeviceError for a number
    of threads that makes no sense.
    """

    name = "cpu"

    def __init__(
        self,
        config: ModelConfig,
        arrays: Mapping[str, NDArray],
        formats: Mapping[str, WeightFormat],
        *,
        block_count: int,
        max_batch_rows: int = 256,
        context: int | None = None,
        threads: int | None = None,
        kv_dtype: KvDtype = "f16",
        predictor: Predictor | None = None,
        ffn: FfnMode = "dense",
    ) -> None:
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= 1024:
            raise DeviceError(f"threads must lie in 1..1024, found {threads}")
        self.block_count, self.max_batch_rows = block_count, max_batch_rows
        self.context = min(context or config.max_position, block_count * BLOCK_SIZE)
        self._config = config
        tables = _rope(config, self.context)
        self._model, self._keep = build_model(config, arrays, formats, tables)
        ffn_parts = (gather_parts(arrays, name).values() for name in ("gate", "up", "down_T"))
        self._ffn_bytes = sum(part.nbytes for parts in ffn_parts for part in parts)
        self._kv = KvBlocks(self._model, block_count, _KV_DTYPES[kv_dtype])
        self._cache, self.kv_bytes_per_token = self._kv.cache, self._kv.bytes_per_token
        self._inputs = _inputs(
            max_batch_rows, min(block_count, -(-self.context // BLOCK_SIZE)), self.threads, config.layer_count
        )
        self._work = self._allocate_workspace()
        self._kept_predictor: list[NDArray] = []
        self.predictor = predictor
        self.ffn: FfnMode = ffn
        self._team: Team | None = Team(self.threads, self._member_loop)
        self._compile(self._team)
        self._team.start()

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor`. Raises ValueError for a batch that breaks the rules of `Batch`."""
        if self._team is None:
            raise ValueError("the executor is closed")
        self._load(batch)
        self._run()
        return self._logits[: len(batch.logit_rows), : self._config.vocab_size]

    @property
    def predictor(self) -> Predictor | None:
        """What `ffn` "sparse" and "auto" list neurons with. Setting one raises ValueError when it does not fit."""
        return self._predictor

    @predictor.setter
    def predictor(self, predictor: Predictor | None) -> None:
        self._kept_predictor = place_predictor(self._model, predictor)
        self._predictor = predictor
        self._costs: FfnCosts | None = None

    @property
    def ffn_costs(self) -> FfnCosts:
        """What "auto" chooses by where there is a predictor: measured with it, when they are first asked for."""
        if self._costs is None:
            model, counts = self._model, self._inputs.counts.copy()
            layer_bytes = self._ffn_bytes / model.layers
            self._costs = measure_ffn_costs(self, model.layers, model.ffn, layer_bytes, model.hidden)
            self._inputs.counts[:] = counts
        return self._costs

    def ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """Run a dense step of at least two rows; what entered the FFN of every layer, (layers, n, hidden) float32."""
        n, model = len(batch.tokens), self._model
        if n < 2:
            raise ValueError("a step that keeps the FFN's inputs needs at least 2 rows")
        kept = aligned(4 * model.layers * n * model.hidden_stride).view(np.float32)
        mode, self.ffn = self.ffn, "dense"
        self._inputs.sizes[KEPT] = kept.ctypes.data
        try:
            self.forward(batch)
        finally:
            self._inputs.sizes[KEPT] = 0
            self.ffn = mode
        return kept.reshape(model.layers, n, -1)[:, :, : model.hidden]

    def read_ahead(self, gap: int) -> None:
        """Have steps ask the system for listed FFN rows before they read them, up to `gap` apart at once; 0: do not."""
        self._inputs.sizes[GAP] = gap

    def run_ffns(
        self, inputs: NDArray[np.float32], layers: int | None = None, sparsity_bias: float = 0.0
    ) -> NDArray[np.float32]:
        """Run FFNs without the rest of a step: the sum of what those of the first `layers` give, (n, hidden) float32.

        `inputs` are what enters them after the norm, (n, hidden) for all or (layers, n, hidden) for each. The result is
        the executor's own buffer: it holds until the next call.
        """
        if self._team is None:
            raise ValueError("the executor is closed")
        model = self._model
        layers, n = model.layers if layers is None else layers, inputs.shape[-2]
        check_ffn_inputs(inputs, layers, layer_count=model.layers, max_rows=self.max_batch_rows, hidden=model.hidden)
        source = aligned(4 * (inputs.size // model.hidden) * model.hidden_stride).view(np.float32)
        source.reshape(*inputs.shape[:-1], -1)[..., : model.hidden] = inputs
        sizes = self._inputs.sizes
        sizes[[N_ROWS, WANTED, MODE]] = n, 0, self._mode(n)
        sizes[SOURCE], sizes[SOURCE_LAYER] = source.ctypes.data, 4 * n * model.hidden_stride * (inputs.ndim == 3)
        self._inputs.claims[:] = 0
        self._inputs.sequences[:n] = 0
        self._inputs.sparsity_bias[0] = sparsity_bias
        sizes[ONLY_FFNS] = layers
        try:
            self._run()
        finally:
            sizes[ONLY_FFNS] = 0
        return self._residual[:n, : model.hidden]

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """See `BlockStore`."""
        return self._kv.read(blocks)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See `BlockStore`."""
        self._kv.write(blocks, data)

    def neuron_counts(self) -> NeuronCounts:
        """Neurons of rows that took the sparse path since the last reset."""
        predicted, active, total = self._inputs.counts[:, [PREDICTED, ACTIVE, TOTAL]].sum(0)
        return NeuronCounts(int(predicted), int(active), int(total))

    def reset_neuron_counts(self) -> None:
        """Start counting anew."""
        self._inputs.counts[:] = 0

    def close(self) -> None:
        """End the threads. Calling it twice is fine."""
        if self._team is not None:
            self._team.close()
            self._team = None

    def _run(self) -> None:
        assert self._team is not None
        with self._team.awake():
            run(self._model, self._work, self._cache, self._inputs, 0, self.threads, self._team.sync, 0)

    def _compile(self, team: Team) -> None:
        state = (self._model, self._work, self._cache, self._inputs)
        compile_entry(run, *state, 0, self.threads, team.sync, 0)

    def _member_loop(self, member: int, sync: NDArray[np.int64], seen: int) -> int:
        return run(self._model, self._work, self._cache, self._inputs, member, self.threads, sync, seen)

    def _load(self, batch: Batch) -> None:
        """Check the batch and copy it to where compiled code reads it."""
        n, wanted = len(batch.tokens), len(batch.logit_rows)
        sequences, blocks = batch.block_tables.shape
        check_batch(
            batch,
            max_rows=self.max_batch_rows,
            max_blocks=self._inputs.block_tables.shape[1],
            block_count=self.block_count,
            context=self.context,
            vocab_size=self._config.vocab_size,
        )
        inputs = self._inputs
        inputs.sizes[[N_ROWS, WANTED, MODE]] = n, wanted, self._mode(n)
        inputs.claims[:] = 0
        inputs.tokens[:n] = batch.tokens
        inputs.positions[:n] = batch.positions
        inputs.sequences[:n] = batch.sequences
        inputs.block_tables[:sequences, :blocks] = batch.block_tables
        inputs.logit_rows[:wanted] = batch.logit_rows
        inputs.sparsity_bias[:sequences] = 0 if batch.sparsity_bias is None else batch.sparsity_bias

    def ffn_path(self, n: int) -> FfnPath:
        """How a step of n rows runs its FFNs."""
        if not self._model.transposed_down:
            return "dense"
        return choose_path(self.ffn, n, self._predictor, lambda: self.ffn_costs)

    def _mode(self, n: int) -> int:
        return {"dense": DENSE, "predict": PREDICT, "skip_zeros": SKIP_ZEROS}[self.ffn_path(n)]

    def _allocate_workspace(self) -> Workspace:
        model, rows = self._model, max(self.max_batch_rows, self.threads)
        rows = -(-rows // 8) * 8  # a tile may touch rows up to the next multiple of 8

        def stride(columns: int) -> int:
            return 4 * padded_columns(columns)

        def quantized(columns: int) -> int:
            return quantized_bytes(padded_columns(columns))

        hidden, attention = stride(model.hidden), stride(model.heads * model.head_dim)
        ffn, kv = stride(model.ffn), stride(model.kv_heads * model.head_dim)
        rank = largest_rank(model.hidden, model.ffn, relu=True)  # predictors come later
        widest = padded_columns(max(model.hidden, model.ffn, model.heads * model.head_dim))
        scratch = max(24 * widest + 8192, 1 << 18)
        self._logits = aligned(rows * stride(model.vocabulary)).view(np.float32).reshape(rows, -1)
        sizes = {
            "x": hidden, "normed": hidden, "second": hidden, "hidden_q": quantized(model.hidden),
            "q": attention, "k": kv, "v": kv, "attention": attention,
            "attention_q": quantized(model.heads * model.head_dim), "attention_add": hidden, "ffn_add": hidden,
            "gate": ffn, "up": ffn, "ffn_q": quantized(model.ffn), "z": stride(rank), "z_q": quantized(rank),
            "neurons": ffn + 64,
        }  # fmt: skip
        buffers = {name: aligned(rows * size) for name, size in sizes.items()}
        self._residual = buffers["x"].view(np.float32).reshape(rows, -1)
        buffers["scratch"] = aligned(self.threads * scratch)
        buffers["partial"] = aligned(self.threads * model.heads * (4 * model.value_stride + 64))
        self._keep += [*buffers.values(), self._logits]
        strides = {
            "hidden_stride": hidden, "hidden_q_stride": sizes["hidden_q"], "q_stride": attention, "kv_stride": kv,
            "attention_stride": attention, "attention_q_stride": sizes["attention_q"], "ffn_stride": ffn,
            "ffn_q_stride": sizes["ffn_q"], "z_stride": sizes["z"], "z_q_stride": sizes["z_q"],
            "neurons_stride": ffn + 64,
            "logits_stride": stride(model.vocabulary), "scratch_stride": scratch,
        }  # fmt: skip
        addresses = {name: buffer.ctypes.data for name, buffer in buffers.items()}
        return Workspace(**addresses, logits=self._logits.ctypes.data, **strides)


def _rope(config: ModelConfig, context: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if config.rope is None:
        return np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    return rope_tables(config, np.arange(context))


def _inputs(rows: int, blocks: int, threads: int, layers: int) -> Inputs:
    def ints(*shape: int) -> NDArray[np.int32]:
        return np.zeros(shape, np.int32)

    return Inputs(
        sizes=np.zeros(SIZES, np.int64),
        tokens=ints(rows),
        positions=ints(rows),
        sequences=ints(rows),
        block_tables=ints(rows, blocks),
        logit_rows=ints(rows),
        sparsity_bias=np.zeros(rows, np.float32),
        claims=np.zeros(layers * STAGES + 1, np.int64),
        counts=np.zeros((threads, COUNTS), np.int64),
    )
