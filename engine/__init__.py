"""Inference for sparse language models on NumPy and Numba.

    import svdengine
    llm = svdengine.load("model.svdp")
    for piece in llm.stream("Once upon a time", max_tokens=64):
        print(piece, end="")

Importing the package is cheap: its parts are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdengine.errors import (
        ContextOverflowError,
        ConversionError,
        DeviceError,
        ModelFileError,
        RequestError,
        SvdEngineError,
    )
    from svdengine.llm import LLM, load
    from svdengine.models.config import ModelConfig
    from svdengine.scheduling.completion import Completion, Stats
    from svdengine.scheduling.sampler import TokenLogprobs
    from svdengine.scheduling.sampling import SamplingParams
    from svdengine.text.tokenizer import Tokenizer
    from svdengine.text_stream import TextStream

__version__ = "0.1.0"

_HOMES = {
    "Completion": "scheduling.completion",
    "ContextOverflowError": "errors",
    "ConversionError": "errors",
    "DeviceError": "errors",
    "LLM": "llm",
    "ModelConfig": "models.config",
    "ModelFileError": "errors",
    "RequestError": "errors",
    "SamplingParams": "scheduling.sampling",
    "Stats": "scheduling.completion",
    "SvdEngineError": "errors",
    "TextStream": "text_stream",
    "TokenLogprobs": "scheduling.sampler",
    "Tokenizer": "text.tokenizer",
    "load": "llm",
}

__all__ = [
    "LLM",
    "Completion",
    "ContextOverflowError",
    "ConversionError",
    "DeviceError",
    "ModelConfig",
    "ModelFileError",
    "RequestError",
    "SamplingParams",
    "Stats",
    "SvdEngineError",
    "TextStream",
    "TokenLogprobs",
    "Tokenizer",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'svdengine' has no attribute {name!r}")
    value = getattr(import_module(f"svdengine.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
