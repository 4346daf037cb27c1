"""Rotary position embedding tables: every scaling that ModelConfig knows, computed in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from svdengine.models.config import ModelConfig, Rope


def rope_tables(
    config: ModelConfig, positions: ArrayLike, rope: Rope | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines that rotate q and k of tokens at `positions` (n,), each (n, head_dim / 2) float32.

    `rope` is one of the model's, by default that of layers without a sliding window. Raises ValueError for a model
    without rotary embedding.
    """
    rope = rope or config.rope
    if rope is None:
        raise ValueError(f"a {config.family} model with rope=None has no rotary embedding")
    frequencies = rope_frequencies(rope, config.head_dim)
    angles = np.asarray(positions, np.float64)[:, None] * frequencies
    scale = np.where(frequencies > 0, rope.attention_factor if rope.scaling == "yarn" else 1.0, 1.0)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def rope_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float64]:
    """Radians per token of each pair of dimensions, (head_dim / 2,) float64, fastest first; 0 of those that stay."""
    rotated = rope.rotated or head_dim
    turning = _turning(rope, rotated)
    return np.concatenate([turning, np.zeros((head_dim - rotated) // 2)])


def _turning(rope: Rope, rotated: int) -> NDArray[np.float64]:
    """Of the pairs that turn: (rotated / 2,)."""
    frequencies: NDArray[np.float64] = rope.theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, frequencies)
    if rope.scaling == "yarn":
        return _yarn(rope, frequencies, rotated)
    return frequencies


def _llama3(rope: Rope, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Llama 3.1: keep what turns often within the original context, slow down the rest, blend in between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    kept = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(rope: Rope, frequencies: NDArray[np.float64], rotated: int) -> NDArray[np.float64]:
    """YaRN (arXiv:2309.00071, equations 18 to 23): blend along the dimensions between beta_fast and beta_slow turns."""

    def dimension_with(turns: float) -> float:
        return rotated * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001  # a step and not a division by zero
    slowed = np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)
    return frequencies * (1 - slowed + slowed / rope.factor)
