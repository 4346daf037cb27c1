"""Inference for sparse language models on NumPy and Numba.

    import svdengine
    llm = svdengine.load("model.svdp")
    for piece in llm.stream("Once upon a time", max_tokens=64):
        print(piece, end="")

Importing the package is cheap: its parts are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The same names twice, as a test makes sure: type checkers follow imports and not a table, and must not see
# `__getattr__`, which for them would make every misspelt name a right one.
if TYPE_CHECKING:
    from svdengine.async_stream import AsyncTextStream as AsyncTextStream
    from svdengine.errors import ContextOverflowError as ContextOverflowError
    from svdengine.errors import ConversionError as ConversionError
    from svdengine.errors import DeviceError as DeviceError
    from svdengine.errors import ModelFileError as ModelFileError
    from svdengine.errors import QueueFullError as QueueFullError
    from svdengine.errors import RequestError as RequestError
    from svdengine.errors import ShutdownError as ShutdownError
    from svdengine.errors import SvdEngineError as SvdEngineError
    from svdengine.executors import Device as Device
    from svdengine.kernels.executor import FfnMode as FfnMode
    from svdengine.kernels.executor import FfnPath as FfnPath
    from svdengine.kernels.executor import KvDtype as KvDtype
    from svdengine.llm import LLM as LLM
    from svdengine.loading import load as load
    from svdengine.models.config import ModelConfig as ModelConfig
    from svdengine.models.config import Rope as Rope
    from svdengine.scheduling.completion import Completion as Completion
    from svdengine.scheduling.completion import FinishReason as FinishReason
    from svdengine.scheduling.completion import Stats as Stats
    from svdengine.scheduling.embedding import Embedding as Embedding
    from svdengine.scheduling.embedding import Pooling as Pooling
    from svdengine.scheduling.engine_loop import EngineStats as EngineStats
    from svdengine.scheduling.request import Generation as Generation
    from svdengine.scheduling.sampler import TokenLogprobs as TokenLogprobs
    from svdengine.scheduling.sampling import SamplingFields as SamplingFields
    from svdengine.scheduling.sampling import SamplingParams as SamplingParams
    from svdengine.text.chat_template import ChatTemplate as ChatTemplate
    from svdengine.text.chat_template import Message as Message
    from svdengine.text.chat_template import RenderedPrompt as RenderedPrompt
    from svdengine.text.grammar import Grammar as Grammar
    from svdengine.text.tokenizer import Prompt as Prompt
    from svdengine.text.tokenizer import Tokenizer as Tokenizer
    from svdengine.text_stream import TextStream as TextStream
else:
    from importlib import import_module

    _HOMES = {
        "AsyncTextStream": "async_stream",
        "ChatTemplate": "text.chat_template",
        "Completion": "scheduling.completion",
        "ContextOverflowError": "errors",
        "ConversionError": "errors",
        "Device": "executors",
        "DeviceError": "errors",
        "Embedding": "scheduling.embedding",
        "EngineStats": "scheduling.engine_loop",
        "FfnMode": "kernels.executor",
        "FfnPath": "kernels.executor",
        "FinishReason": "scheduling.completion",
        "Generation": "scheduling.request",
        "Grammar": "text.grammar",
        "KvDtype": "kernels.executor",
        "LLM": "llm",
        "Message": "text.chat_template",
        "ModelConfig": "models.config",
        "ModelFileError": "errors",
        "Pooling": "scheduling.embedding",
        "Prompt": "text.tokenizer",
        "QueueFullError": "errors",
        "RenderedPrompt": "text.chat_template",
        "RequestError": "errors",
        "Rope": "models.config",
        "SamplingFields": "scheduling.sampling",
        "SamplingParams": "scheduling.sampling",
        "ShutdownError": "errors",
        "Stats": "scheduling.completion",
        "SvdEngineError": "errors",
        "TextStream": "text_stream",
        "TokenLogprobs": "scheduling.sampler",
        "Tokenizer": "text.tokenizer",
        "load": "loading",
    }
    __all__ = [*_HOMES]

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'svdengine' has no attribute {name!r}")
        value = getattr(import_module(f"svdengine.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
