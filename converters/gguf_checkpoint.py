"""A GGUF file as a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.checkpoint import sampling_defaults
from svdengine.converters.gguf_file import read_gguf
from svdengine.converters.gguf_tokenizer import read_gguf_tokenizer
from svdengine.errors import ConversionError
from svdengine.models import config_from_gguf, gguf_source
from svdengine.models.family import Source

_ROPE_FACTORS = "rope_freqs.weight"  # how Llama 3.1 scales its frequencies

# Field under general.sampling -> its name in generation_config.json
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


class GgufCheckpoint:
    """See Checkpoint."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        """Read the header and the tokenizer. Raises ConversionError."""
        self.path = path
        self.notes: list[str] = []
        self._gguf = read_gguf(path)
        self.files = list(self._gguf.files)
        if "token_embd.weight" not in self._gguf.tensors:
            raise ConversionError(f"{path}: the checkpoint lacks the tensor 'token_embd.weight'")
        vocab_size = self._gguf.tensors["token_embd.weight"].shape[0]
        factors = self.read(_ROPE_FACTORS).reshape(-1) if _ROPE_FACTORS in self._gguf.tensors else None
        try:
            self.config = config_from_gguf(
                self._gguf.fields, self.tensor_names, vocab_size, activation, factors, [path.name], self.notes
            )
            self.tokenizer = read_gguf_tokenizer(self._gguf.fields, vocab_size)
        except ValueError as error:
            raise ConversionError(f"{path}: {error}") from error
        self.generation = _generation(self._gguf.fields)

    @property
    def tensor_names(self) -> Collection[str]:
        """Names in the checkpoint."""
        return frozenset(self._gguf.tensors)

    def source(self, tensor: str, layer: int | None) -> Source:
        """Where a canonical tensor comes from."""
        return gguf_source(self.config, tensor, layer, self.tensor_names)

    def read(self, name: str, item: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """One tensor, or one of a stack, dequantised."""
        return self._gguf.read(name, item)


def _generation(fields: Mapping[str, Any]) -> dict[str, Any]:
    return sampling_defaults({ours: fields.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()})
