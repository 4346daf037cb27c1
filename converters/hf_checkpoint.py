"""A Hugging Face folder as a checkpoint: config.json, safetensors with or without an index, a tokenizer."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.checkpoint import read_bytes, read_json, sampling_defaults
from svdengine.converters.hf_tokenizer import read_hf_tokenizer
from svdengine.errors import ConversionError, ModelFileError, quoted
from svdengine.files.tensor_file import DTYPES, TensorEntry, read_header
from svdengine.kernels.formats import from_bfloat16
from svdengine.models import config_from_hf, hf_source, with_activation
from svdengine.models.config import ModelConfig
from svdengine.models.family import Source
from svdengine.models.settings import foreign_quantization

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LONGEST_NAME = 255  # bytes of the name of a file
_FLOATS = ("F32", "F16", "BF16", "F64")


class HfCheckpoint:
    """See Checkpoint."""

    def __init__(self, folder: Path, activation: str | None = None) -> None:
        """Read everything but the tensors. Raises ConversionError."""
        self.path = folder
        settings = read_json(folder / "config.json")
        if method := foreign_quantization(settings):
            raise ConversionError(
                f"{folder}: the weights are quantised ({quoted(method)}); convert the original checkpoint"
            )
        generation = read_json(folder / "generation_config.json", optional=True)
        self._tensors, shards = _find_tensors(folder)
        try:
            config = config_from_hf(settings)
            if activation is not None:
                config = with_activation(config, activation)
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

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32."""
        file, entry = self._tensors[name]
        label = f"tensor {quoted(name)}"
        packed = entry.dtype == "U8" and f"{name}_scale" in self._tensors
        if entry.dtype not in _FLOATS and not packed:
            raise ConversionError(f"{file}: {label}: found {entry.dtype}, expected one of {', '.join(_FLOATS)}")
        data = read_bytes(file, label, DTYPES[entry.dtype], math.prod(entry.shape), entry.start).reshape(entry.shape)
        if entry.dtype == "BF16":
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
        _, entry = self._tensors[embedding.names[0]]
        if len(entry.shape) != 2:
            raise ValueError(f"tensor {quoted(embedding.names[0])}: found the shape {entry.shape}, expected a matrix")
        return entry.shape[0]


def _find_tensors(folder: Path) -> tuple[dict[str, tuple[Path, TensorEntry]], list[Path]]:
    """Name -> (file, entry) of every tensor, and the files."""
    if (folder / _WEIGHTS).exists():  # transformers takes it too where there is an index beside it
        entries = _read_shard(folder / _WEIGHTS)
        return {name: (folder / _WEIGHTS, entry) for name, entry in entries.items()}, [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{folder / _INDEX}: expected a weight_map")
        return _from_index(folder, weight_map)
    if any(folder.glob("pytorch_model*.bin*")):
        raise ConversionError(
            f"{folder}: has only pytorch_model.bin, a pickle that could run code; save it as safetensors first,"
            " with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise ConversionError(f"{folder}: found neither {_WEIGHTS} nor {_INDEX}")


def _from_index(folder: Path, weight_map: dict[str, Any]) -> tuple[dict[str, tuple[Path, TensorEntry]], list[Path]]:
    index = folder / _INDEX
    shards: dict[str, dict[str, TensorEntry]] = {}
    tensors: dict[str, tuple[Path, TensorEntry]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _file_name(shard):
            raise ConversionError(f"{index}: tensor {quoted(name)}: {quoted(str(shard))} is not the name of a file")
        if shard not in shards:
            if not (folder / shard).exists():
                raise ConversionError(f"{index}: tensor {quoted(name)} is in {quoted(shard)}, which is missing")
            shards[shard] = _read_shard(folder / shard)
        if name not in shards[shard]:
            raise ConversionError(f"{folder / shard}: lacks the tensor {quoted(name)}, which the index says it has")
        tensors[name] = folder / shard, shards[shard][name]
    return tensors, [folder / shard for shard in sorted(shards)]


def _file_name(text: str) -> bool:
    """Whether a text can be the name of a file in the folder."""
    return Path(text).name == text and "\0" not in text and len(text.encode("utf-8", "replace")) <= _LONGEST_NAME


def _read_shard(path: Path) -> dict[str, TensorEntry]:
    try:
        return dict(read_header(path).entries)
    except ModelFileError as error:
        raise ConversionError(str(error)) from error
