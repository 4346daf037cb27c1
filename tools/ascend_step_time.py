"""Model, not measurement: what a decode step takes on an Ascend NPU, from the bytes it reads and what it launches.

    python -m svdengine.tools.ascend_step_time --shape llama2-7b --context 512

A token waits for memory: every weight that is used is read once, and so are the cached keys and values. Between two
operators of a stream there is a gap, which nothing here has measured; several are shown. Activations, lists and partial
sums are small and stay in L2: they are left out. No time is given to arithmetic, and all of the bandwidth is taken to
be reached, so that a device can only be slower. `svdengine bench --device ascend --ffn both` measures the same.

The default bandwidth is the lower one of the two figures, "about 1.6" and "1.8 TB/s peak", that Huawei's Ascend C guide
(repository cann/asc-devkit, docs) names for the memory of an Atlas A2 device (910B), without saying which; no data
sheet with a figure for each variant was found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from svdengine.kernels.formats import padded_columns
from svdengine.models import ModelConfig, tensor_specs
from svdengine.tools.random_model import SHAPES, shape_config

BANDWIDTH = 1.6e12  # bytes a second
GAPS = (0.0, 2e-6, 5e-6, 10e-6)  # seconds between operators
_HALF = 2  # bytes of a float16


@dataclass(frozen=True)
class Work:
    """What one token takes."""

    bytes: float  # read from the device's memory
    launches: int  # operators and kernels

    def seconds(self, bandwidth: float, gap: float) -> float:
        """The time of the step."""
        return self.bytes / bandwidth + self.launches * gap


@dataclass(frozen=True)
class Sparsity:
    """A predictor of low rank, and shares of neurons."""

    rank: int
    predicted: float  # whose gate is computed
    active: float  # whose up and down are


def decode_work(config: ModelConfig, context: int, sparsity: Sparsity | None = None) -> Work:
    """The work of decoding one token in float16, with `context` tokens cached; dense without a sparsity.

    Launches are those of kernels/ascend/step.py where the fused attention is used.
    """
    sizes = {spec.name: _HALF * spec.shape[-2] * spec.shape[-1] for spec in tensor_specs(config) if spec.matrix}
    head = sizes["embedding"] if config.tied_embeddings else sizes["lm_head"]
    attention = sum(sizes[name] for name in ("q", "k", "v", "o"))
    cached = 2 * _HALF * context * config.kv_head_count * config.head_dim
    ffn = (
        _sparse_bytes(config, sparsity) if sparsity else sum(sizes.get(n, 0) for n in ("gate", "up", "down", "down_T"))
    )
    layer = _layer_launches(config) + (5 if sparsity else _dense_launches(config))
    around = 5 + (config.embedding_scale != 1.0) + 2 * config.learned_positions + 2 * (config.rope is not None)
    around += 0 if _sums_with_norms(config) else config.layer_count - 1  # the sum after the last layer is one of the 5
    return Work(head + config.layer_count * (attention + cached + ffn), around + config.layer_count * layer)


def _sparse_bytes(config: ModelConfig, sparsity: Sparsity) -> float:
    """Of a layer's predictor and of the rows that are used."""
    d, f, rank = config.hidden_size, config.ffn_size, sparsity.rank
    predictor = _HALF * (f * padded_columns(rank) + rank * d) + 2 * 4 * f  # with thresholds and units
    others = 2 if config.gated else 1  # rows of up and down, or of down
    return predictor + _HALF * f * padded_columns(d) * (sparsity.predicted + others * sparsity.active)


def _sums_with_norms(config: ModelConfig) -> bool:
    """Whether one operator adds to the residual stream and makes the next norm."""
    return config.norm == "rms" and config.residual_scale == 1.0


def _layer_launches(config: ModelConfig) -> int:
    """Of a layer without its FFN: norms, products with biases, rope, two copies, attention, and its sum."""
    norms = 1 if config.shared_norm else 2
    turns = 2 * config.qk_norm + 2 * (config.rope is not None)
    products = 2 + config.qkv_bias + config.output_bias
    return norms + products + turns + 2 + 1 + (config.parallel or not _sums_with_norms(config))


def _dense_launches(config: ModelConfig) -> int:
    """Of a dense FFN: products with biases, activations, and their product."""
    activations = 1 + (config.activation == "relu2") + (config.activation == "drelu")
    return 2 * (1 + config.ffn_bias) + activations + config.gated


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.ascend_step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--context", type=int, default=512, help="tokens that are cached (default: 512)")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH / 1e9, help="GB/s (default: 1600)")
    parser.add_argument("--rank", type=int, default=256, help="of the predictor (default: 256)")
    parser.add_argument("--predicted", type=float, default=0.15, help="share of neurons (default: 0.15)")
    parser.add_argument("--active", type=float, default=0.10, help="share of neurons (default: 0.10)")
    options = parser.parse_args(arguments)
    config = shape_config(options.shape, activation="relu")
    dense = decode_work(config, options.context)
    sparse = decode_work(config, options.context, Sparsity(options.rank, options.predicted, options.active))
    shares = f"{options.predicted:.0%} predicted, {options.active:.0%} active"
    print(f"A model, not a measurement: {options.shape}, float16, one token, {options.context} tokens cached,")
    print(f"{options.bandwidth:.0f} GB/s, rank {options.rank}, {shares}")
    for name, work in (("dense", dense), ("sparse", sparse)):
        print(f"{name}: {work.bytes / 1e9:.2f} GB, {work.launches} launches")
    print()
    print("| gap between operators | dense ms | sparse ms | ratio |\n| ---: | ---: | ---: | ---: |")
    for gap in GAPS:
        a, b = (work.seconds(options.bandwidth * 1e9, gap) for work in (dense, sparse))
        print(f"| {1e6 * gap:.0f} us | {1e3 * a:.2f} | {1e3 * b:.2f} | {a / b:.2f} |")


if __name__ == "__main__":
    main()
