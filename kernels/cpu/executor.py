"""CpuExecutor: weights where they lie in the file, a KV block pool, and a thread team that runs compiled steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.base_executor import BaseExecutor, ExecutorSetup
from svdengine.kernels.batch import Batch
from svdengine.kernels.cores import default_threads
from svdengine.kernels.cpu.aligned import aligned
from svdengine.kernels.cpu.kv_blocks import allocate_kv
from svdengine.kernels.cpu.library import loaded
from svdengine.kernels.cpu.model import build_model, read_whole
from svdengine.kernels.cpu.parts import needed_parts
from svdengine.kernels.cpu.place import place_block, place_predictor
from svdengine.kernels.cpu.record import packed
from svdengine.kernels.cpu.team import Team
from svdengine.kernels.cpu.workspace import (
    AHEAD,
    BLOCK_COUNTS,
    CHOSEN,
    DENSE,
    FIRST_BLOCK,
    GAP,
    KEPT,
    KEPT_EXPERTS,
    MODE,
    N_ROWS,
    ONLY_FFNS,
    PREDICT,
    SIZES,
    SKIP_ZEROS,
    SLOTS,
    SOURCE,
    SOURCE_LAYER,
    STAGES,
    WANTED,
    Inputs,
    Workspace,
    quantized_bytes,
)
from svdengine.kernels.executor import LayerCounts, Logits
from svdengine.kernels.formats import padded_columns
from svdengine.kernels.kv_q8 import key_shape
from svdengine.kernels.predictor import Predictor, largest_rank
from svdengine.kernels.rope import rope_tables
from svdengine.models import ModelConfig


class CpuExecutor(BaseExecutor):
    """Runs a model on the CPU. Raises DeviceError for a number of threads that makes no sense."""

    name = "cpu"

    def __init__(self, setup: ExecutorSetup, *, threads: int | None = None) -> None:
        super().__init__(setup)
        config = setup.config
        self.threads = default_threads() if threads is None else threads
        if not 1 <= self.threads <= 1024:
            raise DeviceError(f"threads must lie in 1..1024, found {threads}")
        tables = _rope(config, self.context)
        self.copied = tuple(read_whole(config, setup.formats)) if setup.interleave else ()
        library = loaded(needed_parts(config, self.copied, deterministic=self.deterministic))
        self._step = library.function("run", 8)
        self._model, self._keep, copies = build_model(
            config,
            setup.arrays,
            setup.formats,
            tables,
            in_panels=self.copied,
            threads=self.threads,
            let_go=setup.let_go,
        )
        self.copies = tuple(copies)
        self._kv = allocate_kv(self._model, self.block_count, setup.kv_dtype, key_shape(config, setup.arrays))
        self._cache, self.kv_bytes_per_token = self._kv.cache, self._kv.bytes_per_token
        self._inputs = _inputs(self.max_batch_rows, self._max_blocks, self.threads, config.ffn_blocks)
        self._work = self._allocate_workspace()
        self._kept_predictor: list[NDArray] = []
        self.predictor = setup.predictor
        self._records = [packed(record) for record in (self._model, self._work, self._cache, self._inputs)]
        self._team = Team(self.threads, self._member_loop, library.function("call_members", 3))
        self._team.start()

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor`. Raises ValueError for a batch that breaks the rules of `Batch`."""
        self._check(batch)
        self._load(batch)
        self._run()
        return self._logits[: len(batch.logit_rows), : self._model.vocabulary]

    def hidden_states(self) -> NDArray[np.float32]:
        """See `HiddenStates`. A step leaves the residual stream as the last layer made it."""
        self._check_open()
        return self._normed(self._residual[: self._inputs.sizes[N_ROWS], : self._model.hidden])

    def read_ahead(self, gap: int) -> None:
        """See `BaseExecutor`."""
        self._inputs.sizes[[GAP, AHEAD]] = gap, 1

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """See `BlockStore`."""
        self._check_open()
        return self._kv.read(blocks)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See `BlockStore`."""
        self._check_open()
        self._kv.write(blocks, data)

    def place_block(self, block: int, arrays: Mapping[str, NDArray]) -> None:
        """See `BaseExecutor`."""
        self._check_open()
        place_block(self._model, block, arrays)

    def layer_counts(self) -> LayerCounts:
        """See `Executor`."""
        counts: LayerCounts = np.add.reduceat(self._block_counters()[..., :CHOSEN].sum(0), self._first_blocks())
        return counts

    def _set_layer_counts(self, counts: LayerCounts) -> None:
        neurons = self._block_counters()[..., :CHOSEN]
        neurons[:] = 0
        neurons[0, self._first_blocks()] = counts

    def block_rows(self) -> NDArray[np.int64]:
        """See `BaseExecutor`."""
        return self._block_counters()[..., CHOSEN].sum(0)

    def _set_block_rows(self, rows: NDArray[np.int64]) -> None:
        self._block_counters()[..., CHOSEN] = 0
        self._block_counters()[0, :, CHOSEN] = rows

    def _first_blocks(self) -> list[int]:
        return [self.config.blocks_of(layer).start for layer in range(self.config.layer_count)]

    def _block_counters(self) -> NDArray[np.int64]:
        """A view of what the threads count: (threads, FFN blocks, BLOCK_COUNTS)."""
        columns = slice(FIRST_BLOCK, FIRST_BLOCK + BLOCK_COUNTS * self.config.ffn_blocks)
        return self._inputs.counts[:, columns].reshape(self.threads, -1, BLOCK_COUNTS)

    def _place_predictor(self, predictor: Predictor | None) -> None:
        self._kept_predictor = place_predictor(self._model, predictor)

    def _keep_ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """Of a step of at least two rows."""
        n, model = len(batch.tokens), self._model
        if n < 2:
            raise ValueError("a step that keeps the FFN's inputs needs at least 2 rows")
        kept = aligned(4 * model.layers * n * model.hidden_stride).view(np.float32)
        experts = np.zeros((model.layers, n, model.chosen_blocks), np.int32)
        self.kept_experts = experts if model.experts else None
        self._inputs.sizes[[KEPT, KEPT_EXPERTS]] = kept.ctypes.data, experts.ctypes.data if model.experts else 0
        try:
            self.forward(batch)
        finally:
            self._inputs.sizes[[KEPT, KEPT_EXPERTS]] = 0
        return kept.reshape(model.layers, n, -1)[:, :, : model.hidden]

    def _run_ffns(self, inputs: NDArray[np.float32], layers: int, sparsity_bias: float) -> NDArray[np.float32]:
        model, n = self._model, inputs.shape[-2]
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

    def _release(self) -> None:
        self._team.close()

    def _run(self) -> None:
        with self._team.awake():
            self._member_loop(0, self._team.sync, 0)

    def _member_loop(self, member: int, sync: NDArray[np.int64], seen: int) -> int:
        addresses = (record.ctypes.data for record in self._records)
        return self._step(*addresses, member, self.threads, sync.ctypes.data, seen)

    def _load(self, batch: Batch) -> None:
        """Copy the batch to where compiled code reads it."""
        n, wanted = len(batch.tokens), len(batch.logit_rows)
        sequences, blocks = batch.block_tables.shape
        inputs = self._inputs
        inputs.sizes[[N_ROWS, WANTED, MODE]] = n, wanted, self._mode(n)
        inputs.claims[:] = 0
        inputs.tokens[:n] = batch.tokens
        inputs.positions[:n] = batch.positions
        inputs.sequences[:n] = batch.sequences
        inputs.block_tables[:sequences, :blocks] = batch.block_tables
        inputs.logit_rows[:wanted] = batch.logit_rows
        inputs.sparsity_bias[:sequences] = 0 if batch.sparsity_bias is None else batch.sparsity_bias

    def _mode(self, n: int) -> int:
        return {"dense": DENSE, "predict": PREDICT, "skip_zeros": SKIP_ZEROS}[self.ffn_path(n)]

    def _allocate_workspace(self) -> Workspace:
        model, rows = self._model, max(self.max_batch_rows, self.threads, SLOTS)
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
            "sums": hidden if model.transposed_down else 64,
            "gate": ffn, "up": ffn, "unscaled": ffn if model.sub_norms else 64,
            "ffn_q": quantized(model.ffn), "z": stride(rank), "z_q": quantized(rank),
            "neurons": ffn + 64,
            "router": 4 * model.router_columns, "chosen": stride(model.chosen_blocks),
            "weights": stride(model.chosen_blocks),
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
            "router_stride": sizes["router"], "chosen_stride": sizes["chosen"],
            "logits_stride": stride(model.vocabulary), "scratch_stride": scratch,
        }  # fmt: skip
        addresses = {name: buffer.ctypes.data for name, buffer in buffers.items()}
        work = Workspace(
            self.deterministic, **addresses, logits=self._logits.ctypes.data, **strides,
            group=0, group_inputs=0, group_rows=0, group_rows_stride=0,
        )  # fmt: skip
        return self._with_group(work, rows) if model.experts else work

    def _with_group(self, work: Workspace, rows: int) -> Workspace:
        """The workspace with buffers for rows that chose the same expert, whose FFN runs in all others as before."""
        normed, added = aligned(rows * work.hidden_stride), aligned(rows * work.hidden_stride)
        quantized = aligned(rows * work.hidden_q_stride)
        lists = aligned(self.threads * 8 * padded_columns(rows))
        normed_at, quantized_at, added_at = (buffer.ctypes.data for buffer in (normed, quantized, added))
        group = packed(work._replace(normed=normed_at, hidden_q=quantized_at, ffn_add=added_at))
        sequences = np.zeros_like(self._inputs.sequences)
        inputs = packed(self._inputs._replace(sequences=sequences))
        self._keep += [normed, quantized, added, lists, group, sequences, inputs]
        return work._replace(
            group=group.ctypes.data,
            group_inputs=inputs.ctypes.data,
            group_rows=lists.ctypes.data,
            group_rows_stride=8 * padded_columns(rows),
        )


def _rope(config: ModelConfig, context: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if config.rope is None:
        return np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    ropes = [config.rope, *([config.local_rope] if config.local_rope is not None else [])]
    cos, sin = zip(*(rope_tables(config, np.arange(context), rope) for rope in ropes), strict=True)
    return np.concatenate(cos), np.concatenate(sin)


def _inputs(rows: int, kv_blocks: int, threads: int, ffn_blocks: int) -> Inputs:
    def ints(*shape: int) -> NDArray[np.int32]:
        return np.zeros(shape, np.int32)

    return Inputs(
        sizes=np.zeros(SIZES, np.int64),
        tokens=ints(rows),
        positions=ints(rows),
        sequences=ints(rows),
        block_tables=ints(rows, kv_blocks),
        logit_rows=ints(rows),
        sparsity_bias=np.zeros(rows, np.float32),
        claims=np.zeros(ffn_blocks * STAGES + 1, np.int64),
        counts=np.zeros((threads, -(-(FIRST_BLOCK + ffn_blocks * BLOCK_COUNTS) // 8) * 8), np.int64),
    )
