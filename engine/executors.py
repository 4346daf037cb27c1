"""Which executor runs a model: by the device's name, with its KV cache sized for the context."""

from __future__ import annotations

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from svdengine.errors import DeviceError, RequestError, shown
from svdengine.files.residency import let_go_of, memory_bytes, usable_memory
from svdengine.kernels.base_executor import BaseExecutor, ExecutorSetup
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.executor import FfnMode, KvDtype
from svdengine.kernels.user_cache import user_cache_directory
from svdengine.scheduling.block_pool import kv_pool_bytes_per_token
from svdengine.scheduling.numbers import check_integer

if TYPE_CHECKING:
    from svdengine.files.model_file import ModelFile
    from svdengine.kernels.predictor import Predictor

Device = Literal["auto", "cpu", "cuda", "ascend", "reference"]
DEVICES: tuple[str, ...] = get_args(Device)
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
FFN_CHOICES: tuple[str, ...] = get_args(FfnMode)
DEVICE_VARIABLE = "SVDENGINE_DEVICE"  # what "auto" means, when it is set

MAX_BATCH_ROWS = 256
MAX_THREADS = 1024


def check_ffn(ffn: Any) -> FfnMode:
    """`ffn` itself. Raises RequestError unless it names a path."""
    if ffn not in FFN_CHOICES:
        raise RequestError(f"ffn must be one of {', '.join(FFN_CHOICES)}, found {shown(ffn)}")
    return cast(FfnMode, ffn)


def create_executor(
    model_file: ModelFile,
    *,
    device: Device = "auto",
    threads: int | None = None,
    context: int,
    block_count: int,
    sequences: int = 1,
    kv_dtype: KvDtype = "f16",
    max_batch_rows: int = MAX_BATCH_ROWS,
    predictor: Predictor | None = None,
    ffn: FfnMode = "dense",
    gpu_memory: int | None = None,
    deterministic: bool = False,
    interleave: bool = True,
) -> BaseExecutor:
    """The executor of a device, for sequences of up to `context` tokens and a pool of `block_count` KV blocks.

    Those are of BLOCK_SIZE tokens; a device whose own are larger has fewer, but room for `sequences` of that length.

    `gpu_memory`: bytes that the model may take on a GPU, by default what is free; FFN rows that do not fit stay in host
    memory, which is said on standard error. `deterministic`: a row gets the same bits whatever rows are beside it.
    `interleave`: the CPU copies matrices that are read whole to where it reads them faster.
    Raises DeviceError when the device is not there, too small, or cannot be deterministic, RequestError on unusable
    arguments.
    """
    if threads is not None:
        check_integer("threads", threads, 1, MAX_THREADS)
    if kv_dtype not in KV_DTYPES:
        raise RequestError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, found {shown(kv_dtype)}")
    if gpu_memory is not None and (isinstance(gpu_memory, bool) or not isinstance(gpu_memory, int) or gpu_memory < 1):
        raise RequestError(f"gpu_memory must be a whole number of bytes, found {shown(gpu_memory)}")
    chosen = resolve_device(device)
    if deterministic and chosen != "cpu":
        chosen = _deterministic_device(chosen, asked=device != "auto" or bool(os.environ.get(DEVICE_VARIABLE)))
    setup = ExecutorSetup(
        model_file.config,
        model_file.arrays,
        model_file.formats,
        block_count=block_count,
        sequences=sequences,
        max_batch_rows=max_batch_rows,
        context=context,
        kv_dtype=kv_dtype,
        predictor=predictor,
        ffn=ffn,
        deterministic=deterministic,
        interleave=interleave,
        let_go=partial(_let_go, model_file),
    )
    if chosen in ("cuda", "ascend"):
        try:
            if setup.config.expert_count and chosen == "ascend":
                raise DeviceError("mixtures of experts do not run on the device ascend yet; use the device cpu")
            return _ascend_executor(setup) if chosen == "ascend" else _cuda_executor(setup, gpu_memory)
        except DeviceError as error:
            if device != "auto" or os.environ.get(DEVICE_VARIABLE):
                raise
            _say_why_not(str(error))
            chosen = "cpu"
    _check_kv_memory(setup, "f32" if chosen == "reference" else kv_dtype)
    if chosen == "reference":
        from svdengine.kernels.reference import ReferenceExecutor, float32_weights

        weights = float32_weights(setup.config, setup.arrays, setup.formats)
        return ReferenceExecutor(
            setup.config, weights, block_count, max_batch_rows, kv_dtype=kv_dtype, predictor=predictor, ffn=ffn
        )
    from svdengine.kernels.cpu.executor import CpuExecutor

    return CpuExecutor(setup, threads=threads)


