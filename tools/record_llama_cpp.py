"""Record what llama.cpp makes of a GGUF file: greedy continuations, and the perplexity of a text.

    python -m svdengine.tools.record_llama_cpp model.gguf inputs.json -o expected.json

The file is first quantised to Q8_0. `inputs.json` holds "prompts", a list of {"text": ...} and {"chat": ...}, and
"text". The tests compare svdengine with the recorded results, and need no llama.cpp.
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


def record(model: LlamaCppModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Completions and perplexity, as plain JSON types."""
    completions = [_complete(model, prompt) for prompt in inputs["prompts"]]
    tokens = model.tokenize(inputs["text"])
    total, count = 0.0, 0
    for window in windows(tokens):
        model.reset()
        total += negative_log_likelihood(model.decode(window, every=True), window)
        count += len(window) - 1
    perplexity = {"window": WINDOW, "value": float(np.exp(total / count)), "scored": count, "tokens": tokens}
    return {"completions": completions, "perplexity": perplexity}


def _complete(model: LlamaCppModel, prompt: Mapping[str, str]) -> dict[str, Any]:
    """Take the likeliest token each time. The margin of a step is by how much its logit exceeded the second best."""
    text = prompt["text"] if "text" in prompt else _CHATML.format(prompt["chat"])
    tokens = model.tokenize(text)
    model.reset()
    logits = model.decode(tokens)[0]
    chosen: list[int] = []
    margins: list[float] = []
    while True:
        second, best = np.argpartition(logits, -2)[-2:]
        chosen.append(int(best))
        margins.append(round(float(logits[best] - logits[second]), 3))
        if len(chosen) == CONTINUATION or model.ends(chosen[-1]):
            break
        logits = model.decode(chosen[-1:])[0]
    return {
        "prompt": text,
        "tokens": tokens,
        "continuation": chosen,
        "margins": margins,
        "text": model.detokenize(chosen),
    }


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
            quantized = Path(folder) / "q8_0.gguf"
            quantize_gguf(options.model, quantized, "q8_0")
            with LlamaCppModel(quantized, threads=1) as model:
                results = record(model, inputs)
    except (SvdEngineError, OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    source = {"file": options.model.name, "sha256": hashlib.sha256(options.model.read_bytes()).hexdigest()}
    versions = {"llama-cpp-python": llama_cpp_version()}
    options.output.write_text(_dump({"source": source, "dtype": "Q8_0", "versions": versions, **results}), "utf-8")


def _dump(data: dict[str, Any]) -> str:
    """JSON with one line for a list of numbers."""
    text = json.dumps(data, indent=1)
    return re.sub(r"\[([-\d.,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


if __name__ == "__main__":
    main()
