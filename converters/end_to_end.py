"""What sparsity costs in the end: the loss of held-out text, sparse against dense."""

from __future__ import annotations

import math
from typing import Protocol

from svdengine.converters.statistics import FfnInputs, Windows, window_batches
from svdengine.errors import ConversionError
from svdengine.kernels.batch import Batch
from svdengine.kernels.executor import FfnMode, Logits
from svdengine.kernels.predictor import Predictor
from svdengine.scheduling.sampler import negative_log_likelihood


class SparseExecutor(FfnInputs, Protocol):
    """An executor whose FFN can be switched between the dense and the sparse path."""

    predictor: Predictor | None
    ffn: FfnMode

    def forward(self, batch: Batch) -> Logits:
        """Run one step; see `Executor.forward`."""
        ...


def mean_loss(executor: SparseExecutor, windows: Windows) -> float:
    """Mean negative log-likelihood, in nats a token, of windows of tokens; the first of each is not scored.

    Raises ConversionError when the logits are not finite, or there is nothing to score.
    """
    total, scored = 0.0, 0
    for window in windows:
        start = 0
        for batch in window_batches(window, executor, logits=True):
            targets = list(window[start + 1 : start + len(batch.tokens) + 1])
            if targets:
                total += negative_log_likelihood(executor.forward(batch)[: len(targets)], targets)
            start += len(batch.tokens)
            scored += len(targets)
    if not scored or not math.isfinite(total):
        raise ConversionError(
            "the held-out windows have no token to score" if not scored else "the model gave logits that are not finite"
        )
    return total / scored


def sparse_loss(executor: SparseExecutor, predictor: Predictor, windows: Windows) -> float:
    """`mean_loss` with every FFN sparse; the executor is left as it was."""
    before = executor.predictor, executor.ffn
    try:
        executor.predictor, executor.ffn = predictor, "sparse"
        return mean_loss(executor, windows)
    finally:
        executor.predictor, executor.ffn = before
