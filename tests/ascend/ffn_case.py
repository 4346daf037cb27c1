"""A layer's conditional FFN as the AscendC kernels take it, and what the definition makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from host_kernels import Script
from model_zoo import random_weights
from numpy.typing import NDArray

from svdengine.kernels.ascend.tiling import COUNT_INTS, list_capacity, padded
from svdengine.kernels.formats import dequantize, quantize
from svdengine.kernels.predictor import LayerPredictor
from svdengine.models.config import ModelConfig


def halves(matrix: NDArray) -> NDArray[np.float16]:
    """Rows in float16, padded with zeros as formats.py pads them."""
    return quantize(np.asarray(matrix, np.float32), "f16")[""]


def make_predictor(neurons: int, hidden: int, rank: int, *, relu: bool = False, seed: int = 0) -> LayerPredictor:
    """Random factors and thresholds, of which about half of the scores are positive."""
    random = np.random.default_rng(seed)
    a = quantize(random.standard_normal((neurons, rank), np.float32) * np.float32(rank**-0.5), "q8")
    b = quantize(random.standard_normal((rank, hidden), np.float32) * np.float32(hidden**-0.5), "q8")
    threshold = -0.2 * random.standard_normal(neurons).astype(np.float32)
    unit = 0.5 + random.random(neurons, np.float32)
    return LayerPredictor(rank, "q8", 0, a, b, {}, threshold, unit, relu)


def with_threshold(predictor: LayerPredictor, threshold: float) -> LayerPredictor:
    """The same predictor with one threshold for all neurons: a large one lists all of them or none."""
    return replace(predictor, threshold=np.full_like(predictor.threshold, threshold))


@dataclass(frozen=True)
class ScoreInputs:
    """What svd_score reads."""

    a: NDArray[np.float16]  # (neurons, rank padded)
    z: NDArray[np.float16]  # (rank,)
    bias: NDArray[np.float32]  # (neurons,) minus the thresholds
    unit: NDArray[np.float32]  # (neurons,)
    shift: float
    relu: bool
    rest: NDArray[np.float16] | None = None  # (neurons,) what a low-bit part adds

    @property
    def scores(self) -> NDArray[np.float64]:
        """(neurons,) of these very float16 factors."""
        z = self.z.astype(np.float64)
        z = np.maximum(z, 0) if self.relu else z
        rest = 0 if self.rest is None else self.rest.astype(np.float64)
        return self.a[:, : len(z)].astype(np.float64) @ z + rest + self.bias - self.shift * self.unit.astype(np.float64)


def score_inputs(predictor: LayerPredictor, x: NDArray[np.float32], shift: float = 0.0) -> ScoreInputs:
    """A predictor as a device holds it: factors in float16, z by a product of float16 operands."""
    a = halves(dequantize(predictor.a, predictor.factor_format, predictor.rank))
    b = dequantize(predictor.b, predictor.factor_format, len(x)).astype(np.float16)
    z = (b.astype(np.float32) @ x.astype(np.float16).astype(np.float32)).astype(np.float16)
    return ScoreInputs(a, z, -predictor.threshold, predictor.unit, shift, predictor.relu)


def capacity_of(script: Script, neurons: int, blocks: int) -> int:
    """Entries of a segment of a list."""
    return list_capacity(neurons, blocks) + script.slack


def add_list(script: Script, name: str, neurons: int, blocks: int, *, values: bool = False) -> None:
    """Empty buffers of a list: NAME_counts, NAME and, for a list with values, NAME_values."""
    capacity = capacity_of(script, neurons, blocks)
    script.empty(f"{name}_counts", (blocks, COUNT_INTS), np.int32)
    script.empty(name, (blocks, capacity), np.int32)
    if values:
        script.empty(f"{name}_values", (blocks, capacity), np.float32)


def launch_score(script: Script, inputs: ScoreInputs, blocks: int, order: int = 0) -> None:
    """Score and list the neurons into the list `predicted`."""
    neurons = len(inputs.a)
    script.buffer("a", inputs.a)
    script.buffer("z", inputs.z)
    script.buffer("bias", inputs.bias)
    script.buffer("unit", inputs.unit)
    script.buffer("shift", np.array([inputs.shift], np.float32))
    if inputs.rest is not None:
        script.buffer("rest", inputs.rest)
    add_list(script, "predicted", neurons, blocks)
    capacity = capacity_of(script, neurons, blocks)
    rest = None if inputs.rest is None else "rest"
    buffers = ("a", "z", "bias", "unit", "shift", rest, "predicted_counts", "predicted")
    script.launch("svd_score", blocks, *buffers, neurons, len(inputs.z), capacity, int(inputs.relu), order=order)


def listed(counts: NDArray[np.int32], segments: NDArray) -> NDArray:
    """The entries of a list, segment after segment."""
    assert (counts[:, 1:] == 0).all()
    return np.concatenate([segment[:count] for count, segment in zip(counts[:, 0], segments, strict=True)])


def score(program: Path, inputs: ScoreInputs, blocks: int, order: int = 0) -> NDArray[np.int32]:
    """The neurons that svd_score lists."""
    script = Script(program)
    launch_score(script, inputs, blocks, order)
    script.dump("predicted_counts", "predicted")
    counts, segments = script.run()
    return listed(counts, segments)


@dataclass(frozen=True)
class FfnInputs:
    """A layer's FFN with weights that float16 holds exactly, so that the reference may use the same."""

    config: ModelConfig
    weights: dict[str, NDArray[np.float32]]  # of one layer, by canonical name
    x: NDArray[np.float32]  # (hidden,)


