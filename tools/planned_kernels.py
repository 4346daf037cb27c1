"""What models of a known shape launch on an NVIDIA GPU, without their weights and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cuda.catalogue import all_kernels
from svdengine.kernels.cuda.executor import CudaExecutor
from svdengine.kernels.cuda.intrinsics import Kernel
from svdengine.kernels.cuda.planned_device import Launch, PlannedDevice, needed_kernels
from svdengine.kernels.cuda.step import Shape, run_step
from svdengine.kernels.executor import FfnMode, FfnPath, KvDtype
from svdengine.kernels.formats import WEIGHT_FORMATS, WeightFormat, quantize
from svdengine.kernels.predictor import LayerPredictor, Predictor
from svdengine.models import ModelConfig, tensor_specs
from svdengine.models.tensors import ROUTER
from svdengine.tools.first_gpu_parts import LONG, MEASURED, small_config, small_mixtures
from svdengine.tools.random_model import shape_config


@dataclass(frozen=True)
class Weightless:
    """Arrays of a model that have its shapes and types, and hardly take memory: a row stands for all."""

    arrays: dict[str, NDArray]
    formats: dict[str, WeightFormat]


def weightless(config: ModelConfig, dtype: WeightFormat) -> Weightless:
    """A model all of whose matrices are in one format."""
    arrays: dict[str, NDArray] = {}
    formats: dict[str, WeightFormat] = {}
    for spec in tensor_specs(config):
        if not spec.matrix:
            arrays[spec.name] = np.broadcast_to(np.float32(0), spec.shape)
            continue
        formats[spec.name] = stored = "f32" if spec.name == ROUTER else dtype
        for suffix, part in quantize(np.zeros((1, spec.shape[-1]), np.float32), stored).items():
            arrays[spec.name + suffix] = np.broadcast_to(part[0], (*spec.shape[:-1], *part.shape[1:]))
    return Weightless(arrays, formats)


def flat_predictor(config: ModelConfig, rank: int) -> Predictor:
    """A predictor of low rank in q8, without weights."""

    def factor(rows: int, columns: int) -> dict[str, NDArray]:
        parts = quantize(np.zeros((1, columns), np.float32), "q8")
        return {suffix: np.broadcast_to(part[0], (rows, *part.shape[1:])) for suffix, part in parts.items()}

    f, nothing = config.ffn_size, np.zeros(config.ffn_size, np.float32)
    layer = LayerPredictor(rank, "q8", 0, factor(f, rank), factor(rank, config.hidden_size), {}, nothing, nothing)
    return Predictor((layer,) * config.ffn_blocks, {})


def step_launches(
    config: ModelConfig, dtype: WeightFormat, *, context: int, rank: int, path: FfnPath, rows: int = 1
) -> list[Launch]:
    """What a step of `rows` sequences launches that have room for `context` tokens and draw their tokens."""
    device, model = PlannedDevice(), weightless(config, dtype)
    modes: dict[FfnPath, FfnMode] = {"dense": "dense", "predict": "sparse", "skip_zeros": "exact"}
    setup = ExecutorSetup(
        config, model.arrays, model.formats, block_count=-(-context // BLOCK_SIZE), context=context,
        predictor=flat_predictor(config, rank) if path == "predict" else None, ffn=modes[path],
    )  # fmt: skip
    executor = CudaExecutor(setup, device=device)
    device.launches.clear()
    run_step(executor._state, executor._placed, Shape(rows, rows, rows, 1, path, "drawn"))
    return device.launches


def kernels_of_first_run() -> dict[str, Kernel]:
    """Every kernel that tools/first_gpu_run.py launches: those of the catalogue, and those of its models."""
    found = all_kernels()
    measured = replace(shape_config("llama2-7b", 1, "relu"), max_position=LONG)
    plans: tuple[tuple[ModelConfig, Sequence[WeightFormat], int, KvDtype], ...] = (
        (measured, tuple(MEASURED.values()), 256, "f16"),
        (small_config(), WEIGHT_FORMATS, 64, "f32"),
        (small_config(), ("q8",), 64, "f16"),
        *((config, (dtype,), 64, "f32") for dtype, config in small_mixtures().items()),
    )
    for config, dtypes, rank, kv_dtype in plans:
        for dtype in dtypes:
            model = weightless(replace(config, layer_count=1), dtype)
            one = replace(config, layer_count=1)
            found |= needed_kernels(one, model.arrays, model.formats, flat_predictor(one, rank), kv_dtype)
    return found
