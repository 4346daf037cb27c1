"""Calibrate when a neuron's score counts as active: from lax to strict, with what each step reads and loses.

    error    for each neuron, the threshold that minimises (energy of what is missed) + lambda * (bytes that are read),
             over the calibration tokens: an exact one-dimensional problem, solved for every lambda at once
    recall   for each neuron, the threshold that keeps a share of its active tokens
    uniform  one threshold for all neurons of a layer
    trained  0, which a trained predictor learned to separate by

A calibrator gives a ThresholdTable of a layer, from which a budget picks. Energy is that of
converters/ffn_layer.py: a neuron's share of a token's squared FFN output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numba
import numpy as np
from numpy.typing import NDArray

from svdengine.converters.ffn_layer import Neurons
from svdengine.converters.parallel import over_parts

Calibrator = Literal["error", "recall", "uniform", "trained"]
CALIBRATORS: tuple[Calibrator, ...] = get_args(Calibrator)

# Energy that may be lost for the bytes of one dense FFN; and the levels of the other calibrators.
LAMBDAS = np.geomspace(1e-6, 10.0, 43)
RECALLS = 1 - np.concatenate([[0.0], np.geomspace(1e-5, 0.9, 64)])
# What the levels of a table stand for, ascending; the same in all layers. 1e-6 stands for a recall of all.
STRICTNESS = {"error": LAMBDAS, "recall": np.maximum(1 - RECALLS, 1e-6), "uniform": np.maximum(1 - RECALLS, 1e-6)}
SLACK = 0.25  # of the spread by which thresholds are lowered, since new tokens miss more than those that were fitted

Array = NDArray[np.float32]

_NEURONS = 64  # that are sorted and measured at once


@dataclass(frozen=True)
class Sample:
    """Scores and truth on n calibration tokens of a layer, neuron-major, in ascending order of each neuron's scores."""

    scores: Array  # (f, n) ascending along n
    energy: Array  # (f, n) in the order of scores
    active: NDArray[np.bool_]  # (f, n) in the order of scores
    spread: Array  # (f,) standard deviation of each neuron's score about what its gate makes of it


@dataclass(frozen=True)
class ThresholdTable:
    """Thresholds of a layer at levels of growing strictness; a neuron is predicted where its score is above."""

    thresholds: Array  # (levels, f)
    error: NDArray[np.float64]  # (levels,) share of the output's energy that is missed, mean over tokens
    predicted: NDArray[np.float64]  # (levels,) share of neurons that are predicted active
    computed: NDArray[np.float64]  # (levels,) share of neurons that are predicted and active

    def at(self, level: float) -> Array:
        """Thresholds (f,) at a level between 0 and levels - 1, interpolated."""
        low, part = self._split(level)
        return (1 - part) * self.thresholds[low] + part * self.thresholds[low + 1]

    def level_of_error(self, error: float) -> float:
        """The strictest level whose error is at most `error`, interpolated; 0 where none is."""
        return _crossing(self.error, error)

    def level_of_density(self, density: float) -> float:
        """The laxest level that predicts at most the share `density` of neurons; the last where none does."""
        return _crossing(-self.predicted, -density)

    def _split(self, level: float) -> tuple[int, np.float32]:
        low = min(max(int(level), 0), len(self.thresholds) - 2)
        return low, np.float32(min(max(level - low, 0.0), 1.0))


def level_of_strictness(calibrator: Calibrator, strictness: float) -> float:
    """The level of a price (error) or of a share of active tokens that may be missed (recall, uniform)."""
    known = np.log(STRICTNESS[calibrator])
    return float(np.interp(math.log(strictness), known, np.arange(len(known))))


def make_sample(scores: Array, neurons: Neurons, estimates: bool = True) -> Sample:
    """Sort scores (n, f) and what the neurons did by score.

    `estimates` says whether a score estimates the gate itself; if not, it has units of its own.
    """
    by_neuron, gates = scores.T, neurons.gates.T
    sample = Sample(
        np.empty(by_neuron.shape, np.float32),
        np.empty(by_neuron.shape, np.float32),
        np.empty(by_neuron.shape, np.bool_),
        np.empty(len(by_neuron), np.float32),
    )

    def fill(part: slice) -> None:
        own = np.array(by_neuron[part], np.float32, order="C")
        sample.spread[part] = (gates[part] - own).std(1) if estimates else _unexplained(own, gates[part])
        energy = np.ascontiguousarray(neurons.energy.T[part], np.float32)
        active = np.ascontiguousarray(neurons.active.T[part])
        sort_rows(own, sample.scores[part], energy, active, sample.energy[part], sample.active[part])

    over_parts(fill, len(by_neuron), size=_NEURONS)
    return sample


