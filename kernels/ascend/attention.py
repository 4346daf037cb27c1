"""Causal attention over the KV block pool.

Rows that are alone in their sequence, as in decoding, attend in one fused operator that reads blocks through their
tables. Everything else, prompts and sliding windows above all, goes sequence by sequence: gather its blocks, two
batched products and a softmax, with a mask that the host made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.ascend.device import AscendDevice
from svdengine.kernels.ascend.operator_calls import VARYING
from svdengine.kernels.ascend.operators import add, gather, permute, scale
from svdengine.kernels.ascend.tensor import Tensor
from svdengine.kernels.ascend.workspace import Workspace, mask_piece
from svdengine.models import ModelConfig

FUSED = "aclnnIncreFlashAttentionV4"
_PRECISE = 0
_BATCH_PRODUCT = "aclnnBatchMatMul"


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of a batch that belong to one sequence."""

    first: int  # row
    rows: int
    length: int  # tokens of the sequence in the cache
    mask: int  # where its masks begin in Workspace.masks


@dataclass(frozen=True)
class Attending:
    """How the rows of a step attend; the same in all layers."""

    chunks: tuple[Chunk, ...]  # in the order of their rows
    alone: int  # leading rows that are each alone in their sequence: as many chunks
    lengths: tuple[int, ...]  # tokens that these see
    windowed_masks: int  # where the masks of layers with a window begin

    def fused(self, window: int, fused: bool) -> int:
        """Leading rows, and chunks, that the fused operator takes in a layer with this window (0: none)."""
        return self.alone if fused and not (window and self.alone and max(self.lengths) > window) else 0


def alone_first(sequences: NDArray[np.int32]) -> NDArray[np.intp]:
    """An order of rows in which those that are alone in their sequence come first."""
    _, which, counts = np.unique(sequences, return_inverse=True, return_counts=True)
    return np.argsort(counts[which] > 1, kind="stable")


def takes_fused(device: AscendDevice, config: ModelConfig) -> bool:
    """Whether the fused operator is there and takes the model's heads ("aclnnIncreFlashAttentionV4", constraints).

    Whether it works on this very device, fused_trial.py finds out.
    """
    kv = config.kv_head_count * config.head_dim
    fits = config.head_dim % 16 == 0 and config.head_dim <= 512 and config.head_count <= 256 and kv < 1 << 16
    grouped = config.head_count // config.kv_head_count <= 64
    return device.soc.has(FUSED) and fits and grouped and device.cann.find(FUSED + "GetWorkspaceSize") is not None


