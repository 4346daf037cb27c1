"""The pickles that PyTorch writes for a list of tensors, read without running anything.

A pickle is a program for a small stack machine (PEP 307, PEP 3154; the module pickletools describes every instruction).
Python's own reader calls whatever the program names, and so can be made to run any code. This one is an interpreter of
its own: it knows the instructions that build plain values, and of names exactly those that a state dict needs
(converters/torch_names.py). Nothing is imported and nothing is called. Anything else is refused by name. Instructions
take constant time or the time of what they remove from the stack, so all is bounded by the size of the program, and by
the limits below.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from svdengine.converters.torch_names import GLOBALS, NAME_LIMIT, call, kind_of, storage_of
from svdengine.errors import quoted

SIZE_LIMIT = 8 << 20  # bytes of a pickle; one of a model with 1,000 tensors has 150 KB
STEP_LIMIT = 1_000_000  # instructions; a tensor takes about 45


class _Mark:
    """Where a list of operands begins."""


_MARK = _Mark()


def read_pickle(data: bytes, start: int = 0) -> tuple[Any, int]:
    """The value of the pickle that begins at byte `start`, and where it ends.

    Values are None, bool, int, float, str, bytes, tuple, list, dict, PickledTensor, PickledStorage and Global; a dict
    has no other keys than str and int. Lists and dicts may hold themselves. Raises ValueError for anything that a list
    of tensors does not need.
    """
    machine = _Machine(data, start)
    for _ in range(STEP_LIMIT):
        code = machine.take(1)[0]
        if code == _STOP:
            return machine.pop(), machine.position
        run = _INSTRUCTIONS.get(code)
        if run is None:
            raise ValueError(f"the pickle has the instruction {_name_of(code)}, which no list of tensors needs")
        run(machine)
        if machine.position - start > SIZE_LIMIT:
            raise ValueError(f"the pickle has more than {SIZE_LIMIT} bytes")
    raise ValueError(f"the pickle has more than {STEP_LIMIT} instructions")


class _Machine:
    """The stack, the memo, and what is left of the program."""

    def __init__(self, data: bytes, start: int) -> None:
        self.data = data
        self.position = start
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        """The next bytes of the program."""
        end = self.position + count
        if end > len(self.data):
            raise ValueError("the pickle is truncated")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str) -> Any:
        """The next number, as struct writes it."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """The next line, which is part of a name."""
        end = self.data.find(b"\n", self.position, self.position + NAME_LIMIT + 1)
        if end < 0:
            raise ValueError("the pickle is truncated, or has a name that is too long")
        return _text(self.take(end + 1 - self.position)[:-1])

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        """The top of the stack, which no mark may be."""
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the pickle takes a value where there is none")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """All values above the last mark, and the mark."""
        values = []
        while self.stack and self.stack[-1] is not _MARK:
            values.append(self.stack.pop())
        if not self.stack:
            raise ValueError("the pickle takes values up to a mark where there is none")
        self.stack.pop()
        return values[::-1]

    def top(self, kind: type) -> Any:
        """The top of the stack, left there, which must be of this kind."""
        if not self.stack or type(self.stack[-1]) is not kind:
            what = kind_of(self.stack[-1]) if self.stack else "nothing"
            raise ValueError(f"the pickle adds to {what} as if it were a {kind.__name__}")
        return self.stack[-1]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _name_of(code: int) -> str:
    import pickletools

    names = {op.code: op.name for op in pickletools.opcodes}
    return names.get(chr(code), f"{code:#04x}, which does not exist")


def _global(machine: _Machine, module: str, name: str) -> None:
    found = GLOBALS.get(f"{module}.{name}")
    if found is None:
        raise ValueError(
            f"the pickle asks for {quoted(f'{module}.{name}')}, which no list of tensors needs and which could run code"
        )
    machine.push(found)


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if type(name) is not str or type(module) is not str or len(name) + len(module) > NAME_LIMIT:
        raise ValueError("the pickle asks for a name that is no text, or too long")
    _global(machine, module, name)


def _put(machine: _Machine, index: int) -> None:
    value = machine.pop()
    machine.push(value)
    machine.memo[index] = value


def _get(machine: _Machine, index: int) -> None:
    if index not in machine.memo:
        raise ValueError("the pickle takes from its memory what it has not put there")
    machine.push(machine.memo[index])


def _long(machine: _Machine) -> None:
    length = machine.take(1)[0]
    if length > 8:
        raise ValueError(f"the pickle has a whole number of {length} bytes, of which 8 are enough for any size")
    machine.push(int.from_bytes(machine.take(length), "little", signed=True))


def _tuple(machine: _Machine, count: int) -> None:
    values = [machine.pop() for _ in range(count)]
    machine.push(tuple(values[::-1]))


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


def _set_items(machine: _Machine, values: list[Any]) -> None:
    if len(values) % 2:
        raise ValueError("the pickle has a key without a value")
    target = machine.top(dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int):  # the hash of others may take for ever
            raise ValueError(f"the pickle has a dict with a key that is {kind_of(key)}, neither text nor number")
        target[key] = value


def _build(machine: _Machine) -> None:
    """Set the state of an object: an OrderedDict has one (`_metadata`), which says nothing of the tensors."""
    machine.pop()
    machine.top(dict)


def _persistent(machine: _Machine) -> None:
    machine.push(storage_of(machine.pop()))


def _reduce(machine: _Machine) -> None:
    arguments, what = machine.pop(), machine.pop()
    if type(arguments) is not tuple:
        raise ValueError("the pickle has a call without arguments")
    machine.push(call(what, arguments))


_STOP = ord(".")
_INSTRUCTIONS: Mapping[int, Callable[[_Machine], None]] = MappingProxyType(
    {
        0x80: lambda m: _protocol(m.take(1)[0]),  # PROTO
        0x95: lambda m: _frame(m.number("<Q")),  # FRAME
        ord("("): lambda m: m.push(_MARK),  # MARK
        ord("N"): lambda m: m.push(None),  # NONE
        0x88: lambda m: m.push(True),  # NEWTRUE
        0x89: lambda m: m.push(False),  # NEWFALSE
        ord("J"): lambda m: m.push(m.number("<i")),  # BININT
        ord("K"): lambda m: m.push(m.take(1)[0]),  # BININT1
        ord("M"): lambda m: m.push(m.number("<H")),  # BININT2
        0x8A: _long,  # LONG1
        ord("G"): lambda m: m.push(m.number(">d")),  # BINFLOAT
        ord("X"): lambda m: m.push(_text(m.take(m.number("<I")))),  # BINUNICODE
        0x8C: lambda m: m.push(_text(m.take(m.take(1)[0]))),  # SHORT_BINUNICODE
        ord("U"): lambda m: m.push(_text(m.take(m.take(1)[0]))),  # SHORT_BINSTRING, of Python 2
        ord("C"): lambda m: m.push(m.take(m.take(1)[0])),  # SHORT_BINBYTES
        ord("B"): lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
        ord(")"): lambda m: m.push(()),  # EMPTY_TUPLE
        0x85: lambda m: _tuple(m, 1),  # TUPLE1
        0x86: lambda m: _tuple(m, 2),  # TUPLE2
        0x87: lambda m: _tuple(m, 3),  # TUPLE3
        ord("t"): lambda m: m.push(tuple(m.pop_marked())),  # TUPLE
        ord("]"): lambda m: m.push([]),  # EMPTY_LIST
        ord("a"): lambda m: _append(m, [m.pop()]),  # APPEND
        ord("e"): lambda m: _append(m, m.pop_marked()),  # APPENDS
        ord("}"): lambda m: m.push({}),  # EMPTY_DICT
        ord("s"): lambda m: _set_items(m, [m.pop(), m.pop()][::-1]),  # SETITEM
        ord("u"): lambda m: _set_items(m, m.pop_marked()),  # SETITEMS
        ord("q"): lambda m: _put(m, m.take(1)[0]),  # BINPUT
        ord("r"): lambda m: _put(m, m.number("<I")),  # LONG_BINPUT
        0x94: lambda m: _put(m, len(m.memo)),  # MEMOIZE
        ord("h"): lambda m: _get(m, m.take(1)[0]),  # BINGET
        ord("j"): lambda m: _get(m, m.number("<I")),  # LONG_BINGET
        ord("c"): lambda m: _global(m, m.line(), m.line()),  # GLOBAL
        0x93: _stack_global,  # STACK_GLOBAL
        ord("R"): _reduce,  # REDUCE
        ord("b"): _build,  # BUILD
        ord("Q"): _persistent,  # BINPERSID
    }
)


def _protocol(version: int) -> None:
    if not 2 <= version <= 5:
        raise ValueError(f"the pickle has protocol {version}, this svdengine reads 2 to 5")


def _frame(_: int) -> None:
    """A hint of how much to read at once."""
