"""Records: how a NamedTuple of numbers and arrays lies in memory for compiled code, in slots of 8 bytes.

An int is itself, a float a double, a bool 0 or 1. An array is its address, then its shape: it must be C-contiguous, and
outlive the record. Compiled code gets a record's address and reads what it needs (record_type.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Field:
    """One field of a record."""

    slot: int  # the first of its slots
    kind: type  # int, float, bool, or np.ndarray
    dtype: np.dtype[Any] | None = None  # of an array
    dimensions: int = 0


@cache
def fields_of(record: type[NamedTuple]) -> dict[str, Field]:
    """The fields of a NamedTuple, from its annotations; those of arrays are Annotated[NDArray[dtype], dimensions]."""
    fields, slot = {}, 0
    for name, hint in get_type_hints(record, include_extras=True).items():
        field = Field(slot, hint)
        if get_origin(hint) is Annotated:
            array, dimensions = get_args(hint)
            (dtype,) = get_args(get_args(array)[1])
            field = Field(slot, np.ndarray, np.dtype(dtype), dimensions)
        fields[name] = field
        slot += 1 + field.dimensions
    return fields


def packed(record: Any) -> NDArray[np.int64]:
    """The slots of a NamedTuple. Raises ValueError for an array that is not what its annotation says."""
    kind: Any = type(record)
    fields = fields_of(kind)
    slots = np.zeros(sum(1 + field.dimensions for field in fields.values()), np.int64)
    for name, field in fields.items():
        value = getattr(record, name)
        if field.kind is np.ndarray:
            if value.dtype != field.dtype or value.ndim != field.dimensions or not value.flags.c_contiguous:
                expected = f"{field.dtype} of {field.dimensions} dimensions"
                raise ValueError(f"{name}: found {value.dtype} {value.shape}, expected {expected}, contiguous")
            slots[field.slot] = value.ctypes.data
            slots[field.slot + 1 : field.slot + 1 + field.dimensions] = value.shape
        elif field.kind is float:
            slots[field.slot : field.slot + 1].view(np.float64)[0] = value
        else:
            slots[field.slot] = int(value)
    return slots
