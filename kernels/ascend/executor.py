"""AscendExecutor: weights and KV blocks in an NPU's memory, steps by CANN's operators, sparse FFNs by own kernels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import DeviceError
from svdengine.kernels.ascend import kv_cache
from svdengine.kernels.ascend.attention import (
    Attending,
    alone_first,
    chunk_rows,
    takes_fused,
    write_masks,
)
from svdengine.kernels.ascend.custom_ops import CustomOps
from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.fused_trial import why_not_fused
from svdengine.kernels.ascend.kv_cache import BLOCK_SIZE, allocate_cache, kv_bytes_per_token
from svdengine.kernels.ascend.model import build_model, device_bytes
from svdengine.kernels.ascend.operator_calls import Action
from svdengine.kernels.ascend.operators import add, needed_operators
from svdengine.kernels.ascend.sparse import PlacedPredictor, allocate_sparse, place_predictor, why_not
from svdengine.kernels.ascend.step import Current, Shape, State, run_ffn, run_step
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.ascend.workspace import allocate_workspace, spare_items, workspace_bytes
from svdengine.kernels.base_executor import BaseExecutor, ExecutorSetup
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnPath, Logits
from svdengine.kernels.predictor import Predictor

_KEPT_ROWS = 8  # steps of up to that many rows come back often: they are recorded, and their operators' plans kept
_RESERVE = 512 << 20  # bytes that are left to the runtime and to operators' workspace


class AscendExecutor(BaseExecutor):
    """Runs a model on an open device, in float16.

    `custom_ops` are the kernels of the sparse FFN, or one line on why there are none: then FFNs run dense. The device
    is closed with the executor, and not where it cannot be made. Raises DeviceError when CANN lacks an operator, or
    the memory does not hold the model.
    """

    name = "ascend"
    block_size = BLOCK_SIZE

    def __init__(
        self, setup: ExecutorSetup, *, device: AscendDevice, custom_ops: CustomOps | str = "no kernels were given"
    ) -> None:
        super().__init__(setup)
        config, rows = setup.config, self.max_batch_rows
        if setup.kv_dtype != "f16":
            raise DeviceError(
                f"the KV cache on Ascend is f16, found --kv-dtype {setup.kv_dtype}; use f16, or --device cpu"
            )
        if config.post_norms or config.local_rope is not None:
            raise DeviceError(
                f"models of the family {config.family} do not run on Ascend: their residual stream grows beyond what"
                " float16 holds, which is what runs there; use --device cpu or cuda"
            )
        if config.sub_norms:
            raise DeviceError(
                f"models of the family {config.family} do not run on Ascend yet: they have norms before the attention's"
                " output projection and before down; use --device cpu"
            )
        for name in needed_operators(config, device.soc):
            device.cann.function(f"{name}GetWorkspaceSize")
        self._device = device
        self._ffn_layer_bytes = 2.0 * (3 if config.gated else 2) * config.ffn_size * config.hidden_size  # float16
        self._said: set[str] = set()
        device.use()
        self.kv_bytes_per_token = kv_bytes_per_token(config)
        size = self.block_size
        cache_bytes = self.kv_bytes_per_token * size * self.block_count
        buffers = workspace_bytes(config, rows, self.context, size)
        spare = spare_items(config, rows, self.context) if device.soc.lacks else 0
        buffers += 2 * spare
        check_memory(device, device_bytes(config, setup.formats), buffers, cache_bytes)
        self._no_kernels = custom_ops if isinstance(custom_ops, str) else why_not(config, None, device.vector_cores)
        sparse = None
        if config.sparse_ffn and self._no_kernels is None and not isinstance(custom_ops, str):
            sparse = allocate_sparse(device, config, custom_ops, rows)
        if spare:
            device.make_spare(spare)
        self._state = State(
            device=device,
            model=build_model(device, config, setup.arrays, setup.formats, self.context),
            work=allocate_workspace(device, config, rows, self.context, size),
            cache=allocate_cache(device, config, self.block_count, size),
            current=Current(Attending((), 0, (), 0), ()),
            fused=self._fuses(device),
            sparse=sparse,
        )
        self._recordings: dict[Shape, list[Action]] = {}
        self._placed: PlacedPredictor | None = None
        self.predictor = setup.predictor

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor`. Raises ValueError for a batch that breaks the rules of `Batch`."""
        shape = self._load(batch)
        self._run(shape)
        self._count(shape.n, self.config.layer_count, shape.ffn)
        logits = self._device.read(self._state.work.logits.rows(0, shape.wanted)).astype(np.float32)
        return logits * np.float32(self.config.logit_scale)

    def ffn_path(self, n: int) -> FfnPath:
        """How a step of n rows runs its FFNs. Where sparse was wanted and cannot be, one line says why, once."""
        reason = self._why_dense(self._predictor) if self._can_skip else None
        if reason is None:
            return super().ffn_path(n)
        if self.ffn != "dense" and self._predictor is not None and reason not in self._said:
            self._said.add(reason)
            print(f"all FFNs run dense: {reason}", file=sys.stderr)
        return "dense"

    def _fuses(self, device: AscendDevice) -> bool:
        """Whether attention of decoded rows is one operator. One that does not work is named, in one line."""
        if not takes_fused(device, self.config):
            return False
        reason = why_not_fused(device, self.config, self.block_size)
        if reason is not None:
            print(f"attention runs in several operators, which takes longer: {reason}", file=sys.stderr)
        return reason is None

    def _place_predictor(self, predictor: Predictor | None) -> None:
        self._device.use()
        self._recordings.clear()  # they hold the addresses of what was placed before
        if self._placed is not None:
            placed, self._placed = self._placed, None
            self._device.free(placed.tensors)
        if predictor is not None and self._why_dense(predictor) is None:
            self._placed = place_predictor(self._device, self.config, predictor, self.max_batch_rows)

    def _keep_ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        shape = self._load(batch)
        kept: list[NDArray[np.float32]] = []

        def keep(index: int, x: Tensor) -> None:
            kept.append(self._device.read(x).astype(np.float32))

        run_step(self._state, self._placed, shape, keep)
        self._device.synchronize()
        inputs = np.empty((len(kept), shape.n, self.config.hidden_size), np.float32)
        inputs[:, alone_first(batch.sequences)] = kept
        return inputs

    def _run_ffns(self, inputs: NDArray[np.float32], layers: int, sparsity_bias: float) -> NDArray[np.float32]:
        device, work, model = self._device, self._state.work, self._state.model
        n, hidden = inputs.shape[-2:]
        path, rows = self.ffn_path(n), inputs.astype(np.float16)
        device.use()
        device.repeat = n <= _KEPT_ROWS
        total = work.x[0].rows(0, n)
        device.write(total, np.zeros((n, hidden), np.float16))
        device.write(work.inputs.sparsity_bias, np.full(n, sparsity_bias, np.float32))
        x = work.normed.rows(0, n)
        for index in range(layers):
            if inputs.ndim == 3 or index == 0:
                device.synchronize()  # what is overwritten may still be read
                device.write(x, rows[index] if inputs.ndim == 3 else rows)
            added = run_ffn(self._state, self._placed, index, model.layers[index], x, path)
            add(device, total, added, self.config.residual_scale)
        found = device.read(total).astype(np.float32)
        self._count(n, layers, path)
        return found

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[Any]:
        """See `BlockStore`."""
        self._check_open()
        self._device.use()
        return kv_cache.read_blocks(self._device, self._state.cache, self.config, blocks)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[Any]) -> None:
        """See `BlockStore`. Raises ValueError for data of another shape or type."""
        self._check_open()
        self._device.use()
        kv_cache.write_blocks(self._device, self._state.cache, self.config, blocks, data)

    def _release(self) -> None:
        self._device.close()

    def _run(self, shape: Shape) -> None:
        """Start a step. Of few rows, it is recorded the first time and repeated from then on."""
        device = self._device
        if shape.n > _KEPT_ROWS:
            run_step(self._state, self._placed, shape)
        elif shape not in self._recordings:
            self._recordings[shape] = device.record(lambda: run_step(self._state, self._placed, shape))
        else:
            for action in self._recordings[shape]:
                action()

    def _load(self, batch: Batch) -> Shape:
        """Check the batch, copy it to the device, and say which operators it takes."""
        self._check(batch)
        batch = _reordered(batch, alone_first(batch.sequences))
        n, wanted = len(batch.tokens), len(batch.logit_rows)
        path = self.ffn_path(n)  # may run something, to measure
        device, work, config = self._device, self._state.work, self.config
        device.use()
        device.repeat = n <= _KEPT_ROWS
        tables = np.zeros((n, work.blocks), np.int32)
        tables[:, : batch.block_tables.shape[1]] = batch.block_tables[batch.sequences]
        blocks = np.take_along_axis(tables, batch.positions[:, None] // self.block_size, 1)[:, 0]
        slots = blocks * self.block_size + batch.positions % self.block_size
        header = np.zeros((5, work.inputs.row_words), np.int32)
        header[0, :n], header[1, :n] = batch.tokens, batch.positions
        header[2, :n] = slots
        header[3, :wanted] = batch.logit_rows
        if batch.sparsity_bias is not None:
            bias = np.asarray(batch.sparsity_bias, np.float32)[batch.sequences]
            header[4, :n] = bias.view(np.int32)
        device.write(work.inputs.words, np.concatenate([header.reshape(-1), tables.reshape(-1)]))
        attending = chunk_rows(batch.sequences, batch.positions, work.masks.size)
        window = config.sliding_window if config.sliding_window_layers else 0
        write_masks(device, work, attending, batch.positions, window, self._state.fused)
        self._state.current.attending, self._state.current.slots = attending, tuple(slots.tolist())
        return Shape(n, wanted, path)

    def _count(self, n: int, layers: int, path: FfnPath) -> None:
        """Add up what the kernels of a sparse step counted; this waits for them."""
        if path == "dense" or self._state.sparse is None:
            return
        counts = self._device.read(self._state.sparse.counts.rows(0, n))[:, :layers, :, :, 0].sum((0, 3))
        total = n * self.config.ffn_size
        self._counted[:layers, 0] += counts[:, 0] if path == "predict" else total
        self._counted[:layers, 1] += counts[:, 1]
        self._counted[:layers, 2] += total

    def _why_dense(self, predictor: Predictor | None) -> str | None:
        """One line on why FFNs cannot run sparse here with this predictor, or None."""
        if self._no_kernels is not None:
            return self._no_kernels
        return why_not(self.config, predictor, self._device.vector_cores)


def _reordered(batch: Batch, order: NDArray[np.intp]) -> Batch:
    """The same step with its rows in another order."""
    place = np.empty(len(order), np.int32)  # of each row
    place[order] = np.arange(len(order), dtype=np.int32)
    rows = {name: getattr(batch, name)[order] for name in ("tokens", "positions", "sequences")}
    return replace(batch, **rows, logit_rows=place[batch.logit_rows])


def check_memory(device: AscendDevice, weights: int, buffers: int, cache: int) -> None:
    """Raise DeviceError, saying how much is missing, unless the device has room for all."""
    needed, free = weights + buffers + cache + _RESERVE, device.free_bytes()
    if needed > free:
        gib = 2.0**30
        raise DeviceError(
            f"the model needs {needed / gib:.2f} GiB on the NPU ({weights / gib:.2f} weights, {cache / gib:.2f} KV"
            f" cache, {(buffers + _RESERVE) / gib:.2f} buffers), {(needed - free) / gib:.2f} GiB more than is free;"
            " use a smaller context, a smaller weight format, or --device cpu"
        )