def ffn_inputs(config: ModelConfig, seed: int = 0) -> FfnInputs:
    """Random weights and one token's FFN input, of the layer's sizes."""
    weights = {name: w[0] for name, w in random_weights(replace(config, layer_count=1), seed).items() if w.ndim > 1}
    weights = {
        name: w if name.endswith("bias") else w.astype(np.float16).astype(np.float32) for name, w in weights.items()
    }
    x = np.random.default_rng(seed + 1).standard_normal(config.hidden_size)
    return FfnInputs(config, weights, x.astype(np.float16).astype(np.float32))


def add_weights(script: Script, inputs: FfnInputs) -> None:
    """The buffers of the layer: x, and its matrices and biases by name."""
    script.buffer("x", inputs.x.astype(np.float16))
    for name in ("gate", "up", "down_T"):
        if name in inputs.weights:
            script.buffer(name, halves(inputs.weights[name]))
    for name in ("gate.bias", "up.bias", "down.bias"):
        if name in inputs.weights:
            script.buffer(name, inputs.weights[name])


def launch_ffn(script: Script, inputs: FfnInputs, producers: int, blocks: int, order: int = 0) -> None:
    """From the list `predicted`, which `producers` blocks wrote, to `active`, `partials` and `y`."""
    config = inputs.config
    neurons, hidden = config.ffn_size, config.hidden_size
    capacity = capacity_of(script, neurons, blocks)

    def present(name: str) -> str | None:
        return name if name in inputs.weights else None

    add_weights(script, inputs)
    add_list(script, "active", neurons, blocks, values=True)
    script.empty("partials", (blocks, padded(hidden)), np.float32)
    script.empty("y", (hidden,), np.float16)

    first = "gate" if config.gated else "up"
    buffers = (first, "x", present(f"{first}.bias"), "predicted_counts", "predicted")
    buffers = (*buffers, "active_counts", "active", "active_values")
    sizes = (neurons, hidden, producers, capacity_of(script, neurons, producers), capacity)
    square = int(config.activation == "relu2")
    script.launch("svd_gate", blocks, *buffers, *sizes, float(config.activation_threshold), square, order=order)

    up, bias = ("up", present("up.bias")) if config.gated else (None, None)
    buffers = (up, "down_T", "x", bias, "active_counts", "active", "active_values", "partials")
    drelu = int(config.activation == "drelu")
    script.launch("svd_up_down", blocks, *buffers, neurons, hidden, blocks, capacity, drelu, order=order)
    script.launch("svd_sum", blocks, "partials", present("down.bias"), "y", blocks, hidden, order=order)
    script.dump("active_counts", "active", "active_values", "partials", "y")
