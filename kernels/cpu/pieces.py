"""The pieces of a step: functions that are compiled apart, each to object code of its own, and call each other by name.

Whoever calls one needs to know its name alone, so that several processes compile at once, and only what is needed. All
that passes between pieces are int64: numbers, and addresses. A parameter that is named `model`, `work`, `cache` or
`inputs` is such a record, and `matrix` or `down` the integers of one (matrix.py): both sides have them as everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from svdengine.kernels.cpu.jit import jit
from svdengine.kernels.cpu.matrix import MATRIX_FIELDS
from svdengine.kernels.cpu.model import Model
from svdengine.kernels.cpu.parts import symbol_of
from svdengine.kernels.cpu.record_type import RecordType, integers_at, record_at
from svdengine.kernels.cpu.simd import I64, call
from svdengine.kernels.cpu.workspace import Cache, Inputs, Workspace

RECORDS = {"model": Model, "work": Workspace, "cache": Cache, "inputs": Inputs}
_MATRICES = ("matrix", "down")

ENTRIES: dict[str, Any] = {}  # by name: what is compiled, for as many int64 as it has parameters
_FUNCTIONS: dict[Any, Any] = {}  # what a piece does, by what takes its place


def piece(function: Callable[..., Any]) -> Any:
    """Compile `function` apart. What takes its place calls it by name; its result is an int64, or of no meaning."""
    name, parameters = function.__name__, list(inspect.signature(function).parameters)
    inner = jit(function)
    ENTRIES[name] = _entry(name, parameters, inner)
    caller = _caller(name, parameters)
    _FUNCTIONS[caller] = inner
    return caller


def whole(function: Any) -> Any:
    """What a piece does, for who calls it alone and has no other pieces; any other function as it is."""
    return _FUNCTIONS.get(function, function)


def _entry(name: str, parameters: list[str], inner: Any) -> Any:
    scope: dict[str, Any] = {"inner": inner, "integers_at": integers_at, "FIELDS": MATRIX_FIELDS}
    arguments = []
    for parameter in parameters:
        if parameter in RECORDS:
            scope[f"{parameter}_at"] = record_at(RECORDS[parameter])
            parameter = f"{parameter}_at({parameter})"
        elif parameter in _MATRICES:
            parameter = f"integers_at({parameter}, FIELDS)"
        arguments.append(parameter)
    exec(f"def {name}({', '.join(parameters)}):\n    return inner({', '.join(arguments)})", scope)
    return jit(scope[name])


def _caller(name: str, parameters: list[str]) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        words = []
        for kind, value in zip(signature.args, values, strict=True):
            if isinstance(kind, types.Array):
                value = builder.ptrtoint(context.make_array(kind)(context, builder, value).data, I64)
            words.append(value)
        assert all(isinstance(word.type, ir.IntType) for word in words)
        return call(builder, symbol_of(name), I64, words)

    def typed(*kinds: Any) -> Any:
        if any(isinstance(kind, types.Float) for kind in kinds):
            raise TypeError(
                f"{name} takes a fraction by its address: a number that is passed loses what is after its point"
            )
        by_address = [kind if isinstance(kind, types.Array | RecordType) else types.int64 for kind in kinds]
        return types.int64(*by_address), codegen

    # An intrinsic's typing function needs named parameters, as many as the piece has.
    listed, scope = ", ".join(parameters), {"typed": typed}
    exec(f"def {name}(typing_context, {listed}):\n    return typed({listed})", scope)
    return intrinsic(scope[name])
