"""Write a list of tensors as torch.save does, without PyTorch: torch.load reads it, with weights_only as without.

converters/torch_file.py says what such a file is.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ConversionError
from svdengine.files.temporary_file import create_temporary, put_in_place

_STORAGES = {"float16": "HalfStorage", "float32": "FloatStorage"}
_ARCHIVE = "archive"  # the folder inside, whose name nobody reads


def write_torch_file(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write float16 and float32 arrays by name. The file appears whole or not at all; its bytes depend on them alone.

    Raises ConversionError when it cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    members = {"data.pkl": _pickle(arrays), "byteorder": b"little"}
    members |= {f"data/{key}": array.tobytes() for key, array in enumerate(arrays.values())}
    members["version"] = b"3\n"
    try:
        temporary, file = create_temporary(path)
        try:
            with zipfile.ZipFile(file, "w") as archive:
                for name, data in members.items():
                    archive.writestr(zipfile.ZipInfo(f"{_ARCHIVE}/{name}"), data)
            put_in_place(file, temporary, path)
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from error


def _pickle(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The pickle, of protocol 2: an OrderedDict of name -> tensor, each a storage of its own."""
    items = b"".join(_text(name) + _tensor(key, array) for key, (name, array) in enumerate(arrays.items()))
    return b"\x80\x02" + _ORDERED_DICT + b"(" + items + b"u."


def _tensor(key: int, array: NDArray[Any]) -> bytes:
    """A call of _rebuild_tensor_v2: storage, offset, shape, strides, no gradient, no hooks."""
    strides = (step // array.itemsize for step in array.strides)
    storage = _text("storage") + _global("torch", _STORAGES[array.dtype.name]) + _text(str(key)) + _text("cpu")
    storage = b"(" + storage + _number(array.size) + b"tQ"
    arguments = storage + _number(0) + _numbers(array.shape) + _numbers(strides) + b"\x89" + _ORDERED_DICT
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def _numbers(numbers: Any) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


_ORDERED_DICT = _global("collections", "OrderedDict") + b")R"
