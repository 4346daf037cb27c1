"""What FFNs cost on this machine, dense and sparse, measured on a model's first layers: a step's path is chosen by it.

Dense costs and those of scoring are measured for a few sizes of a step. The rest of the sparse path is the rows of
gate, up and down that are listed: the first use of one in a step reads memory, every further one finds it in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.batch import FfnMode, NeuronCounts

SIZES = (1, 2, 4, 8, 16, 32)  # rows of a step that are measured; beyond them costs grow as between the last two
_BYTES = 64e6  # of weights that are run over: more than caches hold
_REPETITIONS = 3
_NOTHING, _EVERYTHING = 1e30, -1e30  # sparsity biases: no score, or every score, is positive
_MARGIN = 0.9  # sparse must take at most this share of the dense time: it is not exact


@dataclass(frozen=True)
class FfnCosts:
    """Seconds that one layer's FFN takes."""

    neurons: int  # of a layer
    dense: tuple[float, ...]  # at SIZES
    scoring: tuple[float, ...]  # of scoring and listing alone, at SIZES
    first_use: float  # of one row of gate, up or down that is used for the first time in a step
    further_use: float  # of that row for each of the step's other rows

    def dense_seconds(self, rows: int) -> float:
        """A dense FFN of a step of `rows`."""
        return _at(self.dense, rows)

    def sparse_seconds(self, rows: int, predicted: float, active: float) -> float:
        """A sparse FFN of a step of `rows`, which predict and find active these shares of the neurons.

        How far the rows' lists overlap is not known before they are made; here they do so by chance only.
        """
        uses = rows * (predicted + 2 * active)
        first = 1 - (1 - predicted) ** rows + 2 * (1 - (1 - active) ** rows)
        listed = self.neurons * (first * self.first_use + (uses - first) * self.further_use)
        return _at(self.scoring, rows) + listed

    def prefers_sparse(self, rows: int, predicted: float, active: float) -> bool:
        """Whether the sparse path saves enough time to be worth what it misses."""
        return self.sparse_seconds(rows, predicted, active) < _MARGIN * self.dense_seconds(rows)


class FfnRunner(Protocol):
    """An executor that can run FFNs alone."""

    ffn: FfnMode
    max_batch_rows: int

    def run_ffns(self, inputs: NDArray[np.float32], layers: int, sparsity_bias: float = 0.0) -> NDArray[np.float32]:
        """Run the first layers' FFNs on `inputs` (n, hidden)."""
        ...

    def neuron_counts(self) -> NeuronCounts:
        """Neurons counted so far."""
        ...


def measure_ffn_costs(
    runner: FfnRunner, layer_count: int, neurons: int, layer_bytes: float, hidden_size: int
) -> FfnCosts:
    """Time the FFNs of the first layers of a model with a predictor, on random inputs. Takes some tenths of a second.

    `layer_bytes` are the stored bytes of one layer's FFN. The runner's `ffn` is as before afterwards, and its counters
    have counted.
    """
    layers = min(layer_count, max(1, round(_BYTES / layer_bytes)))
    sizes = [n for n in SIZES if n <= runner.max_batch_rows]
    x = np.random.default_rng(0).standard_normal((sizes[-1], hidden_size), np.float32)

    def seconds(n: int, mode: FfnMode, bias: float) -> float:
        runner.ffn = mode
        return _fastest(lambda: runner.run_ffns(x[:n], layers, bias)) / layers

    before = runner.ffn
    try:
        dense = [seconds(n, "dense", 0.0) for n in sizes]
        scoring = [seconds(n, "sparse", _NOTHING) for n in sizes]
        counted = runner.neuron_counts()
        whole = [seconds(n, "sparse", _EVERYTHING) for n in (1, sizes[-1])]
        found = runner.neuron_counts()
    finally:
        runner.ffn = before
    active = (found.active - counted.active) / max(found.predicted - counted.predicted, 1)
    rows = neurons * (1 + 2 * active)  # of gate, up and down that one input uses
    first_use = max(whole[0] - scoring[0], 0.0) / rows
    touched = neurons * (3 if sizes[-1] > 1 else 1 + 2 * active)
    further = max(sizes[-1] * rows - touched, 1.0)
    further_use = min(max(whole[1] - scoring[-1] - touched * first_use, 0.0) / further, first_use)
    return FfnCosts(neurons, _filled(dense), _filled(scoring), first_use, further_use)


def _fastest(run: Callable[[], object]) -> float:
    """The least time of a few runs, in seconds: others only had more disturbances."""
    times = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _filled(costs: list[float]) -> tuple[float, ...]:
    """Costs at all SIZES; those beyond the executor's largest step are never asked for."""
    return (*costs, *[costs[-1]] * (len(SIZES) - len(costs)))


def _at(costs: tuple[float, ...], rows: int) -> float:
    """Costs between and beyond SIZES, linearly."""
    if rows <= SIZES[-1]:
        return float(np.interp(rows, SIZES, costs))
    slope = max(costs[-1] - costs[-2], 0.0) / (SIZES[-1] - SIZES[-2])
    return costs[-1] + (rows - SIZES[-1]) * slope
