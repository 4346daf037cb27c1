"""The files of weights in a Hugging Face folder, and where each tensor lies in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdengine.converters.checkpoint import StoredTensor, read_json
from svdengine.converters.torch_file import read_torch_file
from svdengine.errors import ConversionError, ModelFileError, quoted
from svdengine.files.tensor_file import read_header

_SINGLE = ("model.safetensors", "pytorch_model.bin", "consolidated.pth")
_LONGEST_NAME = 255  # bytes of the name of a file


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by its name. Raises ConversionError.

    Of several sets of files the first counts, as for transformers: safetensors before PyTorch's own files, and a single
    file before an index with its shards.
    """
    for name in _SINGLE:
        if (folder / name).exists():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ConversionError(f"{index}: expected a weight_map")
            return _from_index(index, weight_map)
    consolidated = sorted(folder.glob("consolidated.*.pth"))
    if len(consolidated) == 1:
        return _read_file(consolidated[0])
    if consolidated:
        raise ConversionError(
            f"{folder}: {consolidated[0].name} and {len(consolidated) - 1} files beside it hold parts of each tensor,"
            " for several GPUs; convert the checkpoint in the layout of transformers"
        )
    raise ConversionError(f"{folder}: found no weights: expected {', '.join(_SINGLE[:2])}, or an index of either")


def _read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, by its suffix."""
    if path.suffix in (".bin", ".pth", ".pt"):
        return read_torch_file(path)
    try:
        entries = read_header(path).entries
    except ModelFileError as error:
        raise ConversionError(str(error)) from error
    return {name: StoredTensor(path, entry.dtype, entry.shape, entry.start) for name, entry in entries.items()}


def _from_index(index: Path, weight_map: dict[str, Any]) -> dict[str, StoredTensor]:
    """The tensors that an index names, each in the shard that it names."""
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _file_name(shard):
            raise ConversionError(f"{index}: tensor {quoted(name)}: {quoted(str(shard))} is not the name of a file")
        path = index.parent / shard
        if shard not in shards:
            if not path.exists():
                raise ConversionError(f"{index}: tensor {quoted(name)} is in {quoted(shard)}, which is missing")
            shards[shard] = _read_file(path)
        if name not in shards[shard]:
            raise ConversionError(f"{path}: lacks the tensor {quoted(name)}, which the index says it has")
        tensors[name] = shards[shard][name]
    return tensors


def _file_name(text: str) -> bool:
    """Whether a text can be the name of a file in the folder."""
    return Path(text).name == text and "\0" not in text and len(text.encode("utf-8", "replace")) <= _LONGEST_NAME
