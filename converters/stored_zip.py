"""Where the members of a zip archive without compression lie, as torch.save writes such archives.

The format is PKWARE's APPNOTE 6.3: a directory at the end of the file lists all members, and a short record at the very
end says where it is; numbers beyond 32 bits stand in further fields (zip64). The package zipfile reads the directory
whole, however long it is, and follows members that lie in each other; here both are refused, as are compression and
encryption, which torch.save does not use. So a small file cannot swell.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from svdengine.errors import quoted

DIRECTORY_LIMIT = 64 << 20  # bytes
_END = struct.Struct("<4s4H2LH")  # at the end of the file: where the directory is
_LOCATOR = struct.Struct("<4sLQL")  # before it in a long file: where a longer record is
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # a member, in the directory
_LOCAL = struct.Struct("<4s5H3L2H")  # a member, before its data
_ZIP64 = 1  # the extra field with sizes and offsets beyond 32 bits
_FULL = 0xFFFFFFFF
_ENCRYPTED = 0x2041  # bits of the flags: encrypted, strongly so, with a hidden directory


@dataclass(frozen=True)
class Member:
    """A member's bytes in the file."""

    start: int
    size: int


def read_members(file: BinaryIO) -> dict[str, Member]:
    """The members of an archive by name, checked to lie in the file and apart. Raises ValueError, OSError."""
    size = os.fstat(file.fileno()).st_size
    count, length, start = _find_directory(file, size)
    if length > DIRECTORY_LIMIT or start + length > size:
        raise ValueError(f"a damaged zip archive: its directory has {length} bytes from {start} on, the file {size}")
    directory = _read(file, start, length)
    members: dict[str, Member] = {}
    position = 0
    for _ in range(count):
        name, header, member_size, position = _entry(directory, position)
        if name in members:
            raise ValueError(f"a zip archive with two members {quoted(name)}")
        members[name] = Member(_data_start(file, header, name, start), member_size)
    end = 0
    for name, member in sorted(members.items(), key=lambda item: (item[1].start, item[1].size)):
        if member.start < end or member.start + member.size > start:
            raise ValueError(f"a damaged zip archive: the member {quoted(name)} does not lie apart from the others")
        end = member.start + member.size
    return members


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """How many members the directory has, its bytes, and where it begins."""
    if size < _END.size:
        raise ValueError("a damaged zip archive: too short")
    signature, disk, first, _, count, length, start, comment = _END.unpack(_read(file, size - _END.size, _END.size))
    if signature != b"PK\5\6" or comment or disk or first:
        raise ValueError("a damaged or truncated zip archive: its directory is not found at the end")
    at = size - _END.size - _LOCATOR.size
    if at >= 0:
        signature, _, record, _ = _LOCATOR.unpack(_read(file, at, _LOCATOR.size))
        if signature == b"PK\6\7":
            fields = _END64.unpack(_read(file, record, _END64.size))
            if fields[0] != b"PK\6\6":
                raise ValueError("a damaged zip archive: the record of its directory is not where it should be")
            count, length, start = fields[7:10]
    return count, length, start


def _entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """A member's name, where its header is, its size, and where the next entry begins."""
    end = position + _ENTRY.size
    if end > len(directory):
        raise ValueError("a damaged zip archive: its directory is too short")
    fields = _ENTRY.unpack_from(directory, position)
    flags, method, packed, size, header = fields[3], fields[4], fields[8], fields[9], fields[16]
    name_length, extra_length, comment_length = fields[10:13]
    after = end + name_length + extra_length + comment_length
    if fields[0] != b"PK\1\2" or after > len(directory):
        raise ValueError("a damaged zip archive: its directory is too short")
    name = directory[end : end + name_length].decode("utf-8")
    extra = directory[end + name_length : end + name_length + extra_length]
    if _FULL in (size, packed, header):
        size, packed, header = _wide(extra, name, (size, packed, header))
    if method or flags & _ENCRYPTED or packed != size:
        raise ValueError(f"the member {quoted(name)} is compressed or encrypted, as torch.save's are not")
    return name, header, size, after


def _wide(extra: bytes, name: str, narrow: tuple[int, int, int]) -> list[int]:
    """Size, packed size and offset of a member, those of 64 bits from its extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == _ZIP64 and position + length <= len(extra):
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra[: position + length], position))
            numbers = [next(wide, None) if number == _FULL else number for number in narrow]
            if None not in numbers:
                return [number for number in numbers if number is not None]
        position += length
    raise ValueError(f"a damaged zip archive: the member {quoted(name)} lacks its size or place")


def _data_start(file: BinaryIO, header: int, name: str, end: int) -> int:
    """Where the bytes of a member begin: after its own header, which repeats its name."""
    if header + _LOCAL.size > end:
        raise ValueError(f"a damaged zip archive: the member {quoted(name)} lies behind the directory")
    fields = _LOCAL.unpack(_read(file, header, _LOCAL.size))
    name_length, extra_length = fields[9:11]
    start = header + _LOCAL.size
    if fields[0] != b"PK\3\4" or fields[3] or _read(file, start, name_length) != name.encode("utf-8"):
        raise ValueError(f"a damaged zip archive: the member {quoted(name)} is not where the directory says")
    return start + name_length + extra_length


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    """Bytes of the file. Raises ValueError where it ends before."""
    file.seek(min(start, 1 << 62))  # beyond that the system takes no offset
    data = file.read(size)
    if len(data) != size:
        raise ValueError("a damaged or truncated zip archive")
    return data
