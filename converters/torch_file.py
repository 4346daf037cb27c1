"""Files that torch.save writes (pytorch_model.bin, .pth, .pt): where each tensor lies in them. PyTorch is not needed.

Since version 1.6 a file is a zip archive without compression: NAME/data.pkl is a pickle of the tensors' names, shapes
and storages, NAME/data/KEY are the bytes of a storage, NAME/byteorder says little or big. Before that, it was five
pickles one after the other (a magic number, a version, the machine, the tensors, the keys of the storages), and then
the storages: for each its number of elements, and its bytes.

A file is not trusted. Its pickle is interpreted by converters/torch_pickle.py, which runs nothing; every shape and
stride is checked against the bytes of its storage before it is used; nothing is unpacked, and names of members are
only looked up.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from svdengine.converters.checkpoint import StoredTensor
from svdengine.converters.stored_zip import Member, read_members
from svdengine.converters.torch_names import PickledStorage, PickledTensor
from svdengine.converters.torch_pickle import SIZE_LIMIT, read_pickle
from svdengine.errors import ConversionError, ModelFileError, quoted
from svdengine.files.tensor_file import DTYPES, open_regular
from svdengine.files.tensor_file import SIZE_LIMIT as TENSOR_LIMIT

_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # a pickle of the number 0x1950a86a20f9469cfc6c
_PROTOCOL = 1001

_Locate = Callable[[PickledStorage], int]  # where the bytes of a storage begin, checked to be there


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; their numbers are not read. Raises ConversionError."""
    try:
        with open_regular(path) as file:
            begin = file.read(len(_MAGIC))
            if begin.startswith(b"PK"):
                values, locate = _open_zip(file)
            elif begin == _MAGIC:
                values, locate = _open_legacy(file)
            else:
                raise ValueError("not a file that torch.save writes: it begins neither as zip archive nor as pickle")
        return _stored_tensors(path, values, locate)
    except (ValueError, OSError, ModelFileError) as error:
        message = str(error)
        raise ConversionError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def _stored_tensors(path: Path, values: object, locate: _Locate) -> dict[str, StoredTensor]:
    """Check that the value is a dict of tensors that fit their storages."""
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, expected a dict of tensors by name")
    tensors = {}
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, PickledTensor):
            what = "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"
            raise ValueError(f"holds {what} under the name {quoted(str(name))}, expected nothing but tensors")
        tensors[name] = _stored(path, name, value, locate(value.storage))
    return tensors


def _stored(path: Path, name: str, tensor: PickledTensor, start: int) -> StoredTensor:
    """A tensor whose every element lies in its storage. Raises ValueError."""
    label, storage, itemsize = f"tensor {quoted(name)}", tensor.storage, DTYPES[tensor.dtype].itemsize
    count, room = math.prod(tensor.shape), storage.count * DTYPES[storage.dtype].itemsize // itemsize
    if math.prod(n for n in tensor.shape if n) * itemsize > TENSOR_LIMIT:
        raise ValueError(f"{label}: the shape is too large")
    if not count:
        return StoredTensor(path, tensor.dtype, tensor.shape, start)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if last >= room:
        raise ValueError(
            f"{label}: {tensor.shape} with strides {tensor.strides} from element {tensor.offset} on does not fit its"
            f" storage of {room}"
        )
    if count > room:
        raise ValueError(f"{label}: repeats its storage of {room} elements {count} times, which is not supported")
    begin = start + tensor.offset * itemsize
    return StoredTensor(path, tensor.dtype, tensor.shape, begin, _strides(tensor))


def _strides(tensor: PickledTensor) -> tuple[int, ...] | None:
    """The strides of a tensor, in elements; None where its elements lie one after the other."""
    expected, strides = 1, []
    for n in tensor.shape[::-1]:
        strides.append(expected)
        expected *= n
    plain = all(n <= 1 or a == b for n, a, b in zip(tensor.shape, tensor.strides, strides[::-1], strict=True))
    return None if plain else tensor.strides


def _open_zip(file: BinaryIO) -> tuple[object, _Locate]:
    """The value of data.pkl, and where storages lie."""
    members = read_members(file)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"a zip archive with {len(pickles)} members data.pkl, where torch.save writes one")
    folder = pickles[0].removesuffix("/data.pkl")
    order = members.get(f"{folder}/byteorder")
    if order is not None and (order.size != 6 or _bytes(file, order) != b"little"):
        raise ValueError("its numbers are in another byte order than little-endian, which is not supported")
    if members[pickles[0]].size > SIZE_LIMIT:
        raise ValueError(f"data.pkl has {members[pickles[0]].size} bytes, more than {SIZE_LIMIT}")
    values, _ = read_pickle(_bytes(file, members[pickles[0]]))

    def locate(storage: PickledStorage) -> int:
        member = members.get(f"{folder}/data/{storage.key}")
        if member is None:
            raise ValueError(f"lacks the storage {quoted(storage.key)}")
        expected = storage.count * DTYPES[storage.dtype].itemsize
        if member.size != expected:
            raise ValueError(
                f"the storage {quoted(storage.key)} has {member.size} bytes, expected {expected}:"
                f" {storage.count} elements of {storage.dtype}"
            )
        return member.start

    return values, locate


def _bytes(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _open_legacy(file: BinaryIO) -> tuple[object, _Locate]:
    """The same for a file from before version 1.6."""
    file.seek(0)
    data = file.read(4 * SIZE_LIMIT)
    version, position = read_pickle(data, len(_MAGIC))
    machine, position = read_pickle(data, position)
    if version != _PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("written by an unknown version of PyTorch, or on a machine that is not little-endian")
    values, position = read_pickle(data, position)
    keys, position = read_pickle(data, position)
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("does not list its storages, each once")
    starts = _storage_starts(file, position, keys, _storages(values))

    def locate(storage: PickledStorage) -> int:
        start, found = starts.get(storage.key, (0, None))
        if found != storage:
            raise ValueError(f"the storage {quoted(storage.key)} is missing, or is described in two ways")
        return start

    return values, locate


def _storages(values: object) -> dict[str, PickledStorage]:
    """The storages of a dict of tensors by key, the first of each."""
    found: dict[str, PickledStorage] = {}
    for value in values.values() if isinstance(values, dict) else ():
        if isinstance(value, PickledTensor):
            found.setdefault(value.storage.key, value.storage)
    return found


def _storage_starts(
    file: BinaryIO, position: int, keys: list[str], storages: Mapping[str, PickledStorage]
) -> dict[str, tuple[int, PickledStorage]]:
    """Where each storage lies, one after the other from `position` on."""
    size, starts = os.fstat(file.fileno()).st_size, {}
    for key in keys:
        if key not in storages:
            raise ValueError(f"no tensor names the storage {quoted(key)}, so its type is not known")
        file.seek(position)
        count, storage = int.from_bytes(file.read(8), "little"), storages[key]
        position += 8
        if count != storage.count:
            raise ValueError(f"the storage {quoted(key)} has {count} elements, expected {storage.count}")
        starts[key] = position, storage
        position += count * DTYPES[storage.dtype].itemsize
        if position > size:
            raise ValueError(f"truncated: the storage {quoted(key)} ends {position - size} bytes after the file")
    return starts
