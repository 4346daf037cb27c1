"""The FFNs of a model without the rest of a step: what decoding spends in them, from the stages that decoding runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import Batch
from svdengine.kernels.cpu.compilation import compile_entry
from svdengine.kernels.cpu.elementwise import copy_row
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.kernels.cpu.ffn_stage import ffn, sparse_together
from svdengine.kernels.cpu.jit import entry, jit
from svdengine.kernels.cpu.quantize import quantize_groups
from svdengine.kernels.cpu.sparse import start_sum
from svdengine.kernels.cpu.step import add_to_residual
from svdengine.kernels.cpu.sync import EPOCH, PARKED, STOP, barrier, exchange, fetch_add, load_shared, wait_for_work
from svdengine.kernels.cpu.team import Team
from svdengine.kernels.cpu.workspace import DENSE, PREDICT

SOURCE, LAYER_BYTES, SUM = range(3)  # what `place` holds: addresses of the inputs and of the result, and a stride


@jit
def ffn_blocks(model, work, inputs, place, member, threads, sync):
    """The FFN of every layer on one row of its own; the sum of what they give goes to place[SUM]."""
    x = work.x + member * work.hidden_stride
    normed = work.normed + member * work.hidden_stride
    start_sum(x, 0, model.hidden_stride, False)
    for layer in range(model.layers):
        copy_row(place[SOURCE] + layer * place[LAYER_BYTES], normed, model.hidden_stride)
        if model.quantized or inputs.sizes[2] == PREDICT:
            quantized = work.hidden_q + member * work.hidden_q_stride
            quantize_groups(normed, quantized, model.hidden_stride, 0, model.hidden_stride)
        if inputs.sizes[2] == DENSE:
            parts = ffn(model, work, inputs, layer, work.normed, 1, member, threads, sync)
        else:
            parts = sparse_together(model, work, inputs, layer, work.normed, member, threads, sync)
        add_to_residual(model, work, work.ffn_add, parts, 1, member, threads)
        barrier(sync, threads)  # the next FFN writes where others may still read
    if member == 0:
        copy_row(x, place[SUM], model.hidden_stride)


@entry
def run_ffn_blocks(model, work, inputs, place, member, threads, sync, seen):
    """As `run` of step.py, for `ffn_blocks`."""
    at = sync.ctypes.data
    if member == 0:
        fetch_add(at + 8 * EPOCH, 1)
        ffn_blocks(model, work, inputs, place, member, threads, at)
        return seen
    exchange(at + 8 * (PARKED + 8 * member), 0)
    while True:
        epoch = wait_for_work(at, member, seen)
        if epoch < 0:
            return seen
        if load_shared(at + 8 * STOP) != 0:
            return np.int64(-1)
        seen = epoch
        ffn_blocks(model, work, inputs, place, member, threads, at)


class FfnBlocks:
    """The FFNs of an executor's model on inputs that real tokens gave them, one token at a time.

    An executor's `ffn` says how they run, and its `neuron_counts` count them. Not to be used while the executor runs.
    `close` ends the threads.
    """

    def __init__(self, executor: CpuExecutor, batch: Batch) -> None:
        """Keep what enters every FFN in a dense step on `batch`, of at least two rows."""
        self._executor = executor
        self._state = executor._model, executor._work, executor._inputs  # the executor's own, of this same package
        self._source = executor.ffn_inputs(batch)  # (layers, n, hidden), rows padded with zeros
        self._sum = np.zeros(executor._model.hidden_stride + 16, np.float32)
        self._place = np.array([0, self._source.strides[0], self._sum.ctypes.data], np.int64)
        self._team = Team(executor.threads, self._member_loop)
        compile_entry(run_ffn_blocks, *self._state, self._place, 0, executor.threads, self._team.sync, 0)
        self._team.start()

    @property
    def rows(self) -> int:
        """Tokens whose inputs were kept."""
        return self._source.shape[1]

    def run(self, row: int, bias: float = 0.0) -> NDArray[np.float32]:
        """Run every layer's FFN on the inputs of one token, as decoding does; the sum of what they give, (hidden,).

        bias: the sparsity bias. The array holds until the next call.
        """
        model, _, inputs = self._state
        inputs.sizes[:3] = 1, 0, self._executor._mode(1)
        inputs.claims[:] = 0
        inputs.sequences[0], inputs.sparsity_bias[0] = 0, bias
        self._place[SOURCE] = self._source.ctypes.data + row * self._source.strides[1]
        with self._team.awake():
            run_ffn_blocks(*self._state, self._place, 0, self._executor.threads, self._team.sync, 0)
        return self._sum[: model.hidden]

    def close(self) -> None:
        """End the threads."""
        self._team.close()

    def _member_loop(self, member: int, sync: NDArray[np.int64], seen: int) -> int:
        return run_ffn_blocks(*self._state, self._place, member, self._executor.threads, sync, seen)
