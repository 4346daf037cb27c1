"""Running a model that is larger than memory: the system is told, before each step, how the FFN's rows will be read.

Sparse decoding picks rows that are scattered, so that reading ahead around them would only push out what is needed.
Instead an executor that can asks for the listed rows, all at once. Where the FFN is dense, as in reading a prompt, its
rows are read in order, and reading ahead is what makes that fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svdengine.files.memory_advice import Advice
from svdengine.files.residency import (
    always_read,
    block_arrays,
    ffn_row_names,
    own_bytes,
    resident_bytes,
    token_block_bytes,
)
from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnMode, HiddenStates, Logits

if TYPE_CHECKING:
    from svdengine.files.kept_experts import KeptExperts
    from svdengine.files.model_file import ModelFile
    from svdengine.kernels.predictor import Predictor

_GAP = 1  # neurons: only neighbours are asked for together; wider gaps read more and were not faster
_FEW = 4  # rows of a step whose lists of neurons together still leave most of the FFN out


def memory_use(executor: object) -> str:
    """One line for people: how a model that was loaded with a bound of memory lies in it."""
    if not isinstance(executor, AdvisingExecutor):
        return "the model fits into that memory"
    told = "the model is larger than that memory: FFN rows are read from its file when they are needed"
    if executor.kept is not None:
        told = executor.kept.describe()
    if executor.missing:
        told += f". Every step takes about {executor.missing / 1e6:,.0f} MB more than that memory"
    return told


class AdvisingExecutor:
    """An `Executor` of a model that is larger than memory: it tells the system how a step will read the FFN's rows.

    `inner` runs the step, and does all else that an executor does.
    """

    def __init__(
        self, inner: BaseExecutor, model_file: ModelFile, memory: int | None = None, kept: KeptExperts | None = None
    ) -> None:
        """`memory`: bytes that the process is to have. `kept`: experts that are kept in memory."""
        self.inner, self.kept = inner, kept
        self._limit = None if memory is None else memory - min(memory // 2, token_block_bytes(model_file))
        # Bytes, about, of the program and of what every token reads that are more than may be taken.
        self.missing = 0 if memory is None else max(0, own_bytes() + always_read(model_file) - memory)
        self.name, self.max_batch_rows = inner.name, inner.max_batch_rows
        self.block_size, self.block_count = inner.block_size, inner.block_count
        self.ffn_path, self.close = inner.ffn_path, inner.close
        self.neuron_counts, self.layer_counts = inner.neuron_counts, inner.layer_counts
        self.reset_neuron_counts, self.expert_counts = inner.reset_neuron_counts, inner.expert_counts
        self._file, self._rows = model_file, ffn_row_names(model_file)
        self._told: dict[str, Advice] = {}

    @property
    def ffn(self) -> FfnMode:
        """See Executor."""
        return self.inner.ffn

    @ffn.setter
    def ffn(self, ffn: FfnMode) -> None:
        self.inner.ffn = ffn

    @property
    def predictor(self) -> Predictor | None:
        """See Executor."""
        return self.inner.predictor

    @predictor.setter
    def predictor(self, predictor: Predictor | None) -> None:
        self.inner.predictor = predictor

    def forward(self, batch: Batch) -> Logits:
        """See Executor."""
        scattered = self._scattered(len(batch.tokens))
        self._advise(scattered)
        self.inner.read_ahead(_GAP if scattered else 0)
        logits = self.inner.forward(batch)
        if self.kept is not None:
            self.kept.after_step(len(batch.tokens))
        self._keep_within()
        return logits

    def hidden_states(self) -> NDArray[np.float32]:
        """See HiddenStates. Raises ValueError where the executor inside has none."""
        if not isinstance(self.inner, HiddenStates):
            raise ValueError(f"the executor {self.inner.name} gives no hidden states")
        return self.inner.hidden_states()

    def ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """See BaseExecutor."""
        self._advise([])
        return self.inner.ffn_inputs(batch)

    @property
    def kept_experts(self) -> NDArray[np.int32] | None:
        """See BaseExecutor."""
        return self.inner.kept_experts

    def _scattered(self, n: int) -> list[str]:
        """The arrays of which a step of n rows picks rows."""
        path = self.inner.ffn_path(n)
        if n > _FEW or path == "dense":
            return []
        if path == "predict":
            return self._rows
        if self._file.config.expert_count:  # a chosen expert is asked for as a whole (kernels/cpu/experts.py)
            return []
        first = "gate" if self._file.config.gated else "up"  # without prediction it is read whole
        return [name for name in self._rows if name != first]

    def _keep_within(self) -> None:
        """Let go of the file's FFN rows where the next token might take more memory than there is; they stay cached."""
        resident = resident_bytes() if self._limit is not None else None
        if resident is not None and self._limit is not None and resident > self._limit:
            self._file.advise(block_arrays(self._file), "dontneed")

    def _advise(self, scattered: list[str]) -> None:
        for advice in ("random", "normal"):
            names = [n for n in self._rows if (n in scattered) == (advice == "random") and self._told.get(n) != advice]
            self._file.advise(names, advice)
            self._told |= dict.fromkeys(names, advice)
