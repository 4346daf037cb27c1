"""Arithmetic on counts of FFN neurons: what a step computed, and what share of a dense FFN that is."""

from __future__ import annotations

from svdengine.kernels.batch import NeuronCounts

NO_NEURONS = NeuronCounts(0, 0, 0)


def add(a: NeuronCounts, b: NeuronCounts) -> NeuronCounts:
    """The neurons of both."""
    return NeuronCounts(a.predicted + b.predicted, a.active + b.active, a.total + b.total)


def since(before: NeuronCounts, now: NeuronCounts) -> NeuronCounts:
    """What was counted between two readings of an executor's counters."""
    return NeuronCounts(now.predicted - before.predicted, now.active - before.active, now.total - before.total)


def predicted_density(counts: NeuronCounts) -> float | None:
    """Share of neurons whose gate was computed; None where nothing ran sparse."""
    return counts.predicted / counts.total if counts.total else None


def active_density(counts: NeuronCounts) -> float | None:
    """Share of neurons whose up and down rows were read; None where nothing ran sparse."""
    return counts.active / counts.total if counts.total else None
