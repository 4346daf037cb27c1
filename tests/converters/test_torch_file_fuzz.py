"""Random damage to files of torch.save: refused with ConversionError, or every tensor lies in the file."""

import io
import math
import os
import pickletools
import random
import struct
import zipfile
from pathlib import Path

import pytest

from svdengine.converters.checkpoint import read_stored
from svdengine.converters.torch_file import read_torch_file
from svdengine.converters.torch_pickle import read_pickle
from svdengine.errors import ConversionError
from svdengine.files.tensor_file import DTYPES

torch = pytest.importorskip("torch")

TRIES = 1500
LONG_TRIES = int(os.environ.get("FUZZ_TRIES", "200000"))
NUMBERS = (0, 1, 2, 6, 7, 255, 256, 65535, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
CODES = [ord(op.code) for op in pickletools.opcodes]


def files() -> list[bytes]:
    """One file of each kind, with views, shared storages, several types and a module's state."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"a": base, "b": base.T, "c": base[1:3, ::2], "d": base.to(torch.bfloat16), "e": torch.tensor(1)}
    made = []
    for new in (True, False):
        for value in (tensors, torch.nn.Linear(3, 2).state_dict()):
            stream = io.BytesIO()
            torch.save(value, stream, _use_new_zipfile_serialization=new)
            made.append(stream.getvalue())
    return made


def damaged(data: bytes, source: random.Random, begin: int, end: int) -> bytes:
    """Some bytes of a part changed, taken out, doubled, or replaced by a number or an instruction."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at, kind = source.randrange(min(begin, len(changed) - 1), min(end, len(changed))), source.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            changed[at] = source.choice(CODES)
        elif kind == 2:
            size = source.choice((1, 2, 4, 8))
            changed[at : at + size] = struct.pack("<Q", source.choice(NUMBERS))[:size]
        elif kind == 3:
            del changed[at : at + source.randint(1, 8)]
        elif kind == 4:
            changed[at:at] = changed[at : at + source.randint(1, 40)]
        else:
            changed[at:at] = bytes([source.choice(CODES)])
    return bytes(changed)


def with_pickle(data: bytes, source: random.Random) -> bytes:
    """An archive that is whole, but for what its pickle says."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.namelist():
            content = old.read(member)
            is_pickle = member.endswith("data.pkl")
            new.writestr(member, damaged(content, source, 0, len(content)) if is_pickle else content)
    return stream.getvalue()


def check(path: Path, data: bytes) -> bool:
    """Whether the file was taken."""
    path.write_bytes(data)
    try:
        found = read_torch_file(path)
    except ConversionError as error:
        assert "\n" not in str(error) and len(str(error)) < 700 + len(str(path))
        return False
    for name, tensor in found.items():
        size, strides = DTYPES[tensor.dtype].itemsize, tensor.strides
        count = math.prod(tensor.shape)
        last = count - 1 if strides is None else sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
        assert not count or (tensor.start >= 0 and tensor.start + (last + 1) * size <= len(data))
        assert read_stored(tensor, name).shape == tensor.shape
    return True


def fuzz(path: Path, tries: int, seed: int) -> int:
    """How many of so many damaged files were taken."""
    source, originals, taken = random.Random(seed), files(), 0
    for index in range(tries):
        data = originals[index % 4]
        if index % 4 < 2 and index % 8 < 4:
            data = with_pickle(data, source)
        else:
            end = len(data) if source.random() < 0.5 else max(1, len(data) // 2)
            data = damaged(data, source, 0 if source.random() < 0.5 else end // 2, end)
        taken += check(path / "f.bin", data)
    return taken


def test_damaged_files(tmp_path: Path) -> None:
    taken = fuzz(tmp_path, TRIES, 0)
    assert 0 < taken < TRIES  # bytes of numbers may change


def test_random_programs() -> None:
    """Instructions in any order, with operands of any size."""
    source = random.Random(0)
    for _ in range(TRIES):
        data = b"\x80\x02" + bytes(source.choice(CODES) for _ in range(source.randrange(60)))
        data += source.randbytes(source.randrange(20)) + b"."
        try:
            read_pickle(data)
        except ValueError as error:
            assert len(str(error)) < 500


@pytest.mark.long
def test_many_damaged_files(tmp_path: Path) -> None:
    taken = fuzz(tmp_path, LONG_TRIES, 1)
    print(f"{taken} of {LONG_TRIES} damaged files were taken")
    assert 0 < taken < LONG_TRIES
