"""Predictors for the tiny models of the tests, without calibration."""

from pathlib import Path

import numpy as np
from model_zoo import random_weights
from tiny_model import write_tiny_model

from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import model_fingerprint, write_model_with_predictor
from svdengine.kernels.formats import WeightFormat, quantize
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models.config import ModelConfig


def tiny_predictor(config: ModelConfig, offset: float = 0.1, fingerprint: str = "") -> Predictor:
    """The gate itself at full rank: it knows every active neuron, and `offset` adds some that are not."""
    layers = []
    for gate in random_weights(config)["gate" if config.gated else "up"]:
        f, d = gate.shape
        a, b = quantize(gate, "q8"), quantize(np.eye(d, dtype=np.float32), "q8")
        threshold = np.full(f, config.activation_threshold - offset, np.float32)
        layers.append(LayerPredictor(d, "q8", 0, a, b, {}, threshold, np.ones(f, np.float32)))
    return Predictor(tuple(layers), {"kind": "svd", "calibrator": "uniform", "fingerprint": fingerprint})


def write_sparse_model(path: Path, offset: float = 0.1, weight_format: WeightFormat = "f32") -> Path:
    """A tiny model file with a predictor in it."""
    write_tiny_model(path, weight_format=weight_format)
    with read_model_file(path) as file:
        write_model_with_predictor(path, file, tiny_predictor(file.config, offset, model_fingerprint(file)))
    return path
