"""What every kind of checkpoint offers to the conversion, and helpers that the kinds share."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ConversionError
from svdengine.files.model_writer import StoredTokenizer
from svdengine.files.tensor_file import DTYPES
from svdengine.models.config import ModelConfig
from svdengine.models.family import Source
from svdengine.models.settings import finite

_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_HASHED = 1 << 24  # bytes at the beginning of a large file; they hold the header of a GGUF or safetensors file


class Checkpoint(Protocol):
    """A checkpoint that was opened: its settings are known, its tensors are read one at a time."""

    path: Path
    config: ModelConfig
    tokenizer: StoredTokenizer
    generation: dict[str, Any]  # sampling defaults
    files: list[Path]  # all that was or will be read
    notes: list[str]  # lines for people: what was settled otherwise than the checkpoint says

    @property
    def tensor_names(self) -> Collection[str]:
        """Names in the checkpoint."""
        ...

    def source(self, tensor: str, layer: int | None) -> Source:
        """Where a canonical tensor comes from. Raises ValueError when the checkpoint lacks it."""
        ...

    def read(self, name: str, item: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """One tensor of the checkpoint as float32, dequantised. Raises ConversionError.

        item: (one, of how many): this one of a stack of so many.
        """
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies uncompressed in a file."""

    file: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # the byte of the file where its first element begins
    strides: tuple[int, ...] | None = None  # in elements; None: one after the other


def read_stored(tensor: StoredTensor, label: str) -> NDArray[Any]:
    """A tensor's elements in the type that DTYPES has for it; no more is read than from its first to its last.

    Raises ConversionError, with `label`, when the file ends before.
    """
    dtype, shape, strides = DTYPES[tensor.dtype], tensor.shape, tensor.strides
    if strides is None:
        return read_bytes(tensor.file, label, dtype, math.prod(shape), tensor.start).reshape(shape)
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    data = read_bytes(tensor.file, label, dtype, count, tensor.start)
    view = np.lib.stride_tricks.as_strided(data, shape, [stride * dtype.itemsize for stride in strides])
    return np.ascontiguousarray(view)


def describe_files(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of source files; of a large file the hash covers the beginning."""
    result = []
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest = hashlib.sha256(stream.read(_HASHED)).hexdigest()
        result.append({"name": file.name, "bytes": size, "sha256": digest, "hashed_bytes": min(size, _HASHED)})
    return result


def read_bytes(path: Path, what: str, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
    """Read `count` elements at byte `offset`. Raises ConversionError when the file ends before."""
    try:
        data = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        raise ConversionError(f"{path}: {what}: {error.strerror or error}") from error
    if data.size != count:
        raise ConversionError(f"{path}: {what}: truncated, found {data.size} of {count} elements")
    return data


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} when an optional file is not there. Raises ConversionError."""
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(read_text(path), parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: expected a JSON object")
    return value


def sampling_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json says of sampling; what is no number that a model file can hold is left out."""
    found = {name: settings.get(name) for name in _SAMPLING}
    return {name: value for name, value in found.items() if isinstance(value, bool) or _storable(value)}


def _storable(value: Any) -> bool:
    number = finite(value)
    return number is not None and (isinstance(value, float) or abs(number) < 1 << 63)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without the mark that some editors put before it. Raises ValueError, OSError."""
    return path.read_text(encoding="utf-8-sig")


def _whole_number(text: str) -> int | float:
    """A number of a JSON file; one beyond 64 bits as a float, which no size is. Infinity stands for the largest."""
    value = int(text) if len(text) < 20 else float(text)
    return value if abs(value) < 1 << 63 else float(value)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer library raises on a damaged file, a Rust panic included, into ValueError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {str(error)[:200]}") from error
