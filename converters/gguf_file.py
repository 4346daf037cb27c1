"""Read a GGUF file, in one part or several: its fields, and where its tensors are.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The parser is our own since the file is
untrusted and the tokenizer's lists are long: every length is checked against what is left of the file. The `gguf`
package supplies the tensor types and dequantises them.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from svdengine.converters.checkpoint import read_bytes
from svdengine.errors import ConversionError, ModelFileError, quoted
from svdengine.files.tensor_file import open_regular

_SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")  # by value type; 8: string, 9: array
_STRING, _ARRAY = 8, 9
_STRING_LIMIT = 1 << 26  # bytes
_DIMENSION_LIMIT = 4
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is. `shape` is in NumPy's order: the last axis is contiguous."""

    path: Path
    shape: tuple[int, ...]
    type_id: int
    offset: int  # bytes from the beginning of the file
    size_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file, or of all its parts together."""

    path: Path  # as it was asked for
    files: tuple[Path, ...]  # the parts in order
    fields: Mapping[str, Any]  # numbers, bools, strings and lists of them
    tensors: Mapping[str, GgufTensor]

    def read(self, name: str, item: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """A tensor, dequantised, of its logical shape. Raises ConversionError.

        item: (one, of how many): no more is read than this one of a stack of so many.
        """
        gguf = import_gguf()
        tensor = self.tensors[name]
        if item is not None:
            tensor = _one_of(name, tensor, *item)
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        data = read_bytes(tensor.path, f"tensor {quoted(name)}", np.dtype("u1"), tensor.size_bytes, tensor.offset)
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are refused later, with the name of the tensor
                return gguf.quants.dequantize(data.reshape(*tensor.shape[:-1], -1), kind).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ConversionError(
                f"{tensor.path}: tensor {quoted(name)} has type {kind.name}, which the gguf package cannot dequantise;"
                " update it, or convert from another file"
            ) from error


def _one_of(name: str, tensor: GgufTensor, item: int, count: int) -> GgufTensor:
    """Where one tensor of a stack is. Raises ConversionError when it is no stack of `count`."""
    if len(tensor.shape) < 3 or tensor.shape[0] != count:
        raise ConversionError(
            f"{tensor.path}: tensor {quoted(name)}: found the shape {tensor.shape}, expected a stack of {count}"
        )
    size = tensor.size_bytes // count
    return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + item * size, size_bytes=size)


def read_gguf(path: Path, magics: Collection[bytes] = (b"GGUF",)) -> GgufFile:
    """Read and check the header of a GGUF file, which begins with one of `magics`. Raises ConversionError.

    Of a file in several parts, any part may be given; all are read.
    """
    import_gguf()
    file = _read_part(path, magics)
    count = file.fields.get("split.count", 0)
    try:
        return _join(file, count, magics) if count not in (0, 1) else file
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error


def _read_part(path: Path, magics: Collection[bytes]) -> GgufFile:
    try:
        with open_regular(path) as stream:
            return _parse(path, _Reader(stream, path.stat().st_size), magics)
    except ModelFileError as error:
        raise ConversionError(str(error)) from error
    except ValueError as error:
        raise ConversionError(f"{path}: {error}") from error


def _join(given: GgufFile, count: Any, magics: Collection[bytes]) -> GgufFile:
    """All the parts of a split file as one; the first has the fields. Raises ValueError and ConversionError."""
    path = given.path
    name = _PART_NAME.fullmatch(path.name)
    if name is None or type(count) is not int or int(name["count"]) != count:
        raise ValueError(
            f"is one part of {count}; to be found, the parts must be named NAME-00001-of-{count:05}.gguf and so on"
            if type(count) is int
            else f"split.count must be a whole number, found {count!r}"
        )
    files = [path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    for file in files:
        if not file.exists():
            raise ValueError(f"is one part of {count}, and the part {quoted(file.name)} is missing")
    parts = [given if file == path else _read_part(file, magics) for file in files]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        found = part.fields.get("split.no"), part.fields.get("split.count")
        if found != (number, count):
            raise ValueError(f"{part.path.name} says that it is part {found[0]} of {found[1]}, expected {number}")
        for tensor, place in part.tensors.items():
            if tensor in tensors:
                raise ValueError(f"the tensor {quoted(tensor)} is in two parts")
            tensors[tensor] = place
    expected = parts[0].fields.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ValueError(f"the parts hold {len(tensors)} tensors, expected {expected}")
    return GgufFile(path, tuple(files), parts[0].fields, tensors)


def import_gguf() -> Any:
    """The `gguf` package. Raises ConversionError with what to install."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise ConversionError("GGUF files need the gguf package: pip install 'svdengine[convert]'") from error
    return gguf


