"""What the first run on a GPU runs in processes of its own (tools/first_gpu_run.py); each prints one line of JSON.

    python -m svdengine.tools.first_gpu_parts formats --work FOLDER

`models` writes those that later parts measure, `formats` compares every weight format with the reference, `memory`
looks whether memory comes back, and `generation` decodes a little, for tools that watch a process.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import svdengine
from svdengine.errors import SvdEngineError
from svdengine.kernels.batch import BLOCK_SIZE, Batch
from svdengine.kernels.cuda.availability import find_gpu
from svdengine.kernels.executor import Choice, FfnMode
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat
from svdengine.models import ModelConfig
from svdengine.tools.planted_model import Sparsity, write_planted
from svdengine.tools.random_model import shape_config

LAYERS = 4  # of the models that are measured, at the shape of a 7B model
LONG = 16384  # positions that these may have: prompts of 8,192 tokens are read
MEASURED: dict[str, WeightFormat] = {"f16": "f16", "q4": "q4"}  # file name -> format
_PROMPT = 40  # tokens: enough for the vendor's library
_STEPS = 3  # of one row: launched, recorded, replayed
_BOUNDS = {"prompt": 5e-3, "decode": 2e-3}  # relative: the library rounds activations to float16
_KEPT = 64 << 20  # bytes that may stay with the driver after a model was closed


def measured_path(work: Path, name: str) -> Path:
    """A model that is measured."""
    return work / f"planted-{name}.svdp"


def small_config(activation: str = "relu") -> ModelConfig:
    """A model of a few hundred thousand weights."""
    config = shape_config("smollm2-135m", 2, activation)
    return replace(config, vocab_size=320, hidden_size=192, ffn_size=448, head_count=6, kv_head_count=2, head_dim=32)


def small_mixtures() -> dict[WeightFormat, ModelConfig]:
    """Mixtures of experts, by the format to store them in.

    Where activations are rounded all experts are chosen: a choice between nearly equal ones shows in every logit.
    """
    mixture = replace(small_config(), family="smallthinker", router="sigmoid", early_router=True)
    return {
        "f32": replace(mixture, expert_count=6, active_experts=2),
        "q8": replace(mixture, expert_count=3, active_experts=3),
    }


def models(work: Path, device: Any) -> dict[str, Any]:
    """Write the models that are measured, but for those that are there."""
    config = replace(shape_config("llama2-7b", LAYERS, "relu"), max_position=LONG)
    for name, dtype in MEASURED.items():
        if not measured_path(work, name).exists():
            write_planted(measured_path(work, name), config, dtype, Sparsity())
    return {name: measured_path(work, name).stat().st_size for name in MEASURED}


def formats(work: Path, device: Any, names: Sequence[WeightFormat] = tuple(WEIGHT_FORMATS)) -> dict[str, Any]:
    """The largest errors of logits, relative to the largest logit. Raises SvdEngineError where they are wrong."""
    found: dict[str, Any] = {}
    cases: dict[str, tuple[ModelConfig, WeightFormat]] = {name: (small_config(), name) for name in names}
    cases |= {f"mixture {dtype}": (config, dtype) for dtype, config in small_mixtures().items() if dtype in names}
    for name, (config, dtype) in cases.items():
        path = work / f"small-{name.replace(' ', '-')}.svdp"
        write_planted(path, config, dtype, Sparsity(rank=64, predicted=0.4, active=0.2))
        for ffn in ("dense", "sparse"):
            one, other = (_logits(path, kind, ffn) for kind in (device, "reference"))
            for part in _BOUNDS:
                found[f"{name} {ffn} {part}"] = _error(one[part], other[part])
    wrong = [f"{name} {error:.1e}" for name, error in found.items() if not error < _BOUNDS[name.split()[-1]]]
    if wrong:
        raise SvdEngineError(f"logits differ from the reference's: {', '.join(wrong)}")
    return {"largest": max(found.values()), **found}


def memory(work: Path, device: Any) -> dict[str, Any]:
    """Free bytes of the GPU before a model is loaded, meanwhile, and after it is closed."""
    gpu = find_gpu()
    if isinstance(gpu, str):
        raise SvdEngineError(f"CUDA cannot be used: {gpu}")
    import cupy

    def free() -> int:
        return int(cupy.cuda.runtime.memGetInfo()[0])

    before = free()
    with svdengine.load(measured_path(work, "f16"), device=device, context=4096) as llm:
        llm.generate([1, 2, 3], max_tokens=4, ignore_eos=True)
        loaded = free()
    after = free()
    if after < before - _KEPT:
        raise SvdEngineError(f"{before - after} bytes of the GPU's memory were not given back, of {before - loaded}")
    return {"before": before, "loaded": loaded, "after": after}


def generation(work: Path, device: Any) -> dict[str, Any]:
    """Decode a few tokens of a small model on every path of the FFN, greedily and sampled."""
    path = work / "small-generation.svdp"
    write_planted(path, small_config(), "q8", Sparsity(rank=64, predicted=0.4, active=0.2))
    made = 0
    with svdengine.load(path, device=device, context=256, ffn="sparse") as llm:
        for ffn in ("dense", "sparse"):
            llm._engine.set_ffn(ffn)
            for temperature in (0.0, 1.0):
                done = llm.generate(
                    [[5, 6, 7] * 4, [8, 9]], temperature=temperature, seed=1, max_tokens=6, ignore_eos=True
                )
                made += sum(len(one.token_ids) for one in done)
    return {"tokens": made}


def _logits(path: Path, device: Any, ffn: FfnMode) -> dict[str, NDArray[np.float32]]:
    """Logits of a prompt, and of single tokens after it."""
    tokens = np.random.default_rng(3).integers(0, 320, _PROMPT + _STEPS)
    with svdengine.load(path, device=device, context=64, kv_dtype="f32", ffn=ffn) as llm:
        executor = llm.executor
        prompt = executor.forward(_batch(tokens[:_PROMPT], 0)).copy()
        steps = []
        for position in range(_PROMPT, _PROMPT + _STEPS):
            batch = _batch(tokens[position : position + 1], position)
            steps.append(executor.forward(batch).copy())
            if hasattr(executor, "forward_and_sample"):
                chosen, _ = executor.forward_and_sample(batch, [Choice(temperature=0.0)])
                if chosen[0] != steps[-1][0].argmax():
                    raise SvdEngineError(f"token {chosen[0]} was chosen, and {steps[-1][0].argmax()} is the likeliest")
    return {"prompt": prompt, "decode": np.concatenate(steps)}


def _batch(tokens: NDArray[np.int64], start: int) -> Batch:
    n, blocks = len(tokens), -(-(start + len(tokens)) // BLOCK_SIZE)
    return Batch(
        tokens=tokens.astype(np.int32),
        positions=np.arange(start, start + n, dtype=np.int32),
        sequences=np.zeros(n, np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        context_lengths=np.array([start + n], np.int32),
        logit_rows=np.arange(n, dtype=np.int32),
    )


def _error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


PARTS: dict[str, Callable[[Path, Any], dict[str, Any]]] = {
    "models": models,
    "formats": formats,
    "memory": memory,
    "generation": generation,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="svdengine.tools.first_gpu_parts", description="A part of a first GPU run.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps(PARTS[options.part](options.work, options.device)))
    except SvdEngineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
