"""Write a model of a known shape with random weights, as a `.svdp` file and as the same model in GGUF.

    python -m svdengine.tools.random_model --shape llama2-7b --layers 8 --dtype q8 --gguf q8_0 -o out.svdp

Speed and memory of an engine depend on the shape of a model and on the number of its active neurons, not on what it
has learned: such a model measures both without a download.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import SvdEngineError
from svdengine.files.model_writer import ModelWriter
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.models import ModelConfig, TensorSpec, tensor_specs, with_activation
from svdengine.models.config import Rope
from svdengine.tools.random_gguf import GGUF_TYPES, check_gguf, write_gguf

_TILE = (1 << 20) + 4099  # numbers that all matrices are cut from
_ROWS = 1024  # rows that are cut at once

_LLAMA2 = ModelConfig(
    family="llama",
    vocab_size=32000,
    hidden_size=4096,
    layer_count=32,
    head_count=32,
    kv_head_count=32,
    head_dim=128,
    ffn_size=11008,
    max_position=4096,
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    rope=Rope(theta=10000.0),
)
_SMALLTHINKER = replace(
    _LLAMA2,
    family="smallthinker",
    vocab_size=151936,
    hidden_size=1536,
    head_count=12,
    kv_head_count=2,
    ffn_size=768,
    max_position=32768,
    norm_eps=1e-6,
    activation="relu",
    rope=Rope(theta=1500000.0),
    tied_embeddings=True,
    expert_count=32,
    active_experts=4,
    router="sigmoid",
    early_router=True,
)

SHAPES: dict[str, ModelConfig] = {
    "llama2-7b": _LLAMA2,
    "smollm2-135m": replace(
        _LLAMA2,
        vocab_size=49152,
        hidden_size=576,
        layer_count=30,
        head_count=9,
        kv_head_count=3,
        head_dim=64,
        ffn_size=1536,
        max_position=8192,
        rope=Rope(theta=100000.0),
        tied_embeddings=True,
    ),
    "mixtral-8x7b": replace(
        _LLAMA2,
        family="mixtral",
        kv_head_count=8,
        ffn_size=14336,
        max_position=32768,
        rope=Rope(theta=1000000.0),
        expert_count=8,
        active_experts=2,
    ),
    "smallthinker-4b": _SMALLTHINKER,
    "smallthinker-21b": replace(
        _SMALLTHINKER,
        hidden_size=2560,
        layer_count=52,
        head_count=28,
        kv_head_count=4,
        max_position=16384,
        expert_count=64,
        active_experts=6,
        sliding_window=4096,
        sliding_window_layers=tuple(layer for layer in range(52) if layer % 4),
        unrotated_layers=tuple(range(0, 52, 4)),
    ),
}


class RandomWeights:
    """Float32 tensors of a config, each drawn again whenever it is asked for: the same every time for one seed.

    Gaussian numbers are drawn once. A row of a matrix is a piece of them, with its own start and sign, so that a
    matrix costs little more than its copy. Matrices keep activations near 1.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        self._seed = seed
        self._specs = {spec.name: spec for spec in tensor_specs(config)}
        longest = max(spec.shape[-1] for spec in self._specs.values())
        self._tile = np.random.default_rng(seed).standard_normal(_TILE + longest, np.float32)

    def tensor(self, name: str, layer: int = 0) -> NDArray[np.float32]:
        """One vector (size,), or one matrix (rows, columns), of one layer."""
        spec = self._specs[name]
        random = np.random.default_rng((self._seed, layer, crc32(name.encode())))
        shape = spec.shape[1:] if spec.stacked else spec.shape
        if spec.matrix:
            return self._matrix(random, shape[0], shape[1], _deviation(spec))
        noise = np.float32(0.1) * random.standard_normal(shape, np.float32)
        return noise + np.float32(1) if name.endswith("norm.weight") else noise

    def _matrix(self, random: np.random.Generator, rows: int, columns: int, deviation: float) -> NDArray[np.float32]:
        starts = random.integers(0, _TILE, rows)
        signs = random.choice(np.array([-deviation, deviation], np.float32), (rows, 1))
        windows = np.lib.stride_tricks.sliding_window_view(self._tile, columns)
        out = np.empty((rows, columns), np.float32)
        for row in range(0, rows, _ROWS):
            part = slice(row, row + _ROWS)
            np.multiply(windows[starts[part]], signs[part], out=out[part])
        return out


