"""The scheduler: which rows of which sequences the next step computes, and where their keys and values go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from svdengine.block_pool import BlockPool
from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.prefix_cache import PrefixCache
from svdengine.sequence import Sequence, blocks_for


@dataclass(frozen=True)
class Chunk:
    """The next `rows` pending tokens of a sequence, and how many of their last rows need logits."""

    sequence: Sequence
    rows: int
    logit_rows: int


@dataclass(frozen=True)
class Step:
    """What one forward pass computes. Logits come in the order of the chunks."""

    batch: Batch
    chunks: tuple[Chunk, ...]


class Scheduler:
    """First come, first served, with continuous batching.

    Decoding sequences get their row first; what is left of a step's rows goes to prompts, cut into chunks. A sequence
    is admitted when the pool has blocks for all its tokens. When a running one finds no block, cached prefixes are
    given up, then the sequence that was admitted last goes back to the queue; its tokens are computed anew later.
    """

    def __init__(self, pool: BlockPool, max_batch_rows: int, prefix_cache: PrefixCache | None = None) -> None:
        self.pool = pool
        self.prefix_cache = PrefixCache(pool, capacity=0) if prefix_cache is None else prefix_cache
        self._max_rows = max_batch_rows
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission

    @property
    def token_capacity(self) -> int:
        """Longest sequence that the pool can hold."""
        return self.pool.block_count * BLOCK_SIZE

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next step, or None when no sequence is left. It must be followed by `advance` or by `remove`."""
        plan: dict[Sequence, int] = {}
        budget = self._max_rows
        for sequence in sorted(self._running, key=lambda s: s.pending > 1):
            rows = min(sequence.pending, budget)
            if rows and sequence in self._running and self._make_room(sequence, rows, plan):
                plan[sequence] = rows
            budget = self._max_rows - sum(plan.values())
        while budget and self._waiting and self._admit(self._waiting[0]):
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            plan[sequence] = min(sequence.pending, budget)
            budget -= plan[sequence]
        if not plan:
            return None
        chunks = tuple(Chunk(s, rows, _logit_rows(s, rows)) for s, rows in plan.items())
        return Step(build_batch(chunks), chunks)

    def advance(self, step: Step) -> None:
        """Note that the step was computed."""
        for chunk in step.chunks:
            chunk.sequence.cached += chunk.rows

    def finish(self, sequence: Sequence) -> None:
        """Take out a sequence that is complete; the prefix cache gets its blocks."""
        self._forget(sequence)
        self._store_prefix(sequence)
        sequence.block_table = []
        sequence.cached = 0

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence and free its blocks, whatever state it is in."""
        self._forget(sequence)
        self._release(sequence)

    def shift(self, sequence: Sequence, keep: int) -> None:
        """Drop the older half of what follows the first `keep` tokens, because the context is full."""
        sequence.drop_oldest(keep)
        count = blocks_for(sequence.cached)
        self.pool.release(sequence.block_table[count:])
        del sequence.block_table[count:]

    def _forget(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def _make_room(self, sequence: Sequence, rows: int, plan: dict[Sequence, int]) -> bool:
        """Give the sequence blocks for its next rows. False when it had to be preempted itself."""
        missing = blocks_for(sequence.cached + rows) - len(sequence.block_table)
        while not self.pool.can_allocate(missing):
            if self.prefix_cache.evict():
                continue
            victim = self._running[-1]
            plan.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.pool.allocate(max(missing, 0))
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, reusing a cached prefix. False when there are too few."""
        if not sequence.all_logits:
            sequence.block_table, sequence.cached = self.prefix_cache.take(sequence.tokens, sequence.sparsity_bias)
        missing = blocks_for(len(sequence)) - len(sequence.block_table)
        while not self.pool.can_allocate(missing):
            if not self.prefix_cache.evict():
                self._store_prefix(sequence)
                sequence.block_table, sequence.cached = [], 0
                return False
        sequence.reused = sequence.cached
        sequence.block_table += self.pool.allocate(missing)
        return True

    def _store_prefix(self, sequence: Sequence) -> None:
        cached = sequence.tokens[: sequence.cached]
        self.prefix_cache.store(cached, sequence.block_table, sequence.sparsity_bias)

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.cached = 0


def _logit_rows(sequence: Sequence, rows: int) -> int:
    if sequence.all_logits:
        return rows
    return 1 if rows == sequence.pending else 0


def build_batch(chunks: Items[Chunk]) -> Batch:
    """The arrays of one step; the rows of a chunk are neighbours, in the order of the chunks."""
    rows = sum(chunk.rows for chunk in chunks)
    tokens = np.empty(rows, np.int32)
    positions = np.empty(rows, np.int32)
    sequences = np.empty(rows, np.int32)
    tables = np.zeros((len(chunks), max(len(c.sequence.block_table) for c in chunks)), np.int32)
    lengths = np.empty(len(chunks), np.int32)
    logit_rows: list[int] = []
    start = 0
    for i, chunk in enumerate(chunks):
        first, end = chunk.sequence.cached, chunk.sequence.cached + chunk.rows
        stop = start + chunk.rows
        tokens[start:stop] = chunk.sequence.tokens[first:end]
        positions[start:stop] = np.arange(first, end)
        sequences[start:stop] = i
        tables[i, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
        lengths[i] = end
        logit_rows.extend(range(stop - chunk.logit_rows, stop))
        start = stop
    biases = np.array([chunk.sequence.sparsity_bias for chunk in chunks], np.float32)
    bias = biases if biases.any() else None
    return Batch(tokens, positions, sequences, tables, lengths, np.array(logit_rows, np.int32), bias)