def calibrate_thresholds(
    calibrator: Calibrator, sample: Sample, held_out: Sample | None, row_bytes: tuple[int, int, int]
) -> ThresholdTable:
    """The table of a layer: thresholds from `sample`, their error and densities from `held_out`, NaN without it.

    `row_bytes` are those of a row of gate, up and down, which weigh a wrong prediction against a right one.
    """
    if calibrator == "error":
        thresholds = error_thresholds(sample, LAMBDAS, row_bytes) - np.float32(SLACK) * sample.spread
    elif calibrator == "recall":
        thresholds = recall_thresholds(sample, RECALLS)
    elif calibrator == "trained":
        thresholds = np.zeros((2, len(sample.scores)), np.float32)
    else:
        thresholds = uniform_thresholds(sample, RECALLS)
    return _unmeasured(thresholds) if held_out is None else measure_thresholds(held_out, thresholds)


def fixed_thresholds(thresholds: Array) -> ThresholdTable:
    """A table of thresholds (f,) that are as they are at every level; it knows neither error nor densities."""
    return _unmeasured(np.stack([thresholds, thresholds]))


def _unmeasured(thresholds: Array) -> ThresholdTable:
    unknown = np.full(len(thresholds), np.nan)
    return ThresholdTable(thresholds, unknown, unknown, unknown)


def error_thresholds(sample: Sample, lambdas: NDArray[np.float64], row_bytes: tuple[int, int, int]) -> Array:
    """Thresholds (lambdas, f) that minimise missed energy + lambda * bytes for each neuron and each lambda, ascending.

    Bytes are those read, as a share of a dense FFN's: the gate's row of every predicted (token, neuron) pair, and the
    rows of up and down where the neuron is active as well.
    """
    gate, up, down = row_bytes
    dense = float(len(sample.scores) * (gate + up + down))
    thresholds = np.empty((len(lambdas), len(sample.scores)), np.float32)

    def fill(part: slice) -> None:
        thresholds[:, part] = _error_thresholds(
            sample.scores[part],
            sample.energy[part],
            sample.active[part],
            sample.spread[part],
            lambdas,
            gate / dense,
            (up + down) / dense,
        )

    over_parts(fill, len(sample.scores), size=_NEURONS)
    return thresholds


def recall_thresholds(sample: Sample, recalls: NDArray[np.float64]) -> Array:
    """Thresholds (recalls, f) that keep at least each share of a neuron's active tokens; recalls descend."""
    thresholds = np.empty((len(recalls), len(sample.scores)), np.float32)
    for i, (scores, active) in enumerate(zip(sample.scores, sample.active, strict=True)):
        found = scores[active]
        if not len(found):
            thresholds[:, i] = scores[-1]  # never seen active: only beyond every score that was seen
            continue
        cut = np.floor((1 - recalls) * len(found) + 1e-9).astype(int)  # that may be missed
        thresholds[:, i] = np.nextafter(found[np.minimum(cut, len(found) - 1)], np.float32(-np.inf))
    return thresholds


def uniform_thresholds(sample: Sample, recalls: NDArray[np.float64]) -> Array:
    """Thresholds (recalls, f), the same for every neuron, that keep each share of the layer's active pairs."""
    found = sample.scores[sample.active]
    if not len(found):
        found = sample.scores.ravel()
    cuts = np.nextafter(np.quantile(found, 1 - recalls, method="lower").astype(np.float32), np.float32(-np.inf))
    return np.repeat(cuts[:, None], len(sample.scores), 1)


def measure_thresholds(sample: Sample, thresholds: Array) -> ThresholdTable:
    """Error and densities of thresholds (levels, f) on a sample."""

    def measure(part: slice) -> Array:
        cuts = np.ascontiguousarray(thresholds[:, part])
        found: Array = _measure(sample.scores[part], sample.energy[part], sample.active[part], cuts)
        return found

    f, n = sample.scores.shape
    missed, predicted, computed = np.sum(over_parts(measure, f, size=_NEURONS), 0)
    error = np.maximum.accumulate(missed / n)
    return ThresholdTable(thresholds, error, predicted / (n * f), computed / (n * f))


def _unexplained(scores: Array, gates: Array) -> Array:
    """Standard deviation (f,) of what is left of each neuron's scores (f, n) by a line through its gates (f, n)."""
    s, g = scores - scores.mean(1, keepdims=True), gates - gates.mean(1, keepdims=True)
    variance = np.square(g).mean(1, keepdims=True)
    slope = np.divide((s * g).mean(1, keepdims=True), variance, out=np.zeros_like(variance), where=variance > 0)
    return (s - slope * g).std(1)


def _crossing(values: NDArray[np.float64], limit: float) -> float:
    """The largest level at which ascending `values` are at most `limit`, linearly between levels."""
    above = np.flatnonzero(values > limit)
    if not len(above):
        return float(len(values) - 1)
    if above[0] == 0:
        return 0.0
    low, high = values[above[0] - 1], values[above[0]]
    return float(above[0] - 1 + (limit - low) / (high - low))


