"""The scheduler: which rows of which sequences the next step computes, and where their keys and values go."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from svdengine.errors import ContextOverflowError
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnMode
from svdengine.scheduling.block_pool import BlockPool
from svdengine.scheduling.forecast import AnswerLengths, most_further_blocks
from svdengine.scheduling.prefix_cache import PrefixCache
from svdengine.scheduling.sequence import Sequence

PREFILL_ROWS = 64  # of a step in which others decode: what bounds the time between their tokens


class Drafter(Protocol):
    """What the scheduler asks about drafted tokens; `svdengine.speculation` has one that decides by measured times."""

    drafted_tokens: int  # so far, those that steps computed
    accepted_tokens: int  # of them, those that were right

    def draft(self, sequence: Sequence, rows: int) -> list[int]:
        """Tokens that are worth trying after a sequence's last one, in a step of `rows` without any drafts."""
        ...

    def own_draft_length(self, sequence: Sequence) -> int:
        """How many tokens are worth drafting by the model itself, for a sequence alone in a step without drafts."""
        ...

    def draft_by_model(self, sequence: Sequence, count: int) -> list[int]:
        """Have the model draft tokens for a sequence that has blocks for `count` more."""
        ...

    def note(self, sequence: Sequence) -> None:
        """Compare the tokens that a step gave a sequence with what was drafted for it."""
        ...

    def note_step(self, rows: int, seconds: float) -> None:
        """Take what a step of decoding sequences, of so many rows, took."""
        ...


@dataclass(frozen=True)
class Chunk:
    """The next `rows` tokens of a sequence, pending or drafted, and how many of their last rows need logits."""

    sequence: Sequence
    rows: int
    logit_rows: int
    drafted: int = 0  # of the rows, those whose tokens may be wrong


@dataclass(frozen=True)
class Step:
    """What one forward pass computes. Logits come in the order of the chunks."""

    batch: Batch
    chunks: tuple[Chunk, ...]
    to_draft: int = 0  # tokens that the model is to draft first, for the only sequence; see `Scheduler.with_draft`
    ffn: FfnMode | None = None  # the path that its sequences want; None: that of the model


