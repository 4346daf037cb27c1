"""Loading a model: the file, its predictor, memory, and the executor of a device, put together as an `LLM`."""

from __future__ import annotations

from pathlib import Path

from svdengine.errors import DeviceError
from svdengine.executors import Device, KvDtype, check_ffn, create_executor
from svdengine.files.advising_executor import AdvisingExecutor
from svdengine.files.file_watch import FileWatch
from svdengine.files.hub_name import HubName, parse_model
from svdengine.files.kept_experts import kept_experts
from svdengine.files.model_file import read_model_file
from svdengine.files.models_folder import kept_path
from svdengine.files.predictor_file import find_predictor, require_predictor
from svdengine.files.residency import bounded_memory, read_by_every_token, room_for, settle
from svdengine.kernels.base_executor import BaseExecutor
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.executor import Executor, FfnMode
from svdengine.llm import LLM
from svdengine.scheduling.block_pool import context_limit, kv_pool_bytes_per_token, pool_blocks
from svdengine.scheduling.numbers import check_integer
from svdengine.scheduling.scheduler import PREFILL_ROWS
from svdengine.scheduling.sequence import blocks_for

_MOST = 1 << 31  # rows of a step, sequences
_READ_THE_MAP = ("cpu", "reference")  # executors without a copy of the weights


def load(
    path: str | Path,
    device: Device = "auto",
    ffn: FfnMode = "auto",
    threads: int | None = None,
    predictor: str | Path | None = None,
    *,
    context: int | None = None,
    kv_dtype: KvDtype = "f16",
    kv_tokens: int | None = None,
    kv_memory: int | None = None,
    sequences: int = 1,
    prefill_rows: int = PREFILL_ROWS,
    speculative: bool = False,
    gpu_memory: int | None = None,
    memory: int | None = None,
    mlock: bool = False,
    prefetch: bool = False,
    deterministic: bool = False,
) -> LLM:
    """Open a `.svdp` model file and make it ready to run.

    path: the model file, as `svdengine convert` writes it, or the name of a model on a hub (org/name) that
        `svdengine pull` has made one of. Nothing is downloaded here.
    device: cpu, cuda (an NVIDIA GPU), ascend (a Huawei NPU), reference (NumPy: slow, and the definition of correct), or
        auto: what the environment variable SVDENGINE_DEVICE names, else a GPU or NPU that can be used, else the CPU.
    ffn: how FFNs run: dense; exact, which skips what is exactly 0 and has the results of dense; sparse, which needs a
        predictor; or auto, which takes for each step what costs less.
    threads: CPU threads, at most 1024; by default one a core.
    predictor: a predictor file of `svdengine calibrate`; by default the one in the model file, if there is one.
    context: most tokens of one sequence, prompt and answer; by default what the model was made for, at most 4096.
    kv_dtype: how keys and values are cached: f16, q8 (8 bits, half the memory), or f32.
    kv_tokens: tokens that the KV cache holds for all sequences together; by default `sequences` whole contexts.
    kv_memory: the size of the KV cache in bytes, instead of in tokens.
    sequences: how many whole contexts the KV cache holds where neither kv_tokens nor kv_memory says.
    prefill_rows: most tokens of prompts that a step reads while others decode: more read prompts faster, fewer let the
        others wait less for each token.
    speculative: let steps try tokens that followed the same ones before, or that the model drafted by its sparse path,
        where that is measured to be faster. Those are kept that are sampled anyway.
    gpu_memory: bytes of a GPU's memory for weights and KV cache; by default what is free. FFN weights that do not fit
        stay in the host's memory.
    memory: bytes that the process is to take of this machine's memory; by default what others leave. Weights that do
        not fit are read from the file when they are needed. Of a mixture of experts those that are used most are kept.
    mlock: keep the weights in memory.
    prefetch: read the weights into memory before anything runs.
    deterministic: the same request gets the same bits whatever runs beside it, is cached, or was read in which pieces,
        and with any number of threads. Prompts are read more slowly. On the CPU only; ffn "auto" is exact then.

    Raises ModelFileError on a model file or predictor that is missing, damaged or made for another model, DeviceError
    where the device is not there, has too little memory, refuses to lock it, or cannot be deterministic, and
    RequestError on an argument that cannot be used.
    """
    mode = check_ffn(ffn)
    check_integer("prefill_rows", prefill_rows, 1, _MOST)
    check_integer("sequences", sequences, 1, _MOST)
    named = parse_model(str(path))
    path = kept_path(named) if isinstance(named, HubName) else path
    model_file = read_model_file(path)
    if memory is not None:
        check_integer("memory", memory, 1, 1 << 60)
        memory = bounded_memory(memory)
    watches: list[FileWatch] = []
    opened: BaseExecutor | None = None
    try:
        watches.append(FileWatch(Path(path)))
        found = find_predictor(model_file, predictor)
        if predictor is not None:
            watches.append(FileWatch(Path(predictor)))
        if ffn == "sparse":
            require_predictor(model_file, found)
        limit = context_limit(model_file.config, context)
        token_bytes = kv_pool_bytes_per_token(model_file.config, "f32" if device == "reference" else kv_dtype)
        given = kv_tokens is not None or kv_memory is not None
        if not given:
            kv_tokens = sequences * blocks_for(limit) * BLOCK_SIZE
        blocks = pool_blocks(limit, kv_tokens, kv_memory, token_bytes)
        room = room_for(model_file, memory)
        if prefetch:
            model_file.prefetch(read_by_every_token(model_file, room))
        opened = create_executor(
            model_file,
            device=device,
            threads=threads,
            context=limit,
            block_count=blocks,
            sequences=1 if given else sequences,
            kv_dtype=kv_dtype,
            predictor=found,
            ffn=mode,
            gpu_memory=gpu_memory,
            deterministic=deterministic,
            interleave=room.copies,
        )
        if memory is not None and opened.name not in _READ_THE_MAP:
            raise DeviceError(
                f"memory bounds a model that runs on the CPU, found the device {opened.name}; leave memory out"
            )
        settle(model_file, room, opened.copied, opened.copies, mlock=mlock)
        if opened.name not in _READ_THE_MAP:
            _close(watches)
            watches = []
        executor: Executor = opened
        if not room.whole and opened.name != "cuda":  # a GPU has its own copy of the weights
            kv_bytes = opened.block_count * BLOCK_SIZE * token_bytes
            executor = AdvisingExecutor(opened, model_file, memory, kept_experts(opened, model_file, memory, kv_bytes))
        return LLM(
            model_file,
            executor,
            context=limit,
            kv_dtype=kv_dtype,
            predictor=found,
            prefill_rows=prefill_rows,
            speculative=speculative,
            deterministic=deterministic,
            watches=watches,
        )
    except BaseException as error:
        if opened is not None:
            opened.close()
        model_file.close()
        _close(watches)
        if isinstance(error, MemoryError):
            raise DeviceError(
                "there is not enough memory for the model and its KV cache; use a smaller model or context"
            ) from error
        raise


def _close(watches: list[FileWatch]) -> None:
    for watch in watches:
        watch.close()
