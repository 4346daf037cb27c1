"""How many FFN neurons were computed, of all that a dense FFN computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdengine.kernels.batch import Executor


@dataclass(frozen=True)
class NeuronShare:
    """Neurons of the rows that took the sparse path, summed over layers; rows that took the dense one do not count."""

    predicted: int = 0  # predicted active: their gate rows were read
    active: int = 0  # of those, active: their up and down rows were read
    total: int = 0

    def __add__(self, other: NeuronShare) -> NeuronShare:
        return NeuronShare(self.predicted + other.predicted, self.active + other.active, self.total + other.total)

    def __sub__(self, other: NeuronShare) -> NeuronShare:
        return NeuronShare(self.predicted - other.predicted, self.active - other.active, self.total - other.total)

    @property
    def predicted_density(self) -> float | None:
        """Share of neurons that were predicted active; None where nothing ran sparse."""
        return self.predicted / self.total if self.total else None

    @property
    def active_density(self) -> float | None:
        """Share of neurons that were computed in full; None where nothing ran sparse."""
        return self.active / self.total if self.total else None


def neurons_so_far(executor: Executor) -> NeuronShare:
    """What an executor counted since its counters were reset; all 0 when it runs no predictor."""
    if getattr(executor, "predictor", None) is None:
        return NeuronShare()
    counts = executor.neuron_counts()
    return NeuronShare(int(counts.predicted), int(counts.active), int(counts.total))
