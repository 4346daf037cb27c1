"""Running a model that is larger than memory: the system is told, before each step, how the FFN's rows will be read.

Sparse decoding picks rows that are scattered, so that reading ahead around them would only push out what is needed.
Instead an executor that can asks for the listed rows, all at once. Where the FFN is dense, as in reading a prompt, its
rows are read in order, and reading ahead is what makes that fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from svdengine.files.memory_advice import Advice
from svdengine.files.residency import ffn_row_names
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import Executor, FfnMode, FfnPath, Logits, NeuronCounts

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile
    from svdengine.kernels.predictor import Predictor

_GAP = 1  # neurons: only neighbours are asked for together; wider gaps read more and were not faster
_FEW = 4  # rows of a step whose lists of neurons together still leave most of the FFN out


@runtime_checkable
class _ReadsAhead(Protocol):
    def read_ahead(self, gap: int) -> None: ...


class AdvisingExecutor:
    """An executor of a model that is larger than memory: it tells the system how each step will read the FFN's rows."""

    def __init__(self, inner: Executor, model_file: ModelFile) -> None:
        self.inner = inner
        self.name, self.block_count, self.max_batch_rows = inner.name, inner.block_count, inner.max_batch_rows
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
        if isinstance(self.inner, _ReadsAhead):
            self.inner.read_ahead(_GAP if scattered else 0)
        return self.inner.forward(batch)

    def ffn_inputs(self, batch: Batch) -> NDArray[np.float32]:
        """What enters the FFN of every layer in a dense step; only of executors that have it."""
        self._advise([])
        inputs: NDArray[np.float32] = self.inner.ffn_inputs(batch)  # type: ignore[attr-defined]
        return inputs

    def ffn_path(self, n: int) -> FfnPath:
        """See Executor."""
        return self.inner.ffn_path(n)

    def neuron_counts(self) -> NeuronCounts:
        """See Executor."""
        return self.inner.neuron_counts()

    def reset_neuron_counts(self) -> None:
        """See Executor."""
        self.inner.reset_neuron_counts()

    def close(self) -> None:
        """See Executor."""
        self.inner.close()

    def _scattered(self, n: int) -> list[str]:
        """The arrays of which a step of n rows picks rows."""
        path = self.ffn_path(n)
        if n > _FEW or path == "dense":
            return []
        if path == "predict":
            return self._rows
        first = "gate" if self._file.config.gated else "up"  # without prediction it is read whole
        return [name for name in self._rows if name != first]

    def _advise(self, scattered: list[str]) -> None:
        for advice in ("random", "normal"):
            names = [n for n in self._rows if (n in scattered) == (advice == "random") and self._told.get(n) != advice]
            self._file.advise(names, advice)
            self._told |= dict.fromkeys(names, advice)
