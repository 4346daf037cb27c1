"""Sparse execution against dense, of the same model on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from svdengine.converters.logit_rows import LogitRows
from svdengine.kernels.executor import NO_NEURONS, NeuronCounts
from svdengine.measuring.benchmark import bytes_per_token
from svdengine.measuring.perplexity import Perplexity, split_text

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.measuring.predictor_study import PredictorStudy
    from svdengine.measuring.task_scores import Outcome, PairedScore, TaskScore

Progress = Callable[[int, int, float], None]  # windows done, windows in all, dense perplexity so far


@dataclass(frozen=True)
class SparseScore:
    """What sparse execution costs in quality, and saves, at one sparsity bias."""

    sparsity_bias: float
    score: Perplexity
    agreement: float  # share of tokens after which both paths have the same likeliest token
    mean_kl: float  # KL divergence of the sparse distribution from the dense one, nats a token
    predicted_density: float  # share of FFN neurons predicted active
    active_density: float  # share of FFN neurons computed in full
    bytes_per_token: float  # of weights and predictor, when one sequence is decoded


@dataclass(frozen=True)
class PathComparison:
    """Both paths on one text."""

    dense: Perplexity
    dense_bytes_per_token: float
    sparse: tuple[SparseScore, ...]  # in the order of the biases that were asked for


@dataclass
class Measurements:
    """All that one evaluation found; what was not asked for is empty."""

    ffn: str  # dense, sparse, auto, or both
    sparsity_bias: float
    perplexity: Perplexity | None = None  # of one path
    comparison: PathComparison | None = None  # of both
    study: PredictorStudy | None = None
    tasks: list[TaskScore] = field(default_factory=list)
    answers: list[Outcome] = field(default_factory=list)  # to each task, on the first path
    pairs: list[PairedScore] = field(default_factory=list)


@dataclass
class _Totals:
    """Sums over the tokens so far, at one bias."""

    nll: float = 0.0
    agreed: int = 0
    kl: float = 0.0
    neurons: NeuronCounts = NO_NEURONS


def compare_paths(
    llm: LLM, text: str, window: int = 512, biases: Sequence[float] = (0.0,), progress: Progress | None = None
) -> PathComparison:
    """Score `text` densely, and sparsely at each sparsity bias. `llm` must be idle; its `ffn` is as before afterwards.

    Raises RequestError where the model cannot run sparse, or the text cannot be scored.
    """
    scored = split_text(llm, text, window)
    before, totals, dense_nll, tokens = llm.ffn, [_Totals() for _ in biases], 0.0, 0
    try:
        for done, ids in enumerate(scored.windows, 1):
            llm.ffn = "dense"
            targets = np.asarray(ids[1:], np.int64)
            dense = LogitRows.of(llm.logits(ids[:-1]))
            llm.ffn = "sparse"
            for bias, sums in zip(biases, totals, strict=True):
                start = llm.executor.neuron_counts()
                sparse = LogitRows.of(llm.logits(ids[:-1], sparsity_bias=bias))
                sums.neurons = sums.neurons + (llm.executor.neuron_counts() - start)
                sums.nll += float(sparse.losses(targets).sum())
                sums.agreed += int((dense.choice == sparse.choice).sum())
                sums.kl += float(dense.divergences(sparse).sum())
            dense_nll += float(dense.losses(targets).sum())
            tokens += len(ids) - 1
            if progress is not None:
                progress(done, len(scored.windows), math.exp(min(dense_nll / tokens, 700.0)))
    finally:
        llm.ffn = before
    scores = [
        SparseScore(
            sparsity_bias=bias,
            score=scored.perplexity(sums.nll),
            agreement=sums.agreed / tokens,
            mean_kl=sums.kl / tokens,
            predicted_density=sums.neurons.predicted_density or 0.0,
            active_density=sums.neurons.active_density or 0.0,
            bytes_per_token=bytes_per_token(llm, sums.neurons, tokens),
        )
        for bias, sums in zip(biases, totals, strict=True)
    ]
    return PathComparison(scored.perplexity(dense_nll), bytes_per_token(llm, NO_NEURONS, tokens), tuple(scores))
