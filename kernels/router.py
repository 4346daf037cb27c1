"""Routers of mixtures of experts: which experts a token has, and what each one's output is multiplied by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svdengine.models.config import ModelConfig


def route(config: ModelConfig, products: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The FFN blocks that rows have of a layer, ascending, and their weights: both (n, chosen_blocks).

    They are the chosen experts, and those that all rows have. products: (n, router_rows), the router's matrix times
    what it reads. Of equal ones the first is chosen, and one that is not a number counts as the smallest. Whatever they
    hold, no expert is chosen twice.
    """
    with np.errstate(invalid="ignore"):
        chosen, weights = _route(config, products[:, : config.expert_count])
        if not config.shared_blocks:
            return chosen, weights
        shared = np.arange(config.expert_count, config.expert_count + config.shared_blocks)
        gate = 1 / (1 + np.exp(-np.clip(products[:, -1:], -80, 80))) if config.shared_gate else np.ones((1, 1))
        shape = len(products), config.shared_blocks
        more = np.broadcast_to(shared, shape), np.broadcast_to(gate, shape).astype(np.float32)
        return np.concatenate([chosen, more[0]], 1), np.concatenate([weights, more[1]], 1)


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
