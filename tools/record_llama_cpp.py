"""Record what llama.cpp makes of a GGUF file: greedy continuations, and the perplexity of a text.

    python -m svdengine.tools.record_llama_cpp model.gguf inputs.json -o expected.json

The file is converted to F32 and to Q8_0 first. `inputs.json` holds "prompts", a list of {"text": ...} and
{"chat": ...}, and "text". The tests compare svdengine with the recorded results, and need no llama.cpp.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import SvdEngineError
from svdengine.tools.llama_cpp_model import LlamaCppModel, llama_cpp_version, quantize_gguf

CONTINUATION = 64  # tokens
KINDS = ("f32", "q8_0")  # how the matrices are stored
WINDOW = 512  # tokens that are scored together

_CHATML = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def negative_log_likelihood(logits: NDArray[np.float32], tokens: Sequence[int]) -> float:
    """Sum over tokens 1.. (n,) of -log p, where row i of the logits (n, vocabulary) predicts token i + 1."""
    x = logits[:-1].astype(np.float64)
    x -= x.max(-1, keepdims=True)
    chosen = x[np.arange(len(x)), np.asarray(tokens[1:])]
    return float((np.log(np.exp(x).sum(-1)) - chosen).sum())


def windows(tokens: Sequence[int]) -> list[Sequence[int]]:
    """The tokens in pieces of WINDOW, each scored on its own; a short rest is left out."""
    return [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW + 1, WINDOW)]


def record(gguf: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Completions and perplexity, as plain JSON types.

    `repeated` counts the completions that llama.cpp gives again without flash attention, which is the same by
    arithmetic but for rounding: where that changes its text, no other program can be expected to find it.
    """
    with LlamaCppModel(gguf, threads=1) as model:
        prompts = [model.tokenize(prompt_text(prompt)) for prompt in inputs["prompts"]]
        completions = [_complete(model, prompt) for prompt in prompts]
        value = _perplexity(model, model.tokenize(inputs["text"]))
    with LlamaCppModel(gguf, threads=1, flash_attention=False) as model:
        again = [_complete(model, prompt) for prompt in prompts]
    repeated = sum(a["tokens"] == b["tokens"] for a, b in zip(completions, again, strict=True))
    return {"perplexity": value, "repeated": repeated, "completions": completions}


def tokenized(gguf: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The token ids of all inputs."""
    with LlamaCppModel(gguf, threads=1) as model:
        prompts = [prompt_text(prompt) for prompt in inputs["prompts"]]
        return {
            "prompts": [{"text": prompt, "tokens": model.tokenize(prompt)} for prompt in prompts],
            "text_tokens": model.tokenize(inputs["text"]),
        }


def prompt_text(prompt: Mapping[str, str]) -> str:
    """Raw text, or a question within the ChatML template."""
    return prompt["text"] if "text" in prompt else _CHATML.format(prompt["chat"])


def _perplexity(model: LlamaCppModel, tokens: Sequence[int]) -> float:
    total, count = 0.0, 0
    for window in windows(tokens):
        model.reset()
        total += negative_log_likelihood(model.decode(window, every=True), window)
        count += len(window) - 1
    return float(np.exp(total / count))


def _complete(model: LlamaCppModel, prompt: Sequence[int]) -> dict[str, Any]:
    """Take the likeliest token each time. The margin of a step is by how much its logit exceeded the second best."""
    model.reset()
    logits = model.decode(prompt)[0]
    chosen: list[int] = []
    margins: list[float] = []
    while True:
        second, best = np.argpartition(logits, -2)[-2:]
        chosen.append(int(best))
        margins.append(round(float(logits[best] - logits[second]), 3))
        if len(chosen) == CONTINUATION or model.ends(chosen[-1]):
            return {"text": model.detokenize(chosen), "tokens": chosen, "margins": margins}
        logits = model.decode(chosen[-1:])[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="svdengine.tools.record_llama_cpp", description="Record what llama.cpp makes of a GGUF file."
    )
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("inputs", type=Path, help="JSON file of prompts and a text")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        inputs = json.loads(options.inputs.read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as folder:
            results = tokenized(options.model, inputs)
            for kind in KINDS:
                quantized = Path(folder) / f"{kind}.gguf"
                quantize_gguf(options.model, quantized, kind)
                results[kind] = record(quantized, inputs)
    except (SvdEngineError, OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    source = {"file": options.model.name, "sha256": hashlib.sha256(options.model.read_bytes()).hexdigest()}
    versions = {"llama-cpp-python": llama_cpp_version()}
    options.output.write_text(_dump({"source": source, "versions": versions, **results}), "utf-8")


def _dump(data: dict[str, Any]) -> str:
    """JSON with one line for a list of numbers."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[([-\d.,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


if __name__ == "__main__":
    main()