@numba.njit(nogil=True, cache=True)
def sort_rows(scores, sorted_scores, energy, active, sorted_energy, sorted_active):  # type: ignore[no-untyped-def]
    """Sort each row of scores, and the rows beside it alike, into new places: a radix sort of 11 bits a pass.

    A float's bits ascend with it once those of negative numbers are inverted and the sign of the others is set.
    """
    f, n = scores.shape
    keys, order = np.empty((2, n), np.uint32), np.empty((2, n), np.int32)
    starts = np.empty((3, 2049), np.int64)
    sign, everything, mask = np.uint32(0x80000000), np.uint32(0xFFFFFFFF), np.uint32(2047)
    for i in range(f):
        bits = scores[i].view(np.uint32)
        starts[:] = 0
        for j in range(n):
            key = bits[j] ^ (everything if bits[j] & sign else sign)
            keys[0, j], order[0, j] = key, j
            for turn in range(3):
                starts[turn, ((key >> np.uint32(11 * turn)) & mask) + 1] += 1
        for turn in range(3):
            source, target, shift = turn % 2, 1 - turn % 2, np.uint32(11 * turn)
            for digit in range(2048):
                starts[turn, digit + 1] += starts[turn, digit]
            for j in range(n):
                digit = (keys[source, j] >> shift) & mask
                at = starts[turn, digit]
                keys[target, at], order[target, at] = keys[source, j], order[source, j]
                starts[turn, digit] = at + 1
        for j in range(n):
            at = order[1, j]
            sorted_scores[i, j], sorted_energy[i, j], sorted_active[i, j] = scores[i, at], energy[i, at], active[i, at]


@numba.njit(nogil=True, cache=True)
def _error_thresholds(scores, energy, active, spread, lambdas, gate_bytes, rest_bytes):  # type: ignore[no-untyped-def]
    """Walk the lower convex hull of (bytes saved, energy missed) over all cuts of each neuron's sorted scores.

    A cut k misses the k lowest scores. Its objective is missed(k) - lambda * saved(k) plus a constant, so the best cut
    of every lambda is a vertex of the hull, and vertices are passed in order as lambda grows.
    """
    neurons, n = scores.shape
    out = np.empty((len(lambdas), neurons), np.float32)
    cuts = np.empty(n + 1, np.int64)
    saved_at, missed_at = np.empty(n + 1), np.empty(n + 1)
    for i in range(neurons):
        saved, missed, top = 0.0, 0.0, 0
        for k in range(n + 1):
            if k:
                saved += gate_bytes + (rest_bytes if active[i, k - 1] else 0.0)
                missed += energy[i, k - 1]
            if 0 < k < n and scores[i, k - 1] == scores[i, k]:
                continue  # equal scores cannot be separated
            while top > 1 and (missed - missed_at[top - 1]) * (saved_at[top - 1] - saved_at[top - 2]) <= (
                missed_at[top - 1] - missed_at[top - 2]
            ) * (saved - saved_at[top - 1]):
                top -= 1
            cuts[top], saved_at[top], missed_at[top] = k, saved, missed
            top += 1
        vertex = 0
        for level in range(len(lambdas)):
            while vertex + 1 < top and missed_at[vertex + 1] - missed_at[vertex] <= lambdas[level] * (
                saved_at[vertex + 1] - saved_at[vertex]
            ):
                vertex += 1
            out[level, i] = _threshold(scores[i], cuts[vertex], spread[i])
    return out


@numba.njit(nogil=True, cache=True)
def _threshold(scores, cut, spread):  # type: ignore[no-untyped-def]
    """A threshold that misses exactly the `cut` lowest scores."""
    if cut == 0:
        return min(scores[0] - spread, np.nextafter(scores[0], np.float32(-np.inf)))
    if cut == len(scores):
        return scores[cut - 1]
    middle = scores[cut - 1] + (scores[cut] - scores[cut - 1]) / np.float32(2)
    return middle if middle < scores[cut] else scores[cut - 1]


@numba.njit(nogil=True, cache=True)
def _measure(scores, energy, active, thresholds):  # type: ignore[no-untyped-def]
    """Missed energy, predicted pairs and predicted active pairs, summed over neurons and tokens: (3, levels)."""
    neurons, n = scores.shape
    sums = np.zeros((3, len(thresholds)))
    energy_below, active_below = np.zeros(n + 1), np.zeros(n + 1)
    for i in range(neurons):
        for k in range(n):
            energy_below[k + 1] = energy_below[k] + energy[i, k]
            active_below[k + 1] = active_below[k] + active[i, k]
        cuts = np.searchsorted(scores[i], thresholds[:, i], side="right")
        for level, cut in enumerate(cuts):
            sums[0, level] += energy_below[cut]
            sums[1, level] += n - cut
            sums[2, level] += active_below[n] - active_below[cut]
    return sums
