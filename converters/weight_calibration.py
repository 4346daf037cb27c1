"""Quantise a model with what its inputs are, layer by layer.

Texts run through the model as it is being rounded: each matrix is rounded for the second moment of what it reads, when
everything before it has been rounded already, so that later matrices make up for earlier ones where they can. Memory
depends on the number of tokens and on the largest matrix, never on the number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.error_feedback import (
    MOST_LEVEL,
    Feedback,
    column_feedback,
    neuron_feedback,
    round_columns,
    round_neurons,
)
from svdengine.converters.layer_inputs import Texts, embed, mix
from svdengine.errors import ConversionError
from svdengine.kernels.formats import Parts, WeightFormat, dequantize
from svdengine.kernels.norm import normalize
from svdengine.kernels.reference import dense_neurons, linear
from svdengine.kernels.router import route
from svdengine.models.config import ModelConfig
from svdengine.models.tensors import FFN_MATRICES, ROUTER, tensor_specs

Array = NDArray[np.float32]
ReadTensor = Callable[[str, int], Array]  # canonical name, layer (0 of what has none) -> float32
WriteTensor = Callable[[str, int, Array], None]  # as it is
WriteParts = Callable[[str, int, Parts], None]
Observe = Callable[[str, int, float], None]  # name, layer, share of its output's energy that rounding a matrix changed
Also = Callable[[str, int, Array, Feedback], None]  # name, layer, a matrix as it was, what it is rounded by

TOKENS = 16_384  # by default; half of them for a model whose hidden size is beyond _LARGE
_LARGE = 2048
_OBSERVED = 512  # tokens of which that share is taken
_FEWEST = 64  # tokens that choose an expert, for it to be rounded for these alone
EMBEDDINGS = ("embedding", "lm_head")


@dataclass(frozen=True)
class WeightCalibration:
    """What `q4` and `q6` weights are calibrated on."""

    tokens: int | None = None  # None: as many as the size of the model leaves time for
    text: Sequence[Path] = field(default=())  # UTF-8 text, or chats in .jsonl files; none: text that every machine has

    def tokens_for(self, config: ModelConfig) -> int:
        """How many tokens of text to use."""
        return self.tokens or (TOKENS if config.hidden_size <= _LARGE else TOKENS // 2)


@dataclass(frozen=True)
class Quantizer:
    """A model to be rounded: where its tensors come from and where they go."""

    config: ModelConfig
    formats: Mapping[str, WeightFormat]  # of each matrix
    read: ReadTensor
    write: WriteTensor
    write_parts: WriteParts
    observe: Observe | None = None
    also: Also | None = None  # is shown each matrix that is rounded, to round it in other formats too

    def run(self, windows: Sequence[Sequence[int]]) -> Array:
        """Round and write every tensor, calibrated on these windows of token ids.

        Returns what the output projection reads for all of their tokens, (n, d). Raises ConversionError when what
        enters a matrix is not finite, and ValueError as `quantize` does.
        """
        config, texts = self.config, Texts.of(windows)
        specs = tensor_specs(config)
        in_layers = [spec.name for spec in specs if spec.stacked]
        if config.expert_count:  # of which each block reads its own
            in_layers = [name for name in in_layers if name not in (ROUTER, *FFN_MATRICES)]
        shared = {spec.name: self.read(spec.name, 0) for spec in specs if not spec.stacked and spec.name != "lm_head"}
        x = embed(config, shared, texts)
        embedding = {"embedding": shared.pop("embedding")}
        if not config.tied_embeddings:
            self._round(("embedding",), embedding, 0, None)
        del embedding  # it is large, and is read once more at the end where it is the output projection too
        for name, array in shared.items():
            self.write(name, 0, array)
        for layer in range(config.layer_count):
            weights = {name: self.read(name, layer) for name in in_layers}
            for name, array in weights.items():
                if array.ndim == 1:
                    self.write(name, layer, array)
            x = self._layer(weights, layer, texts, x)
        x = normalize(config, shared, "output_norm", x)
        name = "embedding" if config.tied_embeddings else "lm_head"
        self._round((name,), {name: self.read(name, 0)}, 0, x)
        return x

    def _layer(self, weights: dict[str, Array], layer: int, texts: Texts, x: Array) -> Array:
        """Round a layer; what it makes of x (n, d)."""
        config, scale = self.config, np.float32(self.config.residual_scale)
        h = normalize(config, weights, "attention_norm", x)
        self._round(("q", "k", "v"), weights, layer, h)
        mixed = mix(config, weights, layer, texts, h)
        self._round(("o",), weights, layer, mixed)
        added = linear(mixed, weights["o"], weights.get("o.bias"))
        attended = x + scale * (
            normalize(config, weights, "attention_post_norm", added) if config.post_norms else added
        )
        if not config.shared_norm:
            h = normalize(config, weights, "ffn_norm", x if config.parallel else attended)
        if config.expert_count:
            added = self._experts(layer, h, x if config.early_router else h)
        else:
            added = self._block(weights, layer, h)
        if config.post_norms:
            added = normalize(config, weights, "ffn_post_norm", added)
        return attended + scale * added

    def _experts(self, layer: int, h: Array, routed_by: Array) -> Array:
        """Round a layer's FFN blocks, each expert for the tokens that choose it; what they make of h (n, d).

        An expert that the text hardly reaches is rounded for all tokens.
        """
        config, y = self.config, np.zeros_like(h)
        chosen, weights = np.zeros((len(h), 1), np.int64), np.ones((len(h), 1), np.float32)
        if routed := layer in config.expert_layers:
            index = config.expert_layers.index(layer)
            router = self.read(ROUTER, index)
            self.write(ROUTER, index, router)
            chosen, weights = route(config, routed_by @ router.T)
        for number, block in enumerate(config.blocks_of(layer)):
            rows, place = np.nonzero(chosen == (number if routed else 0))
            names = ("gate", "up") if config.gated else ("up",)
            matrices = {name: self.read(name, block) for name in (*names, "down_T" if config.sparse_ffn else "down")}
            if len(rows) < _FEWEST:
                made = self._block(matrices, block, h)[rows]
            else:
                made = self._block(matrices, block, h[rows])
            y[rows] += weights[rows, place, None] * made
        return y

    def _block(self, weights: dict[str, Array], block: int, h: Array) -> Array:
        """Round an FFN block for rows h (n, d); what it makes of them."""
        config = self.config
        self._round(("gate", "up") if config.gated else ("up",), weights, block, h)
        h = dense_neurons(config, weights, h)
        name = "down_T" if config.sparse_ffn else "down"
        self._round((name,), weights, block, h)
        down = weights["down_T"].T if config.sparse_ffn else weights["down"]
        return linear(h, down, weights.get("down.bias"))

    def _round(self, names: Sequence[str], weights: dict[str, Array], layer: int, inputs: Array | None) -> None:
        """Round and write matrices that read the same inputs (n, columns), and put what they became in their place.

        Matrices of other formats are written as they are, and taken for exact. Without inputs, as for an embedding that
        only looks up rows, every column counts the same.
        """
        feedback: Feedback | None = None
        for name in names:
            matrix, weight_format = weights[name], self.formats[name]
            if weight_format not in MOST_LEVEL:
                self.write(name, layer, matrix)
                continue
            feedback = feedback or self._feedback(name, layer, matrix, inputs)
            parts = round_matrix(name, matrix, feedback, weight_format)
            self.write_parts(name, layer, parts)
            if self.also is not None:
                self.also(name, layer, matrix, feedback)
            if name in EMBEDDINGS and self.observe is None:
                continue
            weights[name] = dequantize(parts, weight_format, matrix.shape[1])
            if self.observe is not None and inputs is not None:
                step = -(-len(inputs) // _OBSERVED)
                self.observe(name, layer, changed_share(matrix, weights[name], inputs[::step], name == "down_T"))

    def _feedback(self, name: str, layer: int, matrix: Array, inputs: Array | None) -> Feedback:
        if inputs is None:
            return column_feedback(np.eye(matrix.shape[1], dtype=np.float32))
        moment = inputs.T @ inputs
        if not np.isfinite(moment).all():
            raise ConversionError(
                f"layer {layer}: what {name} reads holds NaN or infinity; the model's weights may be damaged"
            )
        return (neuron_feedback if name == "down_T" else column_feedback)(moment)


def exact_states(config: ModelConfig, read: ReadTensor, windows: Sequence[Sequence[int]]) -> Array:
    """What the output projection reads when nothing is rounded, (n, d), for all tokens of these windows."""
    formats: dict[str, WeightFormat] = {spec.name: "f32" for spec in tensor_specs(config) if spec.matrix}
    return Quantizer(config, formats, read, lambda *_: None, lambda *_: None).run(windows)


def round_matrix(name: str, matrix: Array, feedback: Feedback, weight_format: WeightFormat) -> Parts:
    """Round the matrix of this name for what it reads."""
    return (round_neurons if name == "down_T" else round_columns)(matrix, feedback, weight_format)


def changed_share(matrix: Array, rounded: Array, inputs: Array, neuron_major: bool) -> float:
    """The energy of what rounding changes in the outputs for inputs (n, columns), as a share of the outputs'."""
    exact = inputs @ (matrix if neuron_major else matrix.T)
    error = inputs @ (rounded - matrix if neuron_major else (rounded - matrix).T)
    energy = float(np.square(exact).sum(dtype=np.float64))
    return float(np.square(error).sum(dtype=np.float64)) / energy if energy else 0.0
