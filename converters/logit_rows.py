"""What measuring asks of logits: losses, likeliest tokens and divergences of many rows, on all cores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.parallel import over_parts
from svdengine.errors import ConversionError
from svdengine.kernels.executor import Logits

_ROWS = 8  # that a core works on at once, which keeps them in the cache


@dataclass(frozen=True)
class LogitRows:
    """Logits of n rows, with what is needed to take their softmax."""

    logits: Logits  # (n, vocabulary), not a copy
    scale: NDArray[np.float64]  # (n,) logarithm of the sum of exponentials
    choice: NDArray[np.int64]  # (n,) likeliest token

    @classmethod
    def of(cls, logits: Logits) -> LogitRows:
        """Of logits (n, vocabulary), which may be an executor's buffer as long as it holds."""
        scale, choice = np.empty(len(logits)), np.empty(len(logits), np.int64)

        def fill(part: slice) -> None:
            rows = logits[part]
            choice[part] = rows.argmax(1)
            most = np.take_along_axis(rows, choice[part, None], 1)
            with np.errstate(invalid="ignore"):  # losses tell of what is not finite
                scale[part] = most[:, 0] + np.log(np.exp(rows - most).sum(1, dtype=np.float64))

        over_parts(fill, len(logits), size=_ROWS)
        return cls(logits, scale, choice)

    def losses(self, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each token (n,), in nats. Raises ConversionError where logits are not finite."""
        losses = self.scale - self.logits[np.arange(len(targets)), targets]
        if not np.isfinite(losses).all():
            raise ConversionError("the model gave logits that are not finite")
        return losses

    def log_probabilities(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of tokens (n, k)."""
        found: NDArray[np.float32] = np.take_along_axis(self.logits, tokens, 1) - self.scale[:, None].astype(np.float32)
        return found

    def likeliest(self, count: int) -> NDArray[np.int64]:
        """Tokens (n, at most count) with the highest logits of each row, in no order."""
        count = min(count, self.logits.shape[1])
        found = np.empty((len(self.logits), count), np.int64)

        def fill(part: slice) -> None:
            found[part] = np.argpartition(self.logits[part], -count, 1)[:, -count:]

        over_parts(fill, len(self.logits), size=_ROWS)
        return found

    def divergences(self, other: LogitRows) -> NDArray[np.float64]:
        """KL divergence of each row (n,) of `other` from this one, in nats."""
        found = np.empty(len(self.logits))

        def fill(part: slice) -> None:
            rows = self.logits[part]
            most = np.take_along_axis(rows, self.choice[part, None], 1)
            # In float32, but for what is left of large numbers: the mean difference of the logits, and of their scales.
            weights = np.exp(rows - most)
            total = weights.sum(1, dtype=np.float64)
            shift = most - np.take_along_axis(other.logits[part], self.choice[part, None], 1)
            weights *= rows - other.logits[part] - shift
            mean = weights.sum(1, dtype=np.float64) / total + shift[:, 0]
            found[part] = mean - self.scale[part] + other.scale[part]

        over_parts(fill, len(self.logits), size=_ROWS)
        return found
