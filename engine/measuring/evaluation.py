"""Sparse execution against dense, of the same model on the same text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.logit_rows import LogitRows
from svdengine.kernels.executor import NO_NEURONS, FfnMode, NeuronCounts
from svdengine.measuring.benchmark import bytes_per_token
from svdengine.measuring.decode_rates import decode_rates
from svdengine.measuring.perplexity import Perplexity, ScoredText, split_text

if TYPE_CHECKING:
    from svdengine.kernels.predictor import Predictor
    from svdengine.llm import LLM
    from svdengine.measuring.study_results import PredictorStudy
    from svdengine.measuring.task_scores import Outcome, PairedScore, TaskScore

Progress = Callable[[int, int, float], None]  # windows run on either path, all there are, dense perplexity so far


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
    tokens_per_second: float | None = None  # of decoding plain text; None: not measured


@dataclass(frozen=True)
class PathComparison:
    """Both paths on one text."""

    dense: Perplexity
    dense_bytes_per_token: float
    sparse: tuple[SparseScore, ...]  # in the order of the biases that were asked for
    dense_tokens_per_second: float | None = None


@dataclass
class Measurements:
    """All that one evaluation found; what was not asked for is empty."""

    ffn: str  # dense, sparse, auto, or both
    sparsity_bias: float
    perplexity: Perplexity | None = None  # of one path
    comparison: PathComparison | None = None  # of both, with the first predictor
    comparisons: dict[str, PathComparison] = field(default_factory=dict)  # of both, by predictor
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

    def add(self, dense: LogitRows, sparse: LogitRows, targets: NDArray[np.int64], neurons: NeuronCounts) -> None:
        """Count a window."""
        self.neurons = self.neurons + neurons
        self.nll += float(sparse.losses(targets).sum())
        self.agreed += int((dense.choice == sparse.choice).sum())
        self.kl += float(dense.divergences(sparse).sum())


def compare_paths(
    llm: LLM, text: str, window: int = 512, biases: Sequence[float] = (0.0,), progress: Progress | None = None
) -> PathComparison:
    """Score `text` densely, and sparsely at each sparsity bias. `llm` must be idle; its `ffn` is as before afterwards.

    Raises RequestError where the model cannot run sparse, or the text cannot be scored.
    """
    return compare_predictors(llm, text, {"": llm.predictor}, window, biases, progress)[""]


def compare_predictors(
    llm: LLM,
    text: str,
    predictors: Mapping[str, Predictor | None],
    window: int = 512,
    biases: Sequence[float] = (0.0,),
    progress: Progress | None = None,
) -> dict[str, PathComparison]:
    """The same with each of several predictors of the model, which are by name. The model's own is put back."""
    scored = split_text(llm, text, window)
    settings = [(name, bias) for name in predictors for bias in biases]
    totals, dense_nll, tokens = {setting: _Totals() for setting in settings}, 0.0, 0
    runs = count(1)

    def ran() -> None:
        if progress is not None:
            every = len(scored.windows) * (len(settings) + 1)
            progress(next(runs), every, math.exp(min(dense_nll / tokens, 700.0)))

    with _as_before(llm):
        for ids in scored.windows:
            llm.ffn = "dense"
            targets = np.asarray(ids[1:], np.int64)
            dense = LogitRows.of(llm.logits(ids[:-1]))
            dense_nll += float(dense.losses(targets).sum())
            tokens += len(ids) - 1
            ran()
            for name, bias in settings:
                _use(llm, predictors[name])
                start = llm.executor.neuron_counts()
                sparse = LogitRows.of(llm.logits(ids[:-1], sparsity_bias=bias))
                totals[name, bias].add(dense, sparse, targets, llm.executor.neuron_counts() - start)
                ran()
        found = {}
        for name, predictor in predictors.items():
            _use(llm, predictor)
            scores = [_score(llm, scored, bias, totals[name, bias], tokens) for bias in biases]
            found[name] = PathComparison(
                scored.perplexity(dense_nll), bytes_per_token(llm, NO_NEURONS, tokens), tuple(scores)
            )
    return found


def with_rates(
    llm: LLM, predictors: Mapping[str, Predictor], found: Mapping[str, PathComparison], seconds: float = 4.0
) -> dict[str, PathComparison]:
    """Comparisons with how fast each setting decodes, each predictor in about so many `seconds`."""
    timed = {}
    with _as_before(llm):
        for name, comparison in found.items():
            _use(llm, predictors[name])
            settings: list[tuple[FfnMode, float]] = [("dense", 0.0)]
            settings += [("sparse", score.sparsity_bias) for score in comparison.sparse]
            rates = decode_rates(llm, settings, seconds)
            if rates is None:
                timed[name] = comparison
                continue
            speeds = [rate.tokens_per_second for rate in rates]
            sparse = [replace(s, tokens_per_second=v) for s, v in zip(comparison.sparse, speeds[1:], strict=True)]
            timed[name] = replace(comparison, sparse=tuple(sparse), dense_tokens_per_second=speeds[0])
    return timed


@contextmanager
def _as_before(llm: LLM) -> Iterator[None]:
    """Afterwards path and predictor are what they were."""
    ffn, predictor = llm.ffn, llm.predictor
    try:
        yield
    finally:
        _put(llm, predictor)
        llm.ffn = ffn


def _use(llm: LLM, predictor: Predictor | None) -> None:
    """Run sparse with this predictor."""
    _put(llm, predictor)
    llm.ffn = "sparse"


def _put(llm: LLM, predictor: Predictor | None) -> None:
    if llm.executor.predictor is not predictor:
        llm.executor.predictor = llm.predictor = predictor


def _score(llm: LLM, scored: ScoredText, bias: float, sums: _Totals, tokens: int) -> SparseScore:
    return SparseScore(
        sparsity_bias=bias,
        score=scored.perplexity(sums.nll),
        agreement=sums.agreed / tokens,
        mean_kl=sums.kl / tokens,
        predicted_density=sums.neurons.predicted_density or 0.0,
        active_density=sums.neurons.active_density or 0.0,
        bytes_per_token=bytes_per_token(llm, sums.neurons, tokens),
    )