def chunk_rows(sequences: NDArray[np.int32], positions: NDArray[np.int32], mask_items: int) -> Attending:
    """How rows with these sequences and positions attend; those alone in their sequence come first."""
    bounds = [0, *(np.flatnonzero(np.diff(sequences)) + 1).tolist(), len(sequences)]
    spans = [(first, last - first) for first, last in pairwise(bounds)]
    alone = next((i for i, (_, rows) in enumerate(spans) if rows > 1), len(spans))
    chunks, mask = {}, 0
    for index in [*range(alone, len(spans)), *range(alone)]:  # what surely needs a mask has its place first
        first, rows = spans[index]
        length = int(positions[first + rows - 1]) + 1
        chunks[index] = Chunk(first, rows, length, mask)
        mask += mask_piece(rows, length)
    lengths = tuple((positions[:alone] + 1).tolist())
    return Attending(tuple(chunks[i] for i in range(len(spans))), alone, lengths, mask_items // 2)


def write_masks(
    device: AscendDevice, work: Workspace, attending: Attending, positions: NDArray[np.int32], window: int, fused: bool
) -> None:
    """Write what is added to the scores of the rows: 0 where a row sees a token, else minus infinity.

    window: of the layers that have one, 0 if none has. Rows that the fused operator attends need no mask.
    """
    _write_mask(device, work.masks, attending.chunks[attending.fused(0, fused) :], positions, 0)
    if window:
        chunks = attending.chunks[attending.fused(window, fused) :]
        _write_mask(device, _windowed(work, attending), chunks, positions, window)


class LayerAttention:
    """work.attended = attention of rows q (n, heads * head_dim) over a layer's keys and values.

    Its operators depend on the lengths of the sequences: see AscendDevice.vary. `keep`: it will be asked often.
    """

    def __init__(
        self,
        device: AscendDevice,
        config: ModelConfig,
        work: Workspace,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        window: int,
        fused: bool,
        keep: bool,
    ) -> None:
        self._device, self._config, self._work = device, config, work
        self._q, self._keys, self._values = q, keys, values
        self._window, self._fused, self._keep = window, fused, keep
        self._prepared: dict[int, Callable[[tuple[int, ...]], None]] = {}  # the fused operator, by its rows

    def attend(self, attending: Attending) -> None:
        """Start it for the step's sequences."""
        alone = attending.fused(self._window, self._fused)
        if alone:
            self._attend_fused(attending.lengths)
        masks = _windowed(self._work, attending) if self._window else self._work.masks
        for chunk in attending.chunks[alone:]:
            _attend_sequence(self._device, self._config, self._work, chunk, masks, self._q, self._keys, self._values)

    def _attend_fused(self, lengths: tuple[int, ...]) -> None:
        """One token of each of some sequences. Lengths are host values, so that it is planned anew each step."""
        n = len(lengths)
        if n in self._prepared:
            self._prepared[n](lengths)
        elif self._keep:
            self._prepared[n] = self._device.prepare(FUSED, *self._arguments(n, VARYING))
            self._prepared[n](lengths)
        else:
            self._device.run(FUSED, *self._arguments(n, lengths))

    def _arguments(self, n: int, lengths: object) -> tuple[object, ...]:
        work, q = self._work, self._q.rows(0, n)
        tables, out = work.inputs.tables.rows(0, n), work.attended.rows(0, n)
        return fused_arguments(self._config, q, self._keys, self._values, work.block_size, lengths, tables, out)


def fused_arguments(
    config: ModelConfig,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_size: int,
    lengths: object,
    tables: Tensor,
    out: Tensor,
) -> tuple[object, ...]:
    """The arguments of the fused operator for rows q (n, heads * head_dim), over a layer's pools of blocks."""
    n, width = q.shape
    blocks = (keys.shape[0], block_size, config.kv_head_count * config.head_dim)
    return (
        q.reshape(n, 1, width), (keys.reshape(*blocks),), (values.reshape(*blocks),),
        None, None, lengths, None, None, None, None, None, None, None, tables, None,
        config.head_count, config.attention_scale, b"BSH", config.kv_head_count, block_size, _PRECISE,
        out.reshape(n, 1, width),
    )  # fmt: skip


def _windowed(work: Workspace, attending: Attending) -> Tensor:
    half = work.masks.size - attending.windowed_masks
    return work.masks.rows(attending.windowed_masks, half)


def _write_mask(
    device: AscendDevice, masks: Tensor, chunks: Sequence[Chunk], positions: NDArray[np.int32], window: int
) -> None:
    end = max((chunk.mask + mask_piece(chunk.rows, chunk.length) for chunk in chunks), default=0)
    values = np.zeros(end, np.float16)
    for chunk in chunks:
        distance = positions[chunk.first : chunk.first + chunk.rows, None] - np.arange(chunk.length)
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        values[chunk.mask : chunk.mask + hidden.size][hidden.ravel()] = -np.inf
    device.write(masks.leading(len(values)), values)


def _attend_sequence(
    device: AscendDevice,
    config: ModelConfig,
    work: Workspace,
    chunk: Chunk,
    masks: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """The rows of one sequence, as many at once as their scores have room for."""
    kv, head, length = config.kv_head_count, config.head_dim, chunk.length
    blocks = -(-length // work.block_size)
    table = work.inputs.tables.rows(chunk.first, 1).reshape(work.blocks).leading(blocks)
    for source, gathered in ((keys, work.gathered_k), (values, work.gathered_v)):
        gather(device, source, table, gathered.leading(blocks * source.shape[1]).reshape(blocks, source.shape[1]))

    # What lies in the last block beyond the sequence is not looked at.
    shape = (length, kv, head)
    turned_keys = work.permuted_k.leading(length * kv * head).reshape(kv, head, length)
    turned_values = work.permuted_v.leading(length * kv * head).reshape(kv, length, head)
    permute(device, work.gathered_k.leading(length * kv * head).reshape(*shape), (1, 2, 0), turned_keys)
    permute(device, work.gathered_v.leading(length * kv * head).reshape(*shape), (1, 0, 2), turned_values)

    mask = masks.rows(chunk.mask, chunk.rows * length).reshape(chunk.rows, length)
    most = max(1, work.score_items // (config.head_count * length))
    for first in range(0, chunk.rows, most):
        n = min(most, chunk.rows - first)
        rows = chunk.first + first, n
        _attend_rows(
            device, config, work, q.rows(*rows), turned_keys, turned_values, mask.rows(first, n),
            work.attended.rows(*rows),
        )  # fmt: skip


def _attend_rows(
    device: AscendDevice,
    config: ModelConfig,
    work: Workspace,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    out: Tensor,
) -> None:
    """out (n, heads * head_dim): rows q of a sequence over keys (kv, head_dim, t) and values (kv, t, head_dim)."""
    n, t = mask.shape
    kv, head = config.kv_head_count, config.head_dim
    group = config.head_count // kv
    size = n * config.head_count

    # Neighbouring query heads share a kv head: (kv, group * n, head_dim).
    queries = work.permuted_q.leading(size * head)
    permute(device, q.reshape(n, kv, group, head), (1, 2, 0, 3), queries.reshape(kv, group, n, head))
    scale(device, queries, config.attention_scale)
    scores, shares = work.scores.leading(size * t), work.shares.leading(size * t)
    grouped = (kv, group * n, t)
    device.run(_BATCH_PRODUCT, queries.reshape(kv, group * n, head), keys, scores.reshape(*grouped), 0)
    add(device, scores.reshape(config.head_count, n, t), mask)
    device.run("aclnnSoftmax", scores.reshape(*grouped), -1, shares.reshape(*grouped))
    mixed = work.mixed.leading(size * head)
    device.run(_BATCH_PRODUCT, shares.reshape(*grouped), values, mixed.reshape(kv, group * n, head), 0)
    permute(device, mixed.reshape(kv, group, n, head), (2, 0, 1, 3), out.reshape(n, kv, group, head))
