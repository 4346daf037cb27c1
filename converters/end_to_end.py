"""What sparsity costs in the end: the loss of held-out text, sparse against dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.logit_rows import LogitRows
from svdengine.converters.output_head import OutputHead
from svdengine.converters.split_text import Windows
from svdengine.converters.statistics import FfnInputs, window_batches
from svdengine.errors import ConversionError
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnMode, HiddenStates, Logits
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
        hundred tokens tell it well. Where the rise that was measured is more than that by more than chance, which is
        two standard errors, that rise: of several kinds, one is off by a single one every other time.
        """
        return max(math.expm1(self.kl), self.perplexity_rise - 2 * self.standard_error)


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

    def __init__(
        self,
        executor: SparseExecutor,
        kinds: Mapping[str, Windows],
        head: OutputHead | None = None,
        known: Mapping[tuple[int, ...], NDArray[np.float32]] | None = None,
    ) -> None:
        """`kinds`: windows of tokens by kind; the first token of each window is not scored.

        With a `head` logits come from the hidden states of an executor that tells them, which is faster; `known` has
        those of windows that were run dense already, (n, d). Raises ConversionError when the logits are not finite, or
        there is nothing to score.
        """
        self._executor = executor
        self._head = head if tells_hidden_states(executor) else None
        self._windows = {kind: [w for w in windows if len(w) > 1] for kind, windows in kinds.items()}
        self._windows = {kind: windows for kind, windows in self._windows.items() if windows}
        if not self._windows:
            raise ConversionError("the held-out windows have no token to score")
        hidden = (known or {}) if self._head is not None else {}
        self._dense = {kind: list(self._run_dense(windows, hidden)) for kind, windows in self._windows.items()}

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
        for step, (logits, _) in zip(steps, self._run(self._windows[kind]), strict=True):
            found = LogitRows.of(logits)
            rises.append(found.losses(step.targets) - step.losses)
            kl += _divergence(step, found.log_probabilities(step.likely))
            agreed += int((found.choice == step.choice).sum())
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

    def _run_dense(self, windows: Windows, known: Mapping[tuple[int, ...], NDArray[np.float32]]) -> Iterator[_Step]:
        for logits, targets in self._run(windows, known):
            found = LogitRows.of(logits)
            likely = found.likeliest(_LIKELIEST)
            yield _Step(targets, found.losses(targets), found.choice, likely, found.log_probabilities(likely))

    def _run(
        self, windows: Windows, known: Mapping[tuple[int, ...], NDArray[np.float32]] | None = None
    ) -> Iterator[tuple[Logits, NDArray[np.int64]]]:
        """Of each step, logits (n, vocabulary), which hold until the next, and the tokens (n,) that follow."""
        for window in windows:
            start, hidden = 0, (known or {}).get(tuple(window))
            for batch in window_batches(window, self._executor, logits=self._head is None):
                n = len(batch.tokens)
                targets = np.asarray(window[start + 1 : start + n + 1], np.int64)
                if len(targets):
                    yield self._logits(batch, None if hidden is None else hidden[start : start + n], targets), targets
                start += n

    def _logits(self, batch: Batch, hidden: NDArray[np.float32] | None, targets: NDArray[np.int64]) -> Logits:
        """Of the rows of a step that have a target."""
        if self._head is None:
            return self._executor.forward(batch)[: len(targets)]
        if hidden is None:
            self._executor.forward(batch)
            hidden = latest_states(self._executor)
        return self._head.logits(hidden[: len(targets)])


def tells_hidden_states(executor: object) -> bool:
    """Whether an executor, or the one that it wraps, is a `HiddenStates`."""
    return isinstance(executor, HiddenStates) and isinstance(getattr(executor, "inner", executor), HiddenStates)


def latest_states(executor: object) -> NDArray[np.float32]:
    """What the latest step left after the final norm, (n, d), on an executor that tells it."""
    assert isinstance(executor, HiddenStates)
    return executor.hidden_states()


def _divergence(step: _Step, found: NDArray[np.float32]) -> float:
    """Sum over tokens of the KL divergence, from log-probabilities (n, k) of the likely ones; the rest is one more."""
    p, log_p, log_q = (part.astype(np.float64) for part in (np.exp(step.log_likely), step.log_likely, found))
    rest, other = (np.maximum(1 - part.sum(1), 1e-9) for part in (p, np.exp(log_q)))
    return float((p * (log_p - log_q)).sum() + (rest * np.log(rest / other)).sum())
