"""Pickles of tensors: nothing runs, nothing swells, and what a list of tensors does not need is refused by name."""

import os
import pickle
import pickletools
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svdengine.converters.torch_names import GLOBALS
from svdengine.converters.torch_pickle import STEP_LIMIT, read_pickle

P = b"\x80\x02"  # protocol 2


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


class Calls:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Holder:
    """Pickled as an object with a state."""

    def __init__(self) -> None:
        self.x = 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(protocol: int) -> None:
    value = {"a": [1, -2, 1 << 40, -(1 << 62), 3.5, None, True, False], "b": ("x" * 300, (), {}), 7: [[], ("y",)]}
    data = pickle.dumps(value, protocol)
    assert read_pickle(data) == (value, len(data))
    assert read_pickle(b"junk" + data + b"more", 4) == (value, 4 + len(data))


def test_an_ordered_dict_is_a_dict_and_its_state_is_ignored() -> None:
    value = OrderedDict(a=1)
    value._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert read_pickle(pickle.dumps(value, 2))[0] == {"a": 1}


# What each of these would do is run code, or make something that is no list of tensors.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (P + name("os", "system") + text("touch pwned") + b"\x85R.", "'os.system'"),
    "posix.system": (pickle.dumps(Calls(os.system, "touch pwned")), "'posix.system'"),
    "builtins.eval": (pickle.dumps(Calls(eval, "1")), "'builtins.eval'"),
    "eval of Python 2": (pickle.dumps(Calls(eval, "1"), 2), "'__builtin__.eval'"),
    "getattr": (pickle.dumps(Calls(getattr, 1, "real")), "'builtins.getattr'"),
    "protocol 0": (pickle.dumps(Calls(eval, "1"), 0), "'__builtin__.eval'"),
    "stack_global": (P + text("os") + text("system") + b"\x93.", "'os.system'"),
    "a dotted name": (P + text("torch") + text("os.system") + b"\x93.", r"'torch\.os\.system'"),
    "a name of torch": (P + name("torch.hub", "load") + b".", "'torch.hub.load'"),
    "inst": (P + b"(" + text("id") + b"ios\nsystem\n.", "instruction INST"),
    "obj": (P + b"(" + name("collections", "OrderedDict") + b"o.", "instruction OBJ"),
    "newobj": (P + name("collections", "OrderedDict") + b")\x81.", "instruction NEWOBJ"),
    "newobj_ex": (P + name("collections", "OrderedDict") + b")}\x92.", "instruction NEWOBJ_EX"),
    "build of what is no dict": (P + name("torch", "Size") + b"}b.", "as if it were a dict"),
    "an object with a state": (pickle.dumps(Holder(), 2), "'copy(_|)reg._reconstructor'|instruction NEWOBJ|Holder"),
    "call of a result": (P + name("collections", "OrderedDict") + b")R)R.", "calls a dict"),
    "call of a storage": (P + name("torch", "FloatStorage") + b")R.", "calls torch.FloatStorage"),
    "call without a tuple": (P + name("collections", "OrderedDict") + b"]R.", "without arguments"),
    "too many arguments": (P + name("torch", "Size") + b"K\x01K\x02\x86R.", "with 2 arguments"),
    "ext": (P + b"\x82\x01.", "instruction EXT1"),
    "dup": (P + b"]2.", "instruction DUP"),
    "pop": (P + b"]0.", "instruction POP"),
    "a set": (pickle.dumps({1}, 4), "instruction EMPTY_SET"),
    "bytearray": (pickle.dumps(bytearray(3), 5), "instruction BYTEARRAY8"),
    "persistent text": (P + b"Pstorage\n.", "instruction PERSID"),
    "no such instruction": (P + b"\xff.", "0xff, which does not exist"),
    "protocol 255": (b"\x80\xff.", "protocol 255"),
    "persistent junk": (P + b"K\x01Q.", "refers to 1, which is no storage"),
    "persistent list": (P + b"]Q.", "refers to a list"),
    "storage of a name": (
        P + b"(" + text("storage") + name("torch", "Size") + text("0") + text("cpu") + b"K\x01tQ.",
        "of the class torch.Size",
    ),
    "storage with a path": (
        P + b"(" + text("storage") + name("torch", "FloatStorage") + b"]" + text("cpu") + b"K\x01tQ.",
        "a storage a list of 1",
    ),
    "storage of negative size": (
        P + b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"J\xff\xff\xff\xfftQ.",
        "of -1 elements",
    ),
    "a part of a storage": (
        P + b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x01]tQ.",
        "part of another one",
    ),
    "a tensor in no storage": (
        P + name("torch._utils", "_rebuild_tensor_v2") + b"(K\x01K\x00)))" + b"K\x00tR.",
        "in int, which is no storage",
    ),
    "a parameter of no tensor": (
        P + name("torch._utils", "_rebuild_parameter") + b"(K\x01K\x00)tR.",
        "no tensor",
    ),
    "a key that is a tuple": (P + b"})K\x01s.", "a key that is tuple"),
    "a key without a value": (P + b"}(K\x01u.", "without a value"),
    "a large number": (P + b"\x8a\xff" + bytes(254) + b"\x01.", "a whole number of 255 bytes"),
    "a larger number": (P + b"\x8b\xff\xff\xff\x00" + bytes(9) + b".", "instruction LONG4"),
    "a number as text": (P + b"I" + b"9" * 100_000 + b"\n.", "instruction INT"),
    "a long text": (P + b"X\xff\xff\xff\xffabc.", "truncated"),
    "a longer text": (P + b"\x8d" + b"\xff" * 8 + b"abc.", "instruction BINUNICODE8"),
    "no text": (P + text("a")[:-1] + b"\xff.", "can't decode"),
    "nothing there": (P + b".", "where there is none"),
    "no mark": (P + b"t.", "a mark where there is none"),
    "a mark as value": (P + b"(.", "where there is none"),
    "a mark in memory": (P + b"(q\x00.", "where there is none"),
    "not in memory": (P + b"h\x05.", "has not put there"),
    "not a list": (P + b")K\x01a.", "as if it were a list"),
    "no end": (P + b"]" * 10, "truncated"),
    "a name without end": (P + b"c" + b"x" * 2000 + b"\ny\n.", "name that is too long"),
    "a name of a million letters": (P + text("x" * 10**6) + text("y") + b"\x93.", "too long"),
    "too many dimensions": (P + name("torch", "Size") + b"(" + b"K\x01" * 9 + b"t\x85R.", "up to 8 numbers"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_pickle(data)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_name_that_is_allowed_is_a_function_of_python() -> None:
    """Names stand for data: reading one imports nothing."""
    before = set(sys.modules)
    for full in GLOBALS:
        read_pickle(P + name(*full.rsplit(".", 1)) + b".")
    assert set(sys.modules) == before


def doubled(times: int) -> bytes:
    """A tuple of two tuples of two tuples ...: 3 bytes double what it means."""
    return P + b")q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(times))


def nested(times: int) -> bytes:
    return P + b")" + b"\x85" * times


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (doubled(60) + b".", None),
        (doubled(60) + b"Q.", "which is no storage"),
        (doubled(60) + b")R.", "calls a tuple"),
        (doubled(60) + b"}h\x00K\x01s.", "a key that is tuple"),
        (doubled(60) + name("torch", "Size") + b"h\x00\x85R.", None),
        (nested(500_000) + b".", None),
        (nested(500_000) + b"K\x01\x86Q.", "which is no storage"),
        (P + b"]" * (STEP_LIMIT + 1), "more than 1000000 instructions"),
        (P + b"(" * (STEP_LIMIT + 1), "more than 1000000 instructions"),
        (P + b"".join(b"X\x00\x00\x10\x00" + bytes(1 << 20) for _ in range(9)), "more than 8388608 bytes"),
        # A list of half a million, as the dimensions of a hundred thousand sizes.
        (P + b"](" + b"N" * 500_000 + b"eq\x00" + (name("torch", "Size") + b"h\x00\x85R") * 100_000, "up to 8 numbers"),
        (P + b"]q\x00h\x00a.", None),
        (P + b"}q\x00K\x01h\x00s.", None),
    ],
    ids=range(13),
)
def test_what_would_swell_does_not(data: bytes, message: str | None) -> None:
    """Some of these would take for ever, or all the memory."""
    if message is None:
        read_pickle(data)
    else:
        with pytest.raises(ValueError, match=message) as caught:
            read_pickle(data)
        assert len(str(caught.value)) < 300


def test_every_instruction_is_known_or_refused() -> None:
    """No byte makes anything but a value or a ValueError."""
    known = {ord(op.code) for op in pickletools.opcodes}
    for code in range(256):
        for rest in (b".", b"\x00" * 40, b"\x01" * 40 + b".", b"a\nb\n."):
            try:
                read_pickle(P + b"))" + bytes([code]) + rest)
            except ValueError as error:
                if code not in known:
                    assert "does not exist" in str(error)
