"""Decode tokens a second of Hugging Face's transformers on a model of a known shape with random weights.

    python -m svdengine.tools.time_transformers --layers 32

Two ways, both in float16 and greedy: as it comes (`eager`), and with a static cache, for which transformers compiles
the decode step with PyTorch on a GPU (`static`). Needs the packages torch, for CUDA, and transformers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from svdengine.errors import RequestError, SvdEngineError
from svdengine.models import ModelConfig
from svdengine.tools.random_model import SHAPES

_PROMPT = 8  # tokens
_WAYS = ("eager", "static")


@dataclass(frozen=True)
class Speed:
    """How fast one way decodes."""

    way: str
    tokens_per_second: float  # the median of the repetitions
    stddev: float


def decode_speeds(config: ModelConfig, device: str, tokens: int, repetitions: int) -> list[Speed]:
    """The speeds of all ways, for a Llama of this config with random weights. RequestError: a package is missing."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise RequestError(f"{error.name} is missing; pip install torch transformers") from error
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.layer_count,
        num_attention_heads=config.head_count,
        num_key_value_heads=config.kv_head_count,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        eos_token_id=None,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(shape).eval()
            prompt = torch.ones((1, _PROMPT), dtype=torch.long)
    finally:
        torch.set_default_dtype(before)

    def generate(way: str, count: int) -> None:
        options: dict[str, Any] = {"cache_implementation": "static"} if way == "static" else {}
        with torch.inference_mode():
            model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)
        if device != "cpu":
            torch.cuda.synchronize()

    return [_speed(way, generate, tokens, repetitions) for way in _WAYS]


def _speed(way: str, generate: Callable[[str, int], None], tokens: int, repetitions: int) -> Speed:
    """Tokens a second after the first one, whose time, with the prompt's, is taken off."""

    def seconds(count: int) -> float:
        start = time.perf_counter()
        generate(way, count)
        return time.perf_counter() - start

    for count in (tokens + 1, 1):
        generate(way, count)  # compiles
    rates = [tokens / max(seconds(tokens + 1) - seconds(1), 1e-9) for _ in range(repetitions)]
    return Speed(way, statistics.median(rates), statistics.stdev(rates) if repetitions > 1 else 0.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.time_transformers", description="Time transformers.")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--layers", type=int, help="number of layers (default: the shape's)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tg", type=int, default=128, help="tokens to decode (default: 128)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print a list instead of the table")
    options = parser.parse_args(arguments)
    config = SHAPES[options.shape]
    config = replace(config, layer_count=options.layers or config.layer_count)
    if min(config.layer_count, options.tg, options.repetitions) < 1:
        parser.error("--layers, --tg and --repetitions must be at least 1")
    try:
        speeds = decode_speeds(config, options.device, options.tg, options.repetitions)
    except SvdEngineError as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps([asdict(speed) for speed in speeds], indent=1))
        return
    print("| transformers, f16 | tokens/s |\n| --- | ---: |")
    for speed in speeds:
        print(f"| {speed.way} | {speed.tokens_per_second:.2f} ± {speed.stddev:.2f} |")


if __name__ == "__main__":
    main()
