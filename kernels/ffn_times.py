"""How long FFNs take on this machine, dense and sparse, by a model's first layers: a step's path is chosen by it.

Dense FFNs and scoring are measured for a few sizes of a step. The rest of the sparse path is the rows of gate, up and
down that are listed; without a gate, up has its part. The first use of one in a step reads memory, every further one
finds it in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.executor import FfnMode, FfnPath, NeuronCounts

if TYPE_CHECKING:
    from svdengine.kernels.predictor import Predictor

SIZES = (1, 2, 8, 32)  # rows of a step that are measured; beyond them times grow as between the last two
_BYTES = 64e6  # of weights that are run over: more than caches hold
_REPETITIONS = 2
_NOTHING = 1e30  # a sparsity bias with which no score is positive
_SHARE = 0.25  # of neurons that are predicted while the rows' times are measured: lists with gaps, as they will be
_MARGIN = 0.9  # prediction must take at most this share of the time of exact paths: it is not exact


@dataclass(frozen=True)
class FfnTimes:
    """Seconds that one layer's FFN takes."""

    neurons: int  # of a layer
    dense: tuple[float, ...]  # at `sizes`
    scoring: tuple[float, ...]  # of scoring and listing alone, at `sizes`
    first_use: float  # of one row of gate, up or down that is used for the first time in a step
    further_use: float  # of that row for each of the step's other rows
    later: int = 2  # matrices of which the active neurons' rows are read: up and down, or without a gate down alone
    share: float = 1.0  # of a layer's neurons that a row has: those of its experts
    sizes: tuple[int, ...] = SIZES

    def dense_seconds(self, rows: int) -> float:
        """A dense FFN of a step of `rows`."""
        return _at(self.sizes, self.dense, rows)

    def sparse_seconds(self, rows: int, predicted: float, active: float) -> float:
        """A sparse FFN of a step of `rows`, which predict and find active these shares of the neurons."""
        first, further = _uses(self.neurons, self.share, rows, predicted, active, self.later)
        return _at(self.sizes, self.scoring, rows) + first * self.first_use + further * self.further_use

    def skipping_seconds(self, active: float) -> float:
        """An FFN of one row of which all gates are computed, and the rest for this share of the neurons."""
        first, _ = _uses(self.neurons, self.share, 1, 1.0, active, self.later)
        return first * self.first_use

    def fastest(self, rows: int, predicted: float, active: float) -> FfnPath:
        """The path of a step of `rows`; a predictor must save enough time to be worth what it misses."""
        path: FfnPath = "dense"
        exact = self.dense_seconds(rows)
        if rows == 1 and self.skipping_seconds(active) < exact:
            exact, path = self.skipping_seconds(active), "skip_zeros"
        return "predict" if self.sparse_seconds(rows, predicted, active) < _MARGIN * exact else path


def choose_path(ffn: FfnMode, rows: int, predictor: Predictor | None, times: Callable[[], FfnTimes]) -> FfnPath:
    """How a step of some rows runs the FFNs of a model whose rows of down can be skipped.

    `times` is asked only where "auto" has a predictor to choose with.
    """
    if ffn == "dense":
        return "dense"
    if predictor is None or ffn == "exact" or (ffn == "auto" and predictor.scores_nothing):
        return "skip_zeros" if rows == 1 or ffn == "sparse" else "dense"
    return "predict" if ffn == "sparse" else times().fastest(rows, *predictor.densities)


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


def measure_ffn_times(
    runner: FfnRunner,
    layer_count: int,
    neurons: int,
    layer_bytes: float,
    hidden_size: int,
    layers: int | None = None,
    *,
    gated: bool = True,
    share: float = 1.0,
) -> FfnTimes:
    """Time the FFNs of the first layers of a model with a predictor, on random inputs. Takes some tenths of a second.

    `layer_bytes` are the stored bytes of one layer's FFN. `layers`: how many run, by default enough for caches to be of
    no help; more take longer. share: see FfnTimes; of a mixture a step is measured too in which each expert has as many
    rows as SIZES ends with. The runner's `ffn` is as before afterwards, and its counters have counted.
    """
    layers = layers or min(layer_count, max(1, round(_BYTES / layer_bytes)))
    wanted = SIZES if share == 1 else (*SIZES, round(SIZES[-1] / share))
    sizes = tuple(n for n in wanted if n <= runner.max_batch_rows)
    x = np.random.default_rng(0).standard_normal((sizes[-1], hidden_size), np.float32)

    def seconds(n: int, mode: FfnMode, bias: float) -> float:
        runner.ffn = mode
        several = layers if n <= SIZES[-1] else max(1, round(layers * share))  # many rows have most experts
        return _least_seconds(lambda: runner.run_ffns(x[:n], several, bias)) / several

    def counted(n: int, bias: float) -> tuple[float, float]:
        """Shares of neurons that n rows predict and find active."""
        runner.ffn = "sparse"
        before = runner.neuron_counts()
        runner.run_ffns(x[:n], layers, bias)
        after = runner.neuron_counts()
        total = after.total - before.total
        return (after.predicted - before.predicted) / total, (after.active - before.active) / total

    before, later = runner.ffn, 2 if gated else 1
    try:
        dense = [seconds(n, "dense", 0.0) for n in sizes]
        scoring = [seconds(n, "sparse", _NOTHING) for n in sizes]
        bias = _bias_for(_SHARE, lambda bias: counted(1, bias)[0])
        listed = [seconds(n, "sparse", bias) - scored for n, scored in ((1, scoring[0]), (sizes[-1], scoring[-1]))]
        shares = [counted(n, bias) for n in (1, sizes[-1])]
    finally:
        runner.ffn = before
    first_use = max(listed[0], 0.0) / max(sum(_uses(neurons, share, 1, *shares[0], later)), 1.0)
    first, further = _uses(neurons, share, sizes[-1], *shares[1], later)
    further_use = min(max(listed[1] - first * first_use, 0.0) / max(further, 1.0), first_use)
    return FfnTimes(neurons, tuple(dense), tuple(scoring), first_use, further_use, later, share, sizes)


def _uses(neurons: int, share: float, rows: int, predicted: float, active: float, later: int) -> tuple[float, float]:
    """How often a layer's stored rows are used by a step for the first time, and how often after that.

    How far the lists of a step's rows overlap is not known before they are made; here they do so by chance only.
    """
    predicted, active = share * predicted, share * active
    first = neurons * (1 - (1 - predicted) ** rows + later * (1 - (1 - active) ** rows))
    return first, neurons * rows * (predicted + later * active) - first


def _bias_for(share: float, predicted: Callable[[float], float]) -> float:
    """About the sparsity bias at which this share of neurons is predicted, of those that are tried."""
    tried = [0.0, *(sign * 4.0**power for power in range(-4, 6) for sign in (1, -1))]
    return min(tried, key=lambda bias: abs(predicted(bias) - share))


def _least_seconds(run: Callable[[], object]) -> float:
    """The least time of a few runs, in seconds: others only had more disturbances."""
    found = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _at(sizes: tuple[int, ...], seconds: tuple[float, ...], rows: int) -> float:
    """Seconds between and beyond the sizes, linearly."""
    if rows <= sizes[-1] or len(sizes) == 1:
        return float(np.interp(rows, sizes, seconds))
    slope = max(seconds[-1] - seconds[-2], 0.0) / (sizes[-1] - sizes[-2])
    return seconds[-1] + (rows - sizes[-1]) * slope
