"""What the names in a pickle of tensors stand for: data of this module, in place of PyTorch's classes and functions.

GLOBALS has exactly the names that a state dict needs. None of them is imported or called: `call` makes of a function's
name and its arguments what the function would describe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from svdengine.errors import quoted, shown

NAME_LIMIT = 1024  # bytes of a name of a module or class, or of the key of a storage

# PyTorch's classes of storages, and the types of their elements by their names in safetensors.
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# Types that have no class of storages: a tensor of them names the type, and its storage counts bytes.
_DTYPES = {
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True)
class Global:
    """A name that a pickle may use: module.name."""

    name: str


@dataclass(frozen=True)
class StorageKind(Global):
    """A class of storages. dtype: of an element, as safetensors names it; U8 where it counts bytes."""

    dtype: str


@dataclass(frozen=True)
class ElementType(Global):
    """A type of elements that has no class of storages."""

    dtype: str


@dataclass(frozen=True)
class PickledStorage:
    """Elements that lie outside the pickle, under `key`."""

    key: str
    dtype: str
    count: int  # elements


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; nothing of it has been checked against the storage."""

    storage: PickledStorage
    dtype: str  # another than that of the storage where that counts bytes
    offset: int  # elements before the first
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements


def brief(value: Any) -> str:
    """A value in an error. Of others the kind alone: a list may hold itself, or be short and mean millions."""
    if isinstance(value, Global):
        return value.name
    if type(value) is tuple and len(value) <= 8 and all(type(item) is int for item in value):
        return str(value)
    return shown(value) if type(value) in (bool, int, float, str, bytes, type(None)) else f"a {type(value).__name__}"


def kind_of(value: Any) -> str:
    """The kind of a value, for an error."""
    return type(value).__name__


def storage_of(value: Any) -> PickledStorage:
    """A storage: ("storage", class, key, device, elements), in old files what it is a part of. Raises ValueError."""
    if type(value) is not tuple or len(value) not in (5, 6) or value[0] != "storage":
        raise ValueError(f"the pickle refers to {brief(value)}, which is no storage")
    _, kind, key, _, count, *view = value
    if not isinstance(kind, StorageKind):
        raise ValueError(f"the pickle has a storage of the class {brief(kind)}")
    if type(key) is not str or len(key) > NAME_LIMIT or not _is_size(count):
        raise ValueError(f"the pickle has a storage {brief(key)} of {brief(count)} elements")
    if view != [] and view != [None]:
        raise ValueError(f"the storage {quoted(key)} is a part of another one, which is not supported")
    return PickledStorage(key, kind.dtype, count)


def call(what: Any, arguments: tuple[Any, ...]) -> Any:
    """What a name makes of arguments. Raises ValueError where it stands for no function, or they do not fit."""
    builder = _BUILDERS.get(what.name) if isinstance(what, Global) else None
    if builder is None:
        raise ValueError(f"the pickle calls {brief(what)}")
    least, most = _ARITY[builder]
    if not least <= len(arguments) <= most:
        raise ValueError(f"the pickle calls {what.name} with {len(arguments)} arguments")
    return builder(*arguments)


def _ordered_dict() -> dict[Any, Any]:
    """collections.OrderedDict, which is filled later."""
    return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
    """torch._utils._rebuild_tensor and _v2: what comes after the strides says nothing of the numbers."""
    if not isinstance(storage, PickledStorage):
        raise ValueError(f"the pickle has a tensor in {kind_of(storage)}, which is no storage")
    if not _is_size(offset) or not _are_sizes(shape) or not _are_sizes(strides) or len(shape) != len(strides):
        raise ValueError(
            f"the pickle has a tensor of shape {brief(shape)} with strides {brief(strides)} from {brief(offset)} on"
        )
    return PickledTensor(storage, storage.dtype, offset, shape, strides)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, kind: Any, *_: Any
) -> PickledTensor:
    """torch._utils._rebuild_tensor_v3, whose storage counts bytes."""
    plain = _tensor(storage, offset, shape, strides)
    if not isinstance(kind, ElementType) or storage.dtype != "U8":
        raise ValueError(f"the pickle has a tensor of the type {brief(kind)}")
    return PickledTensor(storage, kind.dtype, plain.offset, plain.shape, plain.strides)


def _parameter(tensor: Any, *_: Any) -> PickledTensor:
    """torch._utils._rebuild_parameter: a tensor that was trained is a tensor."""
    if not isinstance(tensor, PickledTensor):
        raise ValueError(f"the pickle has a parameter of {kind_of(tensor)}, which is no tensor")
    return tensor


def _of_type(what: Any, kind: Any, arguments: Any, _: Any) -> PickledTensor:
    """torch._tensor._rebuild_from_type_v2: a tensor, and attributes that somebody has hung on it."""
    if kind not in (GLOBALS["torch.Tensor"], GLOBALS["torch.nn.parameter.Parameter"]) or type(arguments) is not tuple:
        raise ValueError(f"the pickle has a tensor of the class {brief(kind)}")
    return _parameter(call(what, arguments))


def _size(dimensions: Any) -> tuple[int, ...]:
    """torch.Size."""
    if type(dimensions) not in (list, tuple) or len(dimensions) > 8:
        raise ValueError(f"the pickle has a size of {kind_of(dimensions)}, expected up to 8 numbers")
    return tuple(dimensions)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _are_sizes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 8 and all(map(_is_size, values))


_BUILDERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered_dict,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _typed_tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._tensor._rebuild_from_type_v2": _of_type,
        "torch.Size": _size,
    }
)
_ARITY: Mapping[Callable[..., Any], tuple[int, int]] = MappingProxyType(
    {_ordered_dict: (0, 0), _tensor: (4, 7), _typed_tensor: (7, 8), _parameter: (2, 4), _of_type: (4, 4), _size: (1, 1)}
)
GLOBALS: Mapping[str, Global] = MappingProxyType(
    {
        **{name: Global(name) for name in (*_BUILDERS, "torch.Tensor", "torch.nn.parameter.Parameter")},
        **{f"torch.{name}": StorageKind(f"torch.{name}", dtype) for name, dtype in _STORAGES.items()},
        "torch.storage.UntypedStorage": StorageKind("torch.storage.UntypedStorage", "U8"),
        **{f"torch.{name}": ElementType(f"torch.{name}", dtype) for name, dtype in _DTYPES.items()},
    }
)
