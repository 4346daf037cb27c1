"""Rounding to `q4` and `q6` so that products with known inputs change little: errors are fed back.

Weights are rounded one after the other. What rounding one of them gets wrong is made up for by those that follow, as
far as their inputs go together (GPTQ, Frantar et al. 2022, arXiv:2210.17323). Written with H = E[x x^T] = R R^T, R
upper triangular, the error e of a row costs |e R|^2, and the j-th term of that sum depends on the weights up to j
alone: each weight is rounded so that its term is least. That needs R only, no inverse. Scale and minimum of a group are
tried out in the same measure: the group's whole range and parts of it, then what least squares makes of the best levels
found.

Groups of 32 columns share a scale. In a matrix whose inputs are its columns they are rounded group by group, those of
the largest inputs first. In `down_T`, stored neuron-major, a neuron's row is one input, and its groups run along the
outputs: there neurons are rounded one after the other, those of the largest inputs first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.formats import GROUP, Parts, WeightFormat, pack_affine, padded_columns

Array = NDArray[np.float32]

MOST_LEVEL: dict[WeightFormat, int] = {"q4": 15, "q6": 63}  # the highest level of each format that this is for

_DAMPING = 0.1  # of the mean of H's diagonal, added to it: less fits the calibration text too closely
_HEADROOM = 1.1  # of a row's units: feedback can widen a group's range
_UNITS = 255  # that a scale or minimum can count
_AT_ONCE = 1 << 24  # weights: a vocabulary's matrix is rounded in parts, so that memory stays bounded
_NEURONS = 64  # rounded between two products
# What is tried for a group: a share of its range, and into how many steps that is cut. Where the source has 4 bits, its
# 15 steps are 4 of 60 each.
_TRIALS: dict[WeightFormat, Array] = {
    "q4": np.array([(1.0, 15), (0.9, 15), (0.8, 15)], np.float32),
    "q6": np.array([(1.0, 63), (1.0, 60), (0.95, 63)], np.float32),
}
_REFITS = 3
_NO_SPREAD = np.float32(1e-6)  # share of the sums below which levels do not tell scale from minimum
_ZERO, _ONE, _MOST_UNITS = np.float32(0), np.float32(1), np.float32(_UNITS)


@dataclass(frozen=True)
class Feedback:
    """In which order inputs are rounded, and how errors spread. Made once for all matrices with the same inputs."""

    order: NDArray[np.intp]  # (n,) inputs, first to last
    factor: Array  # (n, n) R, upper triangular, in that order


def column_feedback(moment: Array) -> Feedback:
    """For matrices whose columns have the inputs of this second moment (columns, columns)."""
    n = len(moment)
    padded = np.zeros((padded_columns(n), padded_columns(n)), np.float32)
    padded[:n, :n] = moment
    size = np.diag(padded).reshape(-1, GROUP)
    groups = np.argsort(-size.sum(1), kind="stable")
    within = np.argsort(-size[groups], axis=1, kind="stable")
    return _feedback(padded, (groups[:, None] * GROUP + within).ravel(), n)


def neuron_feedback(moment: Array) -> Feedback:
    """For a neuron-major matrix whose rows have the inputs of this second moment (neurons, neurons)."""
    return _feedback(moment, np.argsort(-np.diag(moment), kind="stable"), len(moment))


def round_columns(matrix: Array, feedback: Feedback, weight_format: WeightFormat) -> Parts:
    """Store matrix (rows, columns), a row an output, for `column_feedback`. Raises ValueError on NaN or infinity."""
    step = max(1, _AT_ONCE // matrix.shape[1])
    chunks = [_round_rows(matrix[at : at + step], feedback, weight_format) for at in range(0, len(matrix), step)]
    return {suffix: np.concatenate([parts[suffix] for parts in chunks]) for suffix in chunks[0]}


def _round_rows(matrix: Array, feedback: Feedback, weight_format: WeightFormat) -> Parts:
    w = _padded(matrix)
    rows, columns = w.shape
    order, factor = feedback.order, feedback.factor
    most, trials = MOST_LEVEL[weight_format], _TRIALS[weight_format]
    unit = _units(w, most)
    w = np.ascontiguousarray(w[:, order])
    errors = np.zeros_like(w)  # of the columns done so far, in `order`
    levels = np.zeros((rows, columns), np.uint8)
    beside = np.zeros((2, rows, columns // GROUP), np.uint8)  # scales, minima
    for at in range(0, columns, GROUP):
        end = at + GROUP
        before = errors[:, :at] @ factor[:at, at:end]
        found, pair = np.zeros((rows, GROUP), np.uint8), np.zeros((2, rows), np.uint8)
        metric = np.ascontiguousarray(factor[at:end, at:end])
        _share(
            rows,
            _round_group_of_columns,
            w[:, at:end],
            before,
            metric,
            unit,
            most,
            trials,
            found,
            pair,
            errors[:, at:end],
        )
        levels[:, order[at:end]] = found
        beside[:, :, order[at] // GROUP] = pair
    return pack_affine(levels, beside[0], beside[1], unit, weight_format)


def round_neurons(matrix: Array, feedback: Feedback, weight_format: WeightFormat) -> Parts:
    """Store matrix (neurons, outputs), a row an input, for `neuron_feedback`. Raises ValueError on NaN or infinity."""
    w = _padded(matrix)[feedback.order]
    neurons, outputs = w.shape
    factor, most, trials = feedback.factor, MOST_LEVEL[weight_format], _TRIALS[weight_format]
    unit = _units(w, most)
    errors = np.zeros_like(w)
    levels = np.zeros((neurons, outputs), np.uint8)
    beside = np.zeros((2, neurons, outputs // GROUP), np.uint8)
    for at in range(0, neurons, _NEURONS):
        end = min(at + _NEURONS, neurons)
        block = slice(at, end)
        before = np.ascontiguousarray(factor[:at, block].T @ errors[:at])
        metric = np.ascontiguousarray(factor[block, block])
        args = w[block], before, metric, unit[block], most, trials, levels[block], beside[:, block], errors[block]
        _share(outputs // GROUP, _round_block_of_neurons, *args)
    back = np.argsort(feedback.order)
    return pack_affine(levels[back], beside[0][back], beside[1][back], unit[back], weight_format)


def _feedback(moment: Array, order: NDArray[np.intp], inputs: int) -> Feedback:
    """Factorise from the last input to the first: then the factor is upper triangular."""
    mean = float(np.trace(moment)) / inputs
    if not np.isfinite(mean):
        raise ValueError("the calibration inputs hold NaN or infinity")
    backwards = order[::-1]
    damped = moment[np.ix_(backwards, backwards)]
    damped /= np.float32(mean or 1.0)
    diagonal = np.einsum("ii->i", damped)
    damping = _DAMPING
    diagonal += np.float32(damping)
    while True:
        try:
            return Feedback(order, np.linalg.cholesky(damped)[::-1, ::-1])
        except np.linalg.LinAlgError:  # float32 does not resolve so wide a range of inputs
            diagonal += np.float32(9 * damping)
            damping *= 10


def _padded(matrix: Array) -> Array:
    if not np.isfinite(matrix).all():
        raise ValueError("the weights hold NaN or infinity")
    rows, columns = matrix.shape
    w = np.zeros((rows, padded_columns(columns)), np.float32)
    w[:, :columns] = matrix
    return w


def _units(w: Array, most: int) -> Array:
    """What scales and minima of a row count in, (rows, 2)."""
    groups = w.reshape(len(w), -1, GROUP)
    low, high = np.maximum(-groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    widest = np.stack([(low + high).max(1) / np.float32(most), low.max(1)], 1)
    return (widest * np.float32(_HEADROOM / _UNITS)).astype(np.float32)


def _share(count: int, work: Callable[..., None], *args: object) -> None:
    """Run work(first, last, *args) over 0..count in threads, of which each takes a part."""
    threads = max(1, min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 64))
    cuts = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count, *args)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: work(cuts[i], cuts[i + 1], *args), range(threads)))


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _round_group_of_columns(first, last, w, before, metric, unit, most, trials, levels, beside, errors):  # type: ignore[no-untyped-def]
    """Round a group of columns of the rows first..last: w (rows, 32).

    before (rows, 32): what the errors so far add to the terms of these columns. metric (32, 32): the factor here.
    Writes levels (rows, 32), beside (2, rows): scale and minimum, and errors (rows, 32).
    """
    n = metric.shape[0]
    wanted, best, work = np.empty(n, np.float32), np.empty(n, np.float32), np.empty((2, n), np.float32)
    ones = metric.sum(0)
    for row in range(first, last):
        low, high = _ZERO, _ZERO
        wanted[:] = before[row]
        for j in range(n):
            for k in range(j, n):
                wanted[k] += w[row, j] * metric[j, k]
            alone = w[row, j] + before[row, j] / metric[j, j]
            low, high = min(low, alone), max(high, alone)
        units = unit[row, 0], unit[row, 1]
        scale, minimum = _fit_group(wanted, metric, ones, -low, high, units, np.float32(most), trials, best, work)
        for j in range(n):
            levels[row, j] = np.uint8(best[j])
            errors[row, j] = w[row, j] - (scale * units[0] * best[j] - minimum * units[1])
        beside[0, row], beside[1, row] = np.uint8(scale), np.uint8(minimum)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _round_block_of_neurons(first, last, w, before, metric, unit, most, trials, levels, beside, errors):  # type: ignore[no-untyped-def]
    """Round the groups first..last, each 32 outputs, of a block of neurons, one neuron after the other.

    w, before, levels, errors (neurons, outputs); metric (neurons, neurons); beside (2, neurons, groups). A neuron's
    term is that of all outputs alike, so that the measure within a group is the plain one.
    """
    n, size = metric.shape[0], 32
    wanted, best, work = np.empty(size, np.float32), np.empty(size, np.float32), np.empty((2, size), np.float32)
    plain, ones = np.eye(size).astype(np.float32), np.ones(size, np.float32)
    spread = np.empty((n, size), np.float32)
    for group in range(first, last):
        at = group * size
        spread[:] = before[:, at : at + size]
        for i in range(n):
            low, high = _ZERO, _ZERO
            for k in range(size):
                wanted[k] = w[i, at + k] + spread[i, k] / metric[i, i]
                low, high = min(low, wanted[k]), max(high, wanted[k])
            units = unit[i, 0], unit[i, 1]
            scale, minimum = _fit_group(wanted, plain, ones, -low, high, units, np.float32(most), trials, best, work)
            for k in range(size):
                levels[i, at + k] = np.uint8(best[k])
                errors[i, at + k] = w[i, at + k] - (scale * units[0] * best[k] - minimum * units[1])
            beside[0, i, group], beside[1, i, group] = np.uint8(scale), np.uint8(minimum)
            for j in range(i + 1, n):
                for k in range(size):
                    spread[j, k] += metric[i, j] * errors[i, at + k]


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _fit_group(wanted, metric, ones, low, high, units, most, trials, best, work):  # type: ignore[no-untyped-def]
    """Scale and minimum of a group, in units, and its levels, which go into `best` (n,).

    They make |wanted - scale (levels metric) + minimum ones|^2 small, where ones = sum of metric's rows. low, high: the
    range around 0 that the levels are to span. trials (t, 2): as in `_TRIALS`. work (2, n).
    """
    least, scale, minimum = np.float32(np.inf), _ZERO, _ZERO
    step, offset = _ZERO, _ZERO
    for trial in range(len(trials) + _REFITS):
        refit = trial >= len(trials)
        if not refit:
            offset = low * trials[trial, 0]
        m = min(_MOST_UNITS, np.rint(offset / units[1])) if units[1] > _ZERO else _ZERO
        if not refit:
            step = (high * trials[trial, 0] + m * units[1]) / trials[trial, 1]
        s = max(_ONE, min(_MOST_UNITS, np.rint(step / units[0]))) if units[0] > _ZERO else _ZERO
        loss = _round_in_turn(wanted, metric, ones, s * units[0], m * units[1], most, work[0], work[1])
        if loss < least:
            least, scale, minimum = loss, s, m
            best[:] = work[0]
            best_step, best_offset = _least_squares(wanted, work[1], ones)
        elif refit:
            break
        if trial >= len(trials) - 1:
            step, offset = best_step, best_offset
            if step <= _ZERO:
                break
    return scale, minimum


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _round_in_turn(wanted, metric, ones, scale, minimum, most, levels, product):  # type: ignore[no-untyped-def]
    """Round to levels (n,), each so that its term is least after those before it; the sum of the squared terms.

    product (n,) becomes levels @ metric.
    """
    n = len(wanted)
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    product[:] = _ZERO
    loss = _ZERO
    for j in range(n):
        left = wanted[j] + minimum * ones[j]
        level = np.rint((left - scale * product[j]) * inverse / metric[j, j])
        level = max(_ZERO, min(most, level))
        levels[j] = level
        for k in range(j, n):
            product[k] += level * metric[j, k]
        left -= scale * product[j]
        loss += left * left
    return loss


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=True)
def _least_squares(wanted, product, ones):  # type: ignore[no-untyped-def]
    """Scale and minimum of least |wanted - scale product + minimum ones|^2; scale 0 where there is no telling."""
    pp, po, oo, pw, ow = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for j in range(len(wanted)):
        pp += product[j] * product[j]
        po += product[j] * ones[j]
        oo += ones[j] * ones[j]
        pw += product[j] * wanted[j]
        ow += ones[j] * wanted[j]
    spread = pp * oo - po * po
    if spread <= _NO_SPREAD * pp * oo:
        return _ZERO, _ZERO
    minimum = max(_ZERO, (po * pw - pp * ow) / spread)
    return (pw + minimum * po) / pp, minimum
