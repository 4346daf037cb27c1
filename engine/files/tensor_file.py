"""The safetensors container: a strict header parser, and read-only arrays over one memory map.

The format (https://github.com/huggingface/safetensors): a little-endian u64 with the header's length, the header as
JSON (name -> dtype, shape, data_offsets), then the data without overlaps or holes. A file is untrusted: nothing is
mapped before every offset, shape and size in the header has been checked against the size of the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ModelFileError, quoted
from svdengine.files import memory_advice

HEADER_LIMIT = 100_000_000  # bytes; the safetensors specification has the same
DIMENSION_LIMIT = 8
SIZE_LIMIT = 1 << 48  # bytes of one tensor

# safetensors name -> NumPy type that holds it; what NumPy lacks is held as unsigned integers of the same width.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype("<u2"),
        "F8_E4M3": np.dtype("u1"),
        "F8_E5M2": np.dtype("u1"),
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
        "U64": np.dtype("<u8"),
        "U32": np.dtype("<u4"),
        "U16": np.dtype("<u2"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("u1"),
    }
)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `start` and `end` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorHeader:
    """A checked header."""

    entries: Mapping[str, TensorEntry]  # in the order of their data
    metadata: Mapping[str, str]
    size_bytes: int  # of the whole file


class TensorFile:
    """A safetensors file, mapped read-only. `arrays[name]` are views: no data is read until it is used."""

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises ModelFileError when it cannot be opened or its header breaks a rule."""
        self.path = path
        with open_regular(path) as file:
            self.header = parse_header(path, file)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._arrays = {name: self._view(entry) for name, entry in self.header.entries.items()}
        self.arrays: Mapping[str, NDArray[Any]] = MappingProxyType(self._arrays)

    def _view(self, entry: TensorEntry) -> NDArray[Any]:
        if entry.start == entry.end:
            return np.empty(entry.shape, DTYPES[entry.dtype])
        count = math.prod(entry.shape)
        return np.frombuffer(self._map, DTYPES[entry.dtype], count, entry.start).reshape(entry.shape)

    def advise(self, names: Iterable[str], advice: memory_advice.Advice) -> None:
        """Say how tensors will be read: "random" keeps the system from reading ahead. A hint, which may be ignored."""
        for start, end in self._ranges(names):
            memory_advice.advise(self._map, start, end, advice)

    def forget_item(self, names: Iterable[str], index: int) -> None:
        """Have the system take back the memory of what each tensor has at this index of its first axis.

        It is read from storage again when it is used. A hint, as `advise` is.
        """
        ranges = []
        for entry in (self.header.entries[name] for name in names):
            size = (entry.end - entry.start) // entry.shape[0]
            ranges.append((entry.start + index * size, entry.start + (index + 1) * size))
        memory_advice.forget(self._map, self.path, ranges)

    def prefetch(self, names: Iterable[str]) -> None:
        """Read tensors into memory, and wait for them."""
        for start, end in self._ranges(names):
            memory_advice.prefetch(self._map, start, end)

    def lock(self, names: Iterable[str]) -> None:
        """Keep tensors in memory until the file is closed. Raises DeviceError when that is not permitted."""
        for start, end in self._ranges(names):
            memory_advice.lock(self._map, start, end)

    def _ranges(self, names: Iterable[str]) -> list[tuple[int, int]]:
        """Where tensors lie, in the order of the file; those that are neighbours but for padding make one range."""
        ranges: list[tuple[int, int]] = []
        for entry in sorted((self.header.entries[name] for name in names), key=lambda entry: entry.start):
            if ranges and entry.start - ranges[-1][1] < mmap.PAGESIZE:
                ranges[-1] = (ranges[-1][0], entry.end)
            else:
                ranges.append((entry.start, entry.end))
        return ranges

    def close(self) -> None:
        """Forget the arrays and unmap; arrays that are held elsewhere stay valid and keep the map until they go."""
        self._arrays.clear()
        with contextlib.suppress(BufferError):
            self._map.close()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises ModelFileError for anything else, before a pipe could block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelFileError(f"{path}: not a regular file")
        return path.open("rb")
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise ModelFileError(f"{str(path)!r}: {error}") from error


def read_header(path: Path) -> TensorHeader:
    """The checked header of a safetensors file. Raises ModelFileError."""
    with open_regular(path) as file:
        return parse_header(path, file)


def parse_header(path: Path, file: BinaryIO) -> TensorHeader:
    """Parse and check the header of an open safetensors file. Raises ModelFileError with the rule that it breaks."""
    try:
        size = os.fstat(file.fileno()).st_size
        header, data_start = _read_json(file, size)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ must map strings to strings")
        entries = {name: _entry(name, value, data_start) for name, value in header.items()}
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
        _check_contiguous(ordered, data_start, size)
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    return TensorHeader(MappingProxyType(ordered), MappingProxyType(metadata), size)


def strict_json(text: str | bytes) -> Any:
    """Parse JSON; duplicate keys, numbers that are not finite and whole ones beyond 64 bits raise ValueError."""
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_int64,
        )
    except RecursionError as error:
        raise ValueError("JSON is nested too deeply") from error


def _read_json(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header object, and where the data begins."""
    if size < 8:
        raise ValueError(f"truncated: {size} bytes are too few for a safetensors header")
    length = int.from_bytes(file.read(8), "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise ValueError(
            f"damaged, or not a safetensors file: the header claims {length} bytes of a file of {size}"
            f" (the limit is {HEADER_LIMIT})"
        )
    text = file.read(length)
    if len(text) != length:
        raise ValueError("truncated header")
    if not text.startswith(b"{"):
        raise ValueError("damaged, or not a safetensors file: the header is not a JSON object")
    try:
        header = strict_json(text.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, 8 + length


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    """Check one tensor of the header by itself."""
    label = f"tensor {quoted(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{label}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{label}: unknown dtype {quoted(str(dtype))}")
    if not _whole_numbers(shape) or len(shape) > DIMENSION_LIMIT:
        raise ValueError(f"{label}: the shape must be at most {DIMENSION_LIMIT} whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{label}: data_offsets must be two whole numbers")
    itemsize = DTYPES[dtype].itemsize
    if math.prod(n for n in shape if n) * itemsize > SIZE_LIMIT:
        raise ValueError(f"{label}: the shape is too large")
    start, end = offsets
    expected = math.prod(shape) * itemsize
    if end - start != expected:
        raise ValueError(f"{label}: {dtype} of shape {tuple(shape)} needs {expected} bytes, found {end - start}")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= SIZE_LIMIT for n in value)


def _check_contiguous(entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Entries in order of their offsets must tile the data exactly."""
    position = data_start
    for name, entry in entries.items():
        if entry.end > size:
            missing = entry.end - size
            raise ValueError(f"truncated: tensor {quoted(name)} ends {missing} bytes after the end of the file")
        if entry.start != position:
            kind = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            raise ValueError(f"tensor {quoted(name)} {kind}")
        position = entry.end
    if position != size:
        raise ValueError(f"{size - position} bytes at the end belong to no tensor")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {quoted(key)} occurs twice")
            seen.add(key)
    return result


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _int64(text: str) -> int:
    value = int(text) if len(text) <= 20 else 1 << 64
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"the number {text[:40]} is too large")
    return value