class Scheduler:
    """Continuous batching: a step mixes rows of sequences that decode with chunks of prompts.

    Sequences are ordered by priority, lower numbers first, and by arrival among equals. They are admitted in that
    order, when the pool has blocks for all their tokens and for what all are expected to grow by (forecast.py). Where
    it has too few, running ones of a lower priority make room. When a running sequence finds no block all the same,
    the last in order goes back to the queue, and its tokens are computed anew later, but for those that the prefix
    cache still has. So the first in order always advances, and every sequence ends, unless others of a higher priority
    never cease to come.

    Each decoding sequence gets its row of a step. The rest, but no more than `prefill_rows` where any decodes, goes to
    prompts: half of it to the first in order, what remains to the shortest. So a short prompt waits neither for a
    long one nor for several.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_rows: int,
        prefix_cache: PrefixCache | None = None,
        prefill_rows: int = PREFILL_ROWS,
        drafter: Drafter | None = None,
    ) -> None:
        self.pool = pool
        self.prefix_cache = PrefixCache(pool, enabled=False) if prefix_cache is None else prefix_cache
        self.drafter = drafter
        self.preemptions = 0  # so far
        self.prefix_hit_tokens = 0  # so far; tokens that did not have to be computed
        self.prompt_tokens = 0  # so far; computed in chunks of prompts
        self.generated_tokens = 0  # so far
        self._max_rows = max_batch_rows
        self._prefill_rows = prefill_rows
        self._arrivals = 0
        self._turns = 0
        self._lengths = AnswerLengths()
        self._waiting: list[Sequence] = []  # both in order
        self._running: list[Sequence] = []

    @property
    def token_capacity(self) -> int:
        """Longest sequence that the pool can hold."""
        return self.pool.block_count * self.pool.block_size

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    @property
    def waiting_count(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def running_count(self) -> int:
        """Sequences that have been admitted."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ContextOverflowError; see `check_length`."""
        self.check_length(sequence)
        self._arrivals += 1
        sequence.arrival = self._arrivals
        insort(self._waiting, sequence, key=_order)

    def check_length(self, sequence: Sequence) -> None:
        """Raise ContextOverflowError when the whole pool could not hold the sequence."""
        if len(sequence) > self.token_capacity:
            raise ContextOverflowError(
                f"{len(sequence)} tokens need {self.pool.blocks_for(len(sequence))} KV blocks and there are "
                f"{self.pool.block_count}: this model's maximum context length is {self.token_capacity} tokens; "
                f"shorten the prompt, or give the KV cache more tokens (kv_tokens)"
            )

    def schedule(self) -> Step | None:
        """The next step, or None when no sequence is left. It must be followed by `advance` or by `finish`."""
        self._grow_tables()
        self._admit_waiting()
        rows = self._share_rows()
        if not rows:
            return None
        self._draft(rows)
        return _make_step(rows, self._own_draft(rows))

    def with_draft(self, step: Step, draft: list[int]) -> Step:
        """The step with tokens that the model drafted for its only sequence, `step.to_draft` at most."""
        sequence = step.chunks[0].sequence
        sequence.draft = draft
        return _make_step({sequence: step.chunks[0].rows})

    def advance(self, step: Step) -> None:
        """Note that the step was computed."""
        for chunk in step.chunks:
            self.prompt_tokens += chunk.rows if chunk.sequence.pending > 1 else 0
            self.generated_tokens += 1 if chunk.logit_rows and not chunk.sequence.all_logits else 0
            chunk.sequence.cached += chunk.rows - chunk.drafted
            self.prefix_cache.register(chunk.sequence)

    def confirm(self, sequence: Sequence) -> None:
        """Note the tokens that a sequence was given by a step with drafts: all but the last one were computed."""
        if self.drafter is None or sequence.every_row:
            return
        self.drafter.note(sequence)
        self.generated_tokens += sequence.pending - 1
        sequence.cached = len(sequence) - 1
        self.prefix_cache.register(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take out a sequence, whatever state it is in, and free its blocks; the prefix cache knows what they hold."""
        self._lengths.learn(sequence)
        self._take_out(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self.prefix_cache.retire(sequence)

    def shift(self, sequence: Sequence, keep: int) -> None:
        """Drop the older half of what follows the first `keep` tokens, because the context is full."""
        sequence.drop_oldest(keep, self.pool.block_size)
        count = self.pool.blocks_for(sequence.cached)
        self.prefix_cache.release(sequence.block_table[count:])
        del sequence.block_table[count:]

    def restart(self) -> None:
        """Have all tokens computed anew: send running sequences back to the queue, and forget all cached prefixes."""
        while self._running:
            self._preempt(self._running[-1])
        self.prefix_cache.clear()

    def _grow_tables(self) -> None:
        """Give every running sequence blocks for all its tokens, the first in order first."""
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            missing = self.pool.blocks_for(len(sequence)) - len(sequence.block_table)
            if missing <= 0 or self.pool.can_allocate(missing):
                sequence.block_table += self.prefix_cache.allocate(missing) if missing > 0 else []
                position += 1
            else:
                self._preempt(self._running[-1])  # perhaps this one

    def _admit_waiting(self) -> None:
        while self._waiting and len(self._running) < self._max_rows and self._admit(self._waiting[0]):
            insort(self._running, self._waiting.pop(0), key=_order)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens. False when there are too few for it to stay."""
        if self._is_hopeless(sequence):
            return False
        found = self.prefix_cache.extend(sequence)
        missing = self.pool.blocks_for(len(sequence)) - len(sequence.block_table)
        while not self._fits(sequence, missing):
            if not self._running or self._running[-1].priority <= sequence.priority:
                self.prefix_cache.retire(sequence)
                return False
            self._preempt(self._running[-1])
        sequence.block_table += self.prefix_cache.allocate(missing)
        sequence.reused = found
        self.prefix_hit_tokens += found
        return True

    def _is_hopeless(self, sequence: Sequence) -> bool:
        """Whether a sequence finds no room, nor anyone to make it: known without a look at its tokens."""
        running = self._running
        return bool(running) and not self.pool.can_allocate(1) and running[-1].priority <= sequence.priority

    def _fits(self, sequence: Sequence, missing: int) -> bool:
        """Whether there are blocks for a sequence now, and for it and those that run as they grow.

        A sequence alone takes what there is: it is as far as any can get.
        """
        if not self._running or not self.pool.can_allocate(missing):
            return self.pool.can_allocate(missing)
        most = most_further_blocks((*self._running, sequence), self._lengths, self.pool.block_size)
        return self.pool.can_allocate(most)

    def _share_rows(self) -> dict[Sequence, int]:
        """How many rows of the next step each running sequence gets."""
        for sequence in self._running:
            if sequence.pending > 1:  # others may have computed what it needs
                found = self.prefix_cache.extend(sequence)
                sequence.reused += found
                self.prefix_hit_tokens += found
        running = self._of_one_path()
        decoding = [s for s in running if s.pending == 1]
        prompts = [s for s in running if s.pending > 1]
        budget = self._max_rows - len(decoding)
        return dict.fromkeys(decoding, 1) | _prefill(prompts, min(budget, self._prefill_rows) if decoding else budget)

    def _of_one_path(self) -> list[Sequence]:
        """Running sequences whose FFNs take the same path, as those of a step do. Where there are several, by turns."""
        paths = list(dict.fromkeys(s.ffn for s in self._running))
        if len(paths) < 2:
            return self._running
        self._turns += 1
        return [s for s in self._running if s.ffn == paths[self._turns % len(paths)]]

    def _draft(self, rows: dict[Sequence, int]) -> None:
        """Choose what a step tries beyond pending tokens: only where all decode, and blocks are at hand."""
        budget = self._max_rows - sum(rows.values())
        alone = all(sequence.pending == 1 for sequence in rows)
        for sequence in rows:
            sequence.draft = []
            if self.drafter is None or not alone or sequence.every_row:
                continue
            draft = self.drafter.draft(sequence, len(rows))
            sequence.draft = draft[: self._make_room(sequence, min(len(draft), budget))]
            budget -= len(sequence.draft)

    def _own_draft(self, rows: dict[Sequence, int]) -> int:
        """How many tokens the model is to draft itself: only for a sequence that decodes alone, and has no draft."""
        sequence = next(iter(rows))
        if self.drafter is None or len(rows) > 1 or sequence.pending > 1 or sequence.draft or sequence.every_row:
            return 0
        return self._make_room(sequence, min(self.drafter.own_draft_length(sequence), self._max_rows - 1))

    def _make_room(self, sequence: Sequence, count: int) -> int:
        """How many of `count` drafted tokens may follow a sequence; it is given a block for them, if one is blank."""
        if sequence.most_tokens is not None:
            count = max(min(count, sequence.most_tokens - len(sequence) - 1), 0)  # the step gives one more
        if self.pool.blocks_for(len(sequence) + count) > len(sequence.block_table) and self.pool.blank_count:
            sequence.block_table += self.prefix_cache.allocate(1)
        return min(count, len(sequence.block_table) * self.pool.block_size - len(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        self._take_out(sequence)
        insort(self._waiting, sequence, key=_order)
        self.preemptions += 1


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _prefill(prompts: list[Sequence], budget: int) -> dict[Sequence, int]:
    """Rows of prompts, which are in order: half of the budget to the first, what remains to the shortest."""
    rows: Counter[Sequence] = Counter()
    shortest = sorted(prompts, key=lambda s: (s.priority, s.pending))
    for sequence, most in [*((s, -(-budget // 2)) for s in prompts[:1]), *((s, budget) for s in shortest)]:
        more = min(sequence.pending - rows[sequence], most, budget)
        if more:
            rows[sequence] += more
            budget -= more
    return rows


def _make_step(rows: dict[Sequence, int], to_draft: int = 0) -> Step:
    """A step of so many pending tokens of each sequence, and those drafted for it."""
    chunks = tuple(Chunk(s, n + len(s.draft), _logit_rows(s, n), len(s.draft)) for s, n in rows.items())
    return Step(build_batch(chunks), chunks, to_draft, chunks[0].sequence.ffn)


def _logit_rows(sequence: Sequence, rows: int) -> int:
    """Of a chunk of `rows` pending tokens, and its drafted ones."""
    if sequence.hidden:
        return 0
    if sequence.all_logits:
        return rows
    return 1 + len(sequence.draft) if rows == sequence.pending else 0


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
        tokens[start:stop] = (chunk.sequence.tokens[first:end] + chunk.sequence.draft)[: chunk.rows]
        positions[start:stop] = np.arange(first, end)
        sequences[start:stop] = i
        tables[i, : len(chunk.sequence.block_table)] = chunk.sequence.block_table
        lengths[i] = end
        logit_rows.extend(range(stop - chunk.logit_rows, stop))
        start = stop
    biases = np.array([chunk.sequence.sparsity_bias for chunk in chunks], np.float32)
    bias = biases if biases.any() else None
    return Batch(tokens, positions, sequences, tables, lengths, np.array(logit_rows, np.int32), bias)
