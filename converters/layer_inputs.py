"""A layer on texts, step by step: what each of its matrices reads. The arithmetic is that of kernels/reference.py.

Texts lie one after the other in arrays of rows, one row a token; attention stays within a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.norm import normalize
from svdengine.kernels.reference import attend, project
from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]
Weights = Mapping[str, Array]  # canonical name -> array of one layer, without the layer axis


@dataclass(frozen=True)
class Texts:
    """Token ids of texts, n in all, and where each begins and ends."""

    tokens: NDArray[np.int32]  # (n,)
    positions: NDArray[np.int32]  # (n,) within the text
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, windows: Sequence[Sequence[int]]) -> Texts:
        """The texts of these token ids."""
        ends = np.cumsum([len(window) for window in windows]).tolist()
        return cls(
            np.concatenate([np.asarray(window, np.int32) for window in windows]),
            np.concatenate([np.arange(len(window), dtype=np.int32) for window in windows]),
            tuple((end - len(window), end) for window, end in zip(windows, ends, strict=True)),
        )


def embed(config: ModelConfig, shared: Weights, texts: Texts) -> Array:
    """What enters the first layer: (n, d)."""
    x: Array = shared["embedding"][texts.tokens] * np.float32(config.embedding_scale)
    if config.learned_positions:
        x = x + shared["position_embedding"][texts.positions]
    return x


def mix(config: ModelConfig, weights: Weights, layer: int, texts: Texts, x: Array) -> Array:
    """Attention of normed rows x (n, d), up to what the output projection reads: (n, heads * head_dim)."""
    q, k, v = project(config, weights, layer, texts.positions, x)
    window = config.sliding_window if layer in config.sliding_window_layers else 0
    mixed = np.empty_like(q)
    for start, end in texts.bounds:
        at = np.arange(end - start)
        distance = at[:, None] - at
        visible = (distance >= 0) & (distance < window) if window else distance >= 0
        mixed[start:end] = attend(q[start:end], k[start:end], v[start:end], visible, config.attention_scale)
    joined = mixed.reshape(len(x), -1)
    return normalize(config, weights, "attention_sub_norm", joined) if config.sub_norms else joined
