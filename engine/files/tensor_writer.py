"""Write a safetensors file in one pass: every tensor aligned, memory bounded by what is written at once, atomic."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svdengine.errors import ModelFileError
from svdengine.files.temporary_file import create_temporary, put_in_place
from svdengine.files.tensor_file import DTYPES, HEADER_LIMIT

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
PAGE = 4096  # bytes: where the data begins, so that tensors of whole pages that come first begin on one
PAD_PREFIX = "__pad."  # tensors that fill up to the next aligned offset, since safetensors forbids holes

Declared = tuple[tuple[int, ...], str]  # shape, safetensors dtype


class TensorWriter:
    """A context manager that writes the tensors declared to it, in any order and in pieces.

        with TensorWriter(path, {"x": ((2, 3), "F32")}, metadata) as writer:
            writer.write("x", array)

    The data goes to a temporary file in the same folder, which takes the name `path` only when the block ends without
    an exception and every tensor is complete; otherwise nothing is left behind. What a program that was killed has left
    there is removed by the next one that writes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Declared], metadata: Mapping[str, str]) -> None:
        """Lay the file out. Raises ModelFileError when the header would be too large or the file cannot be made."""
        self.path = path
        self._tensors = dict(tensors)
        self._starts, header, self.size_bytes = _layout(tensors, metadata)
        self._written = dict.fromkeys(tensors, 0)  # bytes
        self._create()
        try:
            self._write_at(0, header)
        except BaseException:
            self.abort()
            raise

    @property
    def written_bytes(self) -> int:
        """Of tensors, so far."""
        return sum(self._written.values())

    def write(self, name: str, array: NDArray[Any], start: int = 0) -> None:
        """Write `array` into the tensor `name`, from its element `start` on. Raises ModelFileError on a full disk."""
        shape, dtype = self._tensors[name]
        if array.dtype != DTYPES[dtype]:
            raise ValueError(f"tensor {name!r} is {dtype}, found {array.dtype}")
        itemsize = DTYPES[dtype].itemsize
        if start < 0 or start + array.size > math.prod(shape):
            raise ValueError(f"tensor {name!r} of shape {shape} has no room for {array.size} elements at {start}")
        data = np.ascontiguousarray(array, DTYPES[dtype]).reshape(-1)
        self._write_at(self._starts[name] + start * itemsize, data.view(np.uint8).data)
        self._written[name] += data.nbytes

    @property
    def temporary(self) -> Path:
        """The file as long as it has not its final name. Once all is written it can be read there."""
        return self._temporary

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self.abort()

    def _create(self) -> None:
        try:
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._temporary, self._file = create_temporary(self.path)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._take_space()
        except BaseException as error:
            self.abort()
            raise (self._failure(error) if isinstance(error, OSError) else error) from error

    def _take_space(self) -> None:
        """Reserve the whole file, where the system can, so that a full disk shows before any work is done."""
        self._file.truncate(self.size_bytes)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), 0, self.size_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        try:
            self._file.seek(offset)
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._failure(error) from error

    def _finish(self) -> None:
        for name, (shape, dtype) in self._tensors.items():
            expected = size_of((shape, dtype))
            if self._written[name] != expected:
                raise ValueError(f"tensor {name!r}: {self._written[name]} of {expected} bytes were written")
        try:
            put_in_place(self._file, self._temporary, self.path)
        except OSError as error:
            raise self._failure(error) from error
        _sync_folder(self.path.parent)

    def abort(self) -> None:
        """Give up: remove the temporary file. Does nothing after the file got its final name."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> ModelFileError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(self.path.parent).free
            return ModelFileError(
                f"{self.path}: no room for {self.size_bytes / 1e6:.1f} MB ({free / 1e6:.1f} MB are free);"
                " free some space or write elsewhere"
            )
        return ModelFileError(f"{self.path}: cannot write: {error.strerror or error}")


def size_of(declared: Declared) -> int:
    """Bytes of a tensor."""
    shape, dtype = declared
    return math.prod(shape) * DTYPES[dtype].itemsize


def _layout(tensors: Mapping[str, Declared], metadata: Mapping[str, str]) -> tuple[dict[str, int], bytes, int]:
    """Where each tensor starts in the file, the header with its length in front, and the size of the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset, pads = 0, 0
    for name, (shape, dtype) in tensors.items():
        end = offset + size_of((shape, dtype))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if offset != end:
            header[f"{PAD_PREFIX}{pads}"] = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
            pads += 1
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    if len(text) > HEADER_LIMIT:
        raise ModelFileError(f"the header would take {len(text)} bytes; the limit is {HEADER_LIMIT}")
    begin = 8 + len(text)
    starts = {name: begin + header[name]["data_offsets"][0] for name in tensors}
    return starts, len(text).to_bytes(8, "little") + text, begin + offset


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
