"""Predictors for the small models of model_zoo.py, without calibration: shared by the tests of all executors."""

from __future__ import annotations

from functools import cache

import numpy as np
from model_zoo import random_weights

from svdengine.kernels.formats import WeightFormat, quantize
from svdengine.kernels.lowbit import quantize_lowbit
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models import ModelConfig


@cache
def make_predictor(
    config: ModelConfig, rank: int, bits: int, threshold: float, factors: WeightFormat = "q8"
) -> Predictor:
    """Factors by plain SVD and a low-bit residual; every neuron has this threshold."""
    gates = random_weights(config)["gate" if config.gated else "up"]
    layers = []
    for gate in gates:
        u, s, vt = np.linalg.svd(gate, full_matrices=False)
        a, b = u[:, :rank] * s[:rank], vt[:rank]
        rest = gate - a @ b if rank else gate
        layers.append(
            LayerPredictor(
                rank=rank,
                factor_format=factors,
                residual_bits=bits,
                a=quantize(a, factors) if rank else {},
                b=quantize(b, factors) if rank else {},
                q=quantize_lowbit(rest, bits) if bits else {},
                threshold=np.full(config.ffn_size, threshold, np.float32),
                unit=np.ones(config.ffn_size, np.float32),
            )
        )
    return Predictor(tuple(layers), {"kind": "test"})


def make_network(
    config: ModelConfig, rank: int, threshold: float, bits: int = 0, factors: WeightFormat = "q8"
) -> Predictor:
    """Random networks of one hidden layer; every neuron has this threshold."""
    random = np.random.default_rng(0)
    f, d = config.ffn_size, config.hidden_size

    def layer() -> LayerPredictor:
        a, b, q = (random.standard_normal(shape, np.float32) for shape in ((f, rank), (rank, d), (f, d)))
        return LayerPredictor(
            rank=rank,
            factor_format=factors,
            residual_bits=bits,
            a=quantize(a * rank**-0.5, factors),
            b=quantize(b * d**-0.5, factors),
            q=quantize_lowbit(q * d**-0.5, bits) if bits else {},
            threshold=np.full(f, threshold, np.float32),
            unit=np.ones(f, np.float32),
            relu=True,
        )

    return Predictor(tuple(layer() for _ in range(config.layer_count)), {"kind": "test"})
