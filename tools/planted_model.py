"""Write a sparse model of a known shape: gates of low rank plus noise, and an SVD predictor that does predict them.

    python -m svdengine.tools.planted_model --layers 8 --predicted 0.15 --active 0.10 -o planted.svdp
    svdengine bench planted.svdp --ffn both

On every token about the asked shares of neurons are predicted active and computed, whatever it reads: so the file
measures what sparse execution gains at these shares without a trained model.

Llama's gates have no bias, so that a ReLU gate of random weights is positive for half of all neurons. Here the first
columns of the residual stream are a constant: the embeddings hold it, and neither attention nor FFN adds to it. A
gate's weights there act as a bias. The other columns are close to Gaussian, a gate's scores too, and its thresholds
follow from the shares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import SvdEngineError
from svdengine.files.model_file import read_model_file
from svdengine.files.predictor_file import model_fingerprint, write_model_with_predictor
from svdengine.kernels.formats import GROUP, WeightFormat, quantize
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models import ModelConfig
from svdengine.tools.random_model import RandomWeights, announced, shape_config, shape_parser, write_weights

_CONSTANT = 2.0  # what the residual stream holds in its first GROUP columns; the others hold numbers near 1
_ADDED = 0.125  # size of what all layers add to the residual stream, which else is the embedding
_STEPS = 4096  # of an integral
_GUMBEL = np.pi / 6**0.5  # standard deviation of Gumbel's distribution


@dataclass(frozen=True)
class Sparsity:
    """What is planted. Raises ValueError for shares and ranks that cannot be had."""

    rank: int = 256  # of the gates, and of the predictor
    predicted: float = 0.15  # share of neurons whose gate is computed
    active: float = 0.10  # share of neurons computed in full: predicted, and their gate is positive
    noise: float = 0.05  # share of a gate's variance that the predictor does not see
    skew: float = 0.0  # exponent of the law like Zipf's by which tokens choose experts; 0: all equally often

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.noise < 1:
            raise ValueError(f"found rank {self.rank} and noise {self.noise}, expected 1 or more, and between 0 and 1")
        if self.skew < 0:
            raise ValueError(f"found a skew of {self.skew}, expected 0 or more")
        if not 0 < self.active < self.predicted < 1:
            raise ValueError(
                f"found {self.predicted} predicted and {self.active} active, expected shares 0 < active < predicted < 1"
            )

    @property
    def score_threshold(self) -> float:
        """In standard deviations of a score: above it a neuron is predicted active."""
        return NormalDist().inv_cdf(1 - self.predicted)

    @property
    def gate_threshold(self) -> float:
        """In standard deviations of a gate: above it, and predicted, a neuron is active."""
        low, high = -10.0, 10.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if self._both(middle) > self.active else (low, middle)
        return low

    def _both(self, threshold: float) -> float:
        """Chance that the score is above its threshold and the gate above `threshold`."""
        normal, first = NormalDist(), self.predicted
        scores = (normal.inv_cdf(1 - first * (step + 0.5) / _STEPS) for step in range(_STEPS))
        seen, unseen = (1 - self.noise) ** 0.5, self.noise**0.5
        return first * sum(normal.cdf((seen * score - threshold) / unseen) for score in scores) / _STEPS


class PlantedWeights(RandomWeights):
    """RandomWeights whose gates, gate (f, d) = (A B + noise) and a bias, are predicted by `predictor`."""

    def __init__(self, config: ModelConfig, sparsity: Sparsity, seed: int = 0) -> None:
        """Raises ValueError when the model has no gates with ReLU, or is too small for the rank."""
        if not config.gated or config.activation != "relu" or config.norm != "rms" or config.parallel:
            raise ValueError("sparsity is planted in gated ReLU models with RMS norms")
        if sparsity.rank > config.hidden_size - GROUP:
            raise ValueError(f"found rank {sparsity.rank}, expected at most {config.hidden_size - GROUP}")
        super().__init__(config, seed)
        self._config, self._sparsity = config, sparsity
        self._bias = sparsity.gate_threshold
        rest = config.hidden_size - GROUP
        self._rms = ((rest + GROUP * _CONSTANT**2) / config.hidden_size) ** 0.5  # of the residual stream

    def tensor(self, name: str, layer: int = 0) -> NDArray[np.float32]:
        """One vector (size,), or one matrix (rows, columns), of one layer."""
        if name == "ffn_norm.weight":
            return np.ones(self._config.hidden_size, np.float32)
        w = super().tensor(name, layer)
        if name == "embedding":
            w[:, :GROUP] = _CONSTANT
        elif name in ("o", "down_T"):
            w *= np.float32(_ADDED / (2 * self._config.layer_count) ** 0.5)
            (w.T if name == "down_T" else w)[:GROUP] = 0
        elif name == "gate":
            self._plant(w, layer)
        elif name == "router":
            w[:, :GROUP] = 0  # or some experts would always be chosen before others
            w[: self._config.expert_count, :GROUP] = self._preference(layer)[:, None] / (GROUP * _CONSTANT)
        return w

    def _preference(self, layer: int) -> NDArray[np.float32]:
        """What a layer's router adds to the product of each expert, whose deviation is near 1.

        With noise of Gumbel's distribution an expert would be drawn with a chance that is a power of its rank. Gaussian
        noise of the same deviation favours the first ones somewhat more. Which these are differs from layer to layer.
        """
        random = np.random.default_rng((self._seed, layer, crc32(b"preference")))
        ranks = random.permutation(self._config.expert_count) + 1
        preference: NDArray[np.float32] = (-self._sparsity.skew / _GUMBEL * np.log(ranks)).astype(np.float32)
        return preference

    def layer_predictor(self, layer: int) -> LayerPredictor:
        """The predictor of one layer, or one expert: the planted factors in int8."""
        a, b = self._factors(layer)
        threshold = np.full(len(a), self._sparsity.score_threshold, np.float32)
        parts = quantize(a, "q8"), quantize(b, "q8")
        return LayerPredictor(self._sparsity.rank, "q8", 0, *parts, {}, threshold, np.ones(len(a), np.float32))

    def predictor(self, fingerprint: str) -> Predictor:
        """The predictor of a model file with this fingerprint."""
        layers = tuple(self.layer_predictor(layer) for layer in range(self._config.ffn_blocks))
        shares = {"predicted_density": self._sparsity.predicted, "computed_density": self._sparsity.active}
        table = [shares] * len(layers)  # what "auto" chooses by
        about = {"kind": "svd", "thresholds": "planted", "fingerprint": fingerprint, "table": table}
        return Predictor(layers, about)

    def _plant(self, w: NDArray[np.float32], layer: int) -> None:
        """Make random rows w the noise of planted ones, in place; outputs get a variance of 1."""
        a, b = self._factors(layer)
        noise, columns = self._sparsity.noise, w.shape[1]
        w *= np.float32(self._rms * (noise * columns / (columns - GROUP)) ** 0.5)
        w += np.float32((1 - noise) ** 0.5) * a @ b
        w[:, :GROUP] = -self._bias * self._rms / (GROUP * _CONSTANT)

    def _factors(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (f, rank) with rows of length 1, and B (rank, d), whose rows are orthogonal: scores get a variance of 1."""
        random = np.random.default_rng((self._seed, layer, crc32(b"planted")))
        f, d, rank = self._config.ffn_size, self._config.hidden_size, self._sparsity.rank
        a = random.standard_normal((f, rank), np.float32)
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b = np.zeros((rank, d), np.float32)
        b[:, GROUP:] = np.linalg.qr(random.standard_normal((d - GROUP, rank), np.float32))[0].T * np.float32(self._rms)
        return a, b


def write_planted(path: Path, config: ModelConfig, dtype: WeightFormat, sparsity: Sparsity, seed: int = 0) -> None:
    """Write a model file with its predictor. Raises ModelFileError or, where `config` is not fit for it, ValueError."""
    weights = PlantedWeights(config, sparsity, seed)
    provenance = {"source": "random weights, planted gates", "seed": seed, "dtype": dtype}
    write_weights(path, config, dtype, weights, provenance)
    with read_model_file(path) as file:
        write_model_with_predictor(path, file, weights.predictor(model_fingerprint(file)))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = shape_parser("svdengine.tools.planted_model", "Write a model of random weights with sparse FFNs.")
    for name, kind in (("rank", int), ("predicted", float), ("active", float), ("noise", float), ("skew", float)):
        default = getattr(Sparsity, name)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=f"(default: {default})")
    options = parser.parse_args(arguments)
    try:
        sparsity = Sparsity(options.rank, options.predicted, options.active, options.noise, options.skew)
        config = shape_config(options.shape, options.layers, "relu", options.experts, options.active_experts)
        announced(options.output, lambda: write_planted(options.output, config, options.dtype, sparsity, options.seed))
    except (SvdEngineError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
