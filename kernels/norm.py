"""Norms in float32 NumPy: the definition for every executor, and what the host does with hidden states."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig

Array = NDArray[np.float32]


def normalize(config: ModelConfig, weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """The model's kind of norm over the last axis of x."""
    if config.norm == "rms":
        return rms_norm(x, weights[f"{name}.weight"], config.norm_eps)
    centred = x - x.mean(-1, keepdims=True)
    return rms_norm(centred, weights[f"{name}.weight"], config.norm_eps) + weights[f"{name}.bias"]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Divide by the root of the mean square over the last axis, times weight."""
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(eps)) * weight
