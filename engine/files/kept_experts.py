"""Experts that are kept in memory, of a mixture that is larger: those that rows chose most often of late.

The system's page cache keeps what was used last. That is the better rule where a token has experts of the tokens before
it, and popularity the better one where it has not. With a third of the memory for the popular ones neither loses much
(docs/tried.md). Kept experts are copies, in memory that the system cannot take back; steps read them there
(BaseExecutor.place_block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from svdengine.files.residency import always_read, block_arrays, own_bytes
from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.cpu.aligned import large

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile

_SHARE = 1 / 3  # of the memory for experts: what is kept
_CACHED = 1.5  # what the page cache is left at least, in experts of one token: with fewer it finds none of them again
_PERIOD = 16  # steps from one choice to the next
_HALF_LIFE = 256  # rows after which a use counts half
_TWICE, _AHEAD = 1.5, 1.25  # to be kept an expert was used so often, and so much more than the one that goes for it
_LINE = 64


@dataclass(frozen=True)
class ExpertPlan:
    """How many experts are kept."""

    kept: int
    total: int  # of all layers, with those that all rows have
    expert_bytes: int

    def describe(self) -> str:
        """One line for people."""
        size = self.kept * self.expert_bytes
        return f"{self.kept} of {self.total} experts are kept, {size / 1e9:.2f} GB; others come from storage"


def plan_experts(model_file: ModelFile, memory: int, taken: int) -> ExpertPlan:
    """What is kept in `memory` bytes, of which `taken` go to all but the weights."""
    config = model_file.config
    expert = sum(_aligned(model_file.arrays[name][0].nbytes) for name in block_arrays(model_file))
    fit = (memory - taken - always_read(model_file)) / expert
    most = min(_SHARE * fit, fit - _CACHED * config.token_neurons / config.ffn_size)
    return ExpertPlan(min(max(int(most), 0), config.ffn_blocks), config.ffn_blocks, expert)


def kept_experts(
    executor: BaseExecutor, model_file: ModelFile, memory: int | None, kv_bytes: int
) -> KeptExperts | None:
    """What keeps experts within `memory` bytes, beside a KV cache of `kv_bytes`; None without a bound, or experts."""
    if memory is None or not executor.config.expert_count:
        return None
    return KeptExperts(executor, model_file, plan_experts(model_file, memory, own_bytes() + kv_bytes))


class KeptExperts:
    """Copies of the experts that are used most, for an executor that counts them."""

    def __init__(self, executor: BaseExecutor, model_file: ModelFile, plan: ExpertPlan) -> None:
        self.plan = plan
        self._executor, self._file, self._names = executor, model_file, block_arrays(model_file)
        self._pool = large(plan.kept * plan.expert_bytes).reshape(plan.kept, plan.expert_bytes)
        self._slots: dict[int, int] = {}  # FFN block -> row of the pool
        self._scores = np.zeros(plan.total)
        self._steps, self._rows = 0, 0
        self._seen = executor.block_rows()
        self._chosen = self._found = 0

    @property
    def blocks(self) -> frozenset[int]:
        """The FFN blocks that are kept now."""
        return frozenset(self._slots)

    def describe(self) -> str:
        """One line for people."""
        return self.plan.describe()

    def uses(self) -> tuple[int, int]:
        """How often rows chose an expert since the beginning, and how often it was one that is kept."""
        self._count()
        return self._chosen, self._found

    def after_step(self, rows: int) -> None:
        """Now and then choose anew what is kept, after a step of so many rows."""
        self._steps, self._rows = self._steps + 1, self._rows + rows
        if self._steps % _PERIOD == 0:
            self._scores *= 0.5 ** (self._rows / _HALF_LIFE)
            self._rows = 0
            self._count()
            self._choose()

    def _count(self) -> None:
        counts = self._executor.block_rows()
        new, self._seen = counts - self._seen, counts
        self._scores += new
        self._chosen += int(new.sum())
        self._found += int(new[list(self._slots)].sum())

    def _choose(self) -> None:
        coldest = sorted(self._slots, key=lambda block: self._scores[block])
        for block in map(int, np.argsort(-self._scores, kind="stable")[: self.plan.kept]):
            if self._scores[block] < _TWICE:
                return
            if block in self._slots:
                continue
            slot = len(self._slots)
            if slot == self.plan.kept:
                if self._scores[block] < _AHEAD * self._scores[coldest[0]]:
                    return
                slot = self._let_go(coldest.pop(0))
            self._keep(block, slot)

    def _keep(self, block: int, slot: int) -> None:
        room, at, copies = self._pool[slot], 0, {}
        for name in self._names:
            array = self._file.arrays[name][block]
            copy: NDArray[Any] = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            copy[...] = array
            copies[name], at = copy, at + _aligned(array.nbytes)
        self._executor.place_block(block, copies)
        self._file.forget_block(self._names, block)  # or both would lie in memory
        self._slots[block] = slot

    def _let_go(self, block: int) -> int:
        self._executor.place_block(block, {name: self._file.arrays[name][block] for name in self._names})
        return self._slots.pop(block)


def _aligned(size: int) -> int:
    return -(-size // _LINE) * _LINE