class _Reader:
    """Little-endian values from a stream whose end is known."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self._size - self.position:
            raise ValueError(f"truncated or damaged: {count} bytes are expected at byte {self.position}")
        data = self._stream.read(count)
        if len(data) != count:
            raise ValueError("truncated")
        self.position += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def count(self, item_bytes: int) -> int:
        """A number of items that are at least `item_bytes` long."""
        value: int = self.number("Q")
        if value * item_bytes > self._size - self.position:
            raise ValueError(f"truncated or damaged: {value} items at byte {self.position} exceed the file")
        return value

    def string(self) -> str:
        length: int = self.number("Q")
        if length > _STRING_LIMIT:
            raise ValueError(f"damaged: a string of {length} bytes at byte {self.position}")
        return self.take(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        return self.number(_code(kind))

    def _array(self) -> list[Any]:
        kind: int = self.number("I")
        if kind == _ARRAY:
            raise ValueError("nested arrays are not supported")
        if kind == _STRING:
            return [self.string() for _ in range(self.count(8))]
        code = _code(kind)
        count = self.count(struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))


def _code(kind: int) -> str:
    if kind >= len(_SCALARS) or not _SCALARS[kind]:
        raise ValueError(f"damaged: unknown value type {kind}")
    return _SCALARS[kind]


def _parse(path: Path, reader: _Reader, magics: Collection[bytes]) -> GgufFile:
    magic = reader.take(4)
    if magic == b"PWRI" and magic not in magics:
        raise ValueError(
            "a file of PowerInfer: convert the model's own file, and calibrate --predictor powerinfer --from this"
        )
    if magic not in magics:
        raise ValueError("neither a folder nor a GGUF file")
    version: int = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported, only 2 and 3 (little-endian)")
    tensor_count, field_count = reader.count(24), reader.count(12)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        name = reader.string()
        if name in fields:
            raise ValueError(f"the field {quoted(name)} occurs twice")
        fields[name] = reader.value(reader.number("I"))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, found {alignment!r}")
    found = [_tensor_info(reader) for _ in range(tensor_count)]
    data_start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_id, offset in found:
        if name in tensors:
            raise ValueError(f"the tensor {quoted(name)} occurs twice")
        size = _size_bytes(name, shape, type_id)
        start = data_start + offset
        if start + size > path.stat().st_size:
            raise ValueError(f"truncated: tensor {quoted(name)} ends after the end of the file")
        tensors[name] = GgufTensor(path, shape, type_id, start, size)
    return GgufFile(path, (path,), fields, tensors)


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in NumPy's order, type, offset in the data."""
    name = reader.string()
    dimensions: int = reader.number("I")
    if not 1 <= dimensions <= _DIMENSION_LIMIT:
        raise ValueError(f"damaged: tensor {quoted(name)} has {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    if not all(0 < n < 1 << 40 for n in shape):
        raise ValueError(f"damaged: tensor {quoted(name)} has the shape {shape}")
    return name, shape, reader.number("I"), reader.number("Q")


def _size_bytes(name: str, shape: tuple[int, ...], type_id: int) -> int:
    gguf = import_gguf()
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {quoted(name)} has the unknown type {type_id}; update the gguf package") from None
    if shape[-1] % block:
        raise ValueError(f"damaged: rows of {shape[-1]} in tensor {quoted(name)} are not whole blocks of {block}")
    return math.prod(shape) // block * block_bytes
