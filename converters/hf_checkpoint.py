"""A Hugging Face folder as a checkpoint: config.json, files of weights, a tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.checkpoint import read_json, read_stored, sampling_defaults
from svdengine.converters.hf_tokenizer import read_hf_tokenizer
from svdengine.converters.weight_files import find_tensors
from svdengine.errors import ConversionError, quoted
from svdengine.kernels.formats import from_bfloat16
from svdengine.models import config_from_hf, hf_source
from svdengine.models.config import ModelConfig
from svdengine.models.family import Source
from svdengine.models.settings import foreign_quantization

_FLOATS = ("F32", "F16", "BF16", "F64")


class HfCheckpoint:
    """See Checkpoint."""

    def __init__(self, folder: Path, activation: str | None = None) -> None:
        """Read everything but the tensors. Raises ConversionError."""
        self.path = folder
        self.notes: list[str] = []
        settings = _read_settings(folder)
        generation = read_json(folder / "generation_config.json", optional=True)
        self._tensors = find_tensors(folder)
        shards = sorted({tensor.file for tensor in self._tensors.values()})
        try:
            config = config_from_hf(settings, activation, _names(folder), self.notes)
            # Checkpoints often have more rows than tokens; logits have as many as there are rows.
            embedding = hf_source(config, "embedding", None, self._tensors)
            self.config = replace(
                config, vocab_size=self._rows(embedding), tied_embeddings=self._tied(config, embedding)
            )
            self.config.validate()
            self.tokenizer, used = read_hf_tokenizer(folder, settings, generation, self.config.vocab_size)
        except (ValueError, OSError) as error:
            raise ConversionError(f"{folder}: {error}") from error
        self.generation = sampling_defaults(generation)
        texts = [folder / name for name in ("config.json", "generation_config.json")]
        self.files = [file for file in (*texts, *used, *shards) if file.exists()]

    @property
    def tensor_names(self) -> Collection[str]:
        """Names in the checkpoint."""
        return self._tensors.keys()

    def source(self, tensor: str, layer: int | None) -> Source:
        """Where a canonical tensor comes from."""
        return hf_source(self.config, tensor, layer, self._tensors)

    def read(self, name: str, item: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """One tensor as float32."""
        assert item is None  # no family has stacks in such a folder
        tensor, label = self._tensors[name], f"tensor {quoted(name)}"
        packed = tensor.dtype == "U8" and f"{name}_scale" in self._tensors
        if tensor.dtype not in _FLOATS and not packed:
            raise ConversionError(f"{tensor.file}: {label}: found {tensor.dtype}, expected one of {', '.join(_FLOATS)}")
        data = read_stored(tensor, label)
        if tensor.dtype == "BF16":
            return from_bfloat16(data)
        return np.asarray(data, np.float32)

    def _tied(self, config: ModelConfig, embedding: Source) -> bool:
        """Whether one matrix serves at both ends: not where the checkpoint has a different one for the output."""
        try:
            output = hf_source(replace(config, tied_embeddings=False), "lm_head", None, self._tensors)
        except ValueError:
            return config.tied_embeddings  # there is none
        if not config.tied_embeddings:
            return False
        if not np.array_equal(self.read(output.names[0]), self.read(embedding.names[0])):
            return False
        del self._tensors[output.names[0]]  # a copy
        return True

    def _rows(self, embedding: Source) -> int:
        shape = self._tensors[embedding.names[0]].shape
        if len(shape) != 2:
            raise ValueError(f"tensor {quoted(embedding.names[0])}: found the shape {shape}, expected a matrix")
        return shape[0]


def read_hf_config(folder: Path, activation: str | None = None) -> tuple[ModelConfig, list[str]]:
    """What config.json says, before the weights are there, and lines for people: see `Checkpoint.notes`.

    Raises ConversionError on what cannot be converted.
    """
    notes: list[str] = []
    try:
        return config_from_hf(_read_settings(folder), activation, _names(folder), notes), notes
    except ValueError as error:
        raise ConversionError(f"{folder}: {error}") from error


def _names(folder: Path) -> list[str]:
    """What a checkpoint is called: its folder or, in a hub's cache, where that is a commit, its repository."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return [folder.parents[1].name.rpartition("--")[2]]
    return [folder.name]


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / "config.json")
    if method := foreign_quantization(settings):
        raise ConversionError(
            f"{folder}: the weights are quantised ({quoted(method)}); convert the original checkpoint"
        )
    return settings
