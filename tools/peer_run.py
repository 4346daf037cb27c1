"""One measurement of one engine, in a process of its own: `measure` starts it, `main` is what runs there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import SvdEngineError

Engine = Literal["llama.cpp", "svdengine", "bandwidth"]
Step = Callable[[Sequence[int], int], NDArray[np.float32]]  # tokens and their first position -> logits of the last

_WARM_UP = 4  # decode steps


def measure(
    engine: Engine, threads: int, model: Path | None = None, decode: int = 0, prefill: int = 0
) -> dict[str, Any]:
    """Seconds that `decode` greedy tokens after a prompt of one, and a prefill of `prefill` tokens, take.

    Returns "decode" and "prefill" in seconds and "weight_bytes", those that one decoded token reads; of the engine
    "bandwidth" only "gb_per_second". Raises SvdEngineError when the process fails.
    """
    task = {"engine": engine, "threads": threads, "model": str(model), "decode": decode, "prefill": prefill}
    command = [sys.executable, "-m", "svdengine.tools.peer_run", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SvdEngineError(f"{engine} failed on {model}: {reason}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def timed(step: Step, vocab_size: int, decode: int, prefill: int) -> dict[str, float]:
    """Warm up, then measure; only the calls of `step` are timed."""
    prompt = np.random.default_rng(0).integers(3, vocab_size, max(prefill, 1)).tolist()
    if prefill:
        step(prompt, 0)
    _decode(step, prompt[0], _WARM_UP)
    result = {"decode": _decode(step, prompt[0], decode)}
    if prefill:
        begin = time.perf_counter()
        step(prompt, 0)
        result["prefill"] = time.perf_counter() - begin
    return result


def _decode(step: Step, first: int, count: int) -> float:
    """Seconds of `count` steps, each fed with the likeliest token of the one before."""
    token, seconds = first, 0.0
    for position in range(count):
        begin = time.perf_counter()
        logits = step([token], position)
        seconds += time.perf_counter() - begin
        token = int(logits.argmax())
    return seconds


def _llama_cpp(path: Path, threads: int, decode: int, prefill: int) -> dict[str, float]:
    from svdengine.converters.gguf_file import read_gguf
    from svdengine.tools.llama_cpp_model import LlamaCppModel

    tensors = read_gguf(path).tensors
    unread = "token_embd.weight" if "output.weight" in tensors else ""
    weight_bytes = sum(tensor.size_bytes for name, tensor in tensors.items() if name != unread)
    with LlamaCppModel(path, threads, context=_context(decode, prefill)) as model:

        def step(tokens: Sequence[int], position: int) -> NDArray[np.float32]:
            if position == 0:
                model.reset()
            return model.decode(tokens)[0]

        return {"weight_bytes": weight_bytes, **timed(step, model.vocab_size, decode, prefill)}


def _svdengine(path: Path, threads: int, decode: int, prefill: int) -> dict[str, float]:
    """Sparse where the file has a predictor."""
    from svdengine.files.model_file import read_model_file
    from svdengine.files.predictor_file import find_predictor
    from svdengine.kernels.base_executor import ExecutorSetup
    from svdengine.kernels.batch import BLOCK_SIZE, Batch
    from svdengine.kernels.cpu.executor import CpuExecutor
    from svdengine.measuring.memory_traffic import sparse_weight_bytes, weight_bytes

    with read_model_file(path) as file:
        predictor = find_predictor(file)
        blocks = _context(decode, prefill) // BLOCK_SIZE
        setup = ExecutorSetup(
            file.config,
            file.arrays,
            file.formats,
            block_count=blocks,
            context=blocks * BLOCK_SIZE,
            max_batch_rows=max(prefill, 1),
            predictor=predictor,
            ffn="dense" if predictor is None else "sparse",
        )
        executor = CpuExecutor(setup, threads=threads)
        table = np.arange(blocks, dtype=np.int32)[None]

        def step(tokens: Sequence[int], position: int) -> NDArray[np.float32]:
            count = len(tokens)
            batch = Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.arange(position, position + count, dtype=np.int32),
                sequences=np.zeros(count, np.int32),
                block_tables=table,
                context_lengths=np.array([position + count], np.int32),
                logit_rows=np.array([count - 1], np.int32),
            )
            return executor.forward(batch)[0]

        try:
            times = timed(step, file.config.vocab_size, decode, prefill)
            if predictor is None:
                return {"weight_bytes": weight_bytes(file), **times}
            counts = executor.neuron_counts()
            shares = counts.predicted_density or 0.0, counts.active_density or 0.0
            return {"weight_bytes": sparse_weight_bytes(file, predictor, *shares), **times}
        finally:
            executor.close()


def _context(decode: int, prefill: int) -> int:
    """Tokens that fit: a multiple of 256, which is what llama.cpp pads to."""
    return -(-max(decode, prefill, _WARM_UP) // 256) * 256


def _bandwidth(threads: int) -> dict[str, float]:
    from svdengine.kernels.cpu.bandwidth import read_bandwidth

    return {"gb_per_second": read_bandwidth(threads)}


def main() -> None:
    """Run the task in the first argument and print its result as the last line."""
    task = json.loads(sys.argv[1])
    if task["engine"] == "bandwidth":
        result = _bandwidth(task["threads"])
    else:
        run = _llama_cpp if task["engine"] == "llama.cpp" else _svdengine
        result = run(Path(task["model"]), task["threads"], task["decode"], task["prefill"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
