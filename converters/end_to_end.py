"""What sparsity costs in the end: the loss of held-out text, sparse against dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.split_text import Windows
from svdengine.converters.statistics import FfnInputs, window_batches
from svdengine.errors import ConversionError
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnMode, Logits
from svdengine.kernels.predictor import Predictor

_LIKELIEST = 256  # tokens whose probabilities are kept at each position; the others count as one


class SparseExecutor(FfnInputs, Protocol):
    """An executor whose FFN can be switched between the dense and the sparse path."""

    predictor: Predictor | None
    ffn: FfnMode

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor.forward`."""
        ...


@dataclass(frozen=True)
class SparseCost:
    """What sparse execution costs on text of one kind."""

    tokens: int  # that were scored
    perplexity: float  # dense
    perplexity_rise: float  # as a share of it
    standard_error: float  # of that rise: how far chance moves it on so few tokens
    kl: float  # mean divergence of the sparse distribution from the dense one, nats a token
    agreement: float  # share of tokens after which both paths have the same likeliest token

    @property
    def expected_rise(self) -> float:
        """What other text of this kind must be expected to cost.

        The divergence, by whose exponential perplexity rises where the model's own probabilities are right: a few
        hundred tokens tell it well. Where the rise that was measured is more than that by more than chance, that rise.
        """
        return max(math.expm1(self.kl), self.perplexity_rise - self.standard_error)


@dataclass(frozen=True)
class _Step:
    """A step of n tokens that are scored, as the dense path sees it."""

    targets: NDArray[np.int64]  # (n,) the tokens that follow
    losses: NDArray[np.float64]  # (n,) of each of them, nats
    choice: NDArray[np.int64]  # (n,) likeliest next tokens
    likely: NDArray[np.int64]  # (n, k) tokens that are likely
    log_likely: NDArray[np.float32]  # (n, k) logarithms of their probabilities


class LossMeter:
    """Runs text dense once, and then measures what predictors cost on it."""

    def __init__(self, executor: SparseExecutor, kinds: Mapping[str, Windows]) -> None:
        """`kinds`: windows of tokens by kind; the first token of each window is not scored.

        Raises ConversionError when the logits are not finite, or there is nothing to score.
        """
        self._executor = executor
        self._windows = {kind: [w for w in windows if len(w) > 1] for kind, windows in kinds.items()}
        self._windows = {kind: windows for kind, windows in self._windows.items() if windows}
        if not self._windows:
            raise ConversionError("the held-out windows have no token to score")
        self._dense = {kind: list(self._run_dense(windows)) for kind, windows in self._windows.items()}

    @property
    def perplexity(self) -> float:
        """Of the dense path. Every kind counts the same."""
        losses = [np.concatenate([step.losses for step in steps]).mean() for steps in self._dense.values()]
        return math.exp(sum(losses) / len(losses))

    def costs(self, predictor: Predictor) -> dict[str, SparseCost]:
        """What a predictor costs on each kind, with every FFN sparse; the executor is left as it was."""
        executor = self._executor
        before = executor.predictor, executor.ffn
        try:
            executor.predictor, executor.ffn = predictor, "sparse"
            return {kind: self._cost(kind) for kind in self._windows}
        finally:
            executor.predictor, executor.ffn = before

    def _cost(self, kind: str) -> SparseCost:
        steps, rises, kl, agreed = self._dense[kind], [], 0.0, 0
        for step, (found, _) in zip(steps, self._run(self._windows[kind]), strict=True):
            rises.append(_losses(found, step.targets) - step.losses)
            kl += _divergence(step, np.take_along_axis(found, step.likely, 1))
            agreed += int((found.argmax(1) == step.choice).sum())
        rise, dense = np.concatenate(rises), np.concatenate([step.losses for step in steps])
        n = len(rise)
        return SparseCost(
            tokens=n,
            perplexity=math.exp(dense.mean()),
            perplexity_rise=math.expm1(rise.mean()),
            standard_error=float(rise.std()) / math.sqrt(n),
            kl=kl / n,
            agreement=agreed / n,
        )

    def _run_dense(self, windows: Windows) -> Iterator[_Step]:
        for found, targets in self._run(windows):
            likely = np.argpartition(found, -min(_LIKELIEST, found.shape[1]), 1)[:, -_LIKELIEST:]
            losses = _losses(found, targets)
            yield _Step(targets, losses, found.argmax(1), likely, np.take_along_axis(found, likely, 1))

    def _run(self, windows: Windows) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Of each step, log-probabilities (n, vocabulary) and the tokens (n,) that follow."""
        for window in windows:
            start = 0
            for batch in window_batches(window, self._executor, logits=True):
                targets = np.asarray(window[start + 1 : start + len(batch.tokens) + 1], np.int64)
                start += len(batch.tokens)
                if len(targets):
                    yield _log_softmax(self._executor.forward(batch)[: len(targets)]), targets


def _log_softmax(logits: Logits) -> NDArray[np.float32]:
    """Logarithms (n, vocabulary) of the probabilities that logits stand for."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)


def _losses(found: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each token (n,), in nats, from log-probabilities (n, vocabulary). Raises ConversionError."""
    losses = -found[np.arange(len(found)), targets].astype(np.float64)
    if not np.isfinite(losses).all():
        raise ConversionError("the model gave logits that are not finite")
    return losses


def _divergence(step: _Step, found: NDArray[np.float32]) -> float:
    """Sum over tokens of the KL divergence, from log-probabilities (n, k) of the likely ones; the rest is one more."""
    p, log_p, log_q = (part.astype(np.float64) for part in (np.exp(step.log_likely), step.log_likely, found))
    rest, other = (np.maximum(1 - part.sum(1), 1e-9) for part in (p, np.exp(log_q)))
    return float((p * (log_p - log_q)).sum() + (rest * np.log(rest / other)).sum())