def _deviation(spec: TensorSpec) -> float:
    """Standard deviation with which a matrix gives outputs near 1 for inputs near 1."""
    if spec.name in ("embedding", "position_embedding"):
        return 1.0
    inputs = spec.shape[-2] if spec.name == "down_T" else spec.shape[-1]
    return float(inputs**-0.5)


def write_svdp(path: Path, config: ModelConfig, dtype: WeightFormat, seed: int = 0) -> None:
    """Write a model without tokenizer: it reads token ids. Raises ModelFileError when `path` cannot be written."""
    provenance = {"source": "random weights", "seed": seed, "dtype": dtype}
    write_weights(path, config, dtype, RandomWeights(config, seed), provenance)


def write_weights(
    path: Path, config: ModelConfig, dtype: WeightFormat, weights: RandomWeights, provenance: Mapping[str, Any]
) -> None:
    """As `write_svdp`, one layer of one tensor at a time, for any weights of the config."""
    with ModelWriter(path, config, dtype, provenance=provenance) as writer:
        for spec in tensor_specs(config):
            for layer in range(spec.shape[0] if spec.stacked else 1):
                writer.write(spec.name, weights.tensor(spec.name, layer), layer)


def shape_config(
    shape: str,
    layers: int | None = None,
    activation: str | None = None,
    experts: int | None = None,
    active_experts: int | None = None,
) -> ModelConfig:
    """The config of a shape in SHAPES, with another number of layers or experts, or another activation.

    A shape without experts gets some, each as large as its FFN was. Raises ValueError for an unknown activation or a
    number out of range.
    """
    config = SHAPES[shape] if activation is None else with_activation(SHAPES[shape], activation)
    count = config.layer_count if layers is None else layers
    config = replace(
        config,
        layer_count=count,
        sliding_window_layers=tuple(layer for layer in config.sliding_window_layers if layer < count),
        unrotated_layers=tuple(layer for layer in config.unrotated_layers if layer < count),
        expert_count=config.expert_count if experts is None else experts,
        active_experts=config.active_experts if active_experts is None else active_experts,
    )
    config.validate()
    return config


def shape_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A command line that takes a shape, a format, a seed and the file to write."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="number of layers (default: 8)")
    parser.add_argument("--experts", type=int, metavar="N", help="of a layer (default: those of the shape)")
    parser.add_argument("--active-experts", type=int, metavar="K", help="of a token (default: those of the shape)")
    parser.add_argument("--dtype", choices=WEIGHT_FORMATS, default="q8", help="of the .svdp file (default: q8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUTPUT")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = shape_parser("svdengine.tools.random_model", "Write a model of random weights.")
    parser.add_argument(
        "--activation", help="of the FFN: silu, relu, fatrelu, drelu, ... (default: relu for smallthinker, else silu)"
    )
    parser.add_argument(
        "--gguf", choices=GGUF_TYPES, help="also write the same weights as OUTPUT with the suffix .gguf"
    )
    options = parser.parse_args(arguments)
    try:
        experts = options.experts, options.active_experts
        config = shape_config(options.shape, options.layers, options.activation, *experts)
        if options.gguf is not None:
            check_gguf(config)
        announced(options.output, lambda: write_svdp(options.output, config, options.dtype, options.seed))
        if options.gguf is not None:
            gguf = options.output.with_suffix(".gguf")
            weights = RandomWeights(config, options.seed)
            announced(gguf, lambda: write_gguf(gguf, config, options.gguf, weights.tensor))
    except (SvdEngineError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def announced(path: Path, write: Callable[[], None]) -> None:
    """Write a file and say how large it is."""
    write()
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
