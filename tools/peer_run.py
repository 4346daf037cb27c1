"""One measurement of svdengine or llama-cpp-python, in a process of its own: `measure` starts it, `main` runs there."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from svdengine.tools.run_program import run_program

if TYPE_CHECKING:
    from svdengine.llm import LLM
    from svdengine.tools.llama_cpp_model import LlamaCppModel

FfnPath = Literal["dense", "sparse", "speculative"]  # speculative: dense, and the sparse path drafts

_WARM_UP = 4  # decode steps
_PROMPTS = ("Once upon a time, in a small village", "The capital of France", "To bake bread you need", "The moon is")


@dataclass(frozen=True)
class SpeedTest:
    """What is timed: greedy decoding of some tokens, or reading a prompt of as many."""

    kind: Literal["decode", "prefill"]
    tokens: int
    depth: int = 0  # tokens that are in the context before, and are not timed

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens}" + (f" at {self.depth:,}" if self.depth else "")


class Figure(NamedTuple):
    """What an engine reached."""

    tokens_per_second: float
    bytes_per_token: float | None = None  # that a decoded token reads; None in prefill, where many share a read


def measure(engine: str, threads: int, model: Path, test: SpeedTest, path: FfnPath = "dense") -> Figure:
    """How fast `engine`, svdengine or llama-cpp-python, is. Raises SvdEngineError when its process fails."""
    task = {"engine": engine, "threads": threads, "model": str(model), "test": asdict(test), "path": path}
    return Figure(**_started(task, f"{engine} failed on {model}"))


def measure_bandwidth(threads: int) -> float:
    """GB/s at which the machine's memory is read just now."""
    found: float = _started({"engine": "bandwidth", "threads": threads}, "measuring the memory failed")["gb_per_second"]
    return found


def _started(task: dict[str, Any], failed: str) -> dict[str, Any]:
    output = run_program([sys.executable, "-m", "svdengine.tools.peer_run", json.dumps(task)], failed)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def _svdengine(path: Path, threads: int, test: SpeedTest, ffn: FfnPath) -> Figure:
    from svdengine.loading import load
    from svdengine.measuring.benchmark import run_benchmark

    speculative = ffn == "speculative"
    with load(
        path,
        device="cpu",
        ffn="dense" if ffn == "speculative" else ffn,
        threads=threads,
        context=test.depth + test.tokens + 16 * speculative,
        speculative=speculative,
    ) as llm:
        if speculative:
            return Figure(_speculative(llm, test.tokens))
        counts = (test.tokens, 0) if test.kind == "prefill" else (0, test.tokens)
        (row,) = run_benchmark(llm, *counts, 1, depth=test.depth)
        return Figure(row.tokens_per_second, row.bytes_per_token if test.kind == "decode" else None)


def _speculative(llm: LLM, tokens: int) -> float:
    """Tokens a second of several answers, one after another, after one that is not timed."""
    random = np.random.default_rng(0)
    reads_ids = llm.model_file.tokenizer_info.kind == "none"
    prompts = [random.integers(3, 99, 4).tolist() for _ in _PROMPTS] if reads_ids else _PROMPTS
    seconds = count = 0.0
    for number, prompt in enumerate((prompts[0], *prompts)):
        stats = llm.generate(prompt, temperature=0, max_tokens=tokens, ignore_eos=True)[0].stats
        if number:
            count += stats.generated_tokens - 1
            seconds += (stats.generated_tokens - 1) / stats.tokens_per_second
    return count / seconds


def _llama_cpp(path: Path, threads: int, test: SpeedTest) -> Figure:
    from svdengine.tools.llama_cpp_model import LlamaCppModel

    with LlamaCppModel(path, threads, context=-(-(test.depth + test.tokens) // 256) * 256) as model:
        run = _read if test.kind == "prefill" else _decode
        for count in (test.tokens if test.kind == "prefill" else _WARM_UP, test.tokens):
            model.reset()
            _read(model, test.depth)
            seconds = run(model, count)
    return Figure(test.tokens / seconds, gguf_bytes_per_token(path) if test.kind == "decode" else None)


def _read(model: LlamaCppModel, count: int) -> float:
    """Seconds that a prompt of `count` tokens takes."""
    prompt = np.random.default_rng(0).integers(3, model.vocab_size, count).tolist()
    begin = time.perf_counter()
    for start in range(0, count, 512):
        model.decode(prompt[start : start + 512])
    return time.perf_counter() - begin


def _decode(model: LlamaCppModel, count: int) -> float:
    """Seconds of `count` steps, each fed with the likeliest token of the one before."""
    token, seconds = 3, 0.0
    for _ in range(count):
        begin = time.perf_counter()
        logits = model.decode([token])[0]
        seconds += time.perf_counter() - begin
        token = int(logits.argmax())
    return seconds


def gguf_bytes_per_token(path: Path) -> int:
    """Bytes of weights that a decoded token reads of a GGUF file: all but an embedding that is not the output too."""
    from svdengine.converters.gguf_file import read_gguf

    tensors = read_gguf(path).tensors
    unread = "token_embd.weight" if "output.weight" in tensors else ""
    return sum(tensor.size_bytes for name, tensor in tensors.items() if name != unread)


def _bandwidth(threads: int) -> dict[str, float]:
    from svdengine.kernels.cpu.bandwidth import read_bandwidth

    return {"gb_per_second": read_bandwidth(threads)}


def main() -> None:
    """Run the task in the first argument and print its result as the last line."""
    task = json.loads(sys.argv[1])
    if task["engine"] == "bandwidth":
        result = _bandwidth(task["threads"])
    else:
        model, threads, test = Path(task["model"]), task["threads"], SpeedTest(**task["test"])
        svdengine = task["engine"] == "svdengine"
        figure = _svdengine(model, threads, test, task["path"]) if svdengine else _llama_cpp(model, threads, test)
        result = figure._asdict()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