def _let_go(model_file: ModelFile, name: str) -> None:
    let_go_of(model_file, [name])


def _deterministic_device(chosen: str, *, asked: bool) -> str:
    """The CPU, in place of a device that was not asked for. Raises DeviceError on one that was."""
    reason = f"deterministic results are not offered on the device {chosen}"
    if asked:
        raise DeviceError(f"{reason}, where they depend on the rows of a step; use the device cpu")
    _say_why_not(reason)
    return "cpu"


def _check_kv_memory(setup: ExecutorSetup, kv_dtype: KvDtype) -> None:
    """Raise DeviceError for a KV cache that this machine can never fill: the system might promise it all the same."""
    size = setup.block_count * BLOCK_SIZE * kv_pool_bytes_per_token(setup.config, kv_dtype)
    memory = memory_bytes()
    if memory is not None and size > memory:
        raise DeviceError(
            f"the KV cache would take {size / 2**30:.1f} GiB, and this machine has {memory / 2**30:.1f} GiB of memory;"
            " use a smaller context, fewer sequences, or less kv_memory"
        )


def _cuda_executor(setup: ExecutorSetup, gpu_memory: int | None) -> BaseExecutor:
    """An executor on the GPU. Raises DeviceError where none can be used, or the model does not fit its memory."""
    from svdengine.kernels.cuda.availability import find_gpu

    gpu = find_gpu()
    if isinstance(gpu, str):  # without the packages the executor cannot even be imported
        raise DeviceError(f"CUDA cannot be used: {gpu}")
    from svdengine.kernels.cuda.cupy_device import CupyDevice
    from svdengine.kernels.cuda.executor import CudaExecutor

    device = CupyDevice()
    try:
        executor = CudaExecutor(setup, device=device, gpu_memory=gpu_memory, host_memory=usable_memory())
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was copied to the GPU so far
        device.close()
        raise
    if device.without_blas:
        print(f"prompts are read slower than they could be: {device.without_blas}", file=sys.stderr)
    if executor.memory.host:
        print(executor.memory.describe(), file=sys.stderr)
    return executor


def _ascend_executor(setup: ExecutorSetup) -> BaseExecutor:
    """An executor on the NPU. Raises DeviceError where none can be used, or the model does not fit its memory."""
    from svdengine.kernels.ascend.availability import find_npu

    npu = find_npu()
    if isinstance(npu, str):
        raise DeviceError(f"Ascend cannot be used: {npu}")
    from svdengine.kernels.ascend.cann import load_cann
    from svdengine.kernels.ascend.device import AscendDevice
    from svdengine.kernels.ascend.executor import AscendExecutor
    from svdengine.kernels.ascend.self_test import proven_custom_ops

    cann = load_cann()
    sparse = setup.config.sparse_ffn
    ops = proven_custom_ops(cann, npu.soc, ascend_ops_folder()) if sparse else "no neuron of the model is ever zero"
    device = AscendDevice(cann)
    try:
        return AscendExecutor(setup, device=device, custom_ops=ops)
    except BaseException:
        device.close()
        raise


def ascend_ops_folder() -> Path:
    """Where `svdengine build-ascend-ops` puts its libraries."""
    return user_cache_directory() / "ascend"


def resolve_device(device: str) -> str:
    """The device that a name stands for: for "auto" a GPU or NPU, if one can be used.

    Raises DeviceError on a name that is none.
    """
    if device == "auto":
        device = os.environ.get(DEVICE_VARIABLE) or _best_device()
    if device not in DEVICES or device == "auto":
        raise DeviceError(f"found the device {shown(device)}, expected one of {', '.join(DEVICES)}")
    return device


def _best_device() -> str:
    """The GPU, the NPU, or else the CPU, with one line on why where there is a driver: it was meant to be used then."""
    from svdengine.kernels.ascend.availability import find_npu
    from svdengine.kernels.ascend.cann import NO_CANN
    from svdengine.kernels.cuda.availability import NO_DRIVER, find_gpu

    gpu = find_gpu()
    if not isinstance(gpu, str):
        return "cuda"
    npu = find_npu()
    if not isinstance(npu, str):
        return "ascend"
    for reason, absent in ((gpu, NO_DRIVER), (npu, NO_CANN)):
        if not reason.startswith(absent):
            _say_why_not(reason)
    return "cpu"


def _say_why_not(reason: str) -> None:
    print(f"running on the CPU: {reason}", file=sys.stderr)
