"""Routers of mixtures of experts: which experts a token has, and what each one's output is multiplied by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig


def route(config: ModelConfig, products: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The chosen experts of rows, ascending, and their weights: both (n, active_experts).

    products: (n, expert_count), the router's matrix times what it reads. Of equal ones the first is chosen, and one
    that is not a number counts as the smallest. Whatever they hold, no expert is chosen twice.
    """
    with np.errstate(invalid="ignore"):
        return _route(config, products)


def _route(config: ModelConfig, products: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ranked = np.where(np.isnan(products), -np.inf, products)
    chosen = np.sort(np.argsort(-ranked, axis=1, kind="stable")[:, : config.active_experts], 1)
    taken = np.take_along_axis(products, chosen, 1)
    if config.router == "sigmoid":
        weights = 1 / (1 + np.exp(-np.clip(taken, -80, 80)))
        total = weights.sum(1, keepdims=True)
    else:
        largest = products.max(1, keepdims=True)
        weights = np.exp(taken - largest)
        over = taken if config.router == "topk_softmax" else products
        total = np.exp(over - largest).sum(1, keepdims=True)
    return chosen, (weights / total * np.float32(config.expert_scale)).astype(np.float32)
