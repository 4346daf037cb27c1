"""Records (record.py) in compiled code: one address, and `record.field` is read from memory where it is used.

A NamedTuple in Numba is all of its fields, which are handed over anew with each call; that took long to compile.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model
from numba.np.arrayobj import make_array, populate_array

from svdengine.kernels.cpu.record import Field, fields_of

_I64, _F64 = ir.IntType(64), ir.DoubleType()


class RecordType(types.Type):
    """Numba type of a record: the address of its slots."""

    def __init__(self, record: Any) -> None:
        self.record = record
        super().__init__(name=f"Record({record.__name__})")


@register_model(RecordType)
class _RecordModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: RecordType) -> None:
        super().__init__(dmm, fe_type, _I64)


def _type_of(field: Field) -> types.Type:
    if field.dtype is not None:
        return types.Array(numba.from_dtype(field.dtype), field.dimensions, "C")
    return {int: types.int64, float: types.float64, bool: types.boolean}[field.kind]


@infer_getattr
class _RecordAttributes(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, record: Any, name: Any) -> Any:  # type: ignore[override]
        field = fields_of(record.record).get(name)
        return None if field is None else _type_of(field)


def _slot(builder: Any, address: Any, slot: int, kind: Any = _I64) -> Any:
    """A slot's content, which nobody changes while compiled code runs: LLVM need not read it again."""
    at = builder.inttoptr(builder.add(address, ir.Constant(_I64, 8 * slot)), kind.as_pointer())
    value = builder.load(at, typ=kind)
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


@lower_getattr_generic(RecordType)
def _read_field(context: Any, builder: Any, kind: RecordType, address: Any, name: str) -> Any:
    field = fields_of(kind.record)[name]
    if field.kind is float:
        return _slot(builder, address, field.slot, _F64)
    value = _slot(builder, address, field.slot)
    if field.kind is bool:
        return builder.icmp_unsigned("!=", value, ir.Constant(_I64, 0))
    if field.dtype is None:
        return value
    shape = [_slot(builder, address, field.slot + 1 + axis) for axis in range(field.dimensions)]
    return _array(context, builder, _type_of(field), value, shape)


def _array(context: Any, builder: Any, kind: Any, address: Any, shape: list[Any]) -> Any:
    """A C-contiguous array of memory that others own."""
    array = make_array(kind)(context, builder)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides: list[Any] = []
    stride: Any = ir.Constant(_I64, size)
    for extent in reversed(shape):
        strides.insert(0, stride)
        stride = builder.mul(stride, extent)
    populate_array(
        array,
        data=builder.inttoptr(address, array.data.type),
        shape=cgutils.pack_array(builder, shape, ty=_I64),
        strides=cgutils.pack_array(builder, strides, ty=_I64),
        itemsize=ir.Constant(_I64, size),
        meminfo=None,
    )
    return array._getvalue()


def record_at(record: Any) -> Any:
    """The compiled function that takes the address of a record of this NamedTuple and gives the record."""
    kind = RecordType(record)

    @intrinsic
    def at(typing_context, address):
        return kind(types.int64), lambda context, builder, signature, values: values[0]

    return at


@intrinsic
def integers_at(typing_context, address, count):
    """The array of `count` int64 at an address."""
    kind = types.Array(numba.from_dtype(np.dtype(np.int64)), 1, "C")

    def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
        return _array(context, builder, kind, values[0], [values[1]])

    return kind(types.int64, types.int64), codegen
